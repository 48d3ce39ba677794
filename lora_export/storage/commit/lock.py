"""One writer at a time gives names to files of a folder.

The lock is flock(2) on a hidden file: the kernel lets go of it when its process ends, however it ends. The
file goes with the lock; one that a killed process has left is taken and removed by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from lora_export.errors import OutputError
from lora_export.storage.commit.signals import Uninterrupted
from lora_export.storage.commit.steps import discard

NAME = ".lora-export.lock"
# Renames take milliseconds; removing a large folder that was replaced takes longer.
_PATIENCE_S = 60.0
_PAUSE_S = 0.01


@contextlib.contextmanager
def locked(folders: Iterable[Path], patience_s: float = _PATIENCE_S) -> Iterator[None]:
    """Hold the locks of folders.

    Where a file system has no locks (some network and user-space ones), nothing is held.

    Args:
        folders: In any order: they are taken in the same one by everybody.
        patience_s: How long another writer is waited for.

    Raises:
        OutputError: Another writer holds one for longer.
    """
    with contextlib.ExitStack() as held:
        for folder in sorted({folder.resolve() for folder in folders}):
            deadline = time.monotonic() + patience_s
            while not _taken(folder / NAME, held):
                if time.monotonic() > deadline:
                    raise OutputError(
                        f"another process is writing into {folder} and does not come to an end "
                        "(nothing was replaced)",
                        "wait for it or end it, then run this again",
                    )
                time.sleep(_PAUSE_S)
        yield


def _taken(path: Path, held: contextlib.ExitStack) -> bool:
    """Take a lock if nobody has it, and let ``held`` release it; True too where there are none."""
    with Uninterrupted() as calm:
        handle = calm.insist(lambda: _open(path))
        if handle is None:
            return True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        except OSError:  # this file system has no locks
            held.callback(_release, path, handle)
            return True
        if not _is_at(handle, path):  # its holder has removed it meanwhile
            os.close(handle)
            return False
        held.callback(_release, path, handle)
        return True


def _open(path: Path) -> int | None:
    """Open or create the file; None where that isn't possible: what it means shows when files are written."""
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    except OSError:
        # Another user's file: it may be locked all the same.
        with contextlib.suppress(OSError):
            return os.open(path, os.O_RDONLY | flags)
        return None


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except OSError:
        return False


def _release(path: Path, handle: int) -> None:
    # Removed while it is held: whoever has it open sees that it is not at its place any more.
    try:
        with Uninterrupted() as calm:
            discard(path, calm)
    finally:
        os.close(handle)
