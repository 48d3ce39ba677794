"""Weights found and held against values."""
