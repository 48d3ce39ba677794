"""Keep what a run has written: notes at once, outputs that have their names, and what is still open."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lora_export.untrusted.places import is_there


@dataclass
class Run:
    """One run of the command line.

    Attributes:
        note: Function called with each note; equal notes are passed once.
    """

    note: Callable[[str], None]
    _noted: set[str] = field(default_factory=set)
    _committed: list[Path] = field(default_factory=list)
    _begun: dict[Callable[[], None], None] = field(default_factory=dict)

    def written(self) -> list[Path]:
        """Return the outputs that were given their names and still exist."""
        return [path for path in dict.fromkeys(self._committed) if is_there(path)]

    def put_away(self) -> None:
        """Close what is still open: an interrupt may come before the first line of what closes it."""
        for close in reversed(list(self._begun)):
            try:
                close()
            except OSError as error:  # what the run has to say is not lost by that
                self.note(f"could not put away all temporary files: {error}")


_run: Run | None = None


@contextlib.contextmanager
def listening(note: Callable[[str], None]) -> Iterator[Run]:
    """Pass the block's notes to ``note``, its outputs to a `Run`; elsewhere, notes are Python warnings."""
    global _run
    before, _run = _run, Run(note)
    try:
        yield _run
    finally:
        _run = before


def tell(text: str) -> None:
    """Pass the user a note."""
    if _run is None:
        try:
            warnings.warn(text, UserWarning, stacklevel=3)
        except UserWarning:
            # Warnings are errors here, but a note must not stop the tidying of files.
            logging.getLogger("lora_export").warning(text)
    elif text not in _run._noted:
        _run._noted.add(text)
        _run.note(text)


def has_begun(close: Callable[[], None]) -> None:
    """Remember how to put away what is begun now; it may be called twice."""
    if _run is not None:
        _run._begun[close] = None


def has_ended(close: Callable[[], None]) -> None:
    """Forget what is put away."""
    if _run is not None:
        _run._begun.pop(close, None)


def has_written(output: Path) -> None:
    """Record that an output has its name."""
    if _run is not None:
        _run._committed.append(output)
