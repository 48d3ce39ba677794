"""Describe operators that read a weight, one in each file."""
