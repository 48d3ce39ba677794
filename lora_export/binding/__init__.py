"""An adapter, turned into the tensors of a graph with exposed LoRA."""
