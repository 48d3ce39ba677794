"""Hashes over whole files, and files that hold their own."""
