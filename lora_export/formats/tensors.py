"""Tensors of a ``.safetensors`` file without torch: header, values, checks, writing.

Layout (https://github.com/huggingface/safetensors, "Format"): eight bytes little endian with the header's
length, a JSON object name → ``{"dtype", "shape", "data_offsets": [start, stop]}`` (plus ``__metadata__``,
text → text), then the values, row-major, offsets counted from the header's end.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lora_export.adapter import Array
from lora_export.errors import AdapterError

# A header above this is a damaged length field, not a header (the reference reader has the same limit).
MAX_HEADER_BYTES = 100_000_000

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
FLOATS = frozenset(DTYPES[code] for code in ("F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2"))


@dataclass(frozen=True)
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
        AdapterError: The file is truncated, its header is no header, or an offset lies outside it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            if len(first) < 8:
                raise _damaged(path, f"it holds {size} bytes, and a header needs at least 8")
            (length,) = struct.unpack("<Q", first)
            if length > MAX_HEADER_BYTES or 8 + length > size:
                raise _damaged(path, f"its header claims {length} bytes, and the file holds {size}")
            raw = file.read(length)
    except OSError as error:
        raise AdapterError(
            f"cannot read {path}: {error.strerror}", "check the path and its permissions"
        ) from error
    problems: list[str] = []
    try:
        header = json.loads(raw, object_pairs_hook=lambda pairs: _object(pairs, problems))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise _damaged(path, "its __metadata__ is not a JSON object")
    entries = {name: _entry(name, value, 8 + length, size, problems) for name, value in header.items()}
    if problems:
        raise _damaged(path, "its header doesn't fit its values", problems)
    return Header({name: entry for name, entry in entries.items() if entry}, metadata)


def _object(pairs: list[tuple[str, Any]], problems: list[str]) -> dict[str, Any]:
    """Make an object of its pairs; json would silently keep the last of two tensors of one name."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        problems += [f"{name}: is there twice" for name in made if names.count(name) > 1]
    return made


def _entry(name: str, value: Any, base: int, size: int, problems: list[str]) -> Entry | None:
    try:
        code, shape = value["dtype"], tuple(int(n) for n in value["shape"])
        start, stop = (int(n) for n in value["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError):
        problems.append(f"{name}: has no dtype, shape or data_offsets")
        return None
    if not isinstance(code, str) or code not in DTYPES:
        problems.append(f"{name}: dtype {code} is not one of {', '.join(DTYPES)}")
        return None
    wanted = math.prod(shape) * DTYPES[code].itemsize
    if min((*shape, start), default=0) < 0 or stop - start != wanted:
        problems.append(f"{name}: {code} {shape} needs {wanted} bytes, data_offsets give {stop - start}")
    elif base + stop > size:
        problems.append(f"{name}: ends at byte {base + stop}, the file at {size}")
    return Entry(DTYPES[code], shape, base + start, base + stop)


def read_safetensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the file's tensors, memory-mapped and read-only, and its metadata.

    Raises:
        AdapterError: See `read_header`.
    """
    header = read_header(path)
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
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
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
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
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
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
        if array.dtype not in FLOATS:
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


def _damaged(path: Path, what: str, problems: Iterable[str] = ()) -> AdapterError:
    return AdapterError(
        f"{path} is not a complete .safetensors file: {what}", "download or save it again", tuple(problems)
    )
