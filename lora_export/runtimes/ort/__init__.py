"""Run graphs with ONNX Runtime."""
