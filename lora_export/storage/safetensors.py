"""Read and check the header of a ``.safetensors`` file, for adapters and base models, without torch.

Layout (https://github.com/huggingface/safetensors, "Format"): eight bytes little endian with the header's
length, a JSON object name → ``{"dtype", "shape", "data_offsets": [start, stop]}`` (plus ``__metadata__``,
text → text), then the values, row-major, offsets counted from the header's end, without any byte between two
tensors or after the last.
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
# A header in memory takes thirty times its size: beside a large one, the values must be the larger part, as
# in every trained file.
_SMALL_HEADER_BYTES, _HEADER_SHARE = 1 << 20, 5
# Beyond these numpy fails, even for a tensor without values; real files are far below.
_MAX_COUNT, _MAX_AXES = 2**56, 32


class HeaderError(ValueError):
    """Error for a file that breaks rules of the format; its reader turns it into one of ours.

    Attributes:
        problems: One sentence for each broken rule, without the file's name.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        name: Name of the tensor.
        file: The file.
        code: The format's word for the dtype, such as ``BF16``.
        shape: Shape of the tensor.
        offset: Its start, in bytes from the start of the file.
        length: Its size in bytes.
    """

    name: str
    file: Path
    code: str
    shape: tuple[int, ...]
    offset: int
    length: int

    @property
    def end(self) -> int:
        """Its end, in bytes from the start of the file."""
        return self.offset + self.length

    @property
    def dtype(self) -> np.dtype[Any]:
        """Numpy's dtype; KeyError where numpy has none."""
        return DTYPES[self.code]


@dataclass(frozen=True, kw_only=True)
class FileHeader:
    """A valid header.

    Attributes:
        path: The file.
        size: The file's size in bytes.
        data_start: Offset of the values, after the header, in bytes.
        content: The JSON object, in its own order and with ``__metadata__``.
        tensors: The tensors in the order of their places in the file.
    """

    path: Path
    size: int
    data_start: int
    content: Mapping[str, Any]
    tensors: tuple[StoredTensor, ...]

    @property
    def named(self) -> dict[str, StoredTensor]:
        """Name → tensor in the header's own order, in which a tool named them."""
        by_name = {tensor.name: tensor for tensor in self.tensors}
        return {name: by_name[name] for name in self.content if name in by_name}

    @property
    def metadata(self) -> Mapping[str, str]:
        """The file's metadata; empty without any."""
        return self.content.get(METADATA) or {}


def read_file_header(path: Path, known_dtypes: bool = False) -> FileHeader:
    """Read and check only the header; no values are read.

    Args:
        path: The file.
        known_dtypes: Refuse tensors whose dtype is not in `DTYPES`, which can only be copied.

    Raises:
        HeaderError: The header breaks rules; all problems are listed.
        OSError: The file can't be read.
    """
    note_inputs([path])
    raw, size = _read(path)
    data_start = 8 + len(raw)
    problems: list[str] = []
    content = _parsed(raw)
    if not _is_metadata(content.get(METADATA)):
        problems.append(f"its {METADATA} is not a JSON object of strings")
    described = {name: value for name, value in content.items() if name != METADATA}
    found = [
        _tensor(path, name, value=value, data_start=data_start, known_dtypes=known_dtypes, problems=problems)
        for name, value in described.items()
    ]
    tensors = sorted((one for one in found if one is not None), key=lambda one: (one.offset, one.end))
    problems += _place_problems(tensors, data_start, size, complete=len(tensors) == len(found))
    if problems:
        raise HeaderError(problems)
    return FileHeader(path=path, size=size, data_start=data_start, content=content, tensors=tuple(tensors))


def header_bytes(content: Mapping[str, Any]) -> bytes:
    """Return the start of a file: length and header, padded so that the values are aligned to 8 bytes."""
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
            raise HeaderError([f"truncated: it has {size} bytes, but a header needs at least 8"])
        length = int.from_bytes(first, "little")
        if 8 + length > size:
            raise HeaderError([f"truncated: its header claims {length} bytes, but the file has {size}"])
        if length > max(_SMALL_HEADER_BYTES, size // _HEADER_SHARE):
            raise HeaderError(
                [f"its header claims {length} of the file's {size} bytes: more than tensors' names need"]
            )
        if length > _MAX_HEADER_BYTES:
            raise HeaderError([f"its header claims {length} bytes, but the limit is {_MAX_HEADER_BYTES}"])
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


def _tensor(
    path: Path, name: str, value: Any, data_start: int, known_dtypes: bool, problems: list[str]
) -> StoredTensor | None:
    """Check and return one tensor; None if it has no valid place in the file."""
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
        # The size of values of other dtypes is unknown here.
        wanted = math.prod(shape) * DTYPES[code].itemsize if code in DTYPES else max(end - begin, 0)
        if end - begin != wanted:
            problems.append(
                f"'{name}' {code} {shape} needs {wanted} bytes, but data_offsets give {end - begin}"
            )
    return StoredTensor(
        name=name,
        file=path,
        code=str(code),
        shape=tuple(shape),
        offset=data_start + begin,
        length=max(end - begin, 0),
    )


def _are_counts(value: Any) -> bool:
    # By exact type, because Python's booleans are numbers as well.
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= _MAX_COUNT for n in value)


def _place_problems(tensors: list[StoredTensor], data_start: int, size: int, complete: bool) -> list[str]:
    """Return problems of the tensors' places; unused bytes are reported only if all places are known."""
    problems = []
    expected = data_start
    for tensor in tensors:
        if tensor.offset < expected:
            problems.append(f"'{tensor.name}' overlaps the tensor before it")
        elif tensor.offset > expected and complete:
            problems.append(f"{tensor.offset - expected} bytes before '{tensor.name}' belong to no tensor")
        expected = max(expected, tensor.end)
    outside = [tensor for tensor in tensors if tensor.end > size]
    if outside:
        # One line, because an interrupted download would fill pages.
        others = f", as do {len(outside) - 1} more tensors" if len(outside) > 1 else ""
        first = outside[0]
        problems.append(f"truncated: '{first.name}' ends at byte {first.end}, the file at {size}{others}")
    elif complete and expected < size:
        problems.append(f"{size - expected} bytes at the end belong to no tensor")
    return problems
