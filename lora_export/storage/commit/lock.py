"""Lock a folder, so that one writer at a time gives names to its files.

The lock is flock(2) on a hidden file: the kernel releases it when its process ends, in whatever way. The file
is removed with the lock; the next process takes and removes one that a killed process has left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lora_export.errors import OutputError
from lora_export.storage.commit.signals import Uninterrupted
from lora_export.storage.commit.steps import LOCK, discard
from lora_export.storage.commit.told import has_begun, has_ended
from lora_export.untrusted.places import is_link

NAME = LOCK
PAUSE_S = 0.01
# Renames take milliseconds; removing a large folder that was replaced takes longer.
_PATIENCE_S = 60.0


class BusyError(OutputError):
    """Error for another writer that does not finish."""


@dataclass(frozen=True)
class Grip:
    """An open lock file.

    Attributes:
        handle: File descriptor.
        locked: True if it is locked; False if the file system has no locks (some network and user-space
            ones).
    """

    handle: int
    locked: bool

    def let_go(self) -> None:
        """Close the file, which unlocks it."""
        _close(self.handle)


@contextlib.contextmanager
def locked(
    folders: Iterable[Path], patience_s: float = _PATIENCE_S, held: Iterable[Path] = ()
) -> Iterator[None]:
    """Hold the locks of folders.

    On a file system without locks, nothing is held.

    Args:
        folders: The folders, in any order: all processes take them in the same one.
        patience_s: Longest time to wait for another writer, in seconds.
        held: Folders whose locks the caller already holds.

    Raises:
        BusyError: Another writer holds one for longer.
        OutputError: The lock's path is not a regular file.
    """
    mine = {_identity(folder) for folder in held}
    wanted = {_identity(folder): folder for folder in folders}
    with contextlib.ExitStack() as stack:
        for key in sorted(wanted.keys() - mine):
            folder = wanted[key]
            deadline = time.monotonic() + patience_s
            while not _taken(folder / NAME, stack):
                if time.monotonic() > deadline:
                    raise BusyError(
                        f"another process is writing into {folder} and does not finish "
                        "(nothing was replaced)",
                        f"wait for it or stop it, then run this again (it holds {folder / NAME})",
                    )
                time.sleep(PAUSE_S)
        yield


def _identity(folder: Path) -> tuple[int, int]:
    """Return an identity that all paths of a folder share: one that is mounted twice has one lock."""
    found = folder.stat()
    return found.st_dev, found.st_ino


def _taken(path: Path, held: contextlib.ExitStack) -> bool:
    """Take a lock if it is free, and make ``held`` release it; return True also if it can't be made."""
    with Uninterrupted() as calm:
        try:
            grip = calm.insist(lambda: take(path, create=True))
        except OSError:  # it can't be made: writing the files will show why
            return True
        if grip is not None:
            close = partial(_release, path, [grip])
            has_begun(close)
            held.callback(has_ended, close)
            for _ in range(2):  # an interrupt may break into the first lines of one of them
                held.callback(close)
        return grip is not None


def take(path: Path, create: bool = False, mode: int = 0o666) -> Grip | None:
    """Open a file and lock it, without waiting.

    Args:
        path: The file.
        create: Create it if it is missing.
        mode: Permissions of a created file.

    Returns:
        The open file; None if another process holds it, or has removed it in the meantime.

    Raises:
        OSError: The file can't be opened.
        OutputError: The path is a link, a pipe, a folder or a device.
    """
    handle = _open(path, create, mode)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _close(handle)
        return None
    except OSError:
        return Grip(handle, False)
    if not _is_at(handle, path):  # its holder has removed it in the meantime
        _close(handle)
        return None
    return Grip(handle, True)


def _open(path: Path, create: bool, mode: int) -> int:
    # Without O_NONBLOCK, opening a pipe that somebody has put there would wait for ever.
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0) | flags, mode)
    except OSError:
        if is_link(path):
            raise _not_a_file(path) from None
        try:  # another user's file can be locked, too
            handle = os.open(path, os.O_RDONLY | flags)
        except OSError:
            handle = -1
        if handle < 0:
            raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        _close(handle)
        raise _not_a_file(path)
    return handle


def _not_a_file(path: Path) -> OutputError:
    return OutputError(
        f"{path} is not a regular file, so it can't be the lock of its folder",
        "lora-export has not made it: remove it, or choose a folder that others can't write into",
    )


def _close(handle: int) -> None:
    # Linux frees the number and the lock even with an error, which is about content: a lease's is synced.
    with contextlib.suppress(OSError):
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except OSError:
        return False


def _release(path: Path, grips: list[Grip]) -> None:
    # Removed while it is held: a process that has it open sees that it has left its path.
    with Uninterrupted() as calm:
        if grips:
            discard(path, calm)
            grips.pop().let_go()
