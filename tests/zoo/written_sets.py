"""A set of three files that are written together, and files that another process has left."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

from lora_export.storage.commit.lease import Lease, new_identity
from lora_export.storage.outputs import OutputSet

NAMES = ("m.onnx.data", "m.lora.json", "m.onnx")


def write(folder: Path, text: str, force: bool = True) -> None:
    with OutputSet(force) as outputs:
        for name in NAMES:
            outputs.stage(folder / name).write_text(text)
        outputs.commit()


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def all_of(text: str) -> dict[str, str]:
    return dict.fromkeys(NAMES, text)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def ended(folder: Path, *names: str) -> str:
    """Leave files of a set whose process has ended; return the set's identity."""
    held = Lease(folder, new_identity())
    held.hold()
    for name in names:
        staged_by(held.identity, folder, name)
    held.let_go()
    Lease.held_here.discard(held.identity)
    return held.identity


def staged_by(identity: str, folder: Path, name: str = "m.onnx") -> Path:
    path = folder / f"{name}.tmp-{identity}"
    path.write_bytes(b"x" * 2_000_000)
    return path


@contextlib.contextmanager
def in_seconds(most: int):
    def late(*_):
        raise AssertionError("it waits without end")  # no OSError, which is dealt with

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(most)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
