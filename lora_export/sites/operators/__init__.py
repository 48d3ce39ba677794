"""One file per operator that reads a weight."""
