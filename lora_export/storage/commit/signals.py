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

    def __enter__(self) -> Uninterrupted:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if handler not in (None, signal.SIG_IGN):
                    self._before[number] = handler
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        for number in self._arrived:
            signal.raise_signal(number)
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

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number not in self._arrived:
            self._arrived.append(number)
