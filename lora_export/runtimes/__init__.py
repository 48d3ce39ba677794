"""Run graphs in ONNX Runtime (`ort`), engines in TensorRT (`tensorrt`), checkpoints in PyTorch (`torch`).

Users call `session.AdapterSession` and `tensorrt.session.EngineSession`. A runtime takes named tensors; it
knows no adapter format.
"""
