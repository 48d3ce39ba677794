"""The header of a ``.safetensors`` file, read and checked once for adapters and base models, without torch.

Layout (https://github.com/huggingface/safetensors, "Format"): eight bytes little endian with the header's
length, a JSON object name → ``{"dtype", "shape", "data_offsets": [start, stop]}`` (plus ``__metadata__``,
text → text), then the values, row-major, offsets counted from the header's end, with no byte between two
tensors or behind the last.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lora_export.storage.inputs import note_inputs
from lora_export.untrusted.documents import DocumentError, open_regular, parse_json

METADATA = "__metadata__"
FLOATS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    **{f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits // 8}") for kind in "UI" for bits in (8, 16, 32, 64)},
    **FLOATS,
}
# A header above this is a damaged length field, not a header (the reference reader has the same limit).
_MAX_HEADER_BYTES = 100_000_000
# Read, a header takes thirty times its size: of a large one the values must be the larger part, as they are
# in every file that somebody trained.
_SMALL_HEADER_BYTES, _HEADER_SHARE = 1 << 20, 5
# Beyond these numpy fails, also for a tensor without values; no file comes near them.
_MAX_COUNT, _MAX_AXES = 2**56, 32


class HeaderError(ValueError):
    """A file breaks rules of the format; its reader makes an error of ours of it.

    Attributes:
        problems: One sentence for each broken rule, without the file's name.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """One tensor; ``start`` and ``stop`` are byte offsets in the file, ``code`` the format's dtype word."""

    name: str
    code: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class FileHeader:
    """A header that keeps every rule.

    Attributes:
        content: The JSON object, in its own order and with ``__metadata__``.
        data_start: Where the values start: behind the header.
        size: The file's size in bytes.
        entries: The tensors by their place in the file.
    """

    content: Mapping[str, Any]
    data_start: int
    size: int
    entries: tuple[HeaderEntry, ...]

    @property
    def metadata(self) -> Mapping[str, str]:
        """The file's metadata; empty where there is none."""
        return self.content.get(METADATA) or {}


def read_file_header(path: Path, known_dtypes: bool = False) -> FileHeader:
    """Read and check the header alone; no values are touched.

    Args:
        path: The file.
        known_dtypes: Refuse tensors whose dtype is not in `DTYPES`, which can only be copied.

    Raises:
        HeaderError: With everything that is wrong.
        OSError: The file can't be read.
    """
    note_inputs([path])
    raw, size = _read(path)
    data_start = 8 + len(raw)
    problems: list[str] = []
    content = _parsed(raw)
    if not _is_metadata(content.get(METADATA)):
        problems.append(f"its {METADATA} is not a JSON object of texts")
    described = {name: value for name, value in content.items() if name != METADATA}
    found = [_entry(name, value, data_start, known_dtypes, problems) for name, value in described.items()]
    entries = sorted((e for e in found if e is not None), key=lambda entry: (entry.start, entry.stop))
    problems += _place_problems(entries, data_start, size, complete=len(entries) == len(found))
    if problems:
        raise HeaderError(problems)
    return FileHeader(content, data_start, size, tuple(entries))


def header_bytes(content: Mapping[str, Any]) -> bytes:
    """Return the start of a file: length and header, padded so that the values lie on 8 bytes."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    # The format pads with spaces.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read(path: Path) -> tuple[bytes, int]:
    """Return the header's text and the file's size."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(8)
        if len(first) < 8:
            raise HeaderError([f"truncated: it holds {size} bytes, and a header needs at least 8"])
        length = int.from_bytes(first, "little")
        if 8 + length > size:
            raise HeaderError([f"truncated: its header claims {length} bytes, and the file holds {size}"])
        if length > max(_SMALL_HEADER_BYTES, size // _HEADER_SHARE):
            raise HeaderError(
                [f"its header claims {length} of the file's {size} bytes: more than tensors' names need"]
            )
        if length > _MAX_HEADER_BYTES:
            raise HeaderError([f"its header claims {length} bytes, and {_MAX_HEADER_BYTES} is the most"])
        return file.read(length), size


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        content = parse_json(raw, max_bytes=_MAX_HEADER_BYTES)
    except DocumentError as error:
        raise HeaderError(
            f"its header can't be read as JSON: {problem}" for problem in error.problems
        ) from error
    if not isinstance(content, dict):
        raise HeaderError(["its header is not a JSON object"])
    return content


def _is_metadata(value: Any) -> bool:
    # The reference reader takes null as well.
    return value is None or (isinstance(value, dict) and all(isinstance(v, str) for v in value.values()))


def _entry(
    name: str, value: Any, data_start: int, known_dtypes: bool, problems: list[str]
) -> HeaderEntry | None:
    """Check one tensor; None where it has no place that others could be compared with."""
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        problems.append(f"'{name}' has no dtype, shape or data_offsets")
        return None
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        problems.append(f"'{name}' has the shape {shape} and data_offsets {offsets}: not counts")
        return None
    begin, end = offsets
    if not isinstance(code, str) or (known_dtypes and code not in DTYPES):
        problems.append(f"'{name}': dtype {code} is not one of {', '.join(DTYPES)}")
    elif len(shape) > _MAX_AXES or math.prod(n or 1 for n in shape) > _MAX_COUNT:
        problems.append(f"'{name}' has the shape {shape}: more than any array holds")
    else:
        # How many bits a value of another dtype has is not ours to know.
        wanted = math.prod(shape) * DTYPES[code].itemsize if code in DTYPES else max(end - begin, 0)
        if end - begin != wanted:
            problems.append(f"'{name}' {code} {shape} needs {wanted} bytes, data_offsets give {end - begin}")
    return HeaderEntry(name, str(code), tuple(shape), data_start + begin, data_start + max(begin, end))


def _are_counts(value: Any) -> bool:
    # By exact type: to Python, true is a number as well.
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= _MAX_COUNT for n in value)


def _place_problems(entries: list[HeaderEntry], data_start: int, size: int, complete: bool) -> list[str]:
    """Return what is wrong with the tensors' places; which bytes belong to none is known of all only."""
    problems = []
    expected = data_start
    for entry in entries:
        if entry.start < expected:
            problems.append(f"'{entry.name}' overlaps the tensor before it")
        elif entry.start > expected and complete:
            problems.append(f"{entry.start - expected} bytes before '{entry.name}' belong to no tensor")
        expected = max(expected, entry.stop)
    outside = [entry for entry in entries if entry.stop > size]
    if outside:
        # One sentence: a download that broke off would fill pages.
        others = f", as do {len(outside) - 1} more tensors" if len(outside) > 1 else ""
        first = outside[0]
        problems.append(f"truncated: '{first.name}' ends at byte {first.stop}, the file at {size}{others}")
    elif complete and expected < size:
        problems.append(f"{size - expected} bytes at the end belong to no tensor")
    return problems
