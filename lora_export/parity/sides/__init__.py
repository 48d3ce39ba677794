"""What is compared: candidate and reference."""
