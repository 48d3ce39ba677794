"""Follow the batch's rows through a graph's values."""
