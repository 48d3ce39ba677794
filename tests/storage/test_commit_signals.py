"""Signals from outside while a set of files gets its names."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from output_cases import fill, inputs
from written_sets import NAMES

from lora_export import cli
from lora_export.storage.commit.signals import Uninterrupted

SLOW = """
import os, pathlib, sys, time
from lora_export import cli
name, number, mark, *arguments = sys.argv[1:]
own, calls = getattr(os, name), []
def slow(*given, **named):
    calls.append(given)
    if len(calls) == int(number):
        pathlib.Path(mark).touch()
        time.sleep(1)
    return own(*given, **named)
setattr(os, name, slow)
cli.main(arguments)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize(
    ("call", "at", "renaming"), [("fsync", 1, False), ("rename", 2, True), ("rename", 5, True)]
)
def test_a_signal_from_outside(number, call, at, renaming, tmp_path, capsys):
    graph, adapter = inputs(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    fill(out, dict.fromkeys(NAMES, b"old"))
    arguments = [
        "merge-onnx",
        "--base",
        graph,
        "--adapter",
        adapter,
        "-o",
        out / "m.onnx",
        "--force",
        "--quiet",
    ]
    command = [sys.executable, "-c", SLOW, call, str(at), str(tmp_path / "mark"), *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "mark").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        said = process.stderr.read()
    if number == signal.SIGKILL:
        assert process.returncode == -number
        cli._run(["inspect", str(out / "nothing"), "--plot", str(out / "nothing.html")], False)
        told = capsys.readouterr().err
        if not renaming:
            assert "note: removed " in told
        else:
            # The second renaming takes an old file away, the fifth gives a new one its name.
            assert ("note: put back " if at == 2 else "note: finished ") in told
        whole = at == 5
    else:
        assert process.returncode == 128 + number
        whole = renaming
        told = "complete and in place: " if renaming else "nothing was replaced"
        assert f"Aborted: {told}" in said
        assert "Traceback" not in said
    found = contents_of_bytes(out)
    assert set(found) == set(NAMES)
    assert (found["m.onnx"] != b"old") == whole
    assert ([text == b"old" for text in found.values()]) == [not whole] * 3


def contents_of_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_signals_wait_and_come_in_the_end():
    arrived = []
    before = signal.signal(signal.SIGTERM, lambda *_: arrived.append("TERM"))
    try:
        with Uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert not arrived
        assert arrived == ["TERM"]
    finally:
        signal.signal(signal.SIGTERM, before)
    done = []
    with pytest.raises(KeyboardInterrupt):
        _interrupted(done)
    assert done


def _terminated(phase):
    with Uninterrupted():
        signal.raise_signal(signal.SIGTERM)
        phase[:] = ["exit"]


def _interrupted(done):
    with Uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append(True)


@pytest.mark.parametrize("at", ["enter", "exit"])
def test_a_signal_while_handlers_are_exchanged_leaves_none_behind(at, monkeypatch):
    """Ctrl-C once more, in the moment when some handlers are put in place or back, and others are not yet."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    arrived, own, phase = [], signal.signal, ["enter"]
    before = [signal.getsignal(number) for number in numbers]

    def hang_up(*_):
        arrived.append("HUP")
        raise SystemExit

    handlers = (signal.default_int_handler, lambda *_: arrived.append("TERM"), hang_up)
    for number, handler in zip(numbers, handlers, strict=True):
        own(number, handler)

    def exchanged(number, handler):
        result = own(number, handler)
        if number == signal.SIGINT and phase == [at]:
            phase.append("done")
            signal.raise_signal(signal.SIGHUP if at == "enter" else signal.SIGINT)
        return result

    monkeypatch.setattr(signal, "signal", exchanged)
    try:
        with pytest.raises(SystemExit if at == "enter" else KeyboardInterrupt):
            _terminated(phase)
        assert tuple(map(signal.getsignal, numbers)) == handlers
        assert arrived == (["HUP"] if at == "enter" else ["TERM"])
    finally:
        for number, handler in zip(numbers, before, strict=True):
            own(number, handler)
