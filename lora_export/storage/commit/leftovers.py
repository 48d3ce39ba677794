"""Temporary names, and what is done about those whose process has ended.

A killed process leaves files that it was writing: they go. Where it was killed while a set got its names,
the set is finished or what it replaced is put back (`steps`). What belongs to a process that may still run,
to another machine or to another container is left alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lora_export.errors import OutputError
from lora_export.storage.commit.lock import NAME, locked
from lora_export.storage.commit.owner import PATTERN, Owner, this_process
from lora_export.storage.commit.signals import Uninterrupted
from lora_export.storage.commit.steps import MARK, RETIRED, Move, discard, reason_of
from lora_export.storage.commit.told import tell

_NAME = re.compile(
    rf"(?P<name>.+)(?P<suffix>\.tmp-{PATTERN}-[0-9a-f]{{6}})(?P<kind>{re.escape(RETIRED)}|{re.escape(MARK)})?",
    re.DOTALL,
)
_SCRATCH = re.compile(rf"\.?lora-export-{PATTERN}-\w+")
# Of versions that wrote no machine into a name: whose it is can't be told.
_EARLIER = re.compile(rf".+\.tmp-[0-9]{{1,10}}-[0-9a-f]{{8}}(?:{re.escape(RETIRED)})?", re.DOTALL)
_SHOWN = 3
_PATIENCE_S = 1.0


def new_suffix() -> str:
    """Return what the temporary names of one set end with."""
    return f".tmp-{this_process()}-{secrets.token_hex(3)}"


@contextlib.contextmanager
def scratch_folder(place: Path | None = None) -> Iterator[Path]:
    """Make a folder, and remove it with all that is in it.

    Args:
        place: Where: for what will be renamed, or is too large for the system's temporary folder, which None
            stands for.
    """
    hidden = "" if place is None else "."
    above = Path(tempfile.gettempdir()) if place is None else place
    # Named before it is made, so that it is removed wherever an interrupt comes: 64 bits are nobody else's.
    folder = above / f"{hidden}lora-export-{this_process()}-{secrets.token_hex(8)}"
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        with Uninterrupted() as calm:
            discard(folder, calm)


@dataclass
class _Set:
    """Names of one set in one folder, each with the name that it stands for.

    Attributes:
        staged: New files.
        retired: What they replace.
        marks: Marks, with the name of the set's last file.
    """

    staged: dict[Path, Path] = field(default_factory=dict)
    retired: dict[Path, Path] = field(default_factory=dict)
    marks: dict[Path, Path] = field(default_factory=dict)

    def paths(self) -> list[Path]:
        """Return all of them."""
        return [*self.staged, *self.retired, *self.marks]


def abandoned(folder: Path) -> list[Path]:
    """Return what ended processes have left in a folder; nothing is changed."""
    sets, scratch = _found(folder)
    return [path for found in sets.values() for path in found.paths()] + scratch


def foreign(folder: Path) -> list[Path]:
    """Return temporary names of other machines, containers and earlier versions: nothing is known of them."""
    others = [path for path, owner, _ in _named(folder) if not owner.is_here]
    return others + [folder / name for name in _own_names(folder) if _EARLIER.fullmatch(name)]


def tidy(folder: Path) -> bool:
    """Remove, finish or put back what ended processes have left in a folder, and tell of it.

    Args:
        folder: Any; one that can't be read or written is left alone.

    Returns:
        Whether anything is otherwise than before.
    """
    if not (abandoned(folder) or (folder / NAME).exists()) or not os.access(folder, os.W_OK | os.X_OK):
        return False
    try:
        with locked([folder], _PATIENCE_S), Uninterrupted() as calm:
            sets, scratch = _found(folder)  # another process may have been here first
            changed = [_settle(found, calm) for found in sets.values() if found.retired or found.marks]
            unfinished = [found for found in sets.values() if not (found.retired or found.marks)]
            dead = [path for found in unfinished for path in found.staged] + scratch
            return any([*changed, _clear(folder, dead, calm)])
    except OutputError:  # another writer is busy; the next run comes by as well
        return False


def _found(folder: Path) -> tuple[dict[str, _Set], list[Path]]:
    sets: dict[str, _Set] = {}
    scratch = []
    for path, owner, named in _named(folder):
        if not owner.has_ended:
            continue
        if "kind" not in named.re.groupindex:
            scratch.append(path)
            continue
        found = sets.setdefault(named["suffix"], _Set())
        kinds = {RETIRED: found.retired, MARK: found.marks}
        kinds.get(named["kind"], found.staged)[path] = folder / named["name"]
    return sets, scratch


def _named(folder: Path) -> Iterator[tuple[Path, Owner, re.Match[str]]]:
    """Yield what bears a temporary name of ours, with whose it is."""
    for name in _own_names(folder):
        if named := _NAME.fullmatch(name) or _SCRATCH.fullmatch(name):
            yield folder / name, Owner(named["host"], int(named["pid"]), named["start"]), named


def _own_names(folder: Path) -> Iterator[str]:
    """Yield what may be a temporary name and is this user's: in /tmp there are others'."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(
                entry.name for entry in entries if ".tmp-" in entry.name or "lora-export-" in entry.name
            )
    except OSError:
        return
    for name in names:
        with contextlib.suppress(OSError):
            if (folder / name).lstat().st_uid == os.geteuid():
                yield name


def _settle(found: _Set, calm: Uninterrupted) -> bool:
    """Finish a set whose process was killed while it got its names, or put back what it was to replace."""
    forward = bool(found.marks) or not found.staged
    wanted = found.staged if forward else found.retired
    taken = [path for path in wanted.values() if os.path.lexists(path)]
    if taken:
        tell(
            f"an ended run has left {_names(found.paths())}; {_names(taken)} exists by now, so nothing was "
            "touched: keep one of both and remove the other"
        )
        return False
    # As in `steps`: what points at the others comes last.
    last = set(found.marks.values()) if forward else set()
    for path, target in sorted(wanted.items(), key=lambda item: item[1] in last):
        try:
            calm.insist(Move(path, target).do)
        except OSError as error:
            tell(f"could not rename what an ended run has left in {path.parent}: {reason_of(error)}")
            return False
    for path in [*(found.retired if forward else found.staged), *found.marks]:
        discard(path, calm)
    what = "finished" if forward else "put back"
    targets = list(dict.fromkeys([*found.retired.values(), *found.staged.values(), *found.marks.values()]))
    tell(f"{what} {_names(targets)} in {targets[0].parent}: the run was ended between two renames")
    return True


def _clear(folder: Path, dead: list[Path], calm: Uninterrupted) -> bool:
    size = sum(map(_size, dead))
    gone = [path for path in dead if discard(path, calm)]
    if gone:
        tell(f"removed {_size_text(size)} that ended runs have left in {folder}: {_names(gone)}")
    return bool(gone)


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            return sum(child.lstat().st_size for child in path.rglob("*") if not child.is_dir())
        return path.lstat().st_size
    return 0


def _size_text(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def _names(paths: list[Path]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(path.name for path in paths[:_SHOWN]) + more
