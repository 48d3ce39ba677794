"""How much memory an engine takes, told before it is built."""
