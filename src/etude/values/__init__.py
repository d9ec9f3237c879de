"""What flows: corpora, models, generators, measurements."""
