"""Ctrl-C at every line of what puts things away, and once more while the first is dealt with."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import onnx
import onnx.parser
import pytest

from lora_export import cli
from lora_export.storage.commit.leftovers import scratch_folder
from lora_export.storage.outputs import OutputSet

NAMES = ("m.onnx.data", "m.onnx")
# What begins, commits and puts away; and what calls it at the end of a block.
TRACED = (str(Path(cli.__file__).with_name("storage")), contextlib.__file__)


class Tracer:
    """Counts functions that begin and lines that are reached, and sends a signal at one of them."""

    def __init__(self, at: int, number: int, counts: bool) -> None:
        self.seen, self._at, self._number, self.counts = 0, at, number, counts

    def __call__(self, frame, event, _):
        # What is raised where Python closes a generator that nobody reads on is dropped by Python itself.
        if not frame.f_code.co_filename.startswith(TRACED) or frame.f_code.co_name == "<genexpr>":
            return None
        if self.counts and event in ("call", "line"):
            self.seen += 1
            if self.seen - 1 == self._at:
                signal.raise_signal(self._number)
        return self


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(cli, "_tidy", lambda _: None)
    before = {number: signal.getsignal(number) for number in cli._SIGNALS}
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


def run_once(place, monkeypatch, tracer, interrupted):
    """Let a run write a set with a scratch folder; ``interrupted``: it gets a signal in its middle."""

    def verb(*_, **__):
        sys.settrace(tracer)
        try:
            with scratch_folder() as scratch, OutputSet(force=True) as outputs:
                (scratch / "x").write_text("x")
                for name in NAMES:
                    outputs.stage(place / "out" / name).write_text("new")
                if interrupted:
                    tracer.counts = True
                    signal.raise_signal(signal.SIGINT)
                outputs.commit()
        finally:
            sys.settrace(None)

    for name in NAMES:
        (place / "out" / name).write_text("old")
    monkeypatch.setattr(cli.root, "main", verb)
    handler = cli._Ending()
    for number in cli._SIGNALS:
        signal.signal(number, handler)
    return cli._run(["merge"], False)


@pytest.mark.parametrize(
    ("interrupted", "number"),
    [(False, signal.SIGINT), (True, signal.SIGTERM)],
    ids=["the first", "the second"],
)
def test_a_signal_at_every_line(interrupted, number, place, monkeypatch, capsys, record_property):
    at = 0
    while True:
        capsys.readouterr()
        tracer = Tracer(at, number, not interrupted)
        code = run_once(place, monkeypatch, tracer, interrupted)
        said = capsys.readouterr().err
        if tracer.seen <= at:
            break
        where = f"{at}\n{said}"
        texts = {path.name: path.read_text() for path in (place / "out").iterdir()}
        assert texts in (dict.fromkeys(NAMES, "old"), dict.fromkeys(NAMES, "new")), where
        assert not list((place / "tmp").iterdir()), where
        # What follows a first one changes nothing: not the exit code either.
        assert code == (130 if interrupted else 128 + number), where
        is_new = texts["m.onnx"] == "new"
        assert ("complete and in place" in said) == is_new, where
        assert ("nothing was replaced" in said) != is_new, where
        assert "Traceback" not in said, where
        at += 1
    record_property("tried", at)
    assert code == (130 if interrupted else 0)
    assert at > 300


def test_one_that_waits_without_end_can_be_ended_again(place, monkeypatch):
    handler, now = cli._Ending(), time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with pytest.raises(KeyboardInterrupt):
        handler(signal.SIGINT, None)
    handler(signal.SIGTERM, None)
    now += cli._ENDING_S + 1
    with pytest.raises(SystemExit):
        handler(signal.SIGTERM, None)


ENDING = """
import atexit, os, signal, sys, time
from lora_export import cli
def verb(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
class Late:
    def __del__(self, kill=os.kill, process=os.getpid(), number=int(sys.argv[1])):
        kill(process, number)
cli.root.main = verb
late = Late()
atexit.register(os.kill, os.getpid(), int(sys.argv[1]))
cli.main(["merge"])
"""
DONE = ENDING.replace(
    "    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n", "    return int(sys.argv[2])\n"
)


@pytest.mark.parametrize("code", [0, 1, 3])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_after_all_is_done_does_not_change_the_exit_code(number, code):
    command = [sys.executable, "-c", DONE, str(int(number)), str(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_after_the_end_does_not_change_the_exit_code(number):
    """Python puts its own handlers back before it has ended."""
    command = [sys.executable, "-c", ENDING, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr.strip() == "Aborted: nothing was replaced."


EXECUTED = """
import signal
from lora_export import cli
def verb(*_, **__):
    exec("import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)")
cli.root.main = verb
cli.main(["merge"])
"""


def test_ctrl_c_within_a_text_that_is_executed_has_the_usual_exit_code(tmp_path):
    """Python remembers such a one, and with ``-m`` ends by SIGINT itself, though it was dealt with."""
    (tmp_path / "executed.py").write_text(EXECUTED)
    command = [sys.executable, "-m", "executed"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr.strip()) == (130, "Aborted: nothing was replaced.")


# Sends itself a signal when it looks for the module of that number.
IMPORTING = """
import signal, sys
from lora_export.__main__ import main
at, number = map(int, sys.argv.pop(1).split(","))
class Finder:
    seen = 0
    def find_spec(self, *_):
        if Finder.seen == at:
            signal.raise_signal(number)
        Finder.seen += 1
sys.meta_path.insert(0, Finder())
if at < 0:
    import lora_export.cli
    sys.exit(Finder.seen)
main()
"""


def importing(at: int, number: int, ignored: bool = False) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", IMPORTING, f"{at},{number}", "--version"]
    before = (lambda: signal.signal(number, signal.SIG_IGN)) if ignored else None
    return subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=before)


@pytest.fixture(scope="module")
def imports() -> int:
    """The number of modules that the command line is made of."""
    return importing(-1, 0).returncode


@pytest.mark.parametrize("number", cli._SIGNALS)
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.6, 0.9])
def test_a_signal_while_the_command_line_is_imported(share, number, imports):
    assert 20 < imports < 250  # an exit code
    done = importing(int(share * imports), number)
    assert done.stderr == f"{cli._NOTHING}\n"
    assert done.returncode == 128 + number
    assert not done.stdout


@pytest.mark.parametrize("number", cli._SIGNALS)
def test_one_that_is_ignored_stays_ignored(number):
    done = importing(3, number, ignored=True)
    assert done.returncode == 0
    assert not done.stderr


# A package whose own code takes an interrupt for a failure of its own, as extensions do; then the true one.
TAKES_IT = """
import importlib, os, sys, time
try:
    for _ in range(3):
        os.kill(os.getpid(), int(os.environ["NUMBER"]))
        time.sleep(0.1)
except BaseException as error:
    raise ImportError("initialization failed") from error
sys.path.remove(os.path.dirname(os.path.dirname(__file__)))
del sys.modules[__name__]
importlib.import_module(__name__)
"""


@pytest.mark.parametrize("number", cli._SIGNALS)
@pytest.mark.parametrize("package", ["onnxruntime", "torch"])
def test_a_signal_while_a_package_is_imported_is_answered_as_a_signal(package, number, tmp_path):
    (tmp_path / "site" / package).mkdir(parents=True)
    (tmp_path / "site" / package / "__init__.py").write_text(TAKES_IT)
    if package == "torch":
        file = tmp_path / "adapter.pt"
        file.write_bytes(b"x")
        verb = ["inspect", str(file)]
    else:
        graph = onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["" : 20]> g (float[2] x) => (float[2] y) { y = Neg(x) }"""
        )
        for name in ("a.onnx", "b.onnx"):
            onnx.save(graph, tmp_path / name)
        verb = ["parity", "--reference", str(tmp_path / "a.onnx"), "--candidate", str(tmp_path / "b.onnx")]
    before = os.environ.get("PYTHONPATH", "")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}:{before}", "NUMBER": str(int(number))}
    command = [sys.executable, "-m", "lora_export", *verb]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    # The signal may come while an error of the run, a true one, is printed.
    assert done.stderr.endswith((f"{cli._NOTHING}\n", "\nAborted.\n")), done.stderr
    assert done.returncode == 128 + number
    assert "not installed" not in done.stderr


def test_an_import_without_end_is_ended(monkeypatch):
    monkeypatch.setattr(cli, "_IMPORT_S", 0.2)
    monkeypatch.setattr(cli, "_is_importing", lambda _: True)
    handler, before = cli._Ending(), signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, handler)
    try:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(SystemExit):
            time.sleep(10)
    finally:
        signal.signal(signal.SIGTERM, before)
