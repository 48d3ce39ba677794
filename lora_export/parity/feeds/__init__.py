"""The inputs of a parity check: made, read, and what they cover."""
