"""SEAM: write the files that a server needs in its folder, with the graph."""
