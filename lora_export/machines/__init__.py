"""GPUs as data, and what this machine has: its GPUs, packages and environment."""
