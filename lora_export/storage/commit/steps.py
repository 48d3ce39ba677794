"""Give complete files their own names, in reversible steps.

1. The set's lease records the set's entries.
2. Every file to be replaced is renamed, the last of the set first: it points to the others, so that no reader
   finds it beside another run's data. A folder is looked at once more: nobody writes into it by its name now.
3. The lease is renamed, one for all folders (the mark): from here on they are to hold the new set.
4. Every new file gets its name, the last of the set last.
5. The old files are removed, then the leases, the set's own last.

A step that fails is undone with all steps before it. A process that is killed leaves names and a lease, from
which `settling` goes on: forward with the mark, back without it. A file under its own name is never
overwritten, except by a single file, whose renaming is one step of the file system.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lora_export.errors import OutputError
from lora_export.storage.commit.signals import Uninterrupted
from lora_export.storage.commit.told import has_written, tell
from lora_export.untrusted.places import all_below, is_folder, is_link, is_there

RETIRED, MARK = ".old", ".commit"
# The file that is locked in each folder (`lock`).
LOCK = ".lora-export.lock"
_SHOWN = 8


@dataclass(frozen=True)
class Staged:
    """One file or folder of a set.

    Attributes:
        path: Temporary name under which it was written.
        target: Its own name.
        retired: Temporary name of the old file that it replaces.
    """

    path: Path
    target: Path
    retired: Path


class Step(Protocol):
    """A step that can be done, and undone, once or twice with the same result."""

    def do(self) -> None:
        """Do the step."""

    def is_done(self) -> bool:
        """Return whether the step is done, so that it can be undone."""

    def undo(self) -> None:
        """Undo the step."""


@dataclass(frozen=True)
class Move:
    """A renaming to a free name.

    Attributes:
        source: The current name.
        destination: The new name.
        file: The file's `fingerprint`; None: not known.
    """

    source: Path
    destination: Path
    file: tuple[int, ...] | None = None

    @classmethod
    def of(cls, source: Path, destination: Path) -> Move:
        """Return the renaming of the file that has a name now.

        Raises:
            OSError: There is none.
        """
        return cls(source, destination, fingerprint(source))

    def do(self) -> None:
        """Rename the file."""
        self._rename(self.source, self.destination)

    def is_done(self) -> bool:
        """Return whether the file has the new name."""
        return self._has(self.destination) and not is_there(self.source)

    def undo(self) -> None:
        """Rename the file back."""
        self._rename(self.destination, self.source)

    def _rename(self, source: Path, destination: Path) -> None:
        if is_there(source) or not self._has(destination):  # else it is the second try
            _move(source, destination)

    def _has(self, path: Path) -> bool:
        """Return whether a name is the file's: another file may lie where a folder's path leads by now."""
        return is_there(path) and (self.file is None or fingerprint(path) == self.file)


@dataclass(frozen=True)
class Look:
    """A look at a folder that was renamed, for outputs that others have completed in it since it was judged.

    Attributes:
        folder: The folder, as it is called now.
        target: Its own name.
        known: The files that were in it when it was judged.
    """

    folder: Path
    target: Path
    known: frozenset[str]

    def do(self) -> None:
        """Raise `OutputError` if there are more files by now."""
        if more := sorted(places_below(self.folder) - self.known - {LOCK}):
            raise OutputError(
                f"another run has written into {self.target} meanwhile (nothing was replaced)",
                "move these files away, or choose another name",
                more[:_SHOWN],
            )

    def is_done(self) -> bool:
        """Return True: a look has no effect."""
        return True

    def undo(self) -> None:
        """Do nothing."""


def places_below(folder: Path) -> set[str]:
    """Return the places of all files in a folder, and of links to folders; none if it is not a folder."""
    found = (path for path in all_below(folder) if is_link(path) or not is_folder(path))
    return {path.relative_to(folder).as_posix() for path in found}


@dataclass(frozen=True)
class Mark(Move):
    """The renaming that marks the set as complete and the old files as moved."""

    def do(self) -> None:
        """Rename the lease, and flush that to the disk before anything else."""
        super().do()
        sync_path(self.destination.parent)


def _move(source: Path, destination: Path) -> None:
    if not is_there(source):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(source))
    if is_there(destination):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(destination))
    source.rename(destination)


def itself(folder: Path) -> Path:
    """Return a folder's path without links; as it was given, if there are none."""
    real = Path(os.path.realpath(folder))
    return folder if real == Path(os.path.abspath(folder)) else real  # noqa: PTH100


def fingerprint(path: Path) -> tuple[int, ...]:
    """Return kind, size and time of last change, which a renaming does not alter."""
    found = path.lstat()
    kind = stat.S_IFMT(found.st_mode)
    return kind, found.st_size if stat.S_ISREG(kind) else 0, found.st_mtime_ns


def give_names(
    staged: Sequence[Staged],
    mark: Mark,
    remember: Callable[[], None],
    *,
    listed: bool,
    known: Mapping[Path, frozenset[str]],
) -> None:
    """Do all steps except the removal of the leases; the locks of the folders are held.

    Args:
        staged: The set, in order; all of it is on the disk.
        mark: Mark of the set's lease.
        remember: Function that records the set's entries in the lease.
        listed: List the output for the run.
        known: Target that is a folder → `places_below` when it was judged that it may be replaced.

    Raises:
        OutputError: A step failed. `StuckError` if it could not be undone: the staged files are then needed
            to put the folder in order.
    """
    entry = staged[-1].target
    with Uninterrupted() as calm:
        if len(staged) == 1 and not is_folder(entry):
            _replace(staged[0], calm)
        else:
            try:
                calm.insist(remember)
            except OSError as error:
                raise _failed(entry, error) from error
            _in_steps(staged, mark, known, calm)
        unsynced = _try_each([(folder, sync_path) for folder in _folders(staged)], calm)
        if listed and not unsynced:
            has_written(entry)
        for path in (entry.retired for entry in staged):
            discard(path, calm)
    if unsynced:
        raise OutputError(
            f"{entry} is written and complete, but the system does not confirm that it is on the disk",
            "check the disk's health, and compare the files before you rely on them",
            unsynced,
        )


class StuckError(OutputError):
    """Error for a failed step whose predecessors could not be undone."""


def _replace(single: Staged, calm: Uninterrupted) -> None:
    new = single.path.lstat()

    def act() -> None:
        try:
            single.path.replace(single.target)
        except OSError:
            # It may be done nevertheless: a network file system lost the answer, or this is the second try.
            if is_there(single.path) or not os.path.samestat(single.target.lstat(), new):
                raise

    try:
        calm.insist(act)
    except OSError as error:
        raise _failed(single.target, error) from error


def _in_steps(
    staged: Sequence[Staged], mark: Mark, known: Mapping[Path, frozenset[str]], calm: Uninterrupted
) -> None:
    replaced = [entry for entry in staged if is_there(entry.target)]
    try:
        steps: list[Step] = [Move.of(entry.target, entry.retired) for entry in reversed(replaced)]
        looks = [entry for entry in replaced if entry.target in known]
        steps += [Look(entry.retired, entry.target, known[entry.target]) for entry in looks]
        steps += [mark, *(Move.of(entry.path, entry.target) for entry in staged)]
    except OSError as error:
        raise _failed(staged[-1].target, error) from error
    done = 0
    try:
        for step in steps:
            calm.insist(step.do)
            done += 1
    except BaseException as error:
        done += steps[done].is_done()
        try:
            for step in reversed(steps[:done]):
                calm.insist(step.undo)
        except OSError as second:
            raise _stuck(staged, mark, error, second) from error
        if isinstance(error, OSError):
            raise _failed(staged[-1].target, error) from error
        raise


def _failed(target: Path, error: OSError) -> OutputError:
    hint = "check the path and its permissions, and whether another program holds it"
    if error.errno == errno.EXDEV:
        hint = (
            "a folder of a container's image (overlayfs) can't be renamed: choose another name, or remove it "
            "yourself"
        )
    return OutputError(f"cannot write {target}: {reason_of(error)} (nothing was replaced)", hint)


def _stuck(staged: Sequence[Staged], mark: Mark, first: BaseException, second: OSError) -> StuckError:
    """Return the error that lists which file has which name."""
    if is_there(mark.destination):
        problems = [f"{mark.destination} records that the new files are complete"]
    else:
        problems = [f"{mark.source} records the old files"]
    for entry in staged:
        if is_there(entry.retired):
            problems.append(f"{entry.target}: the old one is {entry.retired.name}")
        if is_there(entry.path):
            problems.append(f"{entry.target}: the new one is {entry.path.name}")
        elif is_there(entry.target):
            problems.append(f"{entry.target} is the new one")
    reason = reason_of(first) if isinstance(first, OSError) else type(first).__name__
    return StuckError(
        f"cannot write {staged[-1].target}: {reason}; and renamed files could not be renamed back: "
        f"{reason_of(second)}",
        "nothing is lost: the next lora-export command that writes into that folder puts it in order, and so "
        "does `lora-export doctor` in it",
        problems,
    )


def reason_of(error: OSError) -> str:
    """Return the system's message with the file that it is about."""
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"


def _folders(staged: Sequence[Staged]) -> list[Path]:
    return list(dict.fromkeys(entry.target.parent for entry in staged))


def _try_each(acts: Sequence[tuple[Path, Callable[[Path], None]]], calm: Uninterrupted) -> list[str]:
    """Do all acts; return the system's messages on those that failed."""
    problems = []
    for path, act in acts:
        try:
            calm.insist(lambda path=path, act=act: act(path))  # type: ignore[misc]
        except OSError as error:
            problems.append(f"{path}: {reason_of(error)}")
    return problems


def discard(path: Path, calm: Uninterrupted) -> bool:
    """Remove a file or a folder that nothing needs; return whether it is gone, with a note if not."""
    if problems := _try_each([(path, _remove)], calm):
        tell(f"could not remove {problems[0]}; nothing needs it any more")
    return not problems


def _remove(path: Path) -> None:
    if not is_there(path):
        return
    with contextlib.suppress(FileNotFoundError):
        if is_folder(path) and not is_link(path):
            shutil.rmtree(path)
        else:
            path.unlink()


def sync_path(path: Path) -> None:
    """Flush one file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
