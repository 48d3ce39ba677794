"""Check the claims of a torch checkpoint before torch allocates anything for it.

The walk follows what torch reads. Of the two layouts, a file is a zip archive if its first bytes are those of
one. For a zip, torch's own reader returns the pickle, once `layout_problems` has found that all readers see
the same archive: torch looks names up in the first entry's folder, regardless of case, and ignores bytes
before an archive.

Sources: https://github.com/pytorch/pytorch ``torch/serialization.py`` (``_is_zipfile``, ``_save``,
``_legacy_save``), ``caffe2/serialize/inline_container.cc`` (``PyTorchStreamReader::init``, ``getRecordID``).
"""

from __future__ import annotations

import io
import os
import zipfile
from typing import IO

from lora_export.formats.reading.pickle_walker import LARGE, PickleWalker, Refused, Storage
from lora_export.untrusted.archives import (
    START,
    CrowdedError,
    archive_entries,
    archive_problems,
    layout_problems,
    too_much,
)
from lora_export.untrusted.fields import seen

# One byte of opcode makes an object of sixty; compared to its storages, a checkpoint's pickle is small.
_SMALL_PICKLE, _PICKLE_SHARE = 1 << 20, 8
_PICKLE = "data.pkl"


def claim_problems(file: IO[bytes]) -> list[str]:
    """Return the claims of a checkpoint that can't be true.

    Args:
        file: The file for `torch.load`; its position is reset to the beginning.

    Raises:
        OSError: The file can't be read.
        Exception: The file is damaged; whatever the zip's or the pickle's reader raised.
    """
    size = os.fstat(file.fileno()).st_size
    most = max(_SMALL_PICKLE, size // _PICKLE_SHARE)
    try:
        # torch's rule: zipfile would look for an archive at the file's end.
        if file.read(len(START)) == START:
            entries = archive_entries(file)
            if problems := archive_problems(size, entries) or layout_problems(file, size, entries):
                return problems
            walker = _walk_archive(file, {entry.filename: entry.file_size for entry in entries}, most)
        else:
            _refuse_second(file)
            file.seek(0)
            walker = _walk_legacy(file, most)
    except Refused as error:
        return [str(error)]
    finally:
        file.seek(0)
    stored = sum(storage.count * storage.item_bytes for storage in walker.storages.values())
    if stored > size + _SMALL_PICKLE:
        return [f"its storages claim {stored} bytes, but the file has {size}"]
    if walker.claimed > too_much(size):
        return [
            f"its tensors claim {walker.claimed} bytes, but the file has {size}: values are "
            "repeated (torch.Tensor.expand); save .contiguous() tensors"
        ]
    return []


def _walk_archive(file: IO[bytes], sizes: dict[str, int], most: int) -> PickleWalker:
    """Walk the pickle that torch's own reader finds in an archive."""
    import torch

    name = f"{next(iter(sizes)).partition('/')[0]}/{_PICKLE}"
    if name not in sizes:
        raise Refused(f"it has no entry {seen(name)}, in which torch.save writes names and shapes")
    if sizes[name] > most:
        raise Refused(LARGE)
    file.seek(0)  # torch takes the current position for the beginning
    walker = PickleWalker(io.BytesIO(torch._C.PyTorchFileReader(file).get_record(_PICKLE)), most)
    walker.load()
    return walker


def _refuse_second(file: IO[bytes]) -> None:
    """Refuse a file of the old layout with an archive after it, which other readers would read."""
    try:
        entries = archive_entries(file)
    except CrowdedError as error:
        raise Refused(f"a zip archive follows after its beginning: {error}") from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return
    if entries:
        raise Refused(f"a zip archive of {len(entries)} entries follows after its beginning")


def _walk_legacy(file: IO[bytes], most: int) -> PickleWalker:
    """Walk a file from before torch 1.6: magic number, version, machine, object, keys of its storages."""
    storages: dict[str, Storage] = {}
    claimed = 0
    for _ in range(5):
        walker = PickleWalker(file, most)
        walker.load()
        storages |= walker.storages
        claimed += walker.claimed
    walker.storages, walker.claimed = storages, claimed
    return walker
