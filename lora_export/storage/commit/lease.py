"""Whose temporary names are, and whether that process has ended.

A process holds a lease in each folder that it writes into: a file that it keeps locked for as long as names
of its set lie there. The kernel lets go of the lock when the process ends, however it ends, and answers alike
in every container and namespace: a number of a process, and what /proc says of it, depend on who looks. Of
another kernel's locks nothing is known: another machine's, or this one's before it was started again. What it
holds is left alone.

The lease of the folder that was written into first is the set's; those in further folders point to it. It
knows what the set is to become, and its renaming is the one step that decides for all folders (`steps.Mark`).

A lease is a file like any other: it may have come with a stranger's folder. So what it says is held to rules:

1. It is this user's, and has the fields of a lease.
2. What it is to become lies in its own folder, or in one that it says it covers.
3. A folder counts as covered only where a lease of the same set lies that says so too (`leftovers`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
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
from lora_export.storage.commit.steps import MARK, RETIRED, Mark, Staged, discard
from lora_export.storage.commit.told import tell
from lora_export.untrusted.documents import MAX_BYTES, parse_json
from lora_export.untrusted.fields import from_plain

# Groups of an identity within a name.
IDENTITY = r"(?P<identity>(?P<kernel>[0-9a-f]{6})-[0-9]{1,10}-[0-9a-f]{12})"
LEASE = ".lease"
_UNKNOWN_KERNEL = "0" * 6
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Owner(Enum):
    """What is known of the process that holds a lease."""

    RUNS = "runs"
    ENDED = "ended"
    UNKNOWN = "can't be told"


def new_identity() -> str:
    """Return what the names of a set have in common: kernel, process, and 48 bits that nobody else has."""
    return f"{_kernel()}-{os.getpid()}-{secrets.token_hex(6)}"


def is_here(kernel: str) -> bool:
    """Return whether a name was given under this kernel, whose locks can be asked for."""
    return kernel == _kernel() != _UNKNOWN_KERNEL


@cache
def _kernel() -> str:
    """Return a hash that every start of every machine has for itself, and its containers have in common."""
    try:
        return hashlib.sha256(_BOOT.read_bytes().strip()).hexdigest()[:6]
    except OSError:  # hidden from this process
        return _UNKNOWN_KERNEL


@dataclass(frozen=True)
class Entry:
    """One file or folder of a set, as the lease remembers it.

    Attributes:
        staged: The names.
        new: What tells the new file from others: `fingerprint`.
        replaces: Whether there was an old one.
    """

    staged: Staged
    new: tuple[int, ...]
    replaces: bool

    def is_new(self, path: Path) -> bool:
        """Return whether what lies at ``path`` is the set's new file."""
        with contextlib.suppress(OSError):
            return fingerprint(path) == self.new
        return False


@dataclass
class Record:
    """What a lease says.

    Attributes:
        first: Folder of the set's own lease, if this one only points to it.
        folders: Those that the set lies in, beside that of the lease.
        entries: Files that are to get their names; None before that began.
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


def fingerprint(path: Path) -> tuple[int, ...]:
    """Return the kind, the size of a file and the time of the last change, which stay when it is renamed."""
    found = path.lstat()
    kind = stat.S_IFMT(found.st_mode)
    return kind, found.st_size if stat.S_ISREG(kind) else 0, found.st_mtime_ns


class Lease:
    """The lease of a set in one folder.

    Args:
        folder: The folder.
        identity: The set's.

    Attributes:
        held_here: Identities of what this process writes.
    """

    held_here: ClassVar[set[str]] = set()

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity
        self.path = folder / f".lora-export-{identity}{LEASE}"
        self.mark = Mark(self.path, folder / f".lora-export-{identity}{MARK}")
        self._grip: Grip | None = None

    def hold(self) -> None:
        """Make it and keep it.

        Raises:
            OSError: It can't be made.
        """
        self.held_here.add(self.identity)
        while self._grip is None:
            with Uninterrupted() as calm:
                # Another user who could lock it would keep this process waiting.
                self._grip = calm.insist(lambda: take(self.path, create=True, mode=0o600))
            if self._grip is None:  # somebody has looked at it before it was locked, and removes it
                time.sleep(PAUSE_S)

    def owner(self) -> Owner:
        """Look whether its holder has ended; if so, it is held from then on."""
        for path in self._places:
            if not os.path.lexists(path):
                continue
            try:
                grip = take(path)
            except FileNotFoundError:  # it has just been renamed or removed
                return Owner.RUNS
            except (OSError, OutputError):
                return Owner.UNKNOWN
            if grip is None:
                return Owner.RUNS
            # Rule 1: another user may put a file of this name into a folder that all write into.
            if not grip.locked or os.fstat(grip.handle).st_uid != os.geteuid():
                grip.let_go()
                return Owner.UNKNOWN
            self._grip = grip
            return Owner.ENDED
        return Owner.UNKNOWN

    def release(self, calm: Uninterrupted, remove: bool) -> None:
        """Let go of what this process held.

        Args:
            calm: The block that is not interrupted.
            remove: Remove it; else whoever comes next finishes or takes back what it says.
        """
        if remove:
            self.remove(calm)
        else:
            for path in filter(os.path.lexists, self._places):
                tell(f"{path} stays: by it, the next command that writes into its folder tidies up")
        self.let_go()
        self.held_here.discard(self.identity)

    def remove(self, calm: Uninterrupted) -> None:
        """Remove the file, under both of its names."""
        for path in self._places:
            discard(path, calm)

    def let_go(self) -> None:
        """Unlock it."""
        if self._grip is not None:
            self._grip.let_go()
            self._grip = None

    @property
    def exists(self) -> bool:
        """Whether there is a file under one of its names."""
        return any(map(os.path.lexists, self._places))

    @property
    def _places(self) -> tuple[Path, Path]:
        return self.mark.destination, self.path

    def points_to(self, first: Path) -> None:
        """Let it say that the set's own lease is in the folder ``first``."""
        self._append({"first": self._relative(first)})

    def covers(self, folder: Path) -> None:
        """Let it say that the set lies in a further folder."""
        self._append({"folder": self._relative(folder)})

    def remember(self, staged: Sequence[Staged]) -> None:
        """Let it say what the set is to become, before anything is renamed."""
        entries = [
            {
                "target": os.path.join(self._relative(entry.target.parent), entry.target.name),  # noqa: PTH118
                "new": fingerprint(entry.path),
                "replaces": os.path.lexists(entry.target),
            }
            for entry in staged
        ]
        self._append({"entries": entries})

    def read(self) -> Record:
        """Return what it says; a line that a killed process has not written to its end says nothing.

        Raises:
            ValueError: It says what no lease of ours says.
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
            raise ValueError(f"{self.path} names {place!r}, which is no place from its folder")
        return self.folder / place

    def _entry(self, said: _SaidEntry, covered: set[str]) -> Entry:
        """Keep rule 2."""
        place, name = os.path.split(said.target)
        target = self._named(said.target)
        # One folder has two paths where it is mounted twice.
        is_covered = place in covered or is_same(target.parent, self.folder)
        if name in ("", os.curdir, os.pardir) or not is_covered:
            raise ValueError(f"{self.path} speaks of {said.target!r}, and does not cover its folder")
        return Entry(staged_as(target, self.identity), said.new, said.replaces)

    def _append(self, data: dict[str, Any]) -> None:
        assert self._grip is not None
        line = (json.dumps(data) + "\n").encode()
        os.lseek(self._grip.handle, 0, os.SEEK_END)
        while line:
            line = line[os.write(self._grip.handle, line) :]
        os.fsync(self._grip.handle)

    def _relative(self, folder: Path) -> str:
        # Volumes lie elsewhere in another container.
        return os.path.relpath(folder.resolve(), self.folder.resolve())


def is_same(folder: Path, other: Path) -> bool:
    """Return whether both are there and are one folder."""
    with contextlib.suppress(OSError):
        return folder.samefile(other)
    return False


def staged_as(target: Path, identity: str) -> Staged:
    """Return the names under which a file is written, and what it replaces is kept."""
    name = f"{target.name}.tmp-{identity}"
    return Staged(target.with_name(name), target, target.with_name(name + RETIRED))
