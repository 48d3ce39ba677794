"""Find weights by their values, and compare them with a checkpoint's."""
