"""Quantise one weight when it is written, some rows at a time, and measure what that costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.errors import CheckpointError
from lora_export.graph.onnx_file import release
from lora_export.modes.quantising.choice import QuantiseChoice
from lora_export.modes.quantising.codes import BlockCodes, Method
from lora_export.modes.quantising.find import Product

# Values that are quantised together: 16 MB in float32.
_CHUNK = 1 << 22
# Share of a weight that codes lose only where they don't stand for it.
_MOST_LOST = 0.5
# Codes up to this size are made at once: a larger weight's scales and zero points are all so large that they
# lie in the data file, which is written while the float weights are still at their places.
EAGER_BYTES = 1 << 18


@dataclass(frozen=True)
class Cost:
    """The loss by quantising one weight.

    Attributes:
        error_squared: ‖dequantised − W‖².
        squared: ‖W‖².
    """

    error_squared: float
    squared: float

    @property
    def relative(self) -> float:
        """‖dequantised − W‖ / ‖W‖; 0 for a weight of zeros."""
        return math.sqrt(self.error_squared / self.squared) if self.squared else 0.0


def _squared(values: Array) -> float:
    """Return the sum of squares, which of values below 1e-23 are none in float32."""
    wide = values.ravel().astype(np.float64)
    return float(np.dot(wide, wide))


class CodedWeight:
    """Codes, scales and zero points of one weight, made when the first of them is asked for.

    Args:
        product: The weight and its readers.
        choice: The user's choice.
        method: Quantiser.
        values: Function that returns the stored weight, with an adapter merged into it or not.
    """

    def __init__(
        self, product: Product, choice: QuantiseChoice, method: Method, values: Callable[[], Array]
    ) -> None:
        self.product = product
        self._choice, self._method, self._values = choice, method, values
        self._parts: dict[str, Array] = {}
        self.cost: Cost | None = None

    @property
    def blocks(self) -> int:
        """Number of blocks along K."""
        return math.ceil(self.product.columns / self._choice.block_size)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block's codes."""
        return self._choice.block_size * self._choice.bits // 8

    @property
    def nbytes(self) -> int:
        """Bytes of the codes."""
        return self.product.rows * self.blocks * self.block_bytes

    def tensors(self, names: dict[str, str]) -> dict[str, ir.TensorProtocol]:
        """Return the tensors ``codes``, ``scales`` and, if there are any, ``zeros``, with these names."""
        rows, blocks, dtype = self.product.rows, self.blocks, self.product.dtype
        float_zeros = self._method.float_zeros
        # GatherBlockQuantized has no axis of blocks.
        flat = self.product.kind == "embedding"
        shape = [rows, blocks * self.block_bytes] if flat else [rows, blocks, self.block_bytes]
        kinds: dict[str, tuple[ir.DataType, list[int]]] = {
            "codes": (ir.DataType.UINT8, shape),
            "scales": (dtype, [rows, blocks]),
        }
        if not self._choice.is_symmetric:
            packed = [rows, math.ceil(blocks * self._choice.bits / 8)]
            kinds["zeros"] = (dtype, [rows, blocks]) if float_zeros else (ir.DataType.UINT8, packed)
        if self.nbytes <= EAGER_BYTES:
            return {
                part: ir.tensor(self._take(part, shape), name=names[part])
                for part, (_, shape) in kinds.items()
            }
        return {
            part: ir.LazyTensor(
                partial(self._tensor, part, shape), dtype=kind, shape=ir.Shape(shape), name=names[part]
            )
            for part, (kind, shape) in kinds.items()
        }

    def _tensor(self, part: str, shape: Sequence[int]) -> ir.TensorProtocol:
        return ir.tensor(self._take(part, shape))

    def _take(self, part: str, shape: Sequence[int]) -> Array:
        """Return a part, and forget it: a large weight's are only needed once."""
        if part not in self._parts:
            self._make()
        return self._parts.pop(part).reshape(shape)

    def _make(self) -> None:
        product, bits = self.product, self._choice.bits
        values = self._values()
        step = max(1, _CHUNK // product.columns)
        made: list[BlockCodes] = []
        error = squared = 0.0
        for start in range(0, product.rows, step):
            chunk = self._chunk(values, start, min(start + step, product.rows))
            codes = self._coded(chunk)
            made.append(codes)
            wanted = chunk.T.astype(np.float32)
            lost = (codes.values(bits, product.columns) - wanted).ravel()
            error += _squared(lost)
            squared += _squared(wanted)
            release(product.root)
        if not math.isfinite(error + squared):
            raise CheckpointError(
                f"{product.root.name} can't be quantised: it has values that are not finite, or too large",
                "use an undamaged copy of the base; or leave the weight in float with --keep",
            )
        self.cost = Cost(error, squared)
        if self.cost.relative > _MOST_LOST:
            raise CheckpointError(
                f"{product.root.name} can't be quantised: its codes lose {self.cost.relative:.0%} of it "
                f"(are its values too small for scales in {product.dtype.name.lower()}?)",
                "leave it in float with --keep, or give a graph in float32",
            )
        self._parts = {
            "codes": np.concatenate([codes.packed for codes in made]),
            "scales": np.concatenate([codes.scales for codes in made]),
        }
        zeros = [codes.zeros for codes in made if codes.zeros is not None]
        if zeros:
            self._parts["zeros"] = np.concatenate(zeros)

    def _chunk(self, values: Array, start: int, stop: int) -> Array:
        """Return outputs of the weight as the quantisers take them: ``(K, n)`` in C order."""
        turned = self.product.turned
        part = values[:, start:stop] if turned else values[start:stop].T
        # As ONNX Runtime's tool does: bfloat16 in float32, the scales rounded afterwards.
        half = self.product.dtype is ir.DataType.FLOAT16
        return np.ascontiguousarray(part, np.float16 if half else np.float32)

    def _coded(self, chunk: Array) -> BlockCodes:
        choice = self._choice
        codes = self._method.quantise(chunk, choice.bits, choice.block_size, choice.is_symmetric)
        dtype: np.dtype[Any] = self.product.dtype.numpy()
        if dtype != np.dtype(ml_dtypes.bfloat16):
            return codes
        zeros = codes.zeros
        if zeros is not None and zeros.dtype != np.uint8:
            zeros = zeros.astype(dtype)
        return BlockCodes(codes.packed, codes.scales.astype(dtype), zeros)
