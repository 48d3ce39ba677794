"""Prepare a graph for a TensorRT parser: check it, and change what the parser would misread."""
