"""Make sure that the files that a result is made from stay the same from the first look at them to the last.

A base is read several times by its path: its header, its hash, its weights. A commit of another run may
replace it in between, and the result would be of two models under the hash of one. So whoever opens an input
notes its state (`note_inputs`) within a block of `same_inputs`; all that were noted are looked at once more
before anything gets its name (`OutputSet.commit`), or before a verdict is given. Only
states are compared: nothing is read for it.

An input of several files (the shards, index and config of an adapter; a graph and its tokenizer) is of one
state: that of all is taken before the first of them is read, and looked at when the last one was. A command
that reads some of its inputs before it calls a mode has a block around both (``command=True``).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from lora_export.errors import InputChangedError


@dataclass(frozen=True, kw_only=True)
class FileState:
    """State of a file, which differs after it has been replaced or written to.

    Attributes:
        path: Its absolute path, links not followed.
        device: The file system; -1 if the file does not exist.
        inode: Its number there.
        size_bytes: Its size.
        modified_ns: When it was written to.
    """

    path: Path
    device: int
    inode: int
    size_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Return the state of a file as it is now."""
        absolute = path.absolute()
        try:
            found = os.stat(absolute)  # noqa: PTH116
        except OSError:
            return cls(path=absolute, device=-1, inode=0, size_bytes=0, modified_ns=0)
        return cls(
            path=absolute,
            device=found.st_dev,
            inode=found.st_ino,
            size_bytes=found.st_size,
            modified_ns=found.st_mtime_ns,
        )

    def change(self) -> str:
        """Return what has become of the file since, or an empty text."""
        now = FileState.of(self.path)
        if now == self:
            return ""
        if now.device == -1:
            return f"{self.path}: not there any more"
        if self.device == -1:
            return f"{self.path}: was not there"
        if not self.is_of(now):
            return f"{self.path}: replaced by another file"
        return f"{self.path}: written to ({self.size_bytes} bytes then, {now.size_bytes} now)"

    def is_of(self, other: FileState) -> bool:
        """Return whether both are states of one file."""
        return (self.device, self.inode) == (other.device, other.inode)


@dataclass
class Inputs:
    """The inputs of one result.

    Attributes:
        states: By path, each as it was when it was first noted.
        is_command: They are those of a command, of which results are a part.
        command: Those of the command that this result is a part of.
    """

    states: dict[Path, FileState] = field(default_factory=dict)
    is_command: bool = False
    command: Inputs | None = None

    @property
    def all(self) -> list[FileState]:
        """The states of what this result is made from, those of its command among them."""
        return [*self.states.values(), *(self.command.states.values() if self.command else ())]

    def note(self, state: FileState) -> None:
        """Keep a file's state, unless an earlier one is known."""
        self.states.setdefault(state.path, state)


_INPUTS: ContextVar[Inputs | None] = ContextVar("inputs", default=None)


@contextlib.contextmanager
def same_inputs(at_end: bool = False, command: bool = False) -> Iterator[Inputs]:
    """Return a block, or a decorator, within which inputs are noted for one result.

    Args:
        at_end: No commit looks at them: it is done when the block is. Such a block within
            another one is a part of it, as a session that a parity check opens.
        command: The block of a command: what is noted in it counts for every result within it.

    Raises:
        InputChangedError: With ``at_end``, an input has changed.
    """
    outer = _INPUTS.get()
    if outer is not None and at_end:
        inputs = outer
    else:
        inputs = Inputs(is_command=command, command=outer if outer and outer.is_command else None)
    token = _INPUTS.set(inputs)
    try:
        yield inputs
        if at_end:
            refuse_changed(inputs.all)
    finally:
        _INPUTS.reset(token)


def note_inputs(paths: Iterable[Path]) -> None:
    """Note files before they are opened; outside of `same_inputs` nothing is to be kept together."""
    note_states(map(FileState.of, paths))


def note_states(states: Iterable[FileState]) -> None:
    """Note files that something was read from already, as they were then."""
    if (inputs := _INPUTS.get()) is not None:
        for state in states:
            inputs.note(state)


def note_loaded(states: Iterable[FileState]) -> None:
    """Note files that were loaded before, whose values are mapped, and refuse those written to since.

    One that was replaced is none of ours any more: what is mapped is the old file.

    Raises:
        InputChangedError: A file was written to: its values are not those that it was loaded with.
    """
    mapped = [state for state in states if state.is_of(FileState.of(state.path))]
    refuse_changed(mapped, "since loading", "load it again")
    note_states(mapped)


def forget_inputs(written: Iterable[Path]) -> None:
    """Take files, or all below folders, for inputs no longer: this very run has replaced them."""
    if (inputs := _INPUTS.get()) is not None:
        for place in (str(path.absolute()) for path in written):
            below = os.path.join(place, "")  # noqa: PTH118
            for states in (inputs.states, inputs.command.states if inputs.command else {}):
                for path in [path for path in states if str(path) == place or str(path).startswith(below)]:
                    del states[path]


def refuse_changed_inputs() -> None:
    """Raise `InputChangedError` if an input of this block has changed since it was noted."""
    if (inputs := _INPUTS.get()) is not None:
        refuse_changed(inputs.all)


def refuse_changed(
    states: Collection[FileState],
    since: str = "while being read",
    hint: str = "nothing was written: run it again when nobody writes them",
) -> None:
    """Raise `InputChangedError` naming every file whose state has changed.

    Args:
        states: The files' states when they were first looked at.
        since: The time since then, in the message's words.
        hint: Advice for the user.
    """
    if changed := [change for state in states if (change := state.change())]:
        files = "a file has" if len(changed) == 1 else f"{len(changed)} files have"
        raise InputChangedError(f"{files} changed {since}: the result would be of two models", hint, changed)
