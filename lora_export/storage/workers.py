"""Threads that share files: whoever started them goes on when all have ended, and not before.

`threading.Thread.join` does not promise that: an exception that breaks into it (Ctrl-C) makes Python 3.11
and 3.12 take the thread for ended while it runs. Files would be closed under it, and their numbers be those
of other files of the program when it writes next.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any

# The wake-up of a thread that has ended may be lost to an exception: its entry is looked for this often.
_LOOK_S = 1.0


def run_in_threads(works: Sequence[Callable[[], None]], stop: Callable[[BaseException], None]) -> None:
    """Do each piece of work in a thread of its own; return when all of them have ended, whatever happens.

    Args:
        works: What to do.
        stop: Called with what a piece of work, or a signal's handler meanwhile, has raised: it lets all of
            them end soon, and keeps the exception for the caller. It must not wait for anything.

    Raises:
        BaseException: What a signal's handler has raised, after all have ended.
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
    """A block that no signal's handler breaks into: what one raises comes when the block is done.

    Handlers run as soon as ever, so that a program's own that raises nothing is not delayed. They run in the
    main thread alone: in another one there is nothing to hold.

    Args:
        told: Called with each exception at the time that it is raised.
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
            except BaseException:  # one that was not held yet
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
            except BaseException as error:  # of a handler that is in its place again
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
