"""A setting of the whole process, changed for as long as anybody needs it so."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


class Held:
    """Changes a setting for the first holder, and puts it back when the last one leaves.

    Two holders that overlap, each putting back what it has found, would leave the first one's change behind.

    Args:
        change: Changes the setting; returns what puts it back.
    """

    def __init__(self, change: Callable[[], Callable[[], object]]) -> None:
        self._change, self._lock, self._holders = change, threading.Lock(), 0
        self._put_back: Callable[[], object] = lambda: None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Return a context in which the setting is changed."""
        with self._lock:
            if not self._holders:
                self._put_back = self._change()
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders:
                    self._put_back()
