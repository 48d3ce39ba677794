"""Run checkpoints in PyTorch, as the reference of parity."""
