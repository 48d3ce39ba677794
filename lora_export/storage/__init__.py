"""Store weights: values, files, hashes and commits."""
