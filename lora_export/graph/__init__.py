"""The ONNX file, its data and its metadata."""
