"""SEAM: what a server wants in its folder beside the graph."""
