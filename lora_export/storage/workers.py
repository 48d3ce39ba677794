"""Run threads that share files, and return only after all of them have ended.

`threading.Thread.join` does not guarantee that: an exception that interrupts it (Ctrl-C) makes Python 3.11
and 3.12 treat the thread as ended while it runs. Its files would be closed, and their descriptors could
belong to other files of the program when it writes again.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any

# An exception may swallow the wake-up of a thread that has ended: the list is checked this often.
_LOOK_S = 1.0


def run_in_threads(works: Sequence[Callable[[], None]], stop: Callable[[BaseException], None]) -> None:
    """Do each piece of work in a thread of its own; return when all of them have ended, whatever happens.

    Args:
        works: Functions to call.
        stop: Function called with an exception from a piece of work or, in the meantime, from a signal's
            handler: it makes all of them end soon, and keeps the exception for the caller. It must not wait.

    Raises:
        BaseException: An exception from a signal's handler, after all threads have ended.
    """
    ended: list[int] = []
    wake: queue.SimpleQueue[None] = queue.SimpleQueue()

    def run(number: int) -> None:
        try:
            works[number]()
        except BaseException as error:
            stop(error)
        finally:
            ended.append(number)
            wake.put(None)

    with HeldSignals(stop):
        started = 0
        try:
            for number in range(len(works)):
                threading.Thread(target=run, args=(number,)).start()
                started += 1
        except BaseException as error:  # the system has no further thread
            stop(error)
        while len(ended) < started:
            try:
                with contextlib.suppress(queue.Empty):
                    wake.get(timeout=_LOOK_S)
            except BaseException as error:
                stop(error)


class HeldSignals:
    """A block that holds back exceptions of signals' handlers until its end.

    Handlers run as usual, so that a program's own handler that raises nothing is not delayed. They run only
    in the main thread: in another thread there is nothing to hold back.

    Args:
        told: Function called with each exception at the time that it is raised.
    """

    def __init__(self, told: Callable[[BaseException], None]) -> None:
        self._told = told
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._raised: BaseException | None = None
        self._is_held = False

    def __enter__(self) -> HeldSignals:
        if threading.current_thread() is threading.main_thread():
            self._is_held = True
            try:
                for number in signal.valid_signals():
                    handler = signal.getsignal(number)
                    if callable(handler):
                        self._handlers[number] = handler
                        signal.signal(number, self._handle)
            except BaseException:  # from a handler that was not held yet
                self._let_go()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._let_go()
        if self._raised is not None:
            raise self._raised

    def _let_go(self) -> None:
        waiting = list(self._handlers)
        while waiting:
            try:
                signal.signal(waiting[-1], self._handlers[waiting[-1]])
                waiting.pop()
            except BaseException as error:  # from a handler that was already restored
                self._raised = self._raised or error
        self._is_held = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._is_held:
            self._handlers[number](number, frame)
            return
        try:
            self._handlers[number](number, frame)
        except BaseException as error:
            self._raised = self._raised or error
            self._told(error)
