"""How much memory a run of the command line takes above its imports, here or in a child process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# The limit that every reader keeps: ten times the file, and what a small one takes.
SMALL_BYTES, FACTOR = 50_000_000, 10

# The high-water mark is set back once, after a harmless run has imported all that the verb needs.
_SCRIPT = """
import contextlib, gc, io, json, sys, time
from lora_export.cli import main

def run(arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as stop:
            return stop.code, out.getvalue()[:20000], err.getvalue()[:20000]

def memory(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024

warm, runs = json.loads(sys.stdin.read())
for arguments in warm:
    code, _, err = run(arguments)
    assert code == 0, err
start = memory("VmRSS")
for arguments in runs:
    gc.collect()  # what a run left in cycles is not the next one's
    open("/proc/self/clear_refs", "w").write("5")
    begin = time.monotonic()
    code, out, err = run(arguments)
    seconds = time.monotonic() - begin
    print(json.dumps([code, out, err, memory("VmHWM") - start, seconds]), flush=True)
"""


def measured(
    warm: Sequence[Sequence[object]], runs: Sequence[Sequence[object]]
) -> list[tuple[int, str, str, int, float]]:
    """Return exit code, stdout, stderr, peak in bytes and seconds of each run.

    Args:
        warm: Arguments of harmless runs.
        runs: Arguments of the runs to measure.
    """
    job = json.dumps([[[str(word) for word in one] for one in part] for part in (warm, runs)])
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], input=job, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
    assert len(found) == len(runs)
    return found


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
