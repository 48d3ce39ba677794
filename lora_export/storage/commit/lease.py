"""Find the process that owns temporary names, and whether it has ended.

A process holds a lease in each folder that it writes into: a file that it keeps locked as long as names of
its set exist there. The kernel releases the lock when the process ends, in whatever way, and answers the same
in every container and namespace, while a process's number and its entry in /proc depend on the viewer. The
locks of another kernel (another machine's, or this one's before a restart) are unknown, and files under them
are not touched.

The lease of the folder that was written into first is the set's; leases in other folders point to it. It
records the set's entries, and its renaming is the one step that decides for all folders (`steps.Mark`).

A lease is a file like any other: it may have come with a stranger's folder. So its content is held to rules:

1. It is this user's, and has the fields of a lease.
2. Its entries lie in its own folder, or in one that it says it covers.
3. A folder counts as covered only if a lease of the same set lies there that says so too (`leftovers`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from lora_export.errors import OutputError
from lora_export.storage.commit.lock import PAUSE_S, Grip, take
from lora_export.storage.commit.signals import Uninterrupted
from lora_export.storage.commit.steps import MARK, RETIRED, Mark, Staged, discard, fingerprint
from lora_export.storage.commit.told import tell
from lora_export.untrusted.documents import MAX_BYTES, parse_json
from lora_export.untrusted.fields import from_plain
from lora_export.untrusted.places import is_there

# Groups of an identity within a name.
IDENTITY = r"(?P<identity>(?P<kernel>[0-9a-f]{6})-[0-9]{1,10}-[0-9a-f]{12})"
LEASE = ".lease"
_UNKNOWN_KERNEL = "0" * 6
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class HolderState(Enum):
    """State of the process that holds a lease."""

    RUNS = "runs"
    ENDED = "ended"
    UNKNOWN = "unknown"


def new_identity() -> str:
    """Return the common part of a set's names: kernel, process, and 48 random bits."""
    return f"{_kernel()}-{os.getpid()}-{secrets.token_hex(6)}"


def is_here(kernel: str) -> bool:
    """Return whether a name was given under this kernel, whose locks are known."""
    return kernel == _kernel() != _UNKNOWN_KERNEL


@cache
def _kernel() -> str:
    """Return a hash that is unique to a start of a machine, and shared by its containers."""
    try:
        return hashlib.sha256(_BOOT.read_bytes().strip()).hexdigest()[:6]
    except OSError:  # hidden from this process
        return _UNKNOWN_KERNEL


@dataclass(frozen=True)
class Entry:
    """One file or folder of a set, as the lease records it.

    Attributes:
        staged: Its names.
        new: The new file's `fingerprint`.
        replaces: True if it replaces an old one.
    """

    staged: Staged
    new: tuple[int, ...]
    replaces: bool

    def is_new(self, path: Path) -> bool:
        """Return whether the file at ``path`` is the set's new one."""
        with contextlib.suppress(OSError):
            return fingerprint(path) == self.new
        return False


@dataclass
class Record:
    """The content of a lease.

    Attributes:
        first: Folder of the set's own lease, if this one only points to it.
        folders: The set's folders other than the lease's.
        entries: Files that get their names; None before that has begun.
    """

    first: Path | None = None
    folders: list[Path] = field(default_factory=list)
    entries: list[Entry] | None = None


@dataclass(frozen=True)
class _SaidEntry:
    """An `Entry` as a line has it."""

    target: str
    new: tuple[int, int, int]
    replaces: bool


@dataclass(frozen=True)
class _Line:
    """One line of a lease."""

    first: str | None = None
    folder: str | None = None
    entries: tuple[_SaidEntry, ...] | None = None


class Lease:
    """The lease of a set in one folder.

    Args:
        folder: The folder.
        identity: Identity of the set.

    Attributes:
        held_here: Identities of the sets that this process writes.
    """

    held_here: ClassVar[set[str]] = set()

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity
        self.path = folder / f".lora-export-{identity}{LEASE}"
        self.mark = Mark(self.path, folder / f".lora-export-{identity}{MARK}")
        self._grip: Grip | None = None

    def hold(self) -> None:
        """Create the lease's file and lock it.

        Raises:
            OSError: The file can't be created.
        """
        self.held_here.add(self.identity)
        while self._grip is None:
            with Uninterrupted() as calm:
                # Mode 0o600: another user who could lock it would keep this process waiting.
                self._grip = calm.insist(lambda: take(self.path, create=True, mode=0o600))
            if self._grip is None:  # another process saw it before it was locked, and removes it
                time.sleep(PAUSE_S)

    def owner(self) -> HolderState:
        """Return the state of the lease's holder; if that has ended, this process holds the lease now."""
        for path in self._places:
            if not is_there(path):
                continue
            try:
                grip = take(path)
            except FileNotFoundError:  # it has just been renamed or removed
                return HolderState.RUNS
            except (OSError, OutputError):
                return HolderState.UNKNOWN
            if grip is None:
                return HolderState.RUNS
            # Rule 1: another user may put a file of this name into a folder that all write into.
            if not grip.locked or os.fstat(grip.handle).st_uid != os.geteuid():
                grip.let_go()
                return HolderState.UNKNOWN
            self._grip = grip
            return HolderState.ENDED
        return HolderState.UNKNOWN

    def release(self, calm: Uninterrupted, remove: bool) -> None:
        """Release the lease that this process held.

        Args:
            calm: The uninterrupted block.
            remove: Remove the file; else the next process finishes or takes back the set by it.
        """
        if remove:
            self.remove(calm)
        else:
            for path in filter(is_there, self._places):
                tell(f"{path} stays: with it, the next command that writes into its folder tidies up")
        self.let_go()
        self.held_here.discard(self.identity)

    def remove(self, calm: Uninterrupted) -> None:
        """Remove the lease's file, under both of its names."""
        for path in self._places:
            discard(path, calm)

    def let_go(self) -> None:
        """Unlock the lease's file."""
        # Forgotten first: the number that is closed may be another thread's file by the second try.
        grip, self._grip = self._grip, None
        if grip is not None:
            grip.let_go()

    @property
    def exists(self) -> bool:
        """True if the lease's file exists under one of its names."""
        return any(map(is_there, self._places))

    @property
    def _places(self) -> tuple[Path, Path]:
        return self.mark.destination, self.path

    def points_to(self, first: Path) -> None:
        """Record that the set's own lease is in the folder ``first``."""
        self._append({"first": self._relative(first)})

    def covers(self, folder: Path) -> None:
        """Record that the set also has files in ``folder``."""
        self._append({"folder": self._relative(folder)})

    def remember(self, staged: Sequence[Staged]) -> None:
        """Record the set's entries, before anything is renamed."""
        entries = [
            {
                "target": os.path.join(self._relative(entry.target.parent), entry.target.name),  # noqa: PTH118
                "new": fingerprint(entry.path),
                "replaces": is_there(entry.target),
            }
            for entry in staged
        ]
        self._append({"entries": entries})

    def read(self) -> Record:
        """Return the content; a line that a killed process has not completed is ignored.

        Raises:
            ValueError: The content is not that of a lease of ours.
        """
        assert self._grip is not None
        record, covered = Record(), {os.curdir}
        size = os.fstat(self._grip.handle).st_size
        if size > MAX_BYTES:
            raise ValueError(f"{self.path} holds {size} bytes")
        for line in os.pread(self._grip.handle, size, 0).splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            said = from_plain(_Line, parse_json(line, surrogates=True))
            if said.first is not None:
                record.first = self._named(said.first)
            if said.folder is not None:
                record.folders.append(self._named(said.folder))
                covered.add(said.folder)
            if said.entries is not None:
                record.entries = [self._entry(entry, covered) for entry in said.entries]
        return record

    def _named(self, place: str) -> Path:
        if not place or "\0" in place or Path(place).is_absolute():
            raise ValueError(f"{self.path} names {place!r}, which is not a path from its folder")
        return self.folder / place

    def _entry(self, said: _SaidEntry, covered: set[str]) -> Entry:
        """Keep rule 2."""
        place, name = os.path.split(said.target)
        target = self._named(said.target)
        # One folder has two paths where it is mounted twice.
        is_covered = place in covered or is_one_folder(target.parent, self.folder)
        if name in ("", os.curdir, os.pardir) or not is_covered:
            raise ValueError(f"{self.path} names {said.target!r}, but does not cover its folder")
        return Entry(staged_as(target, self.identity), said.new, said.replaces)

    def _append(self, data: dict[str, Any]) -> None:
        assert self._grip is not None
        line = (json.dumps(data) + "\n").encode()
        os.lseek(self._grip.handle, 0, os.SEEK_END)
        while line:
            line = line[os.write(self._grip.handle, line) :]
        os.fsync(self._grip.handle)

    def _relative(self, folder: Path) -> str:
        # Relative, because volumes have other paths in another container.
        return os.path.relpath(folder.resolve(), self.folder.resolve())


def is_one_folder(folder: Path, other: Path) -> bool:
    """Return whether both are there and are one folder."""
    with contextlib.suppress(OSError):
        return folder.samefile(other)
    return False


def staged_as(target: Path, identity: str) -> Staged:
    """Return the temporary names of a file and of the old one that it replaces."""
    name = f"{target.name}.tmp-{identity}"
    return Staged(target.with_name(name), target, target.with_name(name + RETIRED))
