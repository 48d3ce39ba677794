"""Temporary names, and what is done about those whose process has ended.

A killed process leaves files that it was writing: they go. Where it was killed while a set got its names,
the set is finished or what it replaced is put back (`settling`). What belongs to a process that may still run
(`lease`) is left alone, and where that can't be told, it is said.

All this happens in folders that are written into. One that is only read may be a stranger's, and so may the
leases in it: nothing there is touched, it is only said (`mention`).
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lora_export.errors import OutputError
from lora_export.storage.commit.lease import (
    IDENTITY,
    LEASE,
    Lease,
    Owner,
    Record,
    is_here,
    is_same,
    new_identity,
)
from lora_export.storage.commit.lock import NAME, BusyError, locked
from lora_export.storage.commit.settling import is_settled, names, settle
from lora_export.storage.commit.signals import Uninterrupted
from lora_export.storage.commit.steps import MARK, RETIRED, discard
from lora_export.storage.commit.told import has_begun, has_ended, tell
from lora_export.storage.inputs import forget_inputs

_STAGED = re.compile(rf".+\.tmp-{IDENTITY}(?:{re.escape(RETIRED)})?", re.DOTALL)
_SCRATCH = re.compile(rf"\.?lora-export-{IDENTITY}(?:{re.escape(LEASE)}|{re.escape(MARK)})?")
# Of versions that wrote no machine into a name: whose it is can't be told.
_EARLIER = re.compile(rf".+\.tmp-[0-9]{{1,10}}-[0-9a-f]{{8}}(?:{re.escape(RETIRED)})?", re.DOTALL)
_PATIENCE_S = 1.0


@contextlib.contextmanager
def scratch_folder(place: Path | None = None) -> Iterator[Path]:
    """Make a folder, and remove it with all that is in it.

    Args:
        place: Where: for what will be renamed, or is too large for the system's temporary folder, which None
            stands for.
    """
    hidden = "" if place is None else "."
    above = Path(tempfile.gettempdir()) if place is None else place
    lease = Lease(above, new_identity())
    # Named before it is made, so that it is removed wherever an interrupt comes.
    folder = above / f"{hidden}lora-export-{lease.identity}"
    close = partial(_put_away, lease, folder)
    has_begun(close)
    try:
        try:
            lease.hold()
            folder.mkdir(mode=0o700)
            yield folder
        finally:
            close()
    finally:
        close()  # an interrupt may have broken into the first lines of the same call
        has_ended(close)


def _put_away(lease: Lease, folder: Path) -> None:
    # What was read there was this run's own, and goes with it.
    forget_inputs([folder])
    with Uninterrupted() as calm:
        lease.release(calm, remove=discard(folder, calm))


@dataclass
class _Sets:
    """What bears temporary names in a folder, but for what this process writes itself.

    Attributes:
        here: Names under this kernel, by the identity of their set.
        elsewhere: Those of which nothing can be known.
    """

    here: dict[str, list[Path]] = field(default_factory=dict)
    elsewhere: list[Path] = field(default_factory=list)


@dataclass
class _Outcome:
    """What came of looking through a folder.

    Attributes:
        removed: Files that nobody needed.
        size_bytes: Of these.
        unknown: Names of which it can't be told whether their process has ended.
        has_changed: Whether anything is otherwise than before.
    """

    removed: list[Path] = field(default_factory=list)
    size_bytes: int = 0
    unknown: list[Path] = field(default_factory=list)
    has_changed: bool = False


def tidy(folder: Path, held: Sequence[Path] = ()) -> bool:
    """Remove, finish or put back what ended processes have left in a folder, and tell of it.

    Args:
        folder: Any; one that can't be read or written is left alone.
        held: Folders whose locks the caller holds.

    Returns:
        Whether anything is otherwise than before.
    """
    found = _found(folder)
    outcome = _Outcome(unknown=found.elsewhere)
    if (found.here or os.path.lexists(folder / NAME)) and os.access(folder, os.W_OK | os.X_OK):
        try:
            with locked([folder], _PATIENCE_S, held), Uninterrupted() as calm:
                for identity in _found(folder).here:  # another process may have been here first
                    _Settling(folder, identity, (*held, folder), outcome, calm).run()
        except (BusyError, OSError):  # the next run comes by as well; or the folder is gone
            pass
        except OutputError as error:
            tell(error.message)
    if outcome.removed:
        tell(
            f"removed {_size_text(outcome.size_bytes)} that ended runs have left in {folder}: "
            f"{names(outcome.removed)}"
        )
    _tell_unknown(folder, outcome.unknown)
    return outcome.has_changed


def mention(folder: Path) -> None:
    """Tell of what ended processes have left in a folder that is only read; nothing there is touched."""
    found = _found(folder)
    ended, unknown = [], list(found.elsewhere)
    for identity, paths in found.here.items():
        lease = Lease(folder, identity)
        try:
            owner = lease.owner()
        finally:
            lease.let_go()
        left = [path for path in paths if not _is_lease(path)]
        if owner is Owner.ENDED:
            ended += left
        elif owner is Owner.UNKNOWN:
            unknown += left
    if ended:
        tell(
            f"an ended run has left {names(ended)} in {folder}: what it was writing is finished, put back or "
            "removed by the next command that writes there, or by `lora-export doctor` in that folder"
        )
    _tell_unknown(folder, unknown)


def _tell_unknown(folder: Path, unknown: Sequence[Path]) -> None:
    if unknown:
        tell(
            f"left alone in {folder}: {names(unknown)}; whether the run that wrote this has ended "
            "can't be told here (another machine's or an earlier version's, or this one was started again): "
            f"remove it if no lora-export runs there{_kept(unknown)}"
        )


class _OthersError(Exception):
    """Another process settles the set."""


@dataclass(frozen=True)
class _Settling:
    """One set of an ended process; the lock of ``folder`` is held."""

    folder: Path
    identity: str
    held: Sequence[Path]
    outcome: _Outcome
    calm: Uninterrupted

    def run(self) -> None:
        """Settle the set by the one lease that decides for all its folders."""
        own = Lease(self.folder, self.identity)
        with contextlib.ExitStack() as stack, contextlib.suppress(_OthersError):
            record = self._read(own, stack)
            if record is None:
                self._say_unknown()
            elif record.first is None:
                self._settle([own], record, stack)
            elif not (first := Lease(record.first, self.identity)).exists:
                self._leave(own)
            elif (decided := self._read(first, stack)) is None or not _covers(decided, self.folder):
                self._say_unknown()
            else:
                self._settle([own, first], decided, stack)

    def _read(self, lease: Lease, stack: contextlib.ExitStack) -> Record | None:
        """Return what a lease says, if that can be told; from then on it is held until ``stack`` ends.

        Raises:
            _OthersError: Its holder runs.
        """
        owner = lease.owner()
        stack.callback(lease.let_go)
        if owner is Owner.RUNS:
            raise _OthersError
        with contextlib.suppress(ValueError, OSError):
            return lease.read() if owner is Owner.ENDED else None
        return None

    def _say_unknown(self) -> None:
        self.outcome.unknown += self._names(self.folder)

    def _leave(self, own: Lease) -> None:
        """Leave alone a set whose own lease is not to be found: its folder may not be mounted here."""
        if left := self._names(self.folder):
            self.outcome.unknown += left
        else:
            own.remove(self.calm)

    def _settle(self, leases: list[Lease], record: Record, stack: contextlib.ExitStack) -> None:
        first = leases[-1]
        others = [lease for folder in record.folders if (lease := self._other(folder, leases, stack))]
        folders = [first.folder, *(lease.folder for lease in others)]
        with locked(folders, _PATIENCE_S, self.held):
            is_marked = os.path.lexists(first.mark.destination)
            entries = [entry for entry in record.entries or () if _lies_in(entry.staged.target, folders)]
            # Rule 3 of `lease`: where no lease agrees, nothing is touched.
            rest = [entry for entry in record.entries or () if entry not in entries]
            if not all(is_settled(entry, is_marked) for entry in rest):
                self._say_unknown()
                return
            if entries and not settle(entries, is_marked, self.calm):
                return
            left = [path for folder in folders for path in self._names(folder)]
            if any(path.name.endswith(RETIRED) for path in left):  # no lease says what they are
                self.outcome.unknown += left
                return
            self.outcome.has_changed = True
            are_gone = [self._give_up(path) for path in left]
            if all(are_gone):
                for lease in (*reversed(others), first):
                    lease.remove(self.calm)

    def _other(self, folder: Path, leases: list[Lease], stack: contextlib.ExitStack) -> Lease | None:
        """Return the lease of a further folder of the set, held, if there is one that points to the set's."""
        for lease in leases[:-1]:
            if is_same(lease.folder, folder):
                return lease
        lease = Lease(folder, self.identity)
        if not lease.exists:
            return None
        record = self._read(lease, stack)
        points = record is not None and record.first is not None and is_same(record.first, leases[-1].folder)
        return lease if points else None

    def _names(self, folder: Path) -> list[Path]:
        return [path for path in _found(folder).here.get(self.identity, ()) if not _is_lease(path)]

    def _give_up(self, path: Path) -> bool:
        if not os.path.lexists(path):  # it has its name
            return True
        size = _size(path)
        if is_gone := discard(path, self.calm):
            self.outcome.size_bytes += size
            self.outcome.removed.append(path)
        return is_gone


def _covers(record: Record, folder: Path) -> bool:
    """Return whether a lease is a set's own, and says that it lies in a folder too."""
    return record.first is None and any(is_same(one, folder) for one in record.folders)


def _lies_in(path: Path, folders: Sequence[Path]) -> bool:
    return any(is_same(path.parent, folder) for folder in folders)


def _found(folder: Path) -> _Sets:
    sets = _Sets()
    for name in _own_names(folder):
        named = _STAGED.fullmatch(name) or _SCRATCH.fullmatch(name)
        if named is None:
            if _EARLIER.fullmatch(name):
                sets.elsewhere.append(folder / name)
        elif not is_here(named["kernel"]):
            sets.elsewhere.append(folder / name)
        elif named["identity"] not in Lease.held_here:
            sets.here.setdefault(named["identity"], []).append(folder / name)
    return sets


def _own_names(folder: Path) -> Iterator[str]:
    """Yield what may be a temporary name and is this user's: in /tmp there are others'."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(
                entry.name for entry in entries if ".tmp-" in entry.name or "lora-export-" in entry.name
            )
    except OSError:
        return
    for name in found:
        with contextlib.suppress(OSError):
            if (folder / name).lstat().st_uid == os.geteuid():
                yield name


def _is_lease(path: Path) -> bool:
    return path.name.startswith(".lora-export-") and path.name.endswith((LEASE, MARK))


def _kept(unknown: Sequence[Path]) -> str:
    """Return what to do about files that may be the only ones of their output."""
    old = next((path.name for path in unknown if path.name.endswith(RETIRED)), None)
    if old is None:
        return ""
    name = old.rpartition(".tmp-")[0]
    return f"; what ends in {RETIRED} is what was to be replaced: name it back if {name} is missing"


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            return sum(child.lstat().st_size for child in path.rglob("*") if not child.is_dir())
        return path.lstat().st_size
    return 0


def _size_text(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
