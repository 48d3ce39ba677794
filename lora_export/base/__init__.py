"""Read bases, into which adapters go: also what the names and shapes of their tensors don't tell."""
