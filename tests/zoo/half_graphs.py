"""Graphs of one product in 16 bits, and an adapter for them."""

import numpy as np
import onnx_ir as ir

from lora_export import Adapter, LoraModule, save_adapter


def half_graph(path, dtype):
    """Write ``y = x @ W`` with W of 64 × 64 in a 16-bit type."""
    values = np.linspace(-1, 1, 64 * 64).reshape(64, 64).astype(dtype)
    kind = ir.DataType.from_numpy(values.dtype)
    weight = ir.Value(
        name="fc.weight", shape=ir.Shape((64, 64)), type=ir.TensorType(kind), const_value=ir.tensor(values)
    )
    x = ir.Input("x", ir.Shape(("batch", 64)), ir.TensorType(kind))
    node = ir.node("MatMul", [x, weight], name="/fc/MatMul")
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 20}, name="g")
    node.outputs[0].name = "y"
    node.outputs[0].type = ir.TensorType(kind)
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


def small_adapter(folder, size=1.0):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(4, 64)).astype(np.float32)
    b = (size * rng.normal(size=(64, 4))).astype(np.float32)
    module = LoraModule("fc", "linear", a, b, alpha=4, rank=4, tensor_names=("a", "b"))
    adapter = Adapter("a", "a", "peft", {module.key: module}, tensor_names=("a", "b"))
    return save_adapter(adapter, folder), module
