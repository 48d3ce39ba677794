"""Let one call to the file system fail, or be interrupted, and look at what that leaves.

Calls of `os` are counted where they concern a folder that is watched, by path, by a file descriptor, or by a
folder's descriptor; `pathlib` and `shutil` come by here as well.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CALLS = ("rename", "replace", "unlink", "remove", "rmdir", "mkdir", "fsync", "open")


def _interrupt_before(call: Callable[[], Any]) -> Any:
    raise KeyboardInterrupt


def _interrupt_after(call: Callable[[], Any]) -> Any:
    call()
    raise KeyboardInterrupt


def _killed_after(call: Callable[[], Any]) -> Any:
    try:
        call()
    finally:
        os.kill(os.getpid(), signal.SIGKILL)


def _signal(number: signal.Signals) -> Callable[[Callable[[], Any]], Any]:
    def fault(call: Callable[[], Any]) -> Any:
        done = call()
        signal.raise_signal(number)
        return done

    return fault


def _error_after(number: int) -> Callable[[Callable[[], Any]], Any]:
    def fault(call: Callable[[], Any]) -> Any:
        call()
        raise OSError(number, os.strerror(number))

    return fault


def _error(number: int) -> Callable[[Callable[[], Any]], Any]:
    def fault(call: Callable[[], Any]) -> Any:
        raise OSError(number, os.strerror(number))

    return fault


# What happens in place of a call.
FAULTS: dict[str, Callable[[Callable[[], Any]], Any]] = {
    "Ctrl-C before": _interrupt_before,
    "Ctrl-C after": _interrupt_after,
    "SIGINT": _signal(signal.SIGINT),
    "SIGTERM": _signal(signal.SIGTERM),
    "EBUSY": _error(errno.EBUSY),
    "ENOSPC": _error(errno.ENOSPC),
    "EIO": _error(errno.EIO),
}
# What close(2) may say, on network file systems for example; the number is free all the same.
CLOSES: dict[str, Callable[[Callable[[], Any]], Any]] = {
    "EIO": _error_after(errno.EIO),
    "ENOSPC": _error_after(errno.ENOSPC),
}
KILLS: dict[str, Callable[[Callable[[], Any]], Any]] = {
    "killed before": lambda call: os.kill(os.getpid(), signal.SIGKILL),
    "killed after": _killed_after,
}
ERRORS = ("EBUSY", "ENOSPC", "EIO")


class Injector:
    """Counts calls, and lets those of some numbers fail.

    Args:
        folder: Folder that is watched.
        fault: What happens; None: nothing.
        at: Numbers of the calls.
        closes: Count calls of `os.close` instead, which have faults of their own.

    Attributes:
        made: Each call that was counted: its name and first argument.
    """

    def __init__(
        self, folder: Path, fault: str | None = None, at: range = range(0), *, closes: bool = False
    ) -> None:
        self.made: list[tuple[str, str]] = []
        self._calls, faults = (("close",), CLOSES) if closes else (CALLS, FAULTS | KILLS)
        self._folder, self._fault, self._at = str(folder), faults.get(fault or ""), at

    @contextmanager
    def armed(self) -> Iterator[Injector]:
        """Stand in for the calls of `os` in the block."""
        own = {name: getattr(os, name) for name in self._calls}
        for name, call in own.items():
            setattr(os, name, self._wrapped(name, call))
        try:
            yield self
        finally:
            for name, call in own.items():
                setattr(os, name, call)

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, *more: Any, **named: Any) -> Any:
            where = str(path) if isinstance(path, int) else os.fspath(path)
            concerned = isinstance(path, int) or str(where).startswith(self._folder) or "dir_fd" in named
            if not concerned:
                return call(path, *more, **named)
            number = len(self.made)
            self.made.append((name, str(where)))
            if self._fault is None or number not in self._at:
                return call(path, *more, **named)
            return self._fault(lambda: call(path, *more, **named))

        # shutil looks here for what it may do with a folder's descriptor.
        for supported in (os.supports_dir_fd, os.supports_follow_symlinks):
            if call in supported:
                supported.add(wrapped)
        return wrapped


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, and every empty folder, by its place."""
    found = {}
    for path in sorted(folder.rglob("*")):
        place = str(path.relative_to(folder))
        if path.is_file() or path.is_symlink():
            found[place] = path.read_bytes()
        elif not any(path.iterdir()):
            found[f"{place}/"] = b""
    return found
