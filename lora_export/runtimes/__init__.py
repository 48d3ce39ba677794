"""Run a graph: `ort` with ONNX Runtime. A runtime takes named tensors; it knows no adapter format."""
