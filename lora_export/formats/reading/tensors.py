"""Tensors of a ``.safetensors`` file without torch: header, values, checks, writing."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lora_export.adapter import Array
from lora_export.errors import AdapterError
from lora_export.storage.inputs import FileState, refuse_changed
from lora_export.storage.safetensors import (
    DTYPES,
    FLOATS,
    METADATA,
    HeaderError,
    header_bytes,
    read_file_header,
)

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_FLOATS = frozenset(FLOATS.values())


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor as the header describes it; ``start`` and ``stop`` are byte offsets in the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def parameters(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The header of a ``.safetensors`` file."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header alone; no values are touched.

    Raises:
        AdapterError: The file can't be read, breaks a rule of the format, or has a dtype that numpy lacks.
    """
    try:
        found = read_file_header(path, known_dtypes=True)
    except OSError as error:
        raise AdapterError(
            f"cannot read {path}: {error.strerror}", "check the path and its permissions"
        ) from error
    except HeaderError as error:
        raise AdapterError(
            f"{path} is not a complete .safetensors file", "download or save it again", error.problems
        ) from error
    made = {e.name: Entry(DTYPES[e.code], e.shape, e.start, e.stop) for e in found.entries}
    # In the header's order: an adapter's modules come in the order in which its tool named them.
    return Header({name: made[name] for name in found.content if name in made}, found.metadata)


def read_safetensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the file's tensors, read-only, and its metadata.

    The values are read, not mapped: whoever saves an adapter in place makes its file shorter first, and a map
    of what is not there any more ends the process (SIGBUS) when it is looked at.

    Raises:
        AdapterError: See `read_header`.
        InputChangedError: It was replaced or written to between header and values.
    """
    before = FileState.of(path)
    header = read_header(path)
    try:
        with path.open("rb", buffering=0) as file:
            tensors = {name: _read_entry(file, entry) for name, entry in header.entries.items()}
    except (OSError, _ShortError) as error:
        refuse_changed([before])
        raise AdapterError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}",
            "check the disk, or download or save the file again",
        ) from error
    refuse_changed([before])
    return tensors, dict(header.metadata)


class _ShortError(Exception):
    """A file ends before what its header describes."""


def _read_entry(file: io.FileIO, entry: Entry) -> Array:
    raw: Array = np.empty(entry.stop - entry.start, np.uint8)
    view, done = raw.data, 0
    file.seek(entry.start)
    while done < len(raw):
        step = file.readinto(view[done:])
        if not step:
            raise _ShortError(
                f"it ends at byte {entry.start + done}, within the values that its header names"
            )
        done += step
    raw.flags.writeable = False
    return raw.view(entry.dtype).reshape(entry.shape)


def write_safetensors(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write ``tensors`` in the order of their names; the same tensors give the same bytes.

    Raises:
        AdapterError: A dtype that the format has no code for.
        OSError: The file can't be written.
    """
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for name in sorted(tensors):
        array = tensors[name]
        if array.dtype not in _CODES:
            raise AdapterError(
                f"{name}: safetensors has no code for dtype {array.dtype}", "convert it to float32"
            )
        header[name] = {
            "dtype": _CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    start = header_bytes(header)
    with path.open("wb") as file:
        file.write(start)
        for name in sorted(tensors):
            file.write(np.ascontiguousarray(tensors[name]).tobytes())


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def value_problems(tensors: Iterable[tuple[str, Array]]) -> list[str]:
    """Return one line for each trained tensor that is no float, has no values, or holds NaN or infinity."""
    problems = []
    for name, array in tensors:
        if array.dtype not in _FLOATS:
            problems.append(f"{name}: dtype {array.dtype}, wanted a float")
        elif not array.size:
            problems.append(f"{name}: shape {array.shape} holds no values (a shard saved without gathering?)")
        elif count := _not_finite(array):
            problems.append(f"{name}: {count} of {array.size} values are NaN or infinite")
    return problems


def _not_finite(array: Array) -> int:
    if array.dtype == ml_dtypes.bfloat16:
        # By the exponent's bits: widening bf16 first would cost two copies.
        bits = array.reshape(-1).view(np.uint16)
        return int(np.count_nonzero((bits & 0x7F80) == 0x7F80))
    values = array.astype(np.float32) if array.dtype.itemsize == 1 else array
    return int(values.size - np.count_nonzero(np.isfinite(values)))
