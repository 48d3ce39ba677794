"""Progress of long writes: a bar on a terminal, a few lines elsewhere, nothing when asked to be quiet."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

Advance = Callable[[int], None]
# Off a terminal (a log), one line when a write has gone on for this long, and then as often again.
_LINE_SECONDS = 10.0


@contextlib.contextmanager
def byte_progress(label: str, quiet: bool = False) -> Iterator[Advance | None]:
    """Yield a function to call with each number of bytes written, or None when quiet."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        yield from _bar(label)
    else:
        yield _lines(label)


def _bar(label: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn

    columns = (SpinnerColumn(), TextColumn(label), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=None)
        yield lambda count: progress.advance(task, count)


def _lines(label: str) -> Advance:
    done, last = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        if time.monotonic() - last >= _LINE_SECONDS:
            last = time.monotonic()
            print(f"{label}: {done / 1e9:.1f} GB written", file=sys.stderr, flush=True)

    return advance
