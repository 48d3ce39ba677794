"""Estimate the memory of an engine before it is built."""
