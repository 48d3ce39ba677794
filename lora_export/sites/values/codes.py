"""Read some rows of a weight, also of one that is stored as codes: enough to recognise it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.graph.onnx_file import shape_of, stored_matrix
from lora_export.sites import operator_named
from lora_export.sites.operand import Use
from lora_export.sites.values.grid import held_by_codes

NBITS_WIDTHS = (2, 4, 8)


def canonical_shape(use: Use) -> tuple[int, int]:
    """Return ``(out_dim, in_dim)`` of the weight that a use reads, kernels flattened."""
    assert use.root.const_value is not None
    if use.operand.shape is not None:
        return use.operand.shape
    shape = shape_of(use.root.const_value)
    rows, cols = shape[0], int(np.prod(shape[1:], dtype=int))
    return (cols, rows) if use.transposed else (rows, cols)


def decoded_rows(use: Use, rows: Array) -> Array | None:
    """Return rows of the canonical weight, each up to a factor; None if its codes can't be read.

    Args:
        use: Use of the weight.
        rows: Numbers of the rows.

    Returns:
        ``(rows, in_dim)``, float64.
    """
    assert use.root.const_value is not None
    if not use.quantised:
        return _picked(stored_matrix(use.root.const_value), use.transposed, rows)
    if use.operand.shape is not None:
        return _nbits_rows(use.node, rows)
    if (held := held_by_codes(use)) is not None:
        return _picked(held[0].reshape(len(held[0]), -1), use.transposed, rows)
    operator = operator_named(use.node.op_type)
    if operator and operator.weight_zero is not None:
        codes = _picked(stored_matrix(use.root.const_value), use.transposed, rows)
        zero = constant_of(use.node, operator.weight_zero)
        if zero is None:
            return codes
        return codes - (zero.ravel()[rows][:, None] if zero.size > 1 else float(zero.ravel()[0]))
    return None


def _picked(matrix: Array, transposed: bool, rows: Array) -> Array:
    return np.asarray(matrix.T[rows] if transposed else matrix[rows], np.float64)


def _nbits_rows(node: ir.Node, rows: Array) -> Array | None:
    """Return rows of a MatMulNBits: ``(N, K/block, block·bits/8)`` bytes, the lowest bits of a byte first."""
    bits, block = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 0)
    packed, scales = constant_of(node, 1), constant_of(node, 2)
    outputs, inputs = node.attributes.get_int("N", 0), node.attributes.get_int("K", 0)
    if node.op_type != "MatMulNBits" or bits not in NBITS_WIDTHS or block <= 0 or has_input(node, 4):
        return None
    blocks = -(-inputs // block)
    if packed is None or scales is None or packed.size * 8 != outputs * blocks * block * bits:
        return None
    codes = unpacked(packed.reshape(outputs, -1)[rows], bits).reshape(len(rows), blocks, block)
    zero, middle = constant_of(node, 3), float(1 << (bits - 1))
    if zero is None and has_input(node, 3):
        return None
    points = np.full((len(rows), blocks, 1), middle)
    if zero is not None:
        mine = zero.reshape(outputs, -1)[rows]
        points = (unpacked(mine, bits) if mine.dtype == np.uint8 else mine)[:, :blocks, None]
    values = (codes - points) * scales.reshape(outputs, blocks)[rows].astype(np.float64)[..., None]
    return np.asarray(values.reshape(len(rows), -1)[:, :inputs], np.float64)


def unpacked(packed: Array, bits: int) -> Array:
    """Return the codes in rows of bytes, the lowest bits of a byte first, as float64."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed.view(np.uint8)[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(len(packed), -1).astype(np.float64)


def has_input(node: ir.Node, index: int) -> bool:
    """Return True if a node has an optional input."""
    return index < len(node.inputs) and node.inputs[index] is not None


def constant_of(node: ir.Node, index: int) -> Array | None:
    """Return the values of a node's input; None if the node lacks it or the graph computes it."""
    value = node.inputs[index] if has_input(node, index) else None
    return None if value is None or value.const_value is None else np.asarray(value.const_value.numpy())
