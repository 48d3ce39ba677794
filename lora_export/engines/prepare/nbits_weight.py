"""Read the packed weight of ONNX Runtime's MatMulNBits, and repack it for DequantizeLinear.

MatMulNBits holds W ``(N, K)`` row by row in blocks along K: ``(N, K/block, block·bits/8)`` bytes, the first
of two 4-bit codes in the lower half, and w = (code − 2^(bits−1)) · scale. DequantizeLinear, as NVIDIA's
tools write it, holds the transpose ``(K, N)`` in blocks along axis 0, with signed codes and w = code · scale.
A scale belongs to the same numbers in both, so that nothing is rounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.plan import Refusal

OPERATOR = "MatMulNBits"
_KNOWN = frozenset({"K", "N", "bits", "block_size", "accuracy_level", "weight_prepacked"})
_BLOCKS = (16, 32, 64, 128)
_SCALES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
# Inputs by position.
_A, _B, _SCALE, _ZERO, _ORDER, _BIAS = range(6)
_HINT = "quantise it again: MatMulNBits with 4 or 8 bits, symmetric, blocks of 16, 32, 64 or 128"


@dataclass(frozen=True, kw_only=True, eq=False)
class NbitsWeight:
    """The attributes and weight of a MatMulNBits.

    Attributes:
        node: The node.
        k: Number of inputs.
        n: Number of outputs.
        bits: 4 or 8.
        block: Codes along K that share a scale.
        accuracy_level: How ONNX Runtime may round activations; 0: as it likes.
    """

    node: ir.Node
    k: int
    n: int
    bits: int
    block: int
    accuracy_level: int

    @property
    def blocks(self) -> int:
        """Number of blocks along K; the last one may be padded."""
        return math.ceil(self.k / self.block)

    @property
    def padded(self) -> int:
        """K with the padding."""
        return self.blocks * self.block

    @property
    def dtype(self) -> ir.DataType:
        """Type of scales, activations and result."""
        return _tensor(self.node, _SCALE).dtype

    @property
    def code_dtype(self) -> ir.DataType:
        """Type of DequantizeLinear's codes."""
        return ir.DataType.INT4 if self.bits == 4 else ir.DataType.INT8

    @property
    def nbytes(self) -> int:
        """Size of the codes in bytes."""
        return self.n * self.padded * self.bits // 8

    @property
    def bias(self) -> ir.Value | None:
        """Value that is added to the product, if there is one."""
        return _input(self.node, _BIAS)

    def constants(self) -> tuple[int, int]:
        """Return ids of the weight's codes and scales, which show whether nodes share a weight."""
        return id(_input(self.node, _B)), id(_input(self.node, _SCALE))

    def codes(self) -> Array:
        """Return the codes ``(K, N)`` in C order: int8, or uint8 with two signed 4-bit codes in each byte."""
        packed = _tensor(self.node, _B).numpy().reshape(self.n, -1)
        if self.bits == 8:
            return np.ascontiguousarray(packed.T ^ np.uint8(0x80)).view(np.int8)
        # In two's complement, code − 8 is the code with its highest bit flipped.
        return _transposed_nibbles(packed) ^ np.uint8(0x88)

    def scales(self) -> Array:
        """Return the scales ``(blocks, N)``."""
        return np.ascontiguousarray(_tensor(self.node, _SCALE).numpy().reshape(self.n, self.blocks).T)

    def signs(self) -> Array | None:
        """Return the signs of the scales ``(blocks, N)`` for 8 bits, where TensorRT needs positive scales.

        Return None for 4 bits, or if all scales are positive. ONNX Runtime's quantiser gives about half of
        the blocks a negative scale. (Negating their codes instead is not exact: −128 has no counterpart.)
        """
        signs = np.sign(self.scales())
        return None if self.bits == 4 or np.all(signs == 1) else signs


def _transposed_nibbles(packed: Array) -> Array:
    """Transpose ``(N, K)`` 4-bit codes, two in a byte along K, to ``(K, N)``, two in a byte in C order.

    Codes stay packed in pairs, so that a large weight does not take a byte for each code.
    """
    n, half = packed.shape
    if n % 2:
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(n, -1).T.reshape(-1)
        return np.asarray(codes[0::2] | (codes[1::2] << 4))
    even, odd = packed[0::2], packed[1::2]
    out = np.empty((half, 2, n // 2), np.uint8)
    out[:, 0] = ((even & 15) | (odd << 4)).T
    out[:, 1] = ((even >> 4) | (odd & 0xF0)).T
    return out.reshape(-1)


def read_nbits(node: ir.Node) -> NbitsWeight | Refusal:
    """Return the weight of a MatMulNBits, or the reason why DequantizeLinear can't express it."""
    unknown = sorted(set(node.attributes) - _KNOWN)
    if unknown:
        return _refused(f"it has the unknown attribute {', '.join(unknown)}")
    k, n, bits = (
        node.attributes.get_int(name, default) for name, default in (("K", 0), ("N", 0), ("bits", 4))
    )
    weight = NbitsWeight(
        node=node,
        k=k,
        n=n,
        bits=bits,
        block=node.attributes.get_int("block_size", 0),
        accuracy_level=node.attributes.get_int("accuracy_level", 0),
    )
    if bits not in (4, 8):
        return _refused(f"it has {bits} bits, but DequantizeLinear has 4 or 8")
    if weight.block not in _BLOCKS:
        return _refused(f"its block size is {weight.block}, wanted one of {', '.join(map(str, _BLOCKS))}")
    if node.attributes.get_int("weight_prepacked", 0):
        return _refused("its weight is packed for one processor (weight_prepacked)")
    if _input(node, _ORDER) is not None:
        return _refused("its columns are in another order (g_idx)")
    return _constant_problem(weight) or weight


def _refused(reason: str) -> Refusal:
    return Refusal("operator", reason, _HINT)


def _constant_problem(weight: NbitsWeight) -> Refusal | None:
    """Return the problem of the constants of a MatMulNBits, or None."""
    values = [_input(weight.node, index) for index in (_B, _SCALE)]
    if any(value is None or value.const_value is None or value.is_graph_input() for value in values):
        return _refused("its weight or its scales are computed, but must be constants")
    codes, scales = _tensor(weight.node, _B), _tensor(weight.node, _SCALE)
    if codes.dtype is not ir.DataType.UINT8 or codes.size != weight.nbytes or not weight.nbytes:
        seen = f"{codes.dtype.name.lower()} {tuple(codes.shape)}"
        return _refused(f"its weight is {seen}, K and N need another size")
    if scales.dtype not in _SCALES or scales.size != weight.n * weight.blocks:
        seen = f"{scales.dtype.name.lower()} {tuple(scales.shape)}"
        return _refused(f"its scales are {seen}, K and N need another size")
    return _zero_problem(weight)


def _zero_problem(weight: NbitsWeight) -> Refusal | None:
    """Return the reason why the zero points are not those of a symmetric weight, or None."""
    zero = _input(weight.node, _ZERO)
    if zero is None:
        return None
    if zero.const_value is None:
        return _refused("its zero points are computed, but must be constants")
    values = zero.const_value.numpy()
    if values.dtype == np.uint8:
        values = values.reshape(weight.n, -1)
        if weight.bits == 4:
            values = np.stack([values & 15, values >> 4], axis=-1).reshape(weight.n, -1)
        values = values[:, : weight.blocks]
    middle = 1 << (weight.bits - 1)
    if np.any(values.astype(np.float32) != middle):
        return _refused(
            f"asymmetric (its zero points are not all {middle}), but TensorRT needs symmetric weights"
        )
    return None


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _tensor(node: ir.Node, index: int) -> ir.TensorProtocol:
    value = _input(node, index)
    assert value is not None
    assert value.const_value is not None
    return value.const_value
