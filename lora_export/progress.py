"""Show the progress of long work: a bar on a terminal, a few lines elsewhere, nothing if quiet."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Protocol, TextIO

from lora_export.untrusted.shown import shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TextColumn

Advance = Callable[[int], None]
# A progress callback: takes what is being done, and the share of the whole that is done.
Say = Callable[[str, float], None]
# In a log, a long write prints one line every so many seconds.
_LINE_SECONDS = 10.0


class _Display(Protocol):
    """Display of the work of a verb that writes."""

    def stage(self, what: str, share: float | None) -> None:
        """Show what is done before anything is written."""

    def expect(self, size: int) -> None:
        """Set the number of bytes that will be written."""

    def advance(self, count: int) -> None:
        """Count bytes written."""


# The display of the verb that runs, for code that does its work far below.
_SHOWN: ContextVar[_Display | None] = ContextVar("_SHOWN", default=None)


def tell_stage(what: str, share: float | None = None) -> None:
    """Show what is done now, if a verb has a display, with the share that is done; None if unknown."""
    if (display := _SHOWN.get()) is not None:
        display.stage(what, share)


def tell_size(size: int) -> None:
    """Show how many bytes will be written, if a verb has a display."""
    if (display := _SHOWN.get()) is not None:
        display.expect(size)


@contextlib.contextmanager
def byte_progress(label: str, quiet: bool = False) -> Iterator[Advance | None]:
    """Yield a function to call with each number of bytes written, or None when quiet.

    What is told meanwhile by `tell_stage` and `tell_size` is shown as well.
    """
    if quiet:
        yield None
        return
    with contextlib.ExitStack() as stack:
        display = _Bar(label, stack) if is_terminal(sys.stderr) else _Lines(label)
        token = _SHOWN.set(display)
        stack.callback(_SHOWN.reset, token)
        yield display.advance


class _Bar:
    """A line on the terminal that appears with the first stage or byte."""

    def __init__(self, label: str, stack: contextlib.ExitStack) -> None:
        self._label, self._stack = shown(label), stack
        self._size: int | None = None
        self._written = 0
        self._update: Callable[..., None] | None = None

    def stage(self, what: str, share: float | None) -> None:
        """Show a pulse where nobody knows the share."""
        total = None if share is None else 1.0
        self._show(shown(what), total, share or 0.0, "" if share is None else f"{share:.0%}")

    def expect(self, size: int) -> None:
        self._size = size

    def advance(self, count: int) -> None:
        self._written += count
        self._show(self._label, self._size, self._written, _amount(self._written, self._size))

    def _show(self, what: str, total: float | None, done: float, amount: str) -> None:
        if self._update is None:
            self._update = self._open()
        self._update(description=what, total=total, completed=done, amount=amount)

    def _open(self) -> Callable[..., None]:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        amount = TextColumn("{task.fields[amount]}", markup=False)
        columns = (SpinnerColumn(), BarColumn(bar_width=30), TimeElapsedColumn(), _text(), amount)
        progress = self._stack.enter_context(Progress(*columns, console=_console(), transient=True))
        return partial(progress.update, progress.add_task("", total=None, amount=""))


class _Lines:
    """Lines of a log: a stage of unknown length at once, everything else every few seconds."""

    def __init__(self, label: str) -> None:
        self._label, self._written = label, 0
        self._size: int | None = None
        self._said, self._last = "", time.monotonic()

    def stage(self, what: str, share: float | None) -> None:
        if share is not None:
            self._now_and_then(f"{what}: {share:.0%}")
        elif what != self._said:
            self._said = what
            _to_stderr(what)

    def expect(self, size: int) -> None:
        self._size = size

    def advance(self, count: int) -> None:
        self._written += count
        self._now_and_then(f"{self._label}: {_amount(self._written, self._size)}")

    def _now_and_then(self, line: str) -> None:
        if time.monotonic() - self._last >= _LINE_SECONDS:
            self._last = time.monotonic()
            _to_stderr(line)


def _amount(written: int, size: int | None) -> str:
    return f"{written / 1e9:.1f} GB" if size is None else f"{written / 1e9:.1f} of {size / 1e9:.1f} GB"


def _console() -> Console:
    """Return a terminal that stays the same while an exporter's prints are held back."""
    from rich.console import Console

    return Console(file=sys.stderr, emoji=False)


def _text() -> TextColumn:
    """Return the column with a task's description, shown without reading it as rich's markup."""
    from rich.progress import TextColumn

    return TextColumn("{task.description}", markup=False)


@contextlib.contextmanager
def stage_progress(quiet: bool = False) -> Iterator[Say | None]:
    """Yield a function to call with what is being done and the share that is done, or None when quiet.

    It shows a bar on a terminal, and one line for each stage elsewhere.
    """
    if quiet:
        yield None
    elif is_terminal(sys.stderr):
        yield from _stage_bar()
    else:
        yield _stage_lines()


def _stage_bar() -> Iterator[Say]:
    from rich.progress import BarColumn, Progress, SpinnerColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=30),
        TimeElapsedColumn(),
        _text(),
    )
    with Progress(*columns, console=_console(), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, share: bar.update(task, description=shown(what), completed=share)


def _stage_lines() -> Say:
    last = ""

    def show(what: str, share: float) -> None:
        nonlocal last
        if what != last:
            last = what
            _to_stderr(f"[{share:4.0%}] {what}")

    return show


def is_terminal(stream: TextIO | None) -> bool:
    """Return True if a stream of `sys` is a terminal; it is None if the process was started without it."""
    return stream is not None and not stream.closed and stream.isatty()


def _to_stderr(line: str) -> None:
    if sys.stderr is None:  # `print` would take stdout for it
        return
    spoken(lambda: print(shown(line), file=sys.stderr, flush=True), err=True)


def spoken(write: Callable[[], object], err: bool = False) -> None:
    """Print; if the reader has gone (``| head``), let the work go on and keep its exit code.

    Args:
        write: Function that prints.
        err: True if it prints to stderr. Failures of stderr are ignored, those of stdout are raised, except a
            closed pipe.

    Raises:
        OSError: A result can't be written.
    """
    try:
        write()
    except OSError as error:
        _silence(err)
        if not (err or isinstance(error, BrokenPipeError)):
            raise


def _silence(err: bool) -> None:
    """Send what is still in the buffer nowhere: it would be an error again when Python ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, (sys.stderr if err else sys.stdout).fileno())
        finally:
            os.close(nowhere)
