"""How results are read: a file a measure."""
