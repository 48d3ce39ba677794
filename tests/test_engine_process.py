"""The builder's process: it ends with its parent, finds the user's packages, and may say what it likes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_build_engine import product

from lora_export import build_engine
from lora_export.errors import EngineBuildError

COMMAND = "import sys; from lora_export.cli import main; main(sys.argv[1:])"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return what writes a package that stands for TensorRT-RTX."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))

    def write(text):
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "tensorrt_rtx.py").write_text(text)

    return write


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # ended, and nobody has asked what of


def wait_for(condition):
    for _ in range(300):
        if condition():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_its_parent(how, tmp_path, package):
    mark = tmp_path / "pid"
    package(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(mark)!r}).write_text(str(os.getpid()) + '.')\ntime.sleep(120)\n"
    )
    model = product(tmp_path / "m.onnx")
    arguments = ["build-engine", str(model), "--target", "sm89", "-o", str(tmp_path / "out"), "--no-cache"]
    parent = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        stderr=subprocess.DEVNULL,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    try:
        assert wait_for(lambda: mark.exists() and mark.read_text().endswith("."))
        worker = int(mark.read_text()[:-1])
        parent.send_signal(how)
        parent.wait(30)
        assert wait_for(lambda: not is_running(worker))
    finally:
        parent.kill()
        parent.wait()
    if how == signal.SIGINT:
        assert not list((tmp_path / "out").iterdir())


def test_it_may_complain_at_length(tmp_path, package):
    """More than a pipe holds: 64 KiB that nobody reads would stop it."""
    package("import sys\nsys.stderr.write('x' * 1_000_000)\nraise SystemExit(3)")
    with pytest.raises(EngineBuildError, match="exit code 3") as caught:
        build_engine(product(tmp_path / "m.onnx"), "sm89", tmp_path / "out", cache=False)
    assert len(str(caught.value)) < 1000


def test_a_result_that_was_cut_off(tmp_path, package):
    package(
        "import json, os, pathlib, signal, sys\n"
        "pipe = json.loads(pathlib.Path(sys.argv[1]).read_text())['pipe']\n"
        'os.write(pipe, b\'{"built": {"inputs": [\')\nos.kill(os.getpid(), signal.SIGSEGV)\n'
    )
    with pytest.raises(EngineBuildError, match="SIGSEGV"):
        build_engine(product(tmp_path / "m.onnx"), "sm89", tmp_path / "out", cache=False)


def test_what_lies_in_the_users_folder_is_no_package(tmp_path, monkeypatch):
    for name in ("tensorrt_rtx", "onnx", "tempfile"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('a script of the user')")
    monkeypatch.chdir(tmp_path)
    assert build_engine(product(tmp_path / "m.onnx"), "sm89", "out", cache=False).engines[0].record
