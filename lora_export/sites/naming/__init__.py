"""Read and change the names of parameters."""
