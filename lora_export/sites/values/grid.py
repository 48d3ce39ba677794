"""Measure how much of a change the grid of QuantizeLinear and DequantizeLinear after a float weight keeps.

Quantisation-aware training and ModelOpt leave the weight a float and round it in the graph. A merge adds to
the float; the grid, calibrated for the base's weight, stays as it is: values beyond its range are cut off.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.sites.operand import QUANTIZE, Use
from lora_export.sites.values.ranges import code_range, code_type


@dataclass(frozen=True)
class Loss:
    """Loss of a change ΔW by a grid.

    Attributes:
        beyond: Share of the changed values that are beyond the grid's range, but were not before.
        cut: ‖W − W within the range‖ / ‖ΔW‖, less what the base itself lost so.
        error: ‖grid(W0 + ΔW) − grid(W0) − ΔW‖ / ‖ΔW‖, rounding included.
        node: Name of the QuantizeLinear.
    """

    beyond: float
    cut: float
    error: float
    node: str


def quantisers(use: Use) -> list[ir.Node]:
    """Return the nodes on a weight's way that round it."""
    return [node for node in use.chain if node.op_type in QUANTIZE]


def loss_of(use: Use, before: Array, after: Array) -> Loss:
    """Return the loss of a weight's change by the grid on its way.

    Args:
        use: The way, with one of `quantisers` on it.
        before: The stored values.
        after: The merged values, of the same shape.
    """
    (node, *_) = quantisers(use)
    for passed in use.chain[: use.chain.index(node)]:
        if passed.op_type == "Transpose":
            order = list(passed.attributes.get_ints("perm", ())) or None
            before, after = before.transpose(order), after.transpose(order)
    low, high = code_range(code_type(node))
    step, zero = per_value(node, 1, before.shape), per_value(node, 2, before.shape)
    old, new = (values.astype(np.float64) for values in (before, after))
    inside = [np.clip(values, (low - zero) * step, (high - zero) * step) for values in (old, new)]
    lost = (new - inside[1]) - (old - inside[0])
    error = _rounded(node, inside[1], step, zero) - _rounded(node, inside[0], step, zero) - (new - old)
    whole, changed = float(np.linalg.norm(new - old)), int(np.count_nonzero(new != old))
    if not whole:
        return Loss(0.0, 0.0, 0.0, str(node.name))
    beyond = np.count_nonzero((new != inside[1]) & (old == inside[0]))
    cut, changed_by = (float(np.linalg.norm(values)) / whole for values in (lost, error))
    return Loss(beyond / changed, cut, changed_by, str(node.name))


def held_by_codes(use: Use) -> tuple[Array, Array] | None:
    """Return the values that a constant of codes stands for, and the step between two codes at each of them.

    Args:
        use: A use of the constant.

    Returns:
        Two arrays of the constant's shape, in float64; None if no DequantizeLinear reads it, or one whose
        scale the graph computes.
    """
    node = dequantiser(use)
    return None if node is None else values_and_steps(node)


def dequantiser(use: Use) -> ir.Node | None:
    """Return the DequantizeLinear that turns a constant of codes into floats, by constant scales."""
    changing = [node for node in use.chain if node.op_type != "Identity"]
    return changing[0] if changing and is_dequantiser(changing[0]) else None


def is_dequantiser(node: ir.Node) -> bool:
    """Return True if a node is a DequantizeLinear whose scale and zero point are constants."""
    return node.op_type == "DequantizeLinear" and all(
        value is None or value.const_value is not None for value in node.inputs[1:]
    )


def values_and_steps(node: ir.Node) -> tuple[Array, Array] | None:
    """Return the output of a DequantizeLinear, and the step between two codes at each value, in float64.

    Returns:
        None if the codes are not constant.
    """
    value = without_identity(node.inputs[0])
    if value is None or value.const_value is None:
        return None
    codes = np.asarray(value.const_value.numpy()).astype(np.float64)
    step, zero = (per_value(node, index, codes.shape) for index in (1, 2))
    return (codes - zero) * step, np.broadcast_to(step, codes.shape)


def without_identity(value: ir.Value | None) -> ir.Value | None:
    """Return the value in front of nodes that do nothing."""
    while value is not None and (maker := value.producer()) is not None and maker.op_type == "Identity":
        value = maker.inputs[0]
    return value


def per_value(node: ir.Node, index: int, shape: tuple[int, ...]) -> Array:
    """Return a scale or zero point in a shape that fits the quantised values (ONNX ``Operators.md``)."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None or value.const_value is None:
        return np.zeros(())
    numbers = np.asarray(value.const_value.numpy()).astype(np.float64)
    if numbers.size == 1:
        return numbers.reshape(())
    axis = node.attributes.get_int("axis", 1) % len(shape)
    if numbers.ndim > 1:
        block = node.attributes.get_int("block_size", 0) or -(-shape[axis] // numbers.shape[axis])
        # A block may claim to be longer than the axis.
        block = min(block, shape[axis])
        needed = numbers.take(range(min(-(-shape[axis] // max(block, 1)), numbers.shape[axis])), axis)
        return np.repeat(needed, block, axis)[tuple(slice(size) for size in shape)]
    return numbers.reshape([-1 if position == axis else 1 for position in range(len(shape))])


def _rounded(node: ir.Node, values: Array, step: Array, zero: Array) -> Array:
    """Return values within the range as DequantizeLinear returns them, rounded to the grid."""
    dtype, codes = code_type(node).numpy(), values / step
    integer = code_type(node).is_integer()
    rounded: Array = np.rint(codes) if integer else codes.astype(np.float32).astype(dtype).astype(np.float64)
    return rounded * step
