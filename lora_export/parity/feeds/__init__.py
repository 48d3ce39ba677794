"""Make and read the inputs of a parity check, and measure what they cover."""
