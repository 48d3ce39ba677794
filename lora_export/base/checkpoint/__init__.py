"""A folder of weights and what its config, names and tensors say."""
