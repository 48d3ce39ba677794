"""GPUs as data, and what this machine has."""
