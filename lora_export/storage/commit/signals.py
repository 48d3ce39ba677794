"""Delay interrupts while files are renamed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, TypeVar

_Result = TypeVar("_Result")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Uninterrupted:
    """A block in which Ctrl-C, SIGTERM and SIGHUP are delayed until its end.

    Signals are handled only in the main thread, so in another thread there is nothing to delay.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._arrived: list[int] = []
        self._interrupt: BaseException | None = None
        self._is_over = False

    def __enter__(self) -> Uninterrupted:
        if threading.current_thread() is threading.main_thread():
            try:
                for number in _SIGNALS:
                    handler = signal.getsignal(number)
                    if handler not in (None, signal.SIG_IGN):
                        self._before[number] = handler
                        signal.signal(number, self._note)
            except BaseException:  # from a signal whose handler is not yet replaced
                self._restore()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._restore()
        finally:
            self._deliver()
        if self._interrupt is not None:
            raise self._interrupt

    def insist(self, act: Callable[[], _Result]) -> _Result:
        """Call a function that may be called twice; call it again if an interrupt stops it."""
        try:
            return act()
        except Exception:
            raise
        except BaseException as interrupt:
            self._interrupt = interrupt
            return act()

    def _restore(self) -> None:
        """Put the handlers back, all of them even if one that is already back raises in between."""
        self._is_over = True
        try:
            while self._before:
                number, handler = next(iter(self._before.items()))
                signal.signal(number, handler)
                self._before.pop(number, None)
        finally:
            if self._before:
                self._restore()

    def _deliver(self) -> None:
        """Raise the signals that have arrived, all of them even if a handler raises."""
        try:
            while self._arrived:
                signal.raise_signal(self._arrived.pop(0))
        finally:
            if self._arrived:
                self._deliver()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._is_over:
            if number not in self._arrived:
                self._arrived.append(number)
            return
        # The signal arrived while handlers were put back.
        handler = self._before.get(number, signal.getsignal(number))
        signal.signal(number, handler)
        if callable(handler):
            handler(number, frame)
        else:
            signal.raise_signal(number)
