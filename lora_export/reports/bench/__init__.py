"""What `bench` shows."""
