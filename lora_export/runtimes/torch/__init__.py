"""PyTorch, as the reference."""
