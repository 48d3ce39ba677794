"""Remove, finish or take back the temporary files that ended processes have left.

Files that a killed process was writing are removed. If it was killed while a set got its names, the set is
finished or the old files are put back (`settling`). Files of a process that may still run (`lease`) are not
touched, and if that is unknown, a note says so.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_export.errors import OutputError
from lora_export.storage.commit.lease import IDENTITY, LEASE, Lease, Owner, Record, is_here, new_identity
from lora_export.storage.commit.lock import NAME, BusyError, locked
from lora_export.storage.commit.settling import names, settle
from lora_export.storage.commit.signals import Uninterrupted
from lora_export.storage.commit.steps import MARK, RETIRED, discard
from lora_export.storage.commit.told import tell
from lora_export.storage.inputs import forget_inputs

_STAGED = re.compile(rf".+\.tmp-{IDENTITY}(?:{re.escape(RETIRED)})?", re.DOTALL)
_SCRATCH = re.compile(rf"\.?lora-export-{IDENTITY}(?:{re.escape(LEASE)}|{re.escape(MARK)})?")
# Names of earlier versions, without a machine: their owner is unknown.
_EARLIER = re.compile(rf".+\.tmp-[0-9]{{1,10}}-[0-9a-f]{{8}}(?:{re.escape(RETIRED)})?", re.DOTALL)
_PATIENCE_S = 1.0


@contextlib.contextmanager
def scratch_folder(place: Path | None = None) -> Iterator[Path]:
    """Make a folder, and remove it with its content at the end of the block.

    Args:
        place: Folder to make it in, for files that will be renamed or are large; None: the system's temporary
            folder.
    """
    hidden = "" if place is None else "."
    above = Path(tempfile.gettempdir()) if place is None else place
    lease = Lease(above, new_identity())
    # Named before it is made, so that it is removed whenever an interrupt comes.
    folder = above / f"{hidden}lora-export-{lease.identity}"
    try:
        lease.hold()
        folder.mkdir(mode=0o700)
        yield folder
    finally:
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
        has_changed: Whether anything was changed.
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
    if (found.here or os.path.lexists(folder / NAME)) and os.access(folder, os.W_OK | os.X_OK):
        try:
            with locked([folder], _PATIENCE_S, held), Uninterrupted() as calm:
                for identity in _found(folder).here:  # another process may have been here first
                    _Settling(folder, identity, (*held, folder), outcome, calm).run()
        except (BusyError, OSError):  # the next run tries again; or the folder is gone
            pass
        except OutputError as error:
            tell(error.message)
    if outcome.removed:
        tell(
            f"removed {_size_text(outcome.size_bytes)} that ended runs had left in {folder}: "
            f"{names(outcome.removed)}"
        )
    if outcome.unknown:
        tell(
            f"not touched in {folder}: {names(outcome.unknown)}; it is unknown whether the run that wrote "
            "this has ended (another machine's or an earlier version's, or this machine was restarted): "
            f"remove it if no lora-export runs there{_kept(outcome.unknown)}"
        )
    return outcome.has_changed


@dataclass(frozen=True)
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
        try:
            record = self._read(own)
            if record is None:
                return
            if record.first is None:
                self._settle([own], record)
                return
            if not Lease(record.first, self.identity).exists:
                self._leave(own)
                return
            with locked([record.first], _PATIENCE_S, self.held):
                first = Lease(record.first, self.identity)
                try:
                    if (decided := self._read(first)) is not None:
                        self._settle([own, first], decided)
                finally:
                    first.let_go()
        finally:
            own.let_go()

    def _read(self, lease: Lease) -> Record | None:
        """Return the content of a lease if its holder has ended; this process holds the lease then."""
        owner = lease.owner()
        with contextlib.suppress(ValueError, TypeError, KeyError, OSError):
            if owner is Owner.RUNS:
                return None
            if owner is Owner.ENDED:
                return lease.read()
        self.outcome.unknown += self._names(self.folder)
        return None

    def _leave(self, own: Lease) -> None:
        """Report a set whose own lease is missing as unknown: its folder may not be mounted here."""
        if left := self._names(self.folder):
            self.outcome.unknown += left
        else:
            own.remove(self.calm)

    def _settle(self, leases: list[Lease], record: Record) -> None:
        folders = [folder for folder in (leases[-1].folder, *record.folders) if folder.is_dir()]
        with locked(folders, _PATIENCE_S, (*self.held, leases[-1].folder)):
            is_marked = os.path.lexists(leases[-1].mark.destination)
            if record.entries and not settle(record.entries, is_marked, self.calm):
                return
            left = [path for folder in folders for path in self._names(folder)]
            if any(path.name.endswith(RETIRED) for path in left):  # no lease lists them
                self.outcome.unknown += left
                return
            self.outcome.has_changed = True
            are_gone = [self._give_up(path) for path in left]
            if all(are_gone):
                others = [Lease(folder, self.identity) for folder in folders]
                for lease in (*reversed(others), leases[-1]):
                    lease.remove(self.calm)

    def _names(self, folder: Path) -> list[Path]:
        return [path for path in _found(folder).here.get(self.identity, ()) if not _is_lease(path)]

    def _give_up(self, path: Path) -> bool:
        if not os.path.lexists(path):  # it already has its own name
            return True
        size = _size(path)
        if is_gone := discard(path, self.calm):
            self.outcome.size_bytes += size
            self.outcome.removed.append(path)
        return is_gone


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
        if path.is_dir() and not path.is_symlink():
            return sum(child.lstat().st_size for child in path.rglob("*") if not child.is_dir())
        return path.lstat().st_size
    return 0


def _size_text(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
