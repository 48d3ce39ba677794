"""Shapes of scales and zero points beside what they scale (ONNX ``Operators.md``, DequantizeLinear).

A runtime refuses a graph in which they don't fit. Here they are spread over the values, and what a stranger's
file says of them must not decide how much memory that takes.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

_OPERATORS = ("DequantizeLinear", "QuantizeLinear")
_NAMES = {1: "scale", 2: "zero point"}


def scale_problems(model: ir.Model) -> Iterator[str]:
    """Yield every constant scale and zero point that doesn't fit what its node quantises."""
    for node in model.graph.all_nodes():
        if node.op_type in _OPERATORS:
            held = _shape(node, 0)
            for index, name in _NAMES.items():
                found = _constant_shape(node, index)
                if held is not None and found is not None and not _fits(node, held, found):
                    yield f"{name} of {_named(node)}: {list(found)} beside values of {list(held)}"
            scale, zero = _constant_shape(node, 1), _constant_shape(node, 2)
            if scale is not None and zero is not None and scale != zero and not _is_one(scale, zero):
                yield f"zero point of {_named(node)}: {list(zero)} beside a scale of {list(scale)}"


def _fits(node: ir.Node, held: tuple[int, ...], found: tuple[int, ...]) -> bool:
    """Return whether a scale is one number, one for each place on an axis, or one for each block along it."""
    if _is_one(found):
        return True
    axis = node.attributes.get_int("axis", 1)
    if not -len(held) <= axis < len(held):
        return False
    axis %= len(held)
    if len(found) == 1:
        return found[0] == held[axis]
    others = [size for position, size in enumerate(found) if position != axis]
    if len(found) != len(held) or others != [size for at, size in enumerate(held) if at != axis]:
        return False
    block = node.attributes.get_int("block_size", 0) or -(-held[axis] // max(found[axis], 1))
    return block > 0 and found[axis] == -(-held[axis] // block)


def _is_one(*shapes: tuple[int, ...]) -> bool:
    return all(size == 1 for shape in shapes for size in shape)


def _shape(node: ir.Node, index: int) -> tuple[int, ...] | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return None
    if value.const_value is not None:
        return tuple(int(size) for size in value.const_value.shape.numpy())
    sizes = () if value.shape is None else tuple(value.shape)
    known = tuple(size for size in sizes if isinstance(size, int))
    return known if value.shape is not None and len(known) == len(sizes) else None


def _constant_shape(node: ir.Node, index: int) -> tuple[int, ...] | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None or value.const_value is None else _shape(node, index)


def _named(node: ir.Node) -> str:
    return f"{node.op_type} {node.name or node.outputs[0].name}"
