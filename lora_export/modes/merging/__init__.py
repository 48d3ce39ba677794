"""Merge adapters into graphs and checkpoints."""
