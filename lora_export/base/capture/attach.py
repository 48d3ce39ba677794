"""A checkpoint's weights in a graph traced without them: read when they are written, one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.names import StoredPart
from lora_export.storage.safetensors import DTYPES

# Values that are read, cast and written at a time.
_BLOCK = 1 << 20
# All ones: infinite or NaN.
_EXPONENTS = {ir.DataType.FLOAT16: 0x7C00, ir.DataType.BFLOAT16: 0x7F80}


class Weights:
    """Values of a model's parameters, in a checkpoint.

    Args:
        checkpoint: The base.
        parts: Parameter → the stored tensors that hold it.

    Attributes:
        lost: Parameters that had values before and are not finite in the graph's dtype → whether they are
            NaN in the checkpoint; known when they have been read.
    """

    def __init__(self, checkpoint: Checkpoint, parts: Mapping[str, tuple[StoredPart, ...]]) -> None:
        self._checkpoint, self._parts = checkpoint, parts
        self.lost: dict[str, bool] = {}

    def attach(self, value: ir.Value, name: str) -> None:
        """Give a constant the values of a parameter."""
        value.const_value = _Streamed(self, value, name)

    def link(self, value: ir.Value, name: str, folder: Path) -> bool:
        """Let a constant refer to values in the checkpoint's own file, if they are stored as it holds them.

        Args:
            value: The constant.
            name: Its parameter.
            folder: The graph's, in which the checkpoint's has to be.

        Returns:
            Whether it does.
        """
        first, *others = self._parts[name]
        stored = self._checkpoint.tensors[first.tensor]
        assert value.shape is not None
        assert value.dtype is not None
        if others or first.transposed or first.expert is not None:
            return False
        if DTYPES.get(stored.code) != value.dtype.numpy() or not stored.length:
            return False
        location = os.path.relpath(stored.file.resolve(), folder.resolve())
        value.const_value = ir.ExternalTensor(
            location, stored.offset, stored.length, value.dtype, shape=value.shape, name=str(value.name)
        )
        return True

    def blocks(self, name: str, dtype: ir.DataType) -> Iterator[Array]:
        """Yield a parameter's values in their order, in the graph's dtype, a block at a time."""
        first, *others = self._parts[name]
        if others or first.transposed or first.expert is not None:
            found = np.ascontiguousarray(_joined(self._checkpoint, self._parts[name])).reshape(-1)
            stored: Iterator[Array] = (
                found[start : start + _BLOCK] for start in range(0, found.size, _BLOCK)
            )
        else:
            stored = self._checkpoint.read_blocks(first.tensor, _BLOCK)
        for block in stored:
            yield self._cast(name, block, dtype)

    def _cast(self, name: str, block: Array, dtype: ir.DataType) -> Array:
        with np.errstate(over="ignore"):
            cast: Array = block.astype(dtype.numpy(), copy=False)
        if cast.itemsize == 2:
            exponent = np.uint16(_EXPONENTS[dtype])
            if ((cast.view(np.uint16) & exponent) == exponent).any():
                is_nan = bool(np.isnan(block).any())
                self.lost[name] = self.lost.get(name, False) or is_nan
        return cast


class _Streamed(ir.LazyTensor):
    """A parameter that is written a block at a time, and in memory only where all of it is asked for."""

    def __init__(self, weights: Weights, value: ir.Value, name: str) -> None:
        assert value.shape is not None
        assert value.dtype is not None
        shape, dtype = value.shape.numpy(), value.dtype
        self._weights, self._of = weights, name

        def whole() -> ir.TensorProtocol:
            found = np.empty(shape, dtype.numpy())
            flat, at = found.reshape(-1), 0
            for block in weights.blocks(name, dtype):
                flat[at : at + block.size] = block
                at += block.size
            return ir.Tensor(found, name=value.name)

        super().__init__(whole, dtype=dtype, shape=ir.Shape(shape), name=value.name)

    def tofile(self, file: BinaryIO) -> None:
        """Write the values."""
        for block in self._weights.blocks(self._of, self.dtype):
            file.write(block.view(np.uint8).data)


def stacked(parts: Sequence[tuple[StoredPart, ...]]) -> tuple[StoredPart, ...]:
    """Return what holds the rows of several parameters, one below the other; each is one stored tensor."""
    return tuple(replace(one, piece=(index, len(parts))) for index, (one,) in enumerate(parts))


def shape_of_parts(checkpoint: Checkpoint, parts: Sequence[StoredPart]) -> tuple[int, ...]:
    """Return the shape of a parameter that is made from stored tensors."""
    shapes = [_turned_shape(checkpoint, part) for part in parts]
    if parts[0].expert is None:
        return shapes[0] if len(parts) == 1 else ()
    experts = {part.expert for part in parts}
    if len(parts) != len(experts) * parts[0].piece[1]:
        return ()
    first = [shape for part, shape in zip(parts, shapes, strict=True) if part.expert == parts[0].expert]
    return (len(experts), sum(shape[0] for shape in first), *first[0][1:])


def _turned_shape(checkpoint: Checkpoint, part: StoredPart) -> tuple[int, ...]:
    shape = checkpoint.tensors[part.tensor].shape
    return (*shape[:-2], shape[-1], shape[-2]) if part.transposed else shape


def _joined(checkpoint: Checkpoint, parts: Sequence[StoredPart]) -> Array:
    """Return a parameter's values: one tensor, several in a row, or experts of several pieces each."""

    def read(part: StoredPart) -> Array:
        values = checkpoint.read(part.tensor)
        return values.swapaxes(-1, -2) if part.transposed else values

    if parts[0].expert is None:
        return np.concatenate([read(part) for part in parts]) if len(parts) > 1 else read(parts[0])
    experts: dict[int, list[Any]] = {}
    for part in parts:
        assert part.expert is not None
        experts.setdefault(part.expert, []).append(read(part))
    return np.stack([np.concatenate(pieces) for _, pieces in sorted(experts.items())])
