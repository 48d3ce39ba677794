"""Lay out a shard that is written: tensors and order as before, another dtype or one tensor more."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from lora_export.base.planning.checkpoint_plan import CheckpointPlan, view_of
from lora_export.storage.safetensors import DTYPES, FLOATS, METADATA, FileHeader, StoredTensor, header_bytes
from lora_export.storage.stream import BytesPiece, CopyPiece, MergePiece, Piece, RequantisedPiece
from lora_export.untrusted.documents import open_regular


@dataclass(frozen=True, kw_only=True)
class OutputTensor:
    """Tensor of the output.

    Attributes:
        name: Name in the output.
        tensor: The stored tensor that it comes from.
        code: Code of the dtype in the output.
        shape: Shape in the output.
        at: Position in the output file, in bytes.
        length: Size in the output, in bytes.
    """

    name: str
    tensor: StoredTensor
    code: str
    shape: tuple[int, ...]
    at: int
    length: int


@dataclass(frozen=True)
class Layout:
    """File of the output: its header's bytes and its tensors, in file order."""

    header: bytes
    entries: tuple[OutputTensor, ...]
    size: int

    @cached_property
    def by_name(self) -> dict[str, OutputTensor]:
        """Tensors by their names."""
        return {entry.name: entry for entry in self.entries}


def layout_of(shard: FileHeader, placed: CheckpointPlan, code: str | None) -> Layout:
    """Return the layout of a shard in the output.

    The header is written again only if it has to change; the metadata and the order of names and data stay.
    An added tensor comes after the others of the shard that holds its source. With another dtype, codes with
    scales become plain values, and the scales are left out.

    Args:
        shard: The base's file.
        placed: The plan.
        code: Code of the dtype of every float tensor, or None to leave each as it is.
    """
    dropped = placed.quantised.beside if code else set()
    wanted = [(tensor.name, tensor) for tensor in shard.tensors if tensor.name not in dropped]
    by_name = dict(wanted)
    added = [(a.name, by_name[a.source]) for a in placed.added if a.source in by_name]
    codes = [
        code if code and (t.code in FLOATS or t.name in placed.quantised.scaled) else t.code
        for _, t in wanted + added
    ]
    resized = any(name in placed.resized for name, _ in wanted)
    same = len(wanted) == len(shard.tensors) and not added and not resized
    if same and all(c == t.code for c, (_, t) in zip(codes, wanted, strict=True)):
        with open_regular(shard.path) as file:
            header = file.read(shard.data_start)
        entries = [
            OutputTensor(name=name, tensor=t, code=t.code, shape=t.shape, at=t.offset, length=t.length)
            for name, t in wanted
        ]
        return Layout(header, tuple(entries), shard.size)
    at, entries = 0, []
    for (name, tensor), new in zip(wanted + added, codes, strict=True):
        shape = placed.resized.get(name, tensor.shape)
        same = new == tensor.code and shape == tensor.shape
        length = tensor.length if same else math.prod(shape) * DTYPES[new].itemsize
        entries.append(OutputTensor(name=name, tensor=tensor, code=new, shape=shape, at=at, length=length))
        at += length
    header = _header(shard, entries)
    moved = tuple(replace(entry, at=entry.at + len(header)) for entry in entries)
    return Layout(header, moved, at + len(header))


def pieces_of(layout: Layout, placed: CheckpointPlan) -> Iterator[Piece]:
    """Yield the pieces of the file; runs of unchanged tensors become one copy, patches are computed late."""
    yield BytesPiece(layout.header, 0)
    run: CopyPiece | None = None
    requantised = _requantised(layout, placed)
    for entry in layout.entries:
        if entry.name in requantised:
            piece: Piece | None = requantised[entry.name]
        elif not placed.changes.get(entry.name) and entry.code == entry.tensor.code:
            run, done = _extended(run, entry)
            if done is not None:
                yield done
            continue
        else:
            piece = _merged(entry, placed)
        if run is not None:
            yield run
            run = None
        if piece is not None:
            yield piece
    if run is not None:
        yield run


def _merged(entry: OutputTensor, placed: CheckpointPlan) -> MergePiece:
    """Return the piece for a tensor that is changed, or written in another dtype."""
    out = FLOATS[entry.code]
    values = placed.quantised.values(entry.name) if entry.name in placed.quantised.scaled else None
    if entry.name in placed.resized:
        # The adapter's values replace all of it.
        values = np.broadcast_to(np.zeros(1, FLOATS[entry.tensor.code]), entry.shape)
    stored = FLOATS[entry.tensor.code] if values is None else values.dtype
    wide: type[Any] = np.float64 if np.dtype(np.float64) in (stored, out) else np.float32
    return MergePiece(
        name=entry.name,
        source=entry.tensor.file if values is None else values,
        offset=entry.tensor.offset,
        at=entry.at,
        shape=view_of(entry.shape, entry.name in placed.stacked),
        dtype_in=stored,
        dtype_out=out,
        patches=[make(wide) for make in placed.changes.get(entry.name, [])],
    )


def _requantised(layout: Layout, placed: CheckpointPlan) -> dict[str, RequantisedPiece | None]:
    """Return the pieces for changed codes and their scales; None for a tensor written with the other one."""
    found: dict[str, RequantisedPiece | None] = {}
    for name, scaled in placed.quantised.scaled.items():
        codes, scales = layout.by_name.get(name), layout.by_name.get(scaled.scales.name)
        stays = codes is None or codes.code == codes.tensor.code
        if not placed.changes.get(name) or not stays or (codes is None and scales is None):
            continue
        if scales is not None:
            found[scales.name] = None
        found[name if codes is not None else scaled.scales.name] = RequantisedPiece(
            name=name,
            read=partial(placed.quantised.read, name),
            grid=scaled.grid,
            shape=view_of(scaled.codes.shape, name in placed.stacked),
            patches=[make(np.float32) for make in placed.changes[name]],
            codes_at=None if codes is None else codes.at,
            scales_at=None if scales is None else scales.at,
        )
    return found


def _extended(run: CopyPiece | None, entry: OutputTensor) -> tuple[CopyPiece, CopyPiece | None]:
    """Return the run with the entry, and a finished run if the entry doesn't continue it."""
    tensor = entry.tensor
    if run is not None and (run.offset + run.length, run.at + run.length) == (tensor.offset, entry.at):
        return CopyPiece(run.source, run.offset, run.length + entry.length, run.at), None
    return CopyPiece(tensor.file, tensor.offset, entry.length, entry.at), run


def _header(shard: FileHeader, entries: list[OutputTensor]) -> bytes:
    by_name = {entry.name: entry for entry in entries}
    order = [*shard.content, *(name for name in by_name if name not in shard.content)]
    header: dict[str, Any] = {}
    for name in order:
        if name == METADATA:
            header[name] = shard.content[name]
            continue
        if name not in by_name:
            continue
        entry = by_name[name]
        offsets = [entry.at, entry.at + entry.length]
        header[name] = {"dtype": entry.code, "shape": list(entry.shape), "data_offsets": offsets}
    return header_bytes(header)
