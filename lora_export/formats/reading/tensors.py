"""Tensors of a ``.safetensors`` file without torch: header, values, checks, writing."""

from __future__ import annotations

import hashlib
import math
import mmap
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
from lora_export.untrusted.documents import open_regular

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
    """Return the file's tensors, memory-mapped and read-only, and its metadata.

    Raises:
        AdapterError: See `read_header`.
        InputChangedError: Another file has taken its place between header and values.
    """
    before = FileState.of(path)
    header = read_header(path)
    with open_regular(path) as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    refuse_changed([before])
    tensors = {
        name: np.frombuffer(view, entry.dtype, entry.parameters, entry.start).reshape(entry.shape)
        if entry.parameters
        else np.empty(entry.shape, entry.dtype)
        for name, entry in header.entries.items()
    }
    return tensors, dict(header.metadata)


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
    with open_regular(path) as file:
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
