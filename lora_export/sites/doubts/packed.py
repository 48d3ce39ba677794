"""Tell by the nodes behind a pack's product whether its parts lie one after the other in their names' order.

A builder's ``gate_up_proj`` is gate_proj, then up_proj, and its ``qkv_proj`` q, k, v. A name alone doesn't
say so, and a graph may hold them otherwise. What can be seen:

1. A Reshape makes several axes of the outputs, and they are cut along a later one than the first: the parts
   lie within each other.
2. Of two halves only the second goes through an activation: it is the gate.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from lora_export.sites import fit
from lora_export.sites.operand import Use
from lora_export.sites.target import Site

# Nodes behind a product that leave the outputs where they are.
_KEPT = {"Add", "Cast", "Identity", "QuantizeLinear", "DequantizeLinear"}
_ACTIVATIONS = {
    *(
        "BiasGelu",
        "Elu",
        "Erf",
        "FastGelu",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Mish",
        "QuickGelu",
    ),
    *("Relu", "Selu", "Sigmoid", "Softplus", "Swish", "Tanh"),
}
_DEPTH = 6


def other_order(site: Site, count: int) -> str:
    """Return the reason why a pack's parts don't lie in the order of its name, or "".

    Args:
        site: Site of one part of the pack, found by its name.
        count: Number of parts.
    """
    for part in site.parts:
        for use in part.uses:
            if reason := _reason(use, _height(site, use), count):
                return f"the pack {part.root.name!r} is not cut in the order of its name: {reason}"
    return ""


def _height(site: Site, use: Use) -> int:
    rows, cols = fit.stored_shape(site.target, use)
    return cols if use.transposed else rows


def _reason(use: Use, height: int, count: int) -> str:
    value = use.node.outputs[0]
    for _ in range(_DEPTH):
        readers = list(_readers(value))
        if len(readers) != 1 or readers[0].op_type not in _KEPT:
            break
        value = readers[0].outputs[0]
    halves: dict[int, ir.Value] = {}
    for node in _readers(value):
        if node.op_type == "Reshape":
            if reason := _within(node, height):
                return reason
            halves |= _along_axis(node, height) if count == 2 else {}
        if node.op_type == "Split" and _is_last(node, value) and len(node.outputs) == count == 2:
            halves = dict(enumerate(node.outputs))
        if node.op_type == "Slice" and count == 2 and (start := _start(node)) in (0, height // 2):
            halves[int(start != 0)] = node.outputs[0]
    activated = {number: name for number, half in halves.items() if (name := _activation(half))}
    if len(halves) == 2 and list(activated) == [1]:
        return f"its second half goes through {activated[1]}, the first does not"
    return ""


def _within(node: ir.Node, height: int) -> str:
    """Apply rule 1 to a Reshape of the product."""
    shape, tail = _numbers(node.inputs[1]), _tail(node, height)
    for reader in _readers(node.outputs[0]) if tail else ():
        axis = _cut(reader, len(shape))
        if axis is not None and axis > len(shape) - len(tail):
            return f"{reader.op_type} cuts its outputs along axis {axis} of {tuple(shape)}"
    return ""


def _along_axis(node: ir.Node, height: int) -> dict[int, ir.Value]:
    """Return the halves that are taken from an axis of two that a Reshape makes."""
    shape, tail = _numbers(node.inputs[1]), _tail(node, height)
    halves: dict[int, ir.Value] = {}
    for reader in _readers(node.outputs[0]) if tail[:1] == [2] else ():
        if _cut(reader, len(shape)) != len(shape) - len(tail):
            continue
        if reader.op_type == "Split" and len(reader.outputs) == 2:
            halves |= dict(enumerate(reader.outputs))
        elif reader.op_type == "Gather" and len(index := _numbers(reader.inputs[1])) == 1:
            halves[index[0] % 2] = reader.outputs[0]
    return halves


def _tail(node: ir.Node, height: int) -> list[int]:
    """Return the sizes that a Reshape gives to the outputs; none if they stay one axis, or it doesn't say."""
    shape = _numbers(node.inputs[1])
    tail: list[int] = []
    for size in reversed(shape):
        product = int(np.prod(tail, dtype=np.int64))
        if product >= height or (size < 1 and size != -1):
            break
        # An open axis holds the rest of the outputs.
        tail.insert(0, height // product if size == -1 else size)
    return tail if len(tail) > 1 and int(np.prod(tail, dtype=np.int64)) == height else []


def _cut(node: ir.Node, rank: int) -> int | None:
    """Return the axis along which a node cuts a value."""
    axes: list[int] = []
    if node.op_type in ("Split", "Gather"):
        axes = [node.attributes.get_int("axis", 0)]
    elif node.op_type == "Slice" and len(node.inputs) > 3:
        axes = _numbers(node.inputs[3])
    return axes[0] % rank if len(axes) == 1 else None


def _is_last(node: ir.Node, value: ir.Value) -> bool:
    axis = node.attributes.get_int("axis", 0)
    return axis == -1 or (value.shape is not None and axis == len(value.shape) - 1)


def _start(node: ir.Node) -> int | None:
    """Return where a Slice of the last axis begins."""
    starts, axes = (_numbers(node.inputs[n]) if len(node.inputs) > n else [] for n in (1, 3))
    source = node.inputs[0]
    rank = len(source.shape) if source is not None and source.shape is not None else None
    is_last = len(axes) == 1 and (axes[0] == -1 or (rank is not None and axes[0] == rank - 1))
    return starts[0] if is_last and len(starts) == 1 else None


def _activation(half: ir.Value, depth: int = 3) -> str:
    """Return the activation that a value goes into, perhaps times a number; "" if there is none."""
    for node in _readers(half):
        if node.op_type in _ACTIVATIONS:
            return node.op_type
        is_scaled = node.op_type in ("Mul", "Div") and any(
            one is not None and one.const_value is not None for one in node.inputs
        )
        if (
            depth
            and (is_scaled or node.op_type == "Cast")
            and (name := _activation(node.outputs[0], depth - 1))
        ):
            return name
    return ""


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    return (use.node for use in value.uses())


def _numbers(value: ir.Value | None) -> list[int]:
    if value is None or value.const_value is None or value.const_value.size > _DEPTH:
        return []
    return [int(number) for number in np.asarray(value.const_value.numpy()).reshape(-1)]
