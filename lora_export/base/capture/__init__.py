"""A checkpoint folder or a model in memory, captured as a graph."""
