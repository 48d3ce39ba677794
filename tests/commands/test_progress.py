"""What verbs show of long work: stages of a capture, shares of a search, bytes of a file."""

from __future__ import annotations

import io
import re

import pytest
import tiny
from click.testing import CliRunner
from rich import console
from safetensors.numpy import save_file
from small_graphs import adapter, graph, linear, random, save

from lora_export import merge_onnx, progress
from lora_export.cli import root

ARCH = "llama"


@pytest.fixture
def every_line(monkeypatch):
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)


def run(*arguments):
    """Run a verb and return what it prints to stderr."""
    done = CliRunner().invoke(root, [str(argument) for argument in arguments])
    assert not done.exit_code, done.output
    return done.stderr


def test_a_capture_says_what_it_does(tmp_path):
    given = "merge-onnx", "--base", tiny.checkpoint(ARCH), "--adapter", tiny.adapter(ARCH)
    said = run(*given, "-o", tmp_path / "m.onnx")
    stages = [line.partition(" ")[0] for line in said.splitlines()]
    assert stages[:3] == ["capturing", "tracing", "simplifying"]
    assert not run(*given, "-o", tmp_path / "q.onnx", "--quiet")


def test_a_merge_says_how_much_of_what_is_written(tmp_path, every_line, monkeypatch):
    monkeypatch.setattr(progress, "_amount", lambda written, size: f"{written} of {size}")
    out = tmp_path / "merged"
    said = run("merge", "--base", tiny.checkpoint(ARCH), "--adapter", tiny.adapter(ARCH), "-o", out)
    amounts = [tuple(map(int, found)) for found in re.findall(r"(\d+) of (\d+)$", said, re.M)]
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert amounts[-1] == (size, size)
    assert amounts == sorted(amounts)


def test_a_search_by_value_says_how_far_it_is(tmp_path, every_line, capsys):
    """A chain of nameless products, each of which may be each module's."""
    count, size = 8, 8
    weights = {f"val_{number}": random(size, size, seed=number) for number in range(count)}
    steps = " ".join(f"v{number + 1} = MatMul (v{number}, val_{number})" for number in range(count))
    text = f"g (float[B,8] x) => (float[B,8] y) {{ v0 = Identity (x) {steps} y = Identity (v{count}) }}"
    base = save(graph(text, weights), tmp_path)
    (tmp_path / "checkpoint").mkdir()
    stored = {f"layers.{number}.weight": weights[f"val_{number}"].T.copy() for number in range(count)}
    save_file(stored, tmp_path / "checkpoint" / "model.safetensors")
    (tmp_path / "checkpoint" / "config.json").write_text('{"model_type": "x"}')
    given = adapter(*(linear(f"layers.{number}", size, size) for number in range(count)))
    with progress.byte_progress("writing"):
        merge_onnx(base, given, tmp_path / "m.onnx", checkpoint=tmp_path / "checkpoint")
    shares = [int(share) for share in re.findall(r"by their values: (\d+)%", capsys.readouterr().err)]
    assert len(shares) >= count
    assert shares == sorted(shares)
    assert shares[-1] < 100


def test_a_bar_on_a_terminal(monkeypatch):
    stream, real = io.StringIO(), console.Console
    monkeypatch.setattr(console, "Console", lambda **_: real(file=stream, force_terminal=True, width=120))
    monkeypatch.setattr(progress, "is_terminal", lambda _stream: True)
    with progress.byte_progress("writing m.onnx") as advance:
        progress.tell_stage("tracing Model")
        progress.tell_stage("looking", 0.25)
        progress.tell_size(4_000_000_000)
        advance(3_000_000_000)
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "writing m.onnx 3.0 of 4.0 GB" in said
    progress.tell_stage("nobody shows this", 0.5)
    assert "nobody" not in stream.getvalue()
