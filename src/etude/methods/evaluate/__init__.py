"""What models answer, and which questions are worth asking."""
