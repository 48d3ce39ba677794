"""What `inspect` shows of an adapter."""
