"""Remove, finish or take back the temporary files that ended processes have left.

Files that a killed process was writing are removed. If it was killed while a set got its names, the set is
finished or the old files are put back (`settling`). Files of a process that may still run (`lease`) are not
touched, and if that is unknown, a note says so.

All this happens in folders that are written into. One that is only read may be a stranger's, and so may the
leases in it: nothing there is touched, a note is printed (`mention`).
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
from lora_export.storage.commit.kits import put_back_engine
from lora_export.storage.commit.lease import (
    IDENTITY,
    LEASE,
    HolderState,
    Lease,
    Record,
    is_here,
    is_one_folder,
    new_identity,
)
from lora_export.storage.commit.lock import NAME, BusyError, locked
from lora_export.storage.commit.settling import is_settled, names, settle_set
from lora_export.storage.commit.signals import Uninterrupted
from lora_export.storage.commit.steps import MARK, RETIRED, discard, itself
from lora_export.storage.commit.told import has_begun, has_ended, tell
from lora_export.storage.inputs import forget_inputs
from lora_export.untrusted.places import all_below, is_folder, is_link, is_there

_STAGED = re.compile(rf".+\.tmp-{IDENTITY}(?:{re.escape(RETIRED)})?", re.DOTALL)
_SCRATCH = re.compile(rf"\.?lora-export-{IDENTITY}(?:{re.escape(LEASE)}|{re.escape(MARK)})?")
# Names of earlier versions and their kits, without a machine: their owner is unknown.
_EARLIER = re.compile(
    rf".+\.tmp-[0-9]{{1,10}}-[0-9a-f]{{8}}(?:{re.escape(RETIRED)})?|\.lora-export-kit\.\w{{6}}", re.DOTALL
)
_PATIENCE_S = 1.0


@contextlib.contextmanager
def scratch_folder(place: Path | None = None) -> Iterator[Path]:
    """Make a folder, and remove it with its content at the end of the block.

    Args:
        place: Folder to make it in, for files that will be renamed or are large; None: the system's temporary
            folder.
    """
    hidden = "" if place is None else "."
    above = itself(Path(tempfile.gettempdir()) if place is None else place)
    lease = Lease(above, new_identity())
    # Named before it is made, so that it is removed whenever an interrupt comes.
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
    # Files that were read there are this run's own, and are removed with the folder.
    forget_inputs([folder])
    with Uninterrupted() as calm:
        lease.release(calm, remove=discard(folder, calm))


@dataclass
class _Sets:
    """The temporary names in a folder, without those of this process.

    Attributes:
        here: Names given under this kernel, by the identity of their set.
        elsewhere: Names of unknown owners.
    """

    here: dict[str, list[Path]] = field(default_factory=dict)
    elsewhere: list[Path] = field(default_factory=list)


@dataclass
class _Outcome:
    """Result of tidying a folder.

    Attributes:
        removed: Files that were removed.
        size_bytes: Their size.
        unknown: Names whose process may or may not have ended.
        has_changed: True if anything was changed.
    """

    removed: list[Path] = field(default_factory=list)
    size_bytes: int = 0
    unknown: list[Path] = field(default_factory=list)
    has_changed: bool = False


def tidy(folder: Path, held: Sequence[Path] = ()) -> bool:
    """Remove, finish or take back the files that ended processes have left in a folder, with notes.

    Args:
        folder: Any folder; one that can't be read or written is not touched.
        held: Folders whose locks the caller holds.

    Returns:
        Whether anything was changed.
    """
    found = _found(folder)
    outcome = _Outcome(unknown=found.elsewhere)
    if (found.here or is_there(folder / NAME)) and os.access(folder, os.W_OK | os.X_OK):
        try:
            with locked([folder], _PATIENCE_S, held), Uninterrupted() as calm:
                for identity in _found(folder).here:  # another process may have been here first
                    _Settling(
                        folder=folder, identity=identity, held=(*held, folder), outcome=outcome, calm=calm
                    ).run()
        except (BusyError, OSError):  # the next run tries again; or the folder is gone
            pass
        except OutputError as error:
            tell(error.message)
    if outcome.removed:
        tell(
            f"removed {_size_text(outcome.size_bytes)} that ended runs had left in {folder}: "
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
        if owner is HolderState.ENDED:
            ended += left
        elif owner is HolderState.UNKNOWN:
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
            f"not touched in {folder}: {names(unknown)}; it is unknown whether the run that wrote "
            "this has ended (another machine's or an earlier version's, or this machine was restarted): "
            f"remove it if no lora-export runs there{_kept(unknown)}"
        )


class _OthersError(Exception):
    """Another process settles the set."""


@dataclass(frozen=True, kw_only=True)
class _Settling:
    """Settle one set of an ended process; the lock of ``folder`` is held."""

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
        """Return the content of a lease if its holder has ended; it is held until ``stack`` ends.

        Raises:
            _OthersError: Its holder runs.
        """
        owner = lease.owner()
        stack.callback(lease.let_go)
        if owner is HolderState.RUNS:
            raise _OthersError
        with contextlib.suppress(ValueError, OSError):
            return lease.read() if owner is HolderState.ENDED else None
        return None

    def _say_unknown(self) -> None:
        self.outcome.unknown += self._names(self.folder)

    def _leave(self, own: Lease) -> None:
        """Report a set whose own lease is missing as unknown: its folder may not be mounted here."""
        if left := self._names(self.folder):
            self.outcome.unknown += left
        else:
            own.remove(self.calm)

    def _settle(self, leases: list[Lease], record: Record, stack: contextlib.ExitStack) -> None:
        first = leases[-1]
        others = [lease for folder in record.folders if (lease := self._other(folder, leases, stack))]
        folders = [first.folder, *(lease.folder for lease in others)]
        with locked(folders, _PATIENCE_S, self.held):
            is_marked = is_there(first.mark.destination)
            entries = [entry for entry in record.entries or () if _lies_in(entry.staged.target, folders)]
            # Rule 3 of `lease`: where no lease agrees, nothing is touched.
            rest = [entry for entry in record.entries or () if entry not in entries]
            if not all(is_settled(entry, is_marked) for entry in rest):
                self._say_unknown()
                return
            if entries and not settle_set(entries, is_marked, self.calm):
                return
            left = [path for folder in folders for path in self._names(folder)]
            if any(path.name.endswith(RETIRED) for path in left):  # no lease lists them
                self.outcome.unknown += left
                return
            if not all(put_back_engine(path, self.calm) for path in left):
                return
            self.outcome.has_changed = True
            are_gone = [self._give_up(path) for path in left]
            if all(are_gone):
                for lease in (*reversed(others), first):
                    lease.remove(self.calm)

    def _other(self, folder: Path, leases: list[Lease], stack: contextlib.ExitStack) -> Lease | None:
        """Return the lease of a further folder of the set, held, if there is one that points to the set's."""
        for lease in leases[:-1]:
            if is_one_folder(lease.folder, folder):
                return lease
        lease = Lease(folder, self.identity)
        if not lease.exists:
            return None
        record = self._read(lease, stack)
        points = (
            record is not None and record.first is not None and is_one_folder(record.first, leases[-1].folder)
        )
        return lease if points else None

    def _names(self, folder: Path) -> list[Path]:
        return [path for path in _found(folder).here.get(self.identity, ()) if not _is_lease(path)]

    def _give_up(self, path: Path) -> bool:
        if not is_there(path):  # it already has its own name
            return True
        size = _size(path)
        if is_gone := discard(path, self.calm):
            self.outcome.size_bytes += size
            self.outcome.removed.append(path)
        return is_gone


def _covers(record: Record, folder: Path) -> bool:
    """Return whether a lease is a set's own, and says that it lies in a folder too."""
    return record.first is None and any(is_one_folder(one, folder) for one in record.folders)


def _lies_in(path: Path, folders: Sequence[Path]) -> bool:
    return any(is_one_folder(path.parent, folder) for folder in folders)


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
    """Yield names that may be temporary and whose files belong to this user: /tmp has others' files."""
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
    """Return a hint for files that may be the only ones left of their output."""
    old = next((path.name for path in unknown if path.name.endswith(RETIRED)), None)
    if old is None:
        return ""
    name = old.rpartition(".tmp-")[0]
    return f"; a file ending in {RETIRED} is the old one: rename it back if {name} is missing"


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        if is_folder(path) and not is_link(path):
            return sum(child.lstat().st_size for child in all_below(path) if not is_folder(child))
        return path.lstat().st_size
    return 0


def _size_text(size: int) -> str:
    if size < 1000:
        return f"{size} bytes"
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
