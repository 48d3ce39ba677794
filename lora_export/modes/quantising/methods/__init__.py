"""Quantisers of one weight, one in each file; each calls the function that ONNX Runtime's own tool calls."""
