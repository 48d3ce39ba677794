"""Add LoRA tensors to a graph: as inputs, with or without a default, or as constants."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.binding.cast import dtype_of
from lora_export.graph.exposed import ExposedModule
from lora_export.graph.onnx_file import GraphFile


def ir_type(module: ExposedModule) -> ir.DataType:
    """Return the type of a module's tensors."""
    return ir.DataType.from_numpy(dtype_of(module.dtype))


def add_input(
    graph: GraphFile, name: str, dims: Sequence[int | str], dtype: ir.DataType, default: Array | None
) -> ir.Value:
    """Add a graph input; with a default it is an initializer of the same name as well."""
    value = ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype))
    graph.graph.inputs.append(value)
    if default is not None:
        value.const_value = ir.tensor(default.astype(dtype.numpy(), copy=False), name=name)
        graph.graph.register_initializer(value)
    return value


def add_initializer(graph: GraphFile, name: str, values: Array) -> ir.Value:
    """Add a constant."""
    tensor = ir.tensor(values, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.graph.register_initializer(value)
    return value
