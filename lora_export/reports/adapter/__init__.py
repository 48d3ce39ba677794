"""Measure and show an adapter, for `inspect`."""
