"""One writer at a time gives names to files of a folder.

The lock is flock(2) on a hidden file: the kernel lets go of it when its process ends, however it ends. The
file goes with the lock; one that a killed process has left is taken and removed by the next one.
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
from lora_export.storage.commit.steps import discard
from lora_export.storage.commit.told import has_begun, has_ended

NAME = ".lora-export.lock"
PAUSE_S = 0.01
# Renames take milliseconds; removing a large folder that was replaced takes longer.
_PATIENCE_S = 60.0


class BusyError(OutputError):
    """Another writer does not come to an end."""


@dataclass(frozen=True)
class Grip:
    """An open file.

    Attributes:
        handle: Its descriptor.
        locked: Whether it is locked; False where the file system has no locks (some network and user-space
            ones).
    """

    handle: int
    locked: bool

    def let_go(self) -> None:
        """Close it, and unlock it thereby."""
        os.close(self.handle)


@contextlib.contextmanager
def locked(
    folders: Iterable[Path], patience_s: float = _PATIENCE_S, held: Iterable[Path] = ()
) -> Iterator[None]:
    """Hold the locks of folders.

    Where a file system has no locks, nothing is held.

    Args:
        folders: In any order: they are taken in the same one by everybody.
        patience_s: How long another writer is waited for.
        held: Folders whose locks the caller holds already.

    Raises:
        BusyError: Another writer holds one for longer.
        OutputError: What lies in a lock's place is no file.
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
                        f"another process is writing into {folder} and does not come to an end "
                        "(nothing was replaced)",
                        f"wait for it or end it, then run this again (it holds {folder / NAME})",
                    )
                time.sleep(PAUSE_S)
        yield


def _identity(folder: Path) -> tuple[int, int]:
    """Return what is the same for all paths of a folder: one that is mounted twice has one lock."""
    found = folder.stat()
    return found.st_dev, found.st_ino


def _taken(path: Path, held: contextlib.ExitStack) -> bool:
    """Take a lock if nobody has it, and let ``held`` release it; True too where there are none."""
    with Uninterrupted() as calm:
        try:
            grip = calm.insist(lambda: take(path, create=True))
        except OSError:  # it can't be made: what that means shows when files are written
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
        create: Make it where there is none.
        mode: Who may open it then.

    Returns:
        None if another process holds it, or has removed it meanwhile.

    Raises:
        OSError: It can't be opened.
        OutputError: It is a link, a pipe, a folder or a device.
    """
    handle = _open(path, create, mode)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:
        return Grip(handle, False)
    if not _is_at(handle, path):  # its holder has removed it meanwhile
        os.close(handle)
        return None
    return Grip(handle, True)


def _open(path: Path, create: bool, mode: int) -> int:
    # Without O_NONBLOCK, a pipe that somebody has put there would be waited for without end.
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0) | flags, mode)
    except OSError:
        if path.is_symlink():
            raise _no_file(path) from None
        try:  # another user's file: it may be locked all the same
            handle = os.open(path, os.O_RDONLY | flags)
        except OSError:
            handle = -1
        if handle < 0:
            raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _no_file(path)
    return handle


def _no_file(path: Path) -> OutputError:
    return OutputError(
        f"{path} is no regular file, so it can't be the lock under which files get their names",
        "no lora-export has made it: remove it, or choose a folder that others can't write into",
    )


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except OSError:
        return False


def _release(path: Path, grips: list[Grip]) -> None:
    # Removed while it is held: whoever has it open sees that it is not at its place any more.
    with Uninterrupted() as calm:
        if grips:
            discard(path, calm)
            grips.pop().let_go()
