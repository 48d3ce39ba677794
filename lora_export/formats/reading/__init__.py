"""What the formats of adapters have in common: files, pairs, configs."""
