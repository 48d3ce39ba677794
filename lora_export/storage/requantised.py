"""Merge into a weight of eight-bit codes with scales: widen all of it, add, and quantise it again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from lora_export.adapter import Array
from lora_export.storage.blocks import Block, Buffers, Findings, Matrix, MergePiece, blocks_of
from lora_export.storage.patch import Patch
from lora_export.storage.rounding import Sample
from lora_export.storage.scales import dequantise, requantise


@dataclass(frozen=True, kw_only=True, eq=False)
class RequantisedPiece:
    """A weight of codes and scales, of which one or both go into the written file.

    Attributes:
        name: The weight's name, for messages.
        read: Function that reads the base's codes and scales.
        grid: Number of elements that share a scale, along each axis.
        shape: Shape of the codes as a matrix.
        patches: Changes.
        codes_at: Place of the codes in the file, in bytes; None if they go into another file.
        scales_at: Place of the scales in the file, in bytes; None if they go into another file.
    """

    name: str
    read: Callable[[], tuple[Array, Array]]
    grid: Sequence[int]
    shape: tuple[int, int]
    patches: Sequence[Patch]
    codes_at: int | None
    scales_at: int | None

    def parts(self) -> list[tuple[str, str, int]]:
        """Return the entries of each patch for `rounding.collect`; none if only scales are written."""
        if self.codes_at is None:
            return []
        return [(patch.label, self.name, patch.height * patch.width) for patch in self._matrix(None).patches]

    def _matrix(self, values: Array | None) -> Matrix:
        source = np.empty(0, np.float32) if values is None else values
        kind = np.dtype(np.float32)
        return Matrix(
            MergePiece(
                name=self.name,
                source=source,
                offset=0,
                at=0,
                shape=self.shape,
                dtype_in=kind,
                dtype_out=kind,
                patches=list(self.patches),
            ),
            "off",
        )

    def write(self, write: Callable[[memoryview, int], int], findings: Findings) -> int:
        """Merge, quantise and write; return the number of bytes written.

        Args:
            write: Function that writes bytes at an offset of the file.
            findings: Findings to which the loss by rounding and values that are not finite are added.
        """
        codes, scales = self.read()
        before = dequantise(codes, scales, self.grid)
        matrix = self._matrix(before)
        values = _merged(matrix, before.reshape(self.shape), findings)
        made, new = requantise(
            values.reshape(codes.shape), before, codes=codes, scales=scales, grid=self.grid
        )
        written = 0
        if self.codes_at is not None:
            stored = dequantise(made, new, self.grid).reshape(self.shape)
            findings.samples += _measured(matrix.patches, before.reshape(self.shape), values, stored)
            written += write(made.view(np.uint8).reshape(-1).data, self.codes_at)
        if self.scales_at is not None:
            written += write(new.reshape(-1).view(np.uint8).data, self.scales_at)
        return written


def _merged(matrix: Matrix, before: Array, findings: Findings) -> Array:
    buffers, values = Buffers(), np.empty_like(before)
    read = partial(_block_of, before)
    if matrix.needs_norms:
        matrix.measure_norms(read)
    for block in blocks_of(*before.shape):
        made = matrix.merge(read(block, buffers), block, buffers, findings)
        values[_region(block)] = made.reshape(block.height, block.width)
    return values


def _block_of(matrix: Array, block: Block, _: Buffers) -> Array:
    return np.ascontiguousarray(matrix[_region(block)]).reshape(-1)


def _region(block: Block) -> tuple[slice, slice]:
    return slice(block.row, block.row + block.height), slice(block.col, block.col + block.width)


def _measured(patches: Sequence[Patch], before: Array, exact: Array, stored: Array) -> list[Sample]:
    samples = []
    for patch in patches:
        region = _region(Block(patch.row, patch.col, patch.height, patch.width))
        delta = exact[region] - before[region]
        error = (stored[region] - exact[region]).reshape(-1)
        changed = delta != 0
        samples.append(
            Sample(
                label=patch.label,
                measured=delta.size,
                error_squared=float(np.dot(error, error)),
                delta_squared=float(np.square(delta).sum()),
                changed=int(np.count_nonzero(changed)),
                lost=int(np.count_nonzero(changed & (stored[region] == before[region]))),
            )
        )
    return samples
