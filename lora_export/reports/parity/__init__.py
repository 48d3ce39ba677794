"""What `parity` shows, writes and asserts."""
