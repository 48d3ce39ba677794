"""Merge a stored matrix block by block: widen, add the patches, round once, measure the loss by rounding.

A block is a range of whole rows of about `BLOCK` elements, small enough that its few buffers stay in the
processor's second-level cache, and large enough that Python's share of the time is small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lora_export.adapter import Array
from lora_export.storage.patch import Patch, join
from lora_export.storage.rounding import Mode, Sample

BLOCK = 1 << 18
# Rows longer than this are cut into pieces of BLOCK elements.
WIDE = 1 << 20
# A patch that covers more blocks than this is measured on about this many blocks, evenly spaced.
SAMPLED_BLOCKS = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class MergePiece:
    """A stored matrix that is written with patches, in another dtype, or both.

    Attributes:
        name: The tensor's name, for messages.
        source: File that holds it, row-major; or an array of its values.
        offset: Its place in the file, in bytes (ignored for an array).
        at: Its place in the output, in bytes.
        shape: ``(rows, cols)``; tensors of more axes are viewed as a matrix, vectors as ``(1, n)``.
        dtype_in: Stored dtype: float32, float64, float16, bfloat16 or another ml_dtypes float.
        dtype_out: Dtype to write.
        patches: Changes; the dtype of the sum is float32, or float64 if either dtype is.
            (ml_dtypes rounds float64 to float32 before bfloat16.)
    """

    name: str
    source: Path | Array
    offset: int
    at: int
    shape: tuple[int, int]
    dtype_in: np.dtype[Any]
    dtype_out: np.dtype[Any]
    patches: tuple[Patch, ...] | list[Patch] = ()

    @property
    def length(self) -> int:
        """Size in the output, in bytes."""
        return self.shape[0] * self.shape[1] * self.dtype_out.itemsize


@dataclass(frozen=True)
class Block:
    """The part ``[row : row + height, col : col + width]`` of a matrix; contiguous in the file."""

    row: int
    col: int
    height: int
    width: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.height * self.width


def blocks_of(rows: int, cols: int) -> Iterator[Block]:
    """Cut a ``(rows, cols)`` matrix into blocks, in file order."""
    if rows == 0 or cols == 0:
        return
    if cols > WIDE:
        for row in range(rows):
            for col in range(0, cols, BLOCK):
                yield Block(row, col, 1, min(BLOCK, cols - col))
        return
    height = max(1, BLOCK // cols)
    for row in range(0, rows, height):
        yield Block(row, 0, min(height, rows - row), cols)


class Buffers:
    """The reusable arrays of one thread, by name; they grow to the largest block seen."""

    def __init__(self) -> None:
        self._held: dict[str, Array] = {}

    def take(self, name: str, dtype: np.dtype[Any], size: int) -> Array:
        """Return an uninitialised array ``(size,)``; one name gets the same memory each time."""
        held = self._held.get(name)
        if held is None or held.nbytes < size * dtype.itemsize:
            held = self._held[name] = np.empty(size * dtype.itemsize, np.uint8)
        return held[: size * dtype.itemsize].view(dtype)


@dataclass
class Findings:
    """Measurements from the blocks of one thread.

    Attributes:
        samples: Measured rounding.
        bad_base: Tensor name → number of NaN or infinite values that the base already has.
        overflow: ``(label, tensor name, dtype)`` → number of values that became NaN or infinite.
    """

    samples: list[Sample] = field(default_factory=list)
    bad_base: dict[str, int] = field(default_factory=dict)
    overflow: dict[tuple[str, str, str], int] = field(default_factory=dict)


Region = tuple[slice, slice]


class Matrix:
    """A `MergePiece` prepared for merging: factors in the dtype of the sum, replacements first, DoRA last."""

    def __init__(self, piece: MergePiece, rounding: Mode) -> None:
        self.piece = piece
        wide = np.dtype(np.float64) in (piece.dtype_in, piece.dtype_out)
        self.compute: np.dtype[Any] = np.dtype(np.float64 if wide else np.float32)
        self.patches = [self._prepared(patch) for patch in sorted(join(piece.patches), key=_order)]
        # If rectangles overlap, one product is not the whole change, which is then found by difference.
        self._alone = [
            patch.left is not None
            and patch.magnitude is None
            and not any(other is not patch and _overlap(patch, other) for other in self.patches)
            for patch in self.patches
        ]
        self._norms: dict[int, Array] = {}
        self._rounding = rounding
        largest = float(ml_dtypes.finfo(piece.dtype_out).max)
        self._safe_square = min(largest, 1e150) ** 2

    def _prepared(self, patch: Patch) -> Patch:
        if patch.left is None or patch.right is None:
            return patch
        return Patch(
            label=patch.label,
            row=patch.row,
            col=patch.col,
            height=patch.height,
            width=patch.width,
            left=np.ascontiguousarray(patch.left, self.compute),
            right=np.ascontiguousarray(patch.right, self.compute),
            magnitude=None if patch.magnitude is None else np.asarray(patch.magnitude, self.compute),
            magnitude_axis=patch.magnitude_axis,
        )

    @property
    def needs_norms(self) -> bool:
        """True if some DoRA norm spans several blocks, so that `measure_norms` must be called first."""
        rows_are_cut = self.piece.shape[1] > WIDE
        return any(p.magnitude is not None and (p.magnitude_axis == 1 or rows_are_cut) for p in self.patches)

    def measure_norms(self, read: Callable[[Block, Buffers], Array]) -> None:
        """Read the matrix once and keep the norms of W0 + ΔW that DoRA divides by."""
        buffers = Buffers()
        squares = {
            i: np.zeros(p.height if p.magnitude_axis == 0 else p.width, np.float64)
            for i, p in enumerate(self.patches)
            if p.magnitude is not None
        }
        for block in blocks_of(*self.piece.shape):
            grid = self._widened(read(block, buffers), block, buffers)
            product = buffers.take("product", self.compute, block.size).reshape(grid.shape)
            for i, patch in enumerate(self.patches):
                region = _region(patch, block)
                if region is None:
                    continue
                self._add(patch, grid, product=product, block=block, region=region)
                if i in squares:
                    np.multiply(grid[region], grid[region], out=product[region])
                    along = _within(patch, block, region)[patch.magnitude_axis]
                    squares[i][along] += product[region].sum(axis=1 - patch.magnitude_axis, dtype=np.float64)
        self._norms = {i: np.sqrt(square).astype(self.compute) for i, square in squares.items()}

    def merge(self, stored: Array, block: Block, buffers: Buffers, findings: Findings) -> Array:
        """Return the block's new values ``(size,)`` in the output's dtype; valid until the next call.

        Args:
            stored: The block as stored, ``(size,)`` of ``dtype_in``.
            block: The block's place in the matrix.
            buffers: Buffers of the calling thread.
            findings: Findings of the calling thread, to which this block's are added.
        """
        grid = self._widened(stored, block, buffers)
        product = buffers.take("product", self.compute, block.size).reshape(grid.shape)
        for i, patch in enumerate(self.patches):
            region = _region(patch, block)
            if region is not None:
                self._add(patch, grid, product=product, block=block, region=region)
                if patch.magnitude is not None:
                    self._scale(i, patch, grid=grid, product=product, block=block, region=region)
        flat = grid.reshape(-1)
        out = buffers.take("out", self.piece.dtype_out, block.size)
        out[...] = flat
        # If the sum of squares is below max², no element can exceed max; otherwise each is inspected.
        if not float(np.dot(flat, flat)) < self._safe_square:
            self._inspect(stored, out, block, findings)
        measured = [i for i in range(len(self.patches)) if self._is_measured(self.patches[i], block)]
        if measured:
            self._measure(
                measured,
                stored,
                grid=grid,
                product=product,
                out=out,
                block=block,
                buffers=buffers,
                findings=findings,
            )
        return out

    def _widened(self, stored: Array, block: Block, buffers: Buffers) -> Array:
        wide = buffers.take("wide", self.compute, block.size)
        wide[...] = stored
        return wide.reshape(block.height, block.width)

    def _add(self, patch: Patch, grid: Array, product: Array, block: Block, region: Region) -> None:
        rows, cols = _within(patch, block, region)
        if patch.values is not None:
            grid[region] = patch.values[rows, cols]
        if patch.left is not None and patch.right is not None:
            np.matmul(patch.left[rows], patch.right[:, cols], out=product[region])
            np.add(grid[region], product[region], out=grid[region])

    def _scale(self, i: int, patch: Patch, grid: Array, product: Array, block: Block, region: Region) -> None:
        """Scale W0 + ΔW to DoRA's magnitude (arXiv:2402.09353, equation 5)."""
        assert patch.magnitude is not None
        along = _within(patch, block, region)[patch.magnitude_axis]
        if i in self._norms:
            norms = self._norms[i][along]
        else:
            np.multiply(grid[region], grid[region], out=product[region])
            norms = np.sqrt(product[region].sum(axis=1))
        magnitude = patch.magnitude[along]
        # A channel that a folded batch norm multiplies by 0 has norm 0 and magnitude 0, and stays 0.
        factor = np.divide(magnitude, norms, out=np.zeros_like(norms), where=(norms != 0) | (magnitude != 0))
        grid[region] *= factor[:, None] if patch.magnitude_axis == 0 else factor[None, :]

    def _is_measured(self, patch: Patch, block: Block) -> bool:
        """Return whether this block is one of the evenly spaced ones on which ``patch`` is measured."""
        if self._rounding == "off" or _region(patch, block) is None:
            return False
        if self._rounding == "exact" or block.width < self.piece.shape[1]:
            return True
        height = max(1, BLOCK // block.width)
        first, last = patch.row // height, (patch.row + patch.height - 1) // height
        stride = max(1, (last - first + 1) // SAMPLED_BLOCKS)
        return (block.row // height - first) % stride == stride // 2

    def _measure(
        self,
        measured: list[int],
        stored: Array,
        grid: Array,
        product: Array,
        out: Array,
        block: Block,
        buffers: Buffers,
        findings: Findings,
    ) -> None:
        back = buffers.take("back", self.compute, block.size)
        before = buffers.take("before", self.compute, block.size)
        back[...] = out
        before[...] = stored
        back, before = back.reshape(grid.shape), before.reshape(grid.shape)
        for i in measured:
            patch = self.patches[i]
            region = _region(patch, block)
            assert region is not None
            if not self._alone[i]:
                np.subtract(grid[region], before[region], out=product[region])
            delta = product[region]
            changed = delta != 0
            lost = np.count_nonzero(changed & (back[region] == before[region]))
            error = (back[region] - grid[region]).reshape(-1)
            flat = delta.reshape(-1)
            findings.samples.append(
                Sample(
                    label=patch.label,
                    measured=flat.size,
                    error_squared=float(np.dot(error, error)),
                    delta_squared=float(np.dot(flat, flat)),
                    changed=int(np.count_nonzero(changed)),
                    lost=int(lost),
                )
            )

    def _inspect(self, stored: Array, out: Array, block: Block, findings: Findings) -> None:
        """Count NaN and infinities, separately for those that the base already had."""
        name, dtype = self.piece.name, self.piece.dtype_out.name
        bad_before = ~np.isfinite(stored.astype(self.compute))
        bad = ~np.isfinite(out.astype(self.compute)) & ~bad_before
        if self.patches and bad_before.any():
            findings.bad_base[name] = findings.bad_base.get(name, 0) + int(bad_before.sum())
        if not bad.any():
            return
        bad = bad.reshape(block.height, block.width)
        for patch in self.patches:
            region = _region(patch, block)
            count = 0 if region is None else int(bad[region].sum())
            if region is not None and count:
                key = (patch.label, name, dtype)
                findings.overflow[key] = findings.overflow.get(key, 0) + count
                bad[region] = False
        if bad.any():
            findings.overflow[name, name, dtype] = findings.overflow.get((name, name, dtype), 0) + int(
                bad.sum()
            )


def _order(patch: Patch) -> int:
    return 0 if patch.values is not None else 2 if patch.magnitude is not None else 1


def _overlap(one: Patch, two: Patch) -> bool:
    return (
        one.row < two.row + two.height
        and two.row < one.row + one.height
        and one.col < two.col + two.width
        and two.col < one.col + one.width
    )


def _region(patch: Patch, block: Block) -> Region | None:
    """Return the part of ``block`` that ``patch`` covers, in the block's own coordinates."""
    top, bottom = max(patch.row, block.row), min(patch.row + patch.height, block.row + block.height)
    left, right = max(patch.col, block.col), min(patch.col + patch.width, block.col + block.width)
    if top >= bottom or left >= right:
        return None
    return slice(top - block.row, bottom - block.row), slice(left - block.col, right - block.col)


def _within(patch: Patch, block: Block, region: Region) -> Region:
    """Return the same part in the patch's coordinates."""
    down, across = block.row - patch.row, block.col - patch.col
    rows, cols = region
    return slice(rows.start + down, rows.stop + down), slice(cols.start + across, cols.stop + across)
