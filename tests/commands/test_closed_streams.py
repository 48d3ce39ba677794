"""A process without stdin, stdout or stderr (``2>&-``, services), or with few letters, still works."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from session_graphs import base, both
from session_graphs import swap as swap_graph

from lora_export import progress
from lora_export.formats import save_adapter

CLOSED = {"stdin": "<&-", "stdout": ">&-", "stderr": "2>&-", "all": "<&- >&- 2>&-"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with a base, a swap graph and an adapter of them."""
    folder = tmp_path_factory.mktemp("files")
    base(folder)
    swap_graph(folder)
    save_adapter(both(1), folder / "adapter")
    return folder


VERBS = {
    "inspect --json": "inspect {files}/adapter --json",
    "merge-onnx": "merge-onnx --base {files}/{base} --adapter {files}/adapter -o {out}/m.onnx",
    "verify": "verify {files}/swap.onnx",
    "parity": "parity --reference {files}/{base} --candidate {files}/swap.onnx --adapter {files}/adapter",
    "no such file": "inspect {files}/nothing",
}


def run(verb, files, out, redirections=""):
    out.mkdir()
    words = VERBS[verb].format(files=files, base=base(files).name, out=out)
    command = f"exec {sys.executable} -m lora_export {words} {redirections}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    said = re.sub(r"[0-9.]+ (ms|s)\b", "some time", done.stdout)
    return subprocess.CompletedProcess(done.args, done.returncode, said, done.stderr)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_without_standard_streams(verb, files, tmp_path):
    usual = run(verb, files, tmp_path / "usual")
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "usual").iterdir()}
    assert usual.returncode in (0, 1, 3), usual.stderr
    shutil.rmtree(tmp_path / "usual")
    for closed in CLOSED if verb == "inspect --json" else ("stderr", "all"):
        # In the same place: messages name it.
        found = run(verb, files, tmp_path / "usual", CLOSED[closed])
        assert found.returncode == usual.returncode, closed
        assert found.stdout == ("" if closed in ("stdout", "all") else usual.stdout)
        assert found.stderr == ("" if closed in ("stderr", "all") else usual.stderr)
        assert {path.name: path.read_bytes() for path in (tmp_path / "usual").iterdir()} == wanted
        shutil.rmtree(tmp_path / "usual")


def encoded(encoding, *words):
    command = [sys.executable, "-m", "lora_export", *map(str, words)]
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    return subprocess.run(command, capture_output=True, encoding=encoding, env=env, check=False)


@pytest.mark.parametrize("verb", ["targets", "--help", "parity --help"])
def test_an_encoding_that_lacks_characters_has_escapes_for_them(verb):
    usual, lacking = (encoded(name, *verb.split()) for name in ("utf-8", "latin-1"))
    wanted = usual.stdout.encode("latin-1", "backslashreplace").decode("latin-1")
    assert wanted != usual.stdout
    assert (lacking.returncode, lacking.stdout, lacking.stderr) == (0, wanted, usual.stderr)


@pytest.mark.parametrize("encoding", ["latin-1", "koi8-r", "utf-8"])
def test_json_is_json_in_every_encoding(encoding, files, tmp_path):
    names = ["é.onnx", "日本.onnx", "\U0001d54f.onnx"]
    for name in names:
        shutil.copy(files / "swap.onnx", tmp_path / name)
    done = encoded(encoding, "verify", "--json", tmp_path)
    assert done.returncode < 4, done.stderr
    found = {Path(file["path"]).name for file in json.loads(done.stdout)["files"]}
    assert found >= set(names)


def test_what_c_writes_to_stderr_reaches_no_output(tmp_path):
    script = (
        "import os; from lora_export.commands.printing import guard_libraries; guard_libraries();"
        f"file = open({str(tmp_path / 'output')!r}, 'wb'); os.write(2, b'log'); os.write(1, b'log');"
        "file.write(b'whole')"
    )
    for redirections in CLOSED.values():
        subprocess.run(["bash", "-c", f'exec {sys.executable} -c "{script}" {redirections}'], check=True)
        assert (tmp_path / "output").read_bytes() == b"whole"


@pytest.mark.parametrize("stream", [None, "closed"])
def test_progress_without_stderr_says_nothing_on_stdout(stream, monkeypatch, capsys):
    gone = None if stream is None else io.StringIO()
    if gone is not None:
        gone.close()
    monkeypatch.setattr(sys, "stderr", gone)
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    assert not progress.is_terminal(sys.stderr)
    with progress.stage_progress() as say, progress.byte_progress("x") as advance:
        if stream is None:
            say("planning", 0.5)
            advance(10)
    monkeypatch.undo()
    assert capsys.readouterr().out == ""
