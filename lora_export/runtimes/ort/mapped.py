"""The data files of an open graph, which ONNX Runtime maps: what is written into them changes its answers."""

from __future__ import annotations

import time
from collections.abc import Iterable

from lora_export.storage.inputs import FileState, refuse_changed

# A look takes some microseconds for each file, and a small graph's run not many more.
_PERIOD_S = 1.0


class MappedFiles:
    """The files of one session, looked at now and then.

    Args:
        states: As they were when the session was opened.
    """

    def __init__(self, states: Iterable[FileState]) -> None:
        self._states = tuple(states)
        self._next = time.monotonic() + _PERIOD_S

    def refuse_written(self) -> None:
        """Refuse to go on with files that were written to in place; at most one look a second.

        Another file under the name is none of this session's: what is mapped is the old one.

        Raises:
            InputChangedError: A file was written to. Every later call raises it as well.
        """
        now = time.monotonic()
        if now < self._next:
            return
        kept = [state for state in self._states if state.is_of(FileState.of(state.path))]
        hint = "open another session, and replace files by renaming"
        refuse_changed(kept, "since the session was opened", hint)
        self._next = now + _PERIOD_S
