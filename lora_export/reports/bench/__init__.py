"""Show the results of `bench`."""
