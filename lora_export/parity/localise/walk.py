"""Find the output value of a module from its operator: after its branch and its bias."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.graph.nodes import NodeWriter, model_names
from lora_export.graph.onnx_file import GraphFile
from lora_export.modes.branches.calls import Call
from lora_export.sites import operator_named
from lora_export.sites.operand import PASSED, SHAPE_ONLY

# Names of the nodes that `branches.attach` adds after a product.
_ATTACHED = re.compile(r"\.lora\.(sum|scaled|biased)(\.\d+)?\.\w+$")
_BY_GEMM = re.compile(r"\.lora\.(base|up)(\.\d+)?\.(Flatten|Gemm)$")
_BIAS_SUM = re.compile(r"\.lora\.(bias|joined)(\.\d+)?\.Add$")
# Input number of the bias in operators that add one to their input, and then compute more.
_FUSED_BIAS = {
    "BiasGelu": 1,
    "FastGelu": 1,
    "BiasAdd": 1,
    "SkipSimplifiedLayerNormalization": 3,
    "SkipLayerNormalization": 4,
}
_STEPS = 8


@dataclass(frozen=True, eq=False)
class Tap:
    """A value of the graph, or some of its columns, and a bias that the graph adds later.

    Attributes:
        value: The value.
        columns: Range along its last axis; None for all.
        bias: Bias to add, or None.
    """

    value: ir.Value
    columns: tuple[int, int] | None = None
    bias: Array | None = None


class ModuleWalker:
    """Find the outputs of modules.

    Args:
        graph: The graph; an operator that hides a product gets an added node that computes it openly.
    """

    def __init__(self, graph: GraphFile) -> None:
        self._write = NodeWriter(model_names(graph.model))
        self._opened: dict[int, tuple[ir.Value, bool]] = {}

    def output(self, call: Call, start: int, stop: int, path: str) -> Tap:
        """Return the output of a module whose product is columns ``start`` to ``stop`` of a call's output."""
        value, biased = self._product(call, path)
        tap = Tap(value, None if (start, stop) == (0, call.width) else (start, stop))
        width = call.width
        for _ in range(_STEPS):
            following = _attached(tap.value) or None
            if following is not None:
                tap = replace(tap, value=following)
            elif tap.columns is not None and (cut := _cut(tap)) is not None:
                tap, width = cut
            elif not biased and (following := _with_bias(tap.value, width)) is not None:
                tap, biased = replace(tap, value=following), True
            else:
                break
        return tap if biased else replace(tap, bias=_bias_later(tap, width))

    def _product(self, call: Call, path: str) -> tuple[ir.Value, bool]:
        """Return the product, and True if it contains a bias already."""
        node = call.node
        operator = operator_named(node.op_type)
        if node.op_type == "Attention" or (operator and operator.without_activation):
            if id(node) not in self._opened:
                self._opened[id(node)] = self._open(call, path)
            return self._opened[id(node)]
        index = operator.bias if operator else None
        has_bias = index is not None and len(node.inputs) > index and node.inputs[index] is not None
        return node.outputs[0], has_bias

    def _open(self, call: Call, path: str) -> tuple[ir.Value, bool]:
        """Return an operator's projection before its attention or activation, computed by added nodes."""
        node, name = call.node, f"{path}.lora_probe"
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if node.op_type == "Attention":
            value = self._write.add(node, "MatMul", node.inputs[:2], name, dtype=call.dtype)
        else:
            keep = {
                key: attribute.value
                for key, attribute in node.attributes.items()
                if not key.startswith("activation")
            }
            known = operator_named(node.op_type)
            assert known is not None
            value = self._write.add(
                node, known.without_activation, node.inputs[:3], name, dtype=call.dtype, attributes=keep
            )
            bias = node.inputs[3] if len(node.inputs) > 3 else None
        if bias is not None:
            value = self._write.add(node, "Add", [value, bias], f"{name}.sum", dtype=call.dtype)
        return value, True


def _attached(value: ir.Value) -> ir.Value | None:
    """Return the sum of a value with the module's branches, or None if no branch reads it."""
    for usage in value.uses():
        node = usage.node
        if _ATTACHED.search(node.name or "") or (
            _BY_GEMM.search(node.name or "") and _continues(node, value)
        ):
            return node.outputs[0]
    return None


def _continues(node: ir.Node, value: ir.Value) -> bool:
    """Return True for a Flatten, and for a Gemm that the product is added to."""
    return node.op_type == "Flatten" or (len(node.inputs) > 2 and node.inputs[2] is value)


def _cut(tap: Tap) -> tuple[Tap, int] | None:
    """Return the output of a Split that holds the columns, and its width, or None."""
    assert tap.columns is not None
    start, stop = tap.columns
    for usage in tap.value.uses():
        node = usage.node
        sizes = node.inputs[1] if node.op_type == "Split" and len(node.inputs) > 1 else None
        if sizes is None or sizes.const_value is None or node.attributes.get_int("axis", 0) == 0:
            continue
        at = 0
        for output, size in zip(node.outputs, sizes.const_value.numpy().tolist(), strict=False):
            if at <= start and stop <= at + size:
                whole = (start, stop) == (at, at + size)
                return Tap(output, None if whole else (start - at, stop - at)), size
            at += size
    return None


def _with_bias(value: ir.Value, width: int) -> ir.Value | None:
    """Return the sum with a bias that an Add after the product computes, or None."""
    readers = [usage for usage in value.uses() if usage.node.op_type not in SHAPE_ONLY]
    if len(readers) != 1 or readers[0].node.op_type != "Add":
        return None
    add = readers[0].node
    other = add.inputs[1 - readers[0].idx]
    if other is None:
        return None
    maker = other.producer()
    if maker is not None and _BIAS_SUM.search(maker.name or ""):
        return add.outputs[0]
    bias = _vector(other)
    return add.outputs[0] if bias is not None and len(bias) == width else None


def _bias_later(tap: Tap, width: int) -> Array | None:
    """Return a bias that a fused operator after the product adds, or None."""
    readers = [usage for usage in tap.value.uses() if usage.node.op_type not in SHAPE_ONLY]
    if len(readers) != 1:
        return None
    node, index = readers[0].node, readers[0].idx
    place = _FUSED_BIAS.get(node.op_type)
    if place is not None and index < place and len(node.inputs) > place:
        bias = _vector(node.inputs[place])
        if bias is not None and len(bias) == width:
            return bias if tap.columns is None else bias[slice(*tap.columns)]
    if node.op_type == "MultiHeadAttention" and index < 3 and len(node.inputs) > 3:
        # One bias for query, key and value, in this order; the value's width may be another.
        bias = _vector(node.inputs[3])
        if bias is not None and tap.columns is None:
            return bias[-width:] if index == 2 else bias[index * width : (index + 1) * width]
    return None


def _vector(value: ir.Value | None) -> Array | None:
    """Return the values of a constant vector, through Cast and Identity, or None."""
    while value is not None and value.const_value is None:
        maker = value.producer()
        if maker is None or maker.op_type not in PASSED:
            return None
        value = maker.inputs[0]
    if value is None or value.const_value is None or len(value.const_value.shape) != 1:
        return None
    found: Array = np.asarray(value.const_value.numpy())
    return found


def tap_values(tap: Tap, values: Mapping[str, Array], axis: int) -> Array:
    """Return a tap's values.

    Args:
        tap: The tap.
        values: Name of a graph value → its values.
        axis: Axis of the output channels.
    """
    found = values[str(tap.value.name)]
    if tap.columns is not None:
        found = np.take(found, range(*tap.columns), axis=axis)
    return found if tap.bias is None else found + tap.bias.astype(found.dtype)
