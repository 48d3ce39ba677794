"""Read a folder of weights: its config, names and tensors."""
