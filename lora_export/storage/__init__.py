"""Bytes of weights: how values are stored."""
