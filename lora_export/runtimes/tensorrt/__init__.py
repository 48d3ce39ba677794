"""Run engines with TensorRT and TensorRT-RTX."""
