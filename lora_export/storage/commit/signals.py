"""Put interrupts off while files change their names."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, TypeVar

_Result = TypeVar("_Result")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Uninterrupted:
    """A block that Ctrl-C, SIGTERM and SIGHUP do not break into: they come when it is done.

    Signals are handled in the main thread alone, so in another one there is nothing to put off.
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
            except BaseException:  # a signal whose handler is not replaced yet
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
        """Do something that may be done twice; do it again if an exception that is no error breaks it off."""
        try:
            return act()
        except Exception:
            raise
        except BaseException as interrupt:
            self._interrupt = interrupt
            return act()

    def _restore(self) -> None:
        """Put the handlers back; one that is back already may raise in between, and the others follow."""
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
        """Raise what has arrived; a handler that raises does not keep the others from being called."""
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
        # It comes while handlers are put back.
        handler = self._before.get(number, signal.getsignal(number))
        signal.signal(number, handler)
        if callable(handler):
            handler(number, frame)
        else:
            signal.raise_signal(number)
