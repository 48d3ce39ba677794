"""How much memory a run of the command line takes above its imports, here or in a child process."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import preloaded

# The limit that every reader keeps: ten times the file, and what a small one takes.
SMALL_BYTES, FACTOR = 50_000_000, 10

_SHOWN = 20_000


def measured(
    warm: Sequence[Sequence[object]], runs: Sequence[Sequence[object]]
) -> list[tuple[int, str, str, int, float]]:
    """Return exit code, stdout, stderr, peak in bytes and seconds of each run.

    They run in a fork of a process that has all of lora-export and its libraries loaded.

    Args:
        warm: Arguments of harmless runs.
        runs: Arguments of the runs to measure.
    """
    job = json.dumps([[[str(word) for word in one] for one in part] for part in (warm, runs)])
    done = preloaded.run([], input=job, timeout_s=300, entry="peaks:measure_here")
    assert done.returncode == 0, done.stderr[-2000:]
    found = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
    assert len(found) == len(runs)
    return found


def measure_here(_arguments: Sequence[str]) -> None:
    """Do in this process what `measured` asks for on stdin."""
    warm, runs = json.loads(sys.stdin.read())
    for arguments in warm:
        code, _, said = _run(arguments)
        assert code == 0, said
    start = _status("VmRSS")
    for arguments in runs:
        gc.collect()  # what a run left in cycles is not the next one's
        # The high-water mark is set back once a harmless run has touched all that the verb needs.
        Path("/proc/self/clear_refs").write_text("5")
        begin = time.monotonic()
        code, out, said = _run(arguments)
        seconds = time.monotonic() - begin
        sys.stdout.write(json.dumps([code, out, said, _status("VmHWM") - start, seconds]) + "\n")


def _run(arguments: Sequence[str]) -> tuple[Any, str, str]:
    from lora_export.cli import main

    out, err = io.StringIO(), io.StringIO()
    code = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue()[:_SHOWN], err.getvalue()[:_SHOWN]


@contextmanager
def within(path: Path) -> Iterator[None]:
    """Hold what is done in this process to the peak that reading a file may have, where there is a /proc.

    Without the warm-up of `measured`: small files, of which many are read.
    """
    if sys.platform != "linux":
        yield
        return
    Path("/proc/self/clear_refs").write_text("5")
    start = _status("VmRSS")
    yield
    peak = _status("VmHWM") - start
    assert peak <= allowed(path), f"{peak / 1e6:.0f} MB for {path}, of {allowed(path) / 1e6:.0f}"


def _status(key: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def allowed(path: Path) -> int:
    """Return the peak that reading a file, or the files of a folder, may have."""
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return FACTOR * sum(file.stat().st_size for file in files) + SMALL_BYTES
