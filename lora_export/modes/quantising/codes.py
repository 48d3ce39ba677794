"""Codes of a weight as MatMulNBits holds them, and the values that they stand for.

W is ``(N, K)``, a row for each output, in blocks along K (ONNX Runtime ``docs/ContribOperators.md``,
MatMulNBits): codes ``(N, blocks, block·bits/8)`` bytes, the first of two 4-bit codes in the lower half; a
scale and a zero point for each block; w = (code − zero) · scale. Zero points are packed like codes, each row
padded to whole bytes, or they are floats. Without them, zero is 2^(bits−1). The last block is padded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lora_export.adapter import Array


@dataclass(frozen=True, eq=False)
class BlockCodes:
    """Codes of some rows of a weight.

    Attributes:
        packed: Codes, uint8 ``(N, blocks, block·bits/8)``.
        scales: Scales ``(N, blocks)``.
        zeros: Zero points: packed ones ``(N, bytes)`` uint8, or floats ``(N, blocks)``; None if symmetric.
    """

    packed: Array
    scales: Array
    zeros: Array | None

    def values(self, bits: int, columns: int) -> Array:
        """Return the values that the codes stand for, ``(N, columns)`` float32, without the padding."""
        rows, blocks = self.scales.shape
        codes = unpacked(self.packed.reshape(rows, -1), bits).reshape(rows, blocks, -1).astype(np.float32)
        codes -= self._points(bits)[..., None]
        codes *= self.scales.astype(np.float32)[..., None]
        return codes.reshape(rows, -1)[:, :columns]

    def _points(self, bits: int) -> Array:
        rows, blocks = self.scales.shape
        if self.zeros is None:
            return np.full((rows, blocks), 1 << (bits - 1), np.float32)
        if self.zeros.dtype == np.uint8:
            return unpacked(self.zeros, bits)[:, :blocks].astype(np.float32)
        return self.zeros.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A quantiser.

    Attributes:
        quantise: Function of a matrix ``(K, N)`` (C order, float32 or float16), bits, block size and
            symmetric that returns its codes.
        symmetric: Values of ``symmetric`` that it can do, the default first.
        float_zeros: True if its zero points are floats.
        packages: Packages that it needs besides ONNX Runtime.
    """

    quantise: Callable[[Array, int, int, bool], BlockCodes]
    symmetric: tuple[bool, ...]
    float_zeros: bool = False
    packages: tuple[str, ...] = ()


def unpacked(packed: Array, bits: int) -> Array:
    """Return codes in rows of bytes as uint8, the lower half of a byte first."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


def pack(codes: Array, bits: int) -> Array:
    """Return rows of codes (uint8) as bytes, each row padded to whole bytes."""
    if bits == 8:
        return codes
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    return np.asarray(codes[:, 0::2] | (codes[:, 1::2] << 4))


def padded_rows(matrix: Array, block: int) -> Array:
    """Return ``(N, K)`` float32 of a matrix ``(K, N)``, K padded with zeros to whole blocks, as ORT pads."""
    rows = np.ascontiguousarray(matrix.T, np.float32)
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % block)))
