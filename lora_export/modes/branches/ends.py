"""Find where a branch is added to the product of a quantised module: after the rounding, if possible.

A statically quantised graph rounds every product to a range that was measured without an adapter, and cuts
off values beyond it. Measured on a two-layer network whose adapter is as large as the base: 9–13 % of the
effect is left if the branch is added before the QuantizeLinear.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import onnx_ir as ir

from lora_export.sites.operand import DEQUANTIZE, constant_behind
from lora_export.sites.values.ranges import is_fixed, may_hold_activation


class _Reader(NamedTuple):
    node: ir.Node
    idx: int


@dataclass(frozen=True, eq=False)
class End:
    """Value that is the product, up to rounding and the module's own bias.

    Attributes:
        value: The value.
        readers: Readers of the value that will read the sum.
        is_output: True if it is an output of the graph, which becomes the sum.
    """

    value: ir.Value
    readers: tuple[_Reader, ...]
    is_output: bool


def ends_of(product: ir.Value, dtype: ir.DataType, *, past_bias: bool) -> list[End]:
    """Return the values whose readers will read the sum instead of a product.

    Args:
        product: The result of a call.
        dtype: Dtype of the result.
        past_bias: The branch is not scaled afterwards, so that it may come after the bias as well.
    """
    found = _ways_from(product, dtype, past_bias=past_bias)
    has_ends, goes_on = set[int](), set[int]()
    # From the last values on: a stranger's graph may have any number of sums behind one another.
    for way in reversed(found.values()):
        for _, behind, is_bias in way.steps:
            # Without a quantiser after it the bias stays last, see `write`.
            if is_bias and id(behind[0]) not in goes_on:
                behind.clear()
            if any(id(value) in has_ends for value in behind):
                goes_on.add(id(way.value))
        is_read = any(not behind for _, behind, _ in way.steps)
        if is_read or way.value.is_graph_output() or id(way.value) in goes_on:
            has_ends.add(id(way.value))
    return list(_ends(found, product))


class _Way(NamedTuple):
    """A value; its readers, the values behind each (none: it reads the sum), and if it adds a bias."""

    value: ir.Value
    steps: list[tuple[_Reader, list[ir.Value], bool]]


def _ways_from(product: ir.Value, dtype: ir.DataType, *, past_bias: bool) -> dict[int, _Way]:
    """Return the ways on from a product, each value in front of those behind it."""
    found: dict[int, _Way] = {}
    pending = [product]
    while pending:
        way = _Way(pending.pop(), [])
        found[id(way.value)] = way
        for usage in (_Reader(*used) for used in way.value.uses()):
            behind, is_bias = _behind_rounding(usage, dtype), False
            if not behind and past_bias:
                behind = _behind_bias(usage, dtype)
                is_bias = bool(behind)
            way.steps.append((usage, behind, is_bias))
            pending += behind
    return found


def _ends(found: dict[int, _Way], product: ir.Value) -> Iterator[End]:
    pending = [product]
    while pending:
        way = found[id(pending.pop())]
        inner = tuple(usage for usage, behind, _ in way.steps if not behind)
        if inner or way.value.is_graph_output():
            yield End(way.value, inner, way.value.is_graph_output())
        pending += reversed([value for _, behind, _ in way.steps for value in behind])


def _behind_rounding(usage: _Reader, dtype: ir.DataType) -> list[ir.Value]:
    """Return the floats after a quantiser whose range is fixed, or nothing if the sum can't go there."""
    node = usage.node
    if usage.idx != 0 or not is_fixed(node) or may_hold_activation(node):
        return []
    codes, found = node.outputs[0], []
    for reader in codes.uses():
        scale = reader.node.inputs[1] if len(reader.node.inputs) > 1 else None
        if reader.node.op_type not in DEQUANTIZE or reader.idx != 0 or scale is None or scale.dtype != dtype:
            return []
        found.append(reader.node.outputs[0])
    return [] if codes.is_graph_output() else found


def _behind_bias(usage: _Reader, dtype: ir.DataType) -> list[ir.Value]:
    """Return the sum of the product and a constant vector."""
    node = usage.node
    if node.op_type != "Add" or node.domain != "":
        return []
    other = constant_behind(node.inputs[1 - usage.idx])
    tensor = other.const_value if other is not None else None
    return [node.outputs[0]] if tensor is not None and len(tensor.shape) == 1 else []
