"""Run a graph with ONNX Runtime (`ort_model`) or an engine with TensorRT (`tensorrt`).

A user calls `session` and `engine_session`. A runtime takes named tensors; it knows no adapter format.
"""
