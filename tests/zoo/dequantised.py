"""Read MatMulNBits and GatherBlockQuantized as ONNX Runtime's ``ContribOperators.md`` defines them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Decoded:
    """A quantised weight.

    Attributes:
        node: Its reader.
        values: Values of its codes, float64 ``(N, K)``.
        steps: Difference between neighbouring codes of each value.
    """

    node: onnx.NodeProto
    values: Array
    steps: Array


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from all_graphs(attribute.g)


def constants(model: onnx.ModelProto) -> dict[str, Array]:
    tensors = [tensor for graph in all_graphs(model.graph) for tensor in graph.initializer]
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}


def decoded(path: Path) -> dict[str, Decoded]:
    """Return name of the codes → what they stand for, of all readers in a file."""
    model = onnx.load(path)
    held = constants(model)
    found = {}
    for graph in all_graphs(model.graph):
        for node in graph.node:
            if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
                found[node.input[0 if node.op_type.startswith("Gather") else 1]] = _decoded(node, held)
    return found


def _decoded(node: onnx.NodeProto, held: dict[str, Array]) -> Decoded:
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    table = node.op_type == "GatherBlockQuantized"
    packed = held[node.input[0 if table else 1]]
    bits, block = given["bits"], given["block_size"]
    rows = len(packed)
    columns = packed.reshape(rows, -1).shape[1] * 8 // bits if table else given["K"]
    scales = held[node.input[2]].reshape(rows, -1).astype(np.float64)
    blocks = scales.shape[1]
    zeros = np.full((rows, blocks), 2.0 ** (bits - 1))
    if len(node.input) > 3 and node.input[3]:
        points = held[node.input[3]]
        zeros = split(points.reshape(rows, -1), bits)[:, :blocks] if points.dtype == np.uint8 else points
        zeros = zeros.reshape(rows, blocks).astype(np.float64)
    codes = split(packed.reshape(rows, -1), bits).astype(np.float64)
    spread = [np.repeat(values, block, 1)[:, :columns] for values in (zeros, scales)]
    return Decoded(node, (codes[:, :columns] - spread[0]) * spread[1], np.abs(spread[1]))


def split(packed: Array, bits: int) -> Array:
    """Return 8-bit codes, or 4-bit ones of which the lower half of a byte is the first."""
    if bits == 8:
        return packed
    codes = np.zeros((len(packed), packed.shape[1] * 2), np.uint8)
    codes[:, 0::2], codes[:, 1::2] = packed % 16, packed // 16
    return codes


def as_floats(path: Path, out: Path) -> Path:
    """Write a quantised graph with MatMul and Gather of the values of its codes in float32."""
    model, found = onnx.load(path), decoded(path)
    for graph in all_graphs(model.graph):
        for node in graph.node:
            if node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
                continue
            table = node.op_type == "GatherBlockQuantized"
            values = found[node.input[0 if table else 1]].values
            name = f"{node.output[0]}.values"
            weight = values if table else values.T
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(weight, np.float32), name))
            inputs = [name, node.input[1]] if table else [node.input[0], name]
            node.CopyFrom(
                helper.make_node("Gather" if table else "MatMul", inputs, list(node.output), node.name)
            )
    onnx.save(model, out)
    return out
