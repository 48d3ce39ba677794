"""BLAS on one thread, for as long as anybody wants it so."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any


class _OneThread:
    """Holds BLAS at one thread, and gives back what it had when the last holder leaves.

    The number is the whole process's: two holders that overlap, each putting back what it has found, would
    leave the program the first one's 1.
    """

    def __init__(self) -> None:
        self._lock, self._holders = threading.Lock(), 0
        self._limits: Any = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        from threadpoolctl import threadpool_limits

        with self._lock:
            if not self._holders:
                self._limits = threadpool_limits(1, user_api="blas")
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders:
                    self._limits.restore_original_limits()


_ONE_THREAD = _OneThread()


def one_blas_thread() -> contextlib.AbstractContextManager[None]:
    """Return a context in which BLAS computes on the calling thread alone."""
    return _ONE_THREAD.held()
