"""Show the progress of long work: a bar on a terminal, a few lines elsewhere, nothing if quiet."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

from lora_export.untrusted.shown import shown

if TYPE_CHECKING:
    from rich.progress import TextColumn

Advance = Callable[[int], None]
# A progress callback: takes what is being done, and the share of the whole that is done.
Say = Callable[[str, float], None]
# In a log, a long write prints one line every so many seconds.
_LINE_SECONDS = 10.0


@contextlib.contextmanager
def byte_progress(label: str, quiet: bool = False) -> Iterator[Advance | None]:
    """Yield a function to call with each number of bytes written, or None when quiet."""
    if quiet:
        yield None
    elif is_terminal(sys.stderr):
        with _Bar(label) as bar:
            yield bar.advance
    else:
        yield _lines(label)


class _Bar:
    """A line on the terminal that appears with the first byte: planning may take longer than writing."""

    def __init__(self, label: str) -> None:
        self._label = shown(label)
        self._stack = contextlib.ExitStack()
        self._add: Advance | None = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def advance(self, count: int) -> None:
        """Count bytes written."""
        if self._add is None:
            self._add = self._open()
        self._add(count)

    def _open(self) -> Advance:
        from rich.console import Console
        from rich.progress import FileSizeColumn, Progress, SpinnerColumn, TransferSpeedColumn

        columns = (SpinnerColumn(), _text(), FileSizeColumn(), TransferSpeedColumn())
        progress = self._stack.enter_context(
            Progress(*columns, console=Console(stderr=True, emoji=False), transient=True)
        )
        task = progress.add_task(self._label, total=None)
        return lambda count: progress.advance(task, count)


def _text() -> TextColumn:
    """Return the column with a task's description, shown without reading it as rich's markup."""
    from rich.progress import TextColumn

    return TextColumn("{task.description}", markup=False)


def _lines(label: str) -> Advance:
    done, last = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        if time.monotonic() - last >= _LINE_SECONDS:
            last = time.monotonic()
            _to_stderr(f"{label}: {done / 1e9:.1f} GB")

    return advance


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
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=30),
        TimeElapsedColumn(),
        _text(),
    )
    with Progress(*columns, console=Console(stderr=True, emoji=False), transient=True) as bar:
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
