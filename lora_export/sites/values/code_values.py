"""Read codes of quantised weights as the values that they stand for, some rows at a time.

Sources: ONNX ``Operators.md`` (DequantizeLinear, MatMulInteger), ONNX Runtime ``docs/ContribOperators.md``
(MatMulNBits, DynamicQuantizeMatMul, MatMulIntegerToFloat).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_export.adapter import Array
from lora_export.sites import operator_named
from lora_export.sites.operand import Use
from lora_export.sites.values.codes import NBITS_WIDTHS, constant_of, has_input, unpacked
from lora_export.sites.values.grid import dequantiser, per_value
from lora_export.storage.patch import Placement

_NBITS = "MatMulNBits"
# Number of values that are compared at a time.
_BLOCK = 1 << 20
# Least cosine of rows that a quantiser may have turned.
_RELATED = 0.5
# Inputs of MatMulNBits by position.
_SCALE, _ZERO, _ORDER = 2, 3, 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Codes:
    """Quantised matrix, as its operator multiplies with it.

    Attributes:
        codes: Codes less their zero points, ``(rows, cols)``; or packed, see ``bits``.
        step: Difference between two codes, broadcast to each value; None if the graph has it elsewhere.
        limit: Largest code; values beyond it are cut off.
        bits: Bits of a packed code; 0 if the codes are not packed.
        zeros: Zero points of packed codes, ``(rows, blocks)``.
        block: Number of columns of packed codes that share a scale.
    """

    codes: Array
    step: Array | None
    limit: float
    bits: int = 0
    zeros: Array | None = None
    block: int = 0

    def rows(self, start: int, stop: int) -> tuple[Array, Array | None, Array]:
        """Return some rows' values (without ``step``, codes), steps, and a mask of the outermost codes."""
        if not self.bits:
            codes = np.asarray(self.codes[start:stop], np.float32)
            step = None if self.step is None else np.asarray(self.step[start:stop], np.float32)
            return codes if step is None else codes * step, step, np.abs(codes) >= self.limit
        assert self.zeros is not None
        assert self.step is not None
        packed = self.codes[start:stop]
        codes = unpacked(packed, self.bits).astype(np.float32)
        zeros, step = (np.repeat(values[start:stop], self.block, 1) for values in (self.zeros, self.step))
        outermost = (codes == 0) | (codes == (1 << self.bits) - 1)
        return (codes - zeros) * step, step, outermost


@dataclass(frozen=True)
class CodesMatch:
    """Agreement of quantised values with a checkpoint's.

    Attributes:
        within: True if each value is at most one step of the quantiser away.
        cosine: Least cosine of the rows: a quantiser turns none of them far.
    """

    within: bool
    cosine: float

    @property
    def related(self) -> bool:
        """True if each row points in the checkpoint's direction, as far as a quantiser keeps it."""
        return self.within or self.cosine >= _RELATED


def codes_of(use: Use) -> Codes | None:
    """Return the codes of a use's constant; None if their layout is unknown."""
    if use.root.const_value is None:
        return None
    if use.node.op_type == _NBITS:
        return _of_nbits(use)
    stored = np.asarray(use.root.const_value.numpy())
    codes = stored.reshape(len(stored), -1)
    first, operator = dequantiser(use), operator_named(use.node.op_type)
    if first is not None:
        step: Array | None
        step, zero = (
            np.broadcast_to(per_value(first, index, stored.shape), stored.shape).reshape(codes.shape)
            for index in (1, 2)
        )
    elif not use.chain and operator and operator.weight_zero is not None:
        where, at = operator.weight_scale, operator.weight_zero
        found = [None if index is None else constant_of(use.node, index) for index in (where, at)]
        if (where is not None and found[0] is None) or (found[1] is None and has_input(use.node, at)):
            return None
        scale, own = found[0], np.zeros(()) if found[1] is None else found[1]
        if not all(given is None or _fits(given, codes.shape) for given in (scale, own)):
            return None
        step = None if scale is None else np.broadcast_to(scale.reshape(-1), codes.shape)
        zero = np.broadcast_to(own.reshape(-1), codes.shape)
    else:
        return None
    # Codes of at most 8 bits, less their zero points, fit into 16 bits.
    centred = codes.astype(np.float32) - zero.astype(np.float32)
    return Codes(codes=centred, step=step, limit=float(np.abs(centred).max(initial=0)))


def _fits(values: Array, shape: tuple[int, ...]) -> bool:
    """Return True if there is one value for the whole matrix, or one for each column."""
    return values.size == 1 or (values.size == shape[-1] == values.shape[-1])


def compare_codes(held: Codes, placement: Placement, wanted: Array) -> CodesMatch:
    """Compare a rectangle of codes with rows of the canonical weight."""
    matrix = wanted.T if placement.transposed else wanted
    height, width = matrix.shape
    first, left = placement.row, placement.col
    within, axis = held.step is not None, 0 if placement.transposed else 1
    sums = np.zeros((3, len(wanted)))
    step = max(1, _BLOCK // width)
    for start in range(0, height, step):
        stop = min(start + step, height)
        values, steps, outermost = (
            None if array is None else array[:, left : left + width]
            for array in held.rows(first + start, first + stop)
        )
        assert values is not None
        assert outermost is not None
        other = np.asarray(matrix[start:stop], np.float32)
        if within and steps is not None:
            # Values beyond the outermost code are cut off: the code is nearer to zero than the value.
            cut = outermost & (np.abs(other) > np.abs(values))
            within = bool(((np.abs(values - other) <= np.abs(steps)) | cut).all())
        rows = slice(None) if placement.transposed else slice(start, stop)
        for number, (one, two) in enumerate(((values, other), (values, values), (other, other))):
            sums[number, rows] += (one * two).sum(axis=axis, dtype=np.float64)
    lengths = np.sqrt(sums[1] * sums[2])
    # Rows of zeros have no direction.
    cosines = np.where(lengths > 0, sums[0] / np.maximum(lengths, 1e-300), (sums[1] == sums[2]) * 1.0)
    return CodesMatch(within, float(cosines.min(initial=1.0)))


def _of_nbits(use: Use) -> Codes | None:
    """Return the codes of a MatMulNBits: ``(N, K / block, block · bits / 8)``, the lower half first."""
    node = use.node
    rows, cols = node.attributes.get_int("N", 0), node.attributes.get_int("K", 0)
    bits, block = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 0)
    scale, zero = constant_of(node, _SCALE), constant_of(node, _ZERO)
    prepacked = node.attributes.get_int("weight_prepacked", 0)
    unread = has_input(node, _ORDER) or (zero is None and has_input(node, _ZERO)) or scale is None
    if bits not in NBITS_WIDTHS or block < 1 or unread or prepacked:
        return None
    assert scale is not None
    assert use.root.const_value is not None
    blocks = -(-cols // block)
    stored = np.asarray(use.root.const_value.numpy())
    if stored.size * 8 != rows * blocks * block * bits or scale.size != rows * blocks:
        return None
    packed = stored.reshape(rows, -1)
    if zero is not None and zero.size != rows * (
        -(-blocks * bits // 8) if zero.dtype == np.uint8 else blocks
    ):
        return None
    if zero is None:
        zeros: Array = np.full((rows, blocks), 1 << (bits - 1), np.float32)
    else:
        zeros = zero.reshape(rows, -1)
        zeros = unpacked(zeros, bits) if zeros.dtype == np.uint8 else zeros
        zeros = zeros[:, :blocks].astype(np.float32)
    return Codes(
        codes=packed,
        step=scale.reshape(rows, blocks).astype(np.float32),
        limit=0.0,
        bits=bits,
        zeros=zeros,
        block=block,
    )
