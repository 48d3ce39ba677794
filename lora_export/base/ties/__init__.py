"""Find parameters that share one weight, and the changes that reach them."""
