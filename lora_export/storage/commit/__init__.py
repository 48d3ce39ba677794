"""Give a set of files its names: reversible steps, a lock, and the handling of files left by ended runs."""
