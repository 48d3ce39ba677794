"""Read, check and write the tensors of a ``.safetensors`` file without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from lora_export.adapter import Array
from lora_export.errors import AdapterError
from lora_export.storage.inputs import FileState, refuse_changed
from lora_export.storage.safetensors import (
    DTYPES,
    FLOATS,
    METADATA,
    FileHeader,
    HeaderError,
    StoredTensor,
    header_bytes,
    read_file_header,
)
from lora_export.untrusted.documents import open_regular

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_FLOATS = frozenset(FLOATS.values())


def read_header(path: Path) -> FileHeader:
    """Read and check only the header; no values are read.

    Raises:
        AdapterError: The file can't be read, breaks a rule of the format, or has a dtype that numpy lacks.
    """
    try:
        return read_file_header(path, known_dtypes=True)
    except OSError as error:
        raise AdapterError(
            f"cannot read {path}: {error.strerror}", "check the path and its permissions"
        ) from error
    except HeaderError as error:
        raise AdapterError(
            f"{path} is not a complete .safetensors file", "download or save it again", error.problems
        ) from error


def read_safetensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the file's tensors, read-only, and its metadata.

    The values are read, not mapped: whoever saves an adapter in place makes its file shorter first, and a map
    of what is not there any more ends the process (SIGBUS) when it is looked at.

    Raises:
        AdapterError: As in `read_header`.
        InputChangedError: The file was replaced or written to between reading its header and its values.
    """
    before = FileState.of(path)
    header = read_header(path)
    try:
        with open_regular(path) as file:
            # In the header's order: an adapter's modules come in the order in which its tool named them.
            tensors = {name: _read_tensor(file, tensor) for name, tensor in header.named.items()}
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


def _read_tensor(file: BinaryIO, tensor: StoredTensor) -> Array:
    raw: Array = np.empty(tensor.length, np.uint8)
    view, done = raw.data, 0
    file.seek(tensor.offset)
    while done < len(raw):
        step = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not step:
            raise _ShortError(
                f"it ends at byte {tensor.offset + done}, within the values that its header names"
            )
        done += step
    raw.flags.writeable = False
    return raw.view(tensor.dtype).reshape(tensor.shape)


def write_safetensors(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write ``tensors`` in the order of their names; equal tensors give equal bytes.

    Raises:
        AdapterError: The format has no code for a dtype.
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


def value_problems(tensors: Iterable[tuple[str, Array]]) -> list[str]:
    """Return a line for each trained tensor that is not floating-point, is empty, or has NaN or infinity."""
    problems = []
    for name, array in tensors:
        if array.dtype not in _FLOATS:
            problems.append(f"{name}: dtype {array.dtype}, wanted a float")
        elif not array.size:
            problems.append(f"{name}: shape {array.shape} holds no values (a shard saved without gathering?)")
        elif count := _not_finite(array):
            # Products are computed in float32.
            beyond = ", or too large for float32" if array.dtype == np.float64 else ""
            problems.append(f"{name}: {count} of {array.size} values are NaN or infinite{beyond}")
    return problems


def _not_finite(array: Array) -> int:
    if array.dtype == ml_dtypes.bfloat16:
        # Found by the exponent's bits: widening bfloat16 first would cost two copies.
        bits = array.reshape(-1).view(np.uint16)
        return int(np.count_nonzero((bits & 0x7F80) == 0x7F80))
    with np.errstate(over="ignore"):
        values = array.astype(np.float32) if array.dtype.itemsize in (1, 8) else array
    return int(values.size - np.count_nonzero(np.isfinite(values)))
