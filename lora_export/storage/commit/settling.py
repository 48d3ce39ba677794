"""Finish a set whose process was killed while the set got its names, or put back the old files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_export.storage.commit.lease import Entry
from lora_export.storage.commit.signals import Uninterrupted
from lora_export.storage.commit.steps import Move, discard, reason_of
from lora_export.storage.commit.told import tell
from lora_export.untrusted.places import is_there

_SHOWN = 3


def settle_set(entries: Sequence[Entry], is_marked: bool, calm: Uninterrupted) -> bool:
    """Settle a set; the locks of its folders and its lease are held.

    It is finished only if the mark and every new file exist, and taken back if every old file exists. A file
    that is neither is somebody else's: then nothing is touched.

    Args:
        entries: The set's entries, from the lease.
        is_marked: True if the mark exists: the folders were to hold the new set.
        calm: The uninterrupted block.

    Returns:
        Whether only leases are left of the set.
    """
    forward = is_marked and all(map(_can_go_forward, entries))
    if not forward and not all(_can_go_back(entry, is_marked) for entry in entries):
        _tell_conflict(entries)
        return False
    moves = _forward(entries) if forward else _back(entries)
    for path, target in moves:
        try:
            calm.insist(Move.of(path, target).do)
        except OSError as error:
            tell(f"could not rename files that an ended run had left in {path.parent}: {reason_of(error)}")
            return False
    if moves or forward:
        what = "finished" if forward else "put back"
        targets = [entry.staged.target for entry in entries]
        tell(f"{what} {names(targets)} in {targets[0].parent}: the run had ended between two renames")
    # Other files are removed together with those of other ended runs.
    are_gone = [discard(entry.staged.retired, calm) for entry in entries] if forward else []
    return all(are_gone)


def is_settled(entry: Entry, is_marked: bool) -> bool:
    """Return whether nothing is to be done about an entry, whichever way its set goes."""
    if any(map(is_there, (entry.staged.path, entry.staged.retired))):
        return False
    is_new = entry.is_new(entry.staged.target)
    return is_new if is_marked else not is_new and _can_go_back(entry, is_marked)


def _can_go_forward(entry: Entry) -> bool:
    if is_there(entry.staged.target):
        return entry.is_new(entry.staged.target)
    return entry.is_new(entry.staged.path)


def _can_go_back(entry: Entry, is_marked: bool) -> bool:
    has_old = is_there(entry.staged.retired)
    if is_there(entry.staged.target) and not entry.is_new(entry.staged.target):
        # It is the old one, not renamed yet; after the mark, somebody else has made it.
        return not (has_old or is_marked)
    return has_old or not entry.replaces


def _forward(entries: Sequence[Entry]) -> list[tuple[Path, Path]]:
    """Return the renamings; as in `steps`, the file that points to the others comes last."""
    return [
        (entry.staged.path, entry.staged.target) for entry in entries if not is_there(entry.staged.target)
    ]


def _back(entries: Sequence[Entry]) -> list[tuple[Path, Path]]:
    new = [
        (entry.staged.target, entry.staged.path)
        for entry in reversed(entries)
        if entry.is_new(entry.staged.target)
    ]
    old = [(entry.staged.retired, entry.staged.target) for entry in entries if is_there(entry.staged.retired)]
    return new + old


def _tell_conflict(entries: Sequence[Entry]) -> None:
    left = [path for entry in entries for path in (entry.staged.path, entry.staged.retired)]
    taken = [entry.staged.target for entry in entries if is_there(entry.staged.target)]
    now = f"{names(taken)} exists now" if taken else "neither the old nor the new set is complete"
    tell(
        f"an ended run has left {names([path for path in left if is_there(path)])} in "
        f"{entries[0].staged.target.parent}; {now}, so nothing was touched: keep one set and remove the "
        "other"
    )


def names(paths: Sequence[Path]) -> str:
    """Return the names of the first files, and the number of the others."""
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(path.name for path in paths[:_SHOWN]) + more
