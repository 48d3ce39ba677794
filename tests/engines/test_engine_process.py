"""The builder's process: it ends with its parent, finds the user's packages, and may say what it likes."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from engine_graphs import product

from lora_export import build_engine
from lora_export.engines.builder_process import BuildJob, _Messages
from lora_export.engines.record import BuildOptions, Profile
from lora_export.engines.run_builder import run_worker
from lora_export.errors import BackendUnavailable, EngineBuildError
from lora_export.graph.onnx_file import load_graph

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
        stderr=subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    try:
        assert wait_for(lambda: mark.exists() and mark.read_text().endswith("."))
        worker = int(mark.read_text()[:-1])
        parent.send_signal(how)
        _, said = parent.communicate(timeout=30)
        assert wait_for(lambda: not is_running(worker))
    finally:
        parent.kill()
        parent.wait()
    if how != signal.SIGKILL:
        assert parent.returncode == 128 + how
        assert said.decode().endswith("Aborted: nothing was replaced.\n")
        assert not list((tmp_path / "out").iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
@pytest.mark.parametrize("has_ended", [True, False])
def test_it_ends_if_its_parent_has_ended_while_it_began(has_ended, tmp_path, package):
    """It imports for a second before it can ask the system to end it with its parent."""
    mark = tmp_path / "mark"
    package(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nraise ImportError('none')")
    job = BuildJob(
        backend="tensorrt-rtx",
        graph=str(tmp_path / "m.onnx"),
        model=str(tmp_path / "m.onnx"),
        engine=str(tmp_path / "engine"),
        log=str(tmp_path / "log"),
        compute_capabilities=("8.9",),
        options=BuildOptions(),
        profiles=(),
    )
    (tmp_path / "job.json").write_text(job.to_json())
    parent = subprocess.Popen([sys.executable, "-c", ""]) if has_ended else None
    if parent is not None:
        parent.wait()
    number = os.getpid() if parent is None else parent.pid
    path = os.pathsep.join([os.environ["PYTHONPATH"], *sys.path])
    command = [sys.executable, "-P", "-m", "lora_export.engines.builder_process", tmp_path / "job.json"]
    done = subprocess.run(
        [*command, str(number)], capture_output=True, check=False, env=os.environ | {"PYTHONPATH": path}
    )
    assert mark.exists() != has_ended
    assert (done.returncode == -signal.SIGKILL) == has_ended


FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n" + COMMAND


@pytest.mark.parametrize("more", [[], ["--verbose"]])
def test_a_full_disk_leaves_the_old_files(more, tmp_path):
    """A limit of files' sizes stands in for the full disk: the kernel refuses the write in the same way."""
    out = tmp_path / "out"
    out.mkdir()
    for ending in ("engine", "log", "json"):
        (out / f"m.sm89.{ending}").write_text("old")
    arguments = ["build-engine", str(product(tmp_path / "m.onnx")), "--target", "sm89", "-o", str(out)]
    command = [sys.executable, "-c", FULL.format(size=6000), *arguments, "--no-cache", "--force", *more]
    (tmp_path / "tmp").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1, done.stderr
    assert f"Error: cannot write {out}/m.sm89.engine: File too large (nothing was replaced)" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name: path.read_text() for path in out.iterdir()} == {
        f"m.sm89.{ending}": "old" for ending in ("engine", "log", "json")
    }
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize("kind", ["engine", "log"])
def test_the_builder_tells_of_a_full_disk(kind, tmp_path):
    """Whichever file it is; /dev/full refuses as a full disk does."""
    graph = load_graph(product(tmp_path / "m.onnx"))
    shapes = {"x": ((1, 4), (1, 4), (2, 4))}
    job = BuildJob(
        backend="tensorrt-rtx",
        graph=str(tmp_path / "m.onnx"),
        model=str(tmp_path / "m.onnx"),
        engine=str(tmp_path / "engine"),
        log=str(tmp_path / "log"),
        compute_capabilities=("8.9",),
        options=BuildOptions(),
        profiles=(Profile("p", shapes),),
        verbose=True,
    )
    job = replace(job, **{kind: "/dev/full"})
    with pytest.raises(OSError, match="No space left on device") as caught:
        run_worker(job, graph, tmp_path, tmp_path / "log", lambda *_: None)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("text", "error"),
    [("raise ImportError('broken')", BackendUnavailable), ("import os; os._exit(3)", EngineBuildError)],
)
def test_a_process_that_is_forked_meanwhile_is_not_waited_for(text, error, package, tmp_path, monkeypatch):
    """It has the other end of the builder's pipe, as multiprocessing in another thread would."""
    package(text)
    graph, own, forked = load_graph(product(tmp_path / "m.onnx")), subprocess.Popen, []

    class Forking(own):
        def __init__(self, *arguments, **options):
            if not (pid := os.fork()):
                time.sleep(60)
                os._exit(0)
            forked.append(pid)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", Forking)
    job = BuildJob(
        backend="tensorrt-rtx",
        graph=str(tmp_path / "m.onnx"),
        model=str(tmp_path / "m.onnx"),
        engine=str(tmp_path / "engine"),
        log=str(tmp_path / "log"),
        compute_capabilities=("8.9",),
        options=BuildOptions(),
        profiles=(),
    )
    started = time.monotonic()
    try:
        with pytest.raises(error):
            run_worker(job, graph, tmp_path, tmp_path / "log", lambda *_: None)
        assert time.monotonic() - started < 40
    finally:
        os.kill(forked[0], signal.SIGKILL)
        os.waitpid(forked[0], 0)


def test_what_the_logger_can_not_write_ends_the_build_and_not_the_process():
    """An exception in what the builder calls would go through its C++."""
    trt = pytest.importorskip("tensorrt_rtx")
    with Path("/dev/full").open("w", encoding="utf-8") as file:
        messages = _Messages(trt, file, True)
        messages.logger.log(trt.ILogger.ERROR, "wrong")
        assert messages.unwritten.errno == errno.ENOSPC
        assert messages.errors == ["wrong"]
        with pytest.raises(OSError, match="No space"):
            file.close()


def test_numbers_that_the_builder_does_not_state_are_not_read():
    """A name in the graph may be in a message, and an exception would go through the builder's C++."""
    trt = SimpleNamespace(ILogger=type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 2, "VERBOSE": 3}))
    messages = _Messages(trt, io.StringIO(), True)
    severity = SimpleNamespace(name="INFO")
    for message in (
        "Total Weights Memory: 4096 bytes",
        "x Total Weights Memory: 1 bytes",
        f"Total Weights Memory: {'9' * 5000} bytes",
        f"Total Activation Memory: {'9' * 5000} bytes",
    ):
        messages.logger.log(severity, message)
    assert messages.memory == {"weights": 4096}


def test_a_full_temporary_folder_is_named(tmp_path):
    (tmp_path / "tmp").mkdir()
    arguments = [
        "build-engine",
        str(product(tmp_path / "m.onnx")),
        "--target",
        "sm89",
        "-o",
        str(tmp_path / "o"),
    ]
    command = [sys.executable, "-c", FULL.format(size=100), *arguments, "--no-cache"]
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1, done.stderr
    assert f"Error: cannot write {tmp_path / 'tmp'}/lora-export-" in done.stderr
    assert not list((tmp_path / "tmp").iterdir())


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
