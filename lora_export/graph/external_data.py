"""Lay out a graph's constants in one data file, and write it as a stream with patches applied."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.errors import OutputError
from lora_export.graph.onnx_file import (
    ConstantSource,
    GraphFile,
    byte_size,
    matrix_shape,
    shape_of,
    source_of,
)
from lora_export.progress import tell_size
from lora_export.storage.commit.leftovers import scratch_folder
from lora_export.storage.patch import Patch
from lora_export.storage.rounding import Mode, Rounding
from lora_export.storage.stream import BytesPiece, CopyPiece, MergePiece, Piece, write_pieces

# Constants below this size stay in the protobuf, where shape inference can read them.
INLINE_BYTES = 1024
_PAGE_BYTES = 4096
_SMALL_ALIGNMENT = 64


@dataclass(frozen=True, eq=False)
class InitializerChange:
    """Patches for one initializer.

    Attributes:
        patches: Function that makes the patches, in the view of `graph.matrix_shape`, when the constant is
            written: all adapters' factors in float32 at once would take most of the memory.
        stacked: True if the first two axes are rows (experts).
    """

    patches: Callable[[], tuple[Patch, ...]]
    stacked: bool = False


@dataclass(frozen=True)
class _Slot:
    value: ir.Value
    source: ConstantSource
    at: int


def plan_data(
    graph: GraphFile, changes: Mapping[ir.Value, InitializerChange], out: Path, shared_files: Set[Path]
) -> tuple[list[_Slot], int, int]:
    """Choose the constants of the data file; those that stay in ``shared_files`` refer to these files.

    Returns:
        The constants of the data file, its size, and the number of bytes that stay in the base's files.

    Raises:
        OutputError: A shared file is not in the output's folder or below it.
    """
    slots: list[_Slot] = []
    position = shared = 0
    outside: set[str] = set()
    for value in graph.initializers():
        tensor = value.const_value
        assert tensor is not None
        if value not in changes:
            if not isinstance(tensor, ir.ExternalTensor) and tensor.nbytes < INLINE_BYTES:
                continue
            if isinstance(tensor, ir.ExternalTensor) and Path(tensor.path) in shared_files:
                location = os.path.relpath(Path(tensor.path).resolve(), out.parent.resolve())
                if location.startswith(".."):
                    outside.add(str(tensor.path))
                else:
                    value.const_value = _reference(value, tensor, location, tensor.offset or 0)
                    shared += byte_size(tensor)
                continue
            if tensor.dtype == ir.DataType.STRING:
                continue
        source = source_of(tensor)
        alignment = _PAGE_BYTES if source.length >= 1 << 20 else _SMALL_ALIGNMENT
        position = -(-position // alignment) * alignment
        slots.append(_Slot(value, source, position))
        position += source.length
    if outside:
        raise OutputError(
            "the base's weights can't be shared from there: ONNX Runtime reads external data only from the "
            "model's own folder or below it",
            f"write the output into {Path(next(iter(outside))).parent}, or omit --share-base",
            sorted(outside),
        )
    return slots, position, shared


def write_data(
    staged: Path,
    name: str,
    slots: list[_Slot],
    size: int,
    changes: Mapping[ir.Value, InitializerChange],
    rounding: Mode,
    progress: Callable[[int], None] | None,
) -> dict[str, Rounding]:
    """Write the data file at ``staged``, and make each constant refer to it as ``name``.

    Returns:
        The loss by rounding, by module.
    """
    pieces = (_piece(slot, changes.get(slot.value)) for slot in slots)
    tell_size(size)
    costs = write_pieces(staged, size, pieces, rounding=rounding, progress=progress)
    for slot in slots:
        assert slot.value.const_value is not None
        slot.value.const_value = _reference(slot.value, slot.value.const_value, name, slot.at)
    return costs


def merged_values(
    value: ir.Value,
    change: InitializerChange,
    *,
    rounding: Mode = "off",
    scratch: Path | None = None,
    costs: dict[str, Rounding] | None = None,
) -> Array:
    """Return a constant with its patches applied, bit for bit as `write_data` would write it.

    Args:
        value: The constant.
        change: Its patches.
        rounding: Measurement of rounding.
        scratch: Folder for a large constant's file; None: the system's temporary folder.
        costs: Dict to which the loss by rounding, by module, is added.

    Raises:
        CheckpointError: A value is not finite.
    """
    tensor = value.const_value
    assert tensor is not None
    slot = _Slot(value, source_of(tensor), 0)
    with scratch_folder(scratch) as folder:
        path = folder / "values"
        found = write_pieces(path, slot.source.length, [_piece(slot, change)], rounding=rounding)
        if costs is not None:
            costs.update(found)
        return np.fromfile(path, tensor.dtype.numpy()).reshape(shape_of(tensor))


def _piece(slot: _Slot, change: InitializerChange | None) -> Piece:
    source, tensor = slot.source, slot.value.const_value
    assert tensor is not None
    if change is None:
        if source.path is not None:
            return CopyPiece(source.path, source.offset, source.length, slot.at)
        return BytesPiece(tensor.tobytes() if source.data is None else source.data, slot.at)
    dtype = tensor.dtype.numpy()
    shape = matrix_shape(shape_of(tensor), change.stacked)
    where: Path | np.ndarray
    if source.path is None:
        assert source.data is not None
        where = np.frombuffer(source.data, dtype).reshape(shape)
    else:
        where = source.path
    return MergePiece(
        name=str(slot.value.name),
        source=where,
        offset=source.offset,
        at=slot.at,
        shape=shape,
        dtype_in=dtype,
        dtype_out=dtype,
        patches=change.patches(),
    )


def _reference(value: ir.Value, tensor: ir.TensorProtocol, location: str, offset: int) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        location,
        offset,
        byte_size(tensor),
        tensor.dtype,
        shape=ir.Shape(shape_of(tensor)),
        name=str(value.name),
    )
