"""Capture a checkpoint folder or a model in memory as a graph."""
