"""What a graph goes through before a TensorRT parser sees it."""
