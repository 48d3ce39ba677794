"""A setting of the whole process that stays changed while any caller needs it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


class HeldSetting:
    """Change a setting for the first holder, and restore it when the last holder leaves.

    If each of two overlapping holders restored what it had found, the first one's change would remain.

    Args:
        change: Function that changes the setting and returns a function that restores it.
    """

    def __init__(self, change: Callable[[], Callable[[], object]]) -> None:
        self._change, self._lock, self._holders = change, threading.Lock(), 0
        self._restore: Callable[[], object] = lambda: None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep the setting changed inside a ``with`` block."""
        with self._lock:
            if not self._holders:
                self._restore = self._change()
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders:
                    self._restore()
