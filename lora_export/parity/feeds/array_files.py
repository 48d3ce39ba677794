"""Read arrays by name from the user's ``.npz`` or ``.safetensors`` file: feeds, and saved outputs.

An ``.npz`` is a zip archive of `numpy.save`'s files. The size in each header is compared with the archive
before memory is allocated, and only plain arrays are read.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from lora_export.adapter import Array
from lora_export.errors import AdapterError, BackendError
from lora_export.formats.reading.tensors import read_safetensors
from lora_export.untrusted.archives import CrowdedError, archive_problems, open_archive
from lora_export.untrusted.documents import open_regular

SUFFIXES = (".npz", ".safetensors")
_AGAIN = "save it again with numpy.savez(file, **arrays) or safetensors"
_ENDING = ".npy"
# Damaged arrays that are named; the rest of such a file is not read.
_MOST_PROBLEMS = 20
_PART_BYTES = 1 << 20
# Version 3 is only for arrays of records, whose fields have names.
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_arrays(path: Path) -> dict[str, Array]:
    """Return name → array, in the file's order and this machine's byte order.

    Args:
        path: A file whose suffix is one of `SUFFIXES`.

    Raises:
        BackendError: The file is damaged, claims more than it holds, or holds something else than arrays.
    """
    if path.suffix == ".safetensors":
        try:
            return dict(read_safetensors(path)[0])
        except AdapterError as error:
            raise BackendError(error.message, _AGAIN, error.problems) from error
    arrays: dict[str, Array] = {}
    problems = []
    try:
        with open_regular(path) as file, open_archive(file) as archive:
            entries = archive.infolist()
            if found := archive_problems(path.stat().st_size, entries):
                hint = "save it with numpy.savez(file, **arrays), not compressed, or as .safetensors"
                raise BackendError(f"{path} is not unpacked", hint, found)
            for entry in entries:
                name = entry.filename.removesuffix(_ENDING)
                try:
                    if name in arrays:
                        raise ValueError("it is there twice, with .npy in its name and without")
                    size = entry.file_size
                    # With one byte more, a stream that is longer than stated is not cut off, but found.
                    entry.file_size += 1
                    with archive.open(entry) as member:
                        arrays[name] = _array(member, size)
                except Exception as error:  # a damaged member: zipfile, zlib and numpy raise many kinds
                    problems.append(f"{name}: {type(error).__name__}: {error}")
                    if len(problems) == _MOST_PROBLEMS:
                        problems.append("… and maybe others: the rest was not read")
                        break
    except BackendError:
        raise
    except Exception as error:  # the same for a damaged file
        raise BackendError(f"{path} can't be read: {_trouble(path, error)}", _AGAIN) from error
    if problems:
        hint = "save plain arrays of numbers with numpy.savez(file, **arrays)"
        raise BackendError(f"{path} holds arrays that can't be read", hint, problems)
    return arrays


def _array(member: IO[bytes], size: int) -> Array:
    version = np.lib.format.read_magic(member)
    if version not in _HEADERS:
        raise ValueError(f"version {version[0]}.{version[1]} of the format, wanted 1.0 or 2.0")
    shape, transposed, dtype = _HEADERS[version](member)
    needed, held = math.prod(shape) * dtype.itemsize, size - member.tell()
    if dtype.hasobject or not dtype.itemsize or dtype.shape:
        raise ValueError(f"holds {dtype}, wanted numbers")
    if needed != held or min(shape, default=0) < 0:
        raise ValueError(f"its shape {list(shape)} of {dtype} needs {needed} bytes, it holds {held}")
    values: np.ndarray[Any, Any] = np.frombuffer(_content(member, held), dtype)
    # Equal numbers in another byte order are another dtype to numpy.
    if not dtype.isnative:
        values = values.byteswap(inplace=True).view(dtype.newbyteorder("="))
    return values.reshape(shape, order="F" if transposed else "C")


def _content(member: IO[bytes], size: int) -> bytearray:
    """Return the last bytes of an archive's member.

    Part by part: without a size, `zipfile` unpacks all that the stream holds.
    """
    content = bytearray(size)
    at = 0
    while part := member.read(min(_PART_BYTES, size - at + 1)):
        if at + len(part) > size:
            raise ValueError(f"it unpacks to more than the {size} bytes that the archive states")
        content[at : at + len(part)] = part
        at += len(part)
    if at < size:
        raise ValueError(f"it unpacks to {at} bytes, the archive states {size}")
    return content


def _trouble(path: Path, error: Exception) -> str:
    if isinstance(error, CrowdedError):
        return str(error)
    if not isinstance(error, OSError) and not zipfile.is_zipfile(path):
        return "it is not a zip archive, which numpy.savez writes"
    return f"{type(error).__name__}: {error}"
