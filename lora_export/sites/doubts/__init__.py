"""What speaks against a place that was found."""
