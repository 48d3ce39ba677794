"""What a torch checkpoint claims, known before torch allocates anything for it.

What is walked is what torch reads. Of the two layouts it is a zip archive where the first bytes say so. Of a
zip torch's own reader hands out the pickle, once `layout_problems` found that all readers see one archive: it
looks names up in the first entry's folder, whatever their capitals, and knows nothing of bytes before an
archive.

Sources: https://github.com/pytorch/pytorch ``torch/serialization.py`` (``_is_zipfile``, ``_save``,
``_legacy_save``), ``caffe2/serialize/inline_container.cc`` (``PyTorchStreamReader::init``, ``getRecordID``).
"""

from __future__ import annotations

import io
import os
import zipfile
from typing import IO

from lora_export.formats.reading.pickle_walker import LARGE, Refused, Storage, Walker
from lora_export.untrusted.archives import START, archive_entries, archive_problems, layout_problems, too_much
from lora_export.untrusted.fields import seen

# An opcode of one byte makes an object of sixty: beside its storages a checkpoint's pickle is small.
_SMALL_PICKLE, _PICKLE_SHARE = 1 << 20, 8
_PICKLE = "data.pkl"


def claim_problems(file: IO[bytes]) -> list[str]:
    """Return what a checkpoint claims and can't have.

    Args:
        file: What `torch.load` is to read; it is left at its beginning.

    Raises:
        OSError: It can't be read.
        Exception: It is damaged: whatever the zip's or the pickle's reader met.
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
        return [f"its storages are said to hold {stored} bytes, the file holds {size}"]
    if walker.claimed > too_much(size):
        return [
            f"its tensors are said to hold {walker.claimed} bytes, the file holds {size}: values are "
            "repeated (torch.Tensor.expand); save .contiguous() tensors"
        ]
    return []


def _walk_archive(file: IO[bytes], sizes: dict[str, int], most: int) -> Walker:
    """Walk the pickle that torch's own reader finds in an archive."""
    import torch

    name = f"{next(iter(sizes)).partition('/')[0]}/{_PICKLE}"
    if name not in sizes:
        raise Refused(f"it has no entry {seen(name)}, in which torch.save writes names and shapes")
    if sizes[name] > most:
        raise Refused(LARGE)
    file.seek(0)  # It takes what is here for the beginning.
    walker = Walker(io.BytesIO(torch._C.PyTorchFileReader(file).get_record(_PICKLE)), most)
    walker.load()
    return walker


def _refuse_second(file: IO[bytes]) -> None:
    """Refuse a file of the old layout with an archive behind it, which other readers would read."""
    try:
        entries = archive_entries(file)
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return
    if entries:
        raise Refused(f"a zip archive of {len(entries)} entries lies behind its beginning")


def _walk_legacy(file: IO[bytes], most: int) -> Walker:
    """Walk a file of before torch 1.6: magic number, version, the machine, the object, its storages' keys."""
    storages: dict[str, Storage] = {}
    claimed = 0
    for _ in range(5):
        walker = Walker(file, most)
        walker.load()
        storages |= walker.storages
        claimed += walker.claimed
    walker.storages, walker.claimed = storages, claimed
    return walker
