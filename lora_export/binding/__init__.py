"""Turn an adapter into the tensors of a graph with exposed LoRA."""
