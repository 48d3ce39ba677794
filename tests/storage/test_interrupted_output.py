"""Ctrl-C, SIGTERM or an error at every call that writes: the old output or the new one, whole; said truly."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace

import faults
import parity_reports
import pytest
import session_graphs
from output_cases import CASES, fill, old_of, run

from lora_export import cli, run_bench
from lora_export.demo import run as demo
from lora_export.demo.report import DemoReport, Parity


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    return run_bench(session_graphs.base(tmp_path_factory.mktemp("timed")), seconds=0.05)


@pytest.fixture
def quick(monkeypatch, tmp_path, timed):
    """Let what takes long be done at once: captures, builds, comparisons, timing, training."""

    def capture(_checkpoint, path, **_):
        path.write_bytes(b"graph")
        path.with_name(path.name + ".data").write_bytes(b"data")
        return path

    def build(job, *_, **__):
        Path(job.engine).write_bytes(b"engine")
        Path(job.log).write_text("log")
        ports = ({"name": name, "dtype": "FLOAT", "dims": [-1, 4]} for name in "xy")
        kinds = dict(zip(("inputs", "outputs"), ([port] for port in ports), strict=True))
        return kinds | {"memory": {}, "build_s": 1.0, "peak_build_bytes": 1}

    def train(_trainer, _tasks, folder, _say):
        (folder / "adapters").mkdir()
        (folder / "adapters" / "a.safetensors").write_bytes(b"adapter")

    report = DemoReport(
        output=Path(),
        tasks=(),
        merged="a",
        predictions=(),
        parity=Parity(0.0, 0.0, 1.0),
        shared_is_equal=True,
        storage=(),
        seconds=0.0,
    )
    monkeypatch.setattr("lora_export.modes.capture_onnx.capture_checkpoint", capture)
    monkeypatch.setattr("lora_export.engines.build.run_worker", build)
    monkeypatch.setattr("lora_export.parity.check.check_parity", lambda *_, **__: parity_reports.good())
    monkeypatch.setattr("lora_export.bench.run.carry_out", lambda *_: timed)
    monkeypatch.setattr("lora_export.demo.run.training_session", contextlib.nullcontext)
    monkeypatch.setattr("lora_export.demo.run.time", SimpleNamespace(monotonic=lambda: 0.0))
    monkeypatch.setattr("lora_export.demo.run.save_base", lambda folder, *_: folder.mkdir(parents=True))
    monkeypatch.setattr("lora_export.demo.run.Trainer", lambda *_: None)
    monkeypatch.setattr(demo, "_train", train)
    monkeypatch.setattr(demo, "_merge", lambda folder, *_: (folder / "a.onnx").write_bytes(b"graph"))
    monkeypatch.setattr(demo, "_report", lambda *_: report)
    monkeypatch.setattr("lora_export.demo.report.demo_lines", lambda _: [])
    # Everything that is written lies where the injector looks, and nothing of an earlier run helps.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("LORA_EXPORT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tmp").mkdir()
    before = signal.signal(signal.SIGTERM, cli._terminate)
    yield
    signal.signal(signal.SIGTERM, before)


# Errors go one way, signals another: those of a kind take turns, and others where there were files before.
SIGNALS = ("SIGINT", "SIGTERM")
KINDS = {
    "Ctrl-C before": ("Ctrl-C before",),
    "Ctrl-C after": ("Ctrl-C after",),
    "a signal": SIGNALS,
    "an error": faults.ERRORS,
    "an error of close": tuple(faults.CLOSES),
}
assert {fault for kind in KINDS.values() for fault in kind} == set(faults.FAULTS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("verb", CASES)
def test_every_call(verb, replaces, kind, folder, quick, tmp_path, capsys, record_property):
    case = CASES[verb]
    force = ["--force"] if replaces else []
    assert run(case, folder, tmp_path / "good") == 0
    new = faults.snapshot(tmp_path / "good")
    old = old_of(new) if replaces else {}
    number, tried = 0, 0
    while True:
        top = tmp_path / f"{number}"
        out = top / "out"
        out.mkdir(parents=True)
        fill(out, old)
        capsys.readouterr()
        fault = KINDS[kind][(number + replaces) % len(KINDS[kind])]
        closes = kind == "an error of close"
        injector = faults.Injector(tmp_path, fault, range(number, number + 1), closes=closes)
        with injector.armed():
            code = run(case, folder, out, *force)
        said = capsys.readouterr().err
        if len(injector.made) <= number:
            break
        call, tried = injector.made[number], tried + 1
        judge(case, fault, code, said, faults.snapshot(out), old, new, f"{number}: {call}\n{said}")
        for path in (tmp_path / "tmp").iterdir():
            assert path.name in said, f"left without a word: {path}, {number}: {call}"
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        number += 1
    record_property("tried", tried)
    assert code == 0
    assert tried >= (3 if kind == "an error of close" else 8)


def judge(case, fault, code, said, found, old, new, where):
    """Compare what lies there with both sets, and what was said with what lies there."""
    rest = dict(found)
    states = []
    for prefixes in case.groups:
        was, will = ({k: v for k, v in files.items() if k.startswith(prefixes)} for files in (old, new))
        here = {name: found[name] for name in {*was, *will} & set(found)}
        assert here in (was, will), where
        states.append(here == will)
        for name in here:
            del rest[name]
    for name in rest:
        assert name.split("/")[0] in said, f"left without a word: {name}, {where}"
    if not all(states):
        assert code != 0, where
    if code == 0:
        return
    assert "Traceback" not in said, where
    assert "Internal error" not in said, where
    if fault in faults.ERRORS:
        assert code == 1, where
        assert "Error: " in said, where
    else:
        assert code == (143 if fault == "SIGTERM" else 130), where
        assert "Aborted" in said, where
    if not any(states):
        assert "complete" not in said, where
    elif all(states):
        assert "nothing was replaced" not in said, where
        assert "complete" in said, where
