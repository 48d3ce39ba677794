"""Killed processes and two writers of one output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import forked_runs
import pytest

pytestmark = pytest.mark.slow


def lines_of(what: str, folder: Path) -> list[dict]:
    command = [sys.executable, str(Path(forked_runs.__file__)), what, str(folder)]
    # What pytest looks for in tests/zoo, and the package, whether or not it is installed.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_killed_at_every_call(tmp_path, record_property):
    """The next run that names the folder leaves the old output or the new one whole, and says what it did."""
    runs = lines_of("killed", tmp_path)
    record_property("tried", len(runs))
    assert len(runs) > 400
    for run in runs:
        assert set(run["after"]) <= {"old", "new"}, run
        assert not run["others"], run
        assert not run["tmp"], run
        if run["before"] != run["after"]:
            assert "note: finished " in run["said"] or "note: put back " in run["said"], run
        for held in run["before"]:
            # Never files of both, and never the file that points at the others before these are there.
            if isinstance(held, dict):
                assert len(set(held.values())) <= 1, run
                assert "m.onnx" not in held, run
    assert {"old", "new"} <= {state for run in runs for state in run["before"] if isinstance(state, str)}


def test_two_writers_of_one_output(tmp_path, record_property):
    runs = lines_of("races", tmp_path)
    record_property("tried", len(runs))
    assert len(runs) == 2 * forked_runs.RACES
    for run in runs:
        beside = {"merge-onnx": [], "swap-onnx": ["genai_config.json", "tokenizer.json"]}[run["verb"]]
        assert run["names"] == sorted(["m.lora.json", "m.onnx", "m.onnx.data", *beside]), run
        assert len(run["whose"]) == 1, run
        if run["force"]:
            assert run["codes"] == [0, 0], run
        else:
            assert sorted(run["codes"]) == [0, 1], run
            assert run["whose"] == [("first", "second")[run["codes"].index(0)]], run
            assert "the output exists already" in run["said"], run
