"""Replace folders as a whole: only our own ones, and only if they hold no other files."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from lora_export.errors import LoraExportError, OutputError
from lora_export.storage.commit.lock import NAME
from lora_export.storage.commit.steps import places_below
from lora_export.untrusted.documents import read_json
from lora_export.untrusted.places import is_folder, is_link, is_there

_SHOWN = 8


def listed_files(record: Path, key: str = "") -> set[str]:
    """Return the files that our record lists, with the record itself; none if it is not a record of ours.

    Args:
        record: A JSON file that lists ``files``.
        key: Key of the record in it.
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
    """Raise `OutputError` if replacing a folder would remove files that we have not written.

    Args:
        folder: Folder to be replaced; it may be absent or empty.
        listed: The files that its own record lists.
        what: Name of what we write there: "kit".
    """
    if not is_there(folder):
        return
    if is_link(folder) or not is_folder(folder):
        raise OutputError(f"{folder} is not a folder of a {what}", "choose another name")
    others = sorted(places_below(folder) - set(listed) - {NAME})
    if not others:
        return
    more = [f"… and {len(others) - _SHOWN} more"] if len(others) > _SHOWN else []
    holds = "holds files that its record does not list" if listed else f"is not a {what} that we wrote"
    raise OutputError(
        f"{folder} {holds}: it is not replaced, even with --force",
        "move these files away, or choose another name",
        [*others[:_SHOWN], *more],
    )
