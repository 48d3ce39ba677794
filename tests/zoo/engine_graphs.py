"""Graphs that engines are built from, and what the command line says."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from lora_export import bank_onnx, merge_onnx, swap_onnx
from lora_export.cli import main

SMALL = {"batch": "1:1:2", "sequence": "1:4:16"}


def made(mode, arch, folder, **options):
    """Write a graph of one of the modes; return its path and LoRA record."""
    import tiny  # with torch: the others are for small processes as well

    base, out = tiny.base_onnx(arch, "dynamo"), folder / "m.onnx"
    if arch == "conv":
        options["checkpoint"] = tiny.checkpoint(arch)
    if mode == "merge":
        merge_onnx(base, tiny.adapter(arch), out, **options)
        return out, None
    if mode == "swap":
        report = swap_onnx(base, out, adapter=tiny.adapter(arch), **options)
    else:
        named = {"a": tiny.adapter(arch), "b": tiny.adapter(arch, "patterns", 1)}
        report = bank_onnx(base, named, out, **options)
    return out, report.exposed


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return stop.value.code, said.out, said.err


def graph_of(path, nodes, inputs, outputs, initializers=(), opset=20):
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(initializers))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save(model, path)
    return path


def value(name, dims, dtype=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, dtype, dims)


def product(path, dims=("batch", 4), dtype=TensorProto.FLOAT):
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    weight = helper.make_tensor("w", dtype, [4, 4], np.ones((4, 4), kind).tobytes(), raw=True)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    return graph_of(path, [node], [value("x", dims, dtype)], [value("y", dims, dtype)], [weight])
