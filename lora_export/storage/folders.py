"""Folders that are replaced as a whole: only one of ours, and only where nothing else lies in it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from lora_export.errors import LoraExportError, OutputError
from lora_export.storage.commit.lock import NAME
from lora_export.untrusted.documents import read_json

_SHOWN = 8


def listed_files(record: Path, key: str = "") -> set[str]:
    """Return what a record of ours says is in its folder, with itself; nothing where it is no record of ours.

    Args:
        record: A JSON file that lists ``files``.
        key: Where in it the record is.
    """
    try:
        found = read_json(record)
    except LoraExportError:
        return set()
    for part in (key,) if key else ():
        found = found.get(part) if isinstance(found, dict) else None
    files = found.get("files") if isinstance(found, dict) else None
    return {record.name, *files} if isinstance(files, dict) else set()


def refuse_strangers(folder: Path, listed: Collection[str], what: str) -> None:
    """Raise `OutputError` where replacing a folder would remove what no run of ours has put there.

    Args:
        folder: What is to be replaced; it may be absent or empty.
        listed: The files that its own record lists.
        what: What we write there: "kit".
    """
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise OutputError(f"{folder} is no folder of a {what}", "choose another name")
    others = sorted(set(_places(folder)) - set(listed) - {NAME})
    if not others:
        return
    more = [f"… and {len(others) - _SHOWN} more"] if len(others) > _SHOWN else []
    holds = "holds other files than those that its record lists" if listed else f"is no {what} that we wrote"
    raise OutputError(
        f"{folder} {holds}: it is not replaced, even with --force",
        "move these away, or choose another name",
        [*others[:_SHOWN], *more],
    )


def _places(folder: Path) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        for name in (*files, *links):
            yield (Path(place) / name).relative_to(folder).as_posix()
