"""Where the batch's rows lie in a graph's values."""
