"""Open and run the two sides of parity: candidate and reference."""
