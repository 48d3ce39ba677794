"""A checkpoint's weights in a graph traced without them: read when they are written, one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.names import Part

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

    def __init__(self, checkpoint: Checkpoint, parts: Mapping[str, tuple[Part, ...]]) -> None:
        self._checkpoint, self._parts = checkpoint, parts
        self.lost: dict[str, bool] = {}

    def attach(self, value: ir.Value, name: str) -> None:
        """Give a constant the values of a parameter."""
        assert value.shape is not None
        assert value.dtype is not None
        value.const_value = ir.LazyTensor(
            lambda: ir.Tensor(self._read(name, value), name=value.name),
            dtype=value.dtype,
            shape=value.shape,
            name=value.name,
        )

    def _read(self, name: str, value: ir.Value) -> Array:
        assert value.dtype is not None
        found = _joined(self._checkpoint, self._parts[name])
        with np.errstate(over="ignore"):
            cast = np.ascontiguousarray(found).astype(value.dtype.numpy(), copy=False)
        if cast.itemsize == 2:
            exponent = np.uint16(_EXPONENTS[value.dtype])
            if ((cast.view(np.uint16) & exponent) == exponent).any():
                self.lost[name] = bool(np.isnan(found).any())
        return cast


def shape_of_parts(checkpoint: Checkpoint, parts: Sequence[Part]) -> tuple[int, ...]:
    """Return the shape of a parameter that is made from stored tensors."""
    shapes = [_turned_shape(checkpoint, part) for part in parts]
    if parts[0].expert is None:
        return shapes[0] if len(parts) == 1 else ()
    experts = {part.expert for part in parts}
    if len(parts) != len(experts) * parts[0].piece[1]:
        return ()
    first = [shape for part, shape in zip(parts, shapes, strict=True) if part.expert == parts[0].expert]
    return (len(experts), sum(shape[0] for shape in first), *first[0][1:])


def _turned_shape(checkpoint: Checkpoint, part: Part) -> tuple[int, ...]:
    shape = checkpoint.tensors[part.tensor].shape
    return (*shape[:-2], shape[-1], shape[-2]) if part.transposed else shape


def _joined(checkpoint: Checkpoint, parts: Sequence[Part]) -> Array:
    """Return a parameter's values: one tensor, or experts of several pieces each, stacked."""

    def read(part: Part) -> Array:
        values = checkpoint.read(part.tensor)
        return values.swapaxes(-1, -2) if part.transposed else values

    if parts[0].expert is None:
        return read(parts[0])
    experts: dict[int, list[Any]] = {}
    for part in parts:
        assert part.expert is not None
        experts.setdefault(part.expert, []).append(read(part))
    return np.stack([np.concatenate(pieces) for _, pieces in sorted(experts.items())])
