"""Exit codes and messages of the command line as a whole."""

import os
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import output_cases
import preloaded
import pytest

from lora_export import LoraExportError, ParityError, cli
from lora_export.cli import _run, root
from lora_export.commands import COMMANDS
from lora_export.storage.outputs import OutputSet


def started(*arguments):
    command = [sys.executable, "-c", "from lora_export.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_no_argument_shows_help():
    done = started()
    assert "merge-onnx" in done.stdout + done.stderr


def test_usage_errors_are_2(capsys):
    done = started("nothing")
    assert done.returncode == 2
    assert "No such command 'nothing'" in done.stderr
    assert _run(["merge-onnx"], False) == 2
    assert _run(["merge-onnx", "--nothing"], False) == 2


@pytest.mark.parametrize("verb", list(COMMANDS))
def test_every_verb_has_a_short_help_and_an_example(verb, capsys):
    command = root.get_command(None, verb)
    assert command.short_help
    assert _run([verb, "--help"], False) == 0
    said = capsys.readouterr().out
    assert "Example" in said
    assert f"lora-export {verb}" in said


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (LoraExportError("rule", "mend it", ["one", "two"]), 1, "Error: rule\n  one\n  two\nhint: mend it\n"),
        (ParityError("apart"), 3, "Error: apart\n"),
        (KeyError("x"), 4, "defect of lora-export"),
        (click.exceptions.Abort(), 130, "nothing was replaced"),
        (BrokenPipeError(32, "Broken pipe"), 1, "refused to read or write: Broken pipe"),
        (
            OSError(28, "No space left on device", "x.json"),
            1,
            "refused to read or write x.json: No space left",
        ),
    ],
)
def test_errors_become_exit_codes(monkeypatch, capsys, error, code, said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(root, "main", fail)
    assert _run(["inspect", "x"], False) == code
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown


def test_debug_shows_the_traceback(tmp_path):
    for arguments in (["--debug", "inspect"], ["inspect", "--debug"]):
        done = started(*arguments, str(tmp_path / "nothing"))
        assert done.returncode == 1
        assert "Traceback" in done.stderr
    assert "Traceback" not in started("inspect", str(tmp_path / "nothing")).stderr


def gone() -> int:
    """Return the writing end of a pipe that nobody reads from."""
    read, write = os.pipe()
    os.close(read)
    return write


STREAMS = {"a closed pipe": gone, "a full disk": lambda: os.open("/dev/full", os.O_WRONLY)}


@pytest.mark.parametrize("where", STREAMS)
@pytest.mark.parametrize("streams", [("stdout",), ("stderr",), ("stdout", "stderr")])
def test_what_can_not_be_said_does_not_end_the_work(streams, where, tmp_path):
    """Nor does a note at its beginning; the exit code says whether the work and its result are there."""
    graph, adapter = output_cases.inputs(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "x.tmp-ffffff-1-0123456789ab").touch()  # told of at the start
    command = [sys.executable, "-c", "from lora_export.cli import main; main()"]

    def code(*arguments):
        handles = {name: STREAMS[where]() for name in streams}
        try:
            others = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
            done = subprocess.run([*command, *map(str, arguments)], check=False, **others | handles)
        finally:
            for handle in handles.values():
                os.close(handle)
        return done.returncode

    has_result = where == "a closed pipe" or "stdout" not in streams
    assert code("merge-onnx", "--base", graph, "--adapter", adapter, "-o", out / "m.onnx", "--json") == (
        0 if has_result else 1
    )
    assert {"m.lora.json", "m.onnx", "m.onnx.data"} <= {path.name for path in out.iterdir()}
    assert code("inspect", tmp_path / "nothing") == 1
    assert code("inspect", adapter) == (0 if has_result else 1)


@pytest.mark.parametrize("verb", ["merge-onnx", "swap-onnx", "bank-onnx"])
def test_a_graph_with_a_name_that_is_not_utf8(verb, tmp_path):
    """The graph could not name its data file; elsewhere such names are fine."""
    out = tmp_path / "out"
    out.mkdir()
    arguments = output_cases.CASES[verb].arguments(tmp_path, out)
    name = os.fsdecode(b"caf\xe9")
    done = preloaded.run([*arguments[:-1], out / f"{name}.onnx"])
    assert done.returncode == 1
    assert "is not UTF-8" in done.stderr
    done = preloaded.run([*output_cases.merge(tmp_path, out)[:-1], out / name])
    assert done.returncode == 0
    assert [os.fsencode(path.name) for path in out.iterdir()] == [b"caf\xe9"]


def test_an_output_without_a_name_of_its_own(tmp_path, monkeypatch, capsys):
    """It would be written beside itself."""
    place = tmp_path / "here"
    place.mkdir()
    arguments = [str(argument) for argument in output_cases.merge(tmp_path, tmp_path)[:-1]]
    monkeypatch.chdir(place)
    assert _run([*arguments, ".", "--force"], False) == 1
    assert f"give the folder's name: {place}" in capsys.readouterr().err
    assert not list(place.iterdir())


def test_an_interrupt_before_the_run_is_no_traceback(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "guard_libraries", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", "x"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "Aborted.\n"


@pytest.mark.parametrize(
    "error",
    [
        LoraExportError("rule"),
        OSError(28, "No space left on device"),
        BrokenPipeError(32, "Broken pipe"),
        click.UsageError("a later step of a recipe"),
        KeyError("x"),
        MemoryError(),
        KeyboardInterrupt(),
        cli._Terminated(143),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_was_written_is_said_whatever_comes_after(error, monkeypatch, capsys, tmp_path):
    def write_and_fail(*_, **__):
        with OutputSet() as outputs:
            outputs.stage(tmp_path / "m.onnx").write_text("new")
            outputs.commit()
        raise error

    monkeypatch.setattr(root, "main", write_and_fail)
    assert _run(["merge"], False) != 0
    assert f"complete and in place: {tmp_path / 'm.onnx'}" in capsys.readouterr().err


@pytest.mark.parametrize("debug", [False, True])
def test_too_little_memory_is_no_defect_of_ours(debug, monkeypatch, capsys):
    def fail(*_, **__):
        np.zeros((8, 10**15))

    monkeypatch.setattr(root, "main", fail)
    if debug:
        with pytest.raises(MemoryError):
            _run(["merge"], debug)
        return
    assert _run(["merge"], debug) == 1
    said = capsys.readouterr().err
    assert said.startswith("Error: there is not enough memory: Unable to allocate ")
    assert "report it" not in said


@pytest.mark.parametrize("verb", ["merge", "merge-onnx", "swap-onnx", "bank-onnx", "convert-adapter"])
def test_a_full_disk_behind_stdout(verb, tmp_path):
    """The result can't be printed: it is there all the same, and that is said."""
    (tmp_path / "out").mkdir()
    arguments = output_cases.CASES[verb].arguments(tmp_path, tmp_path / "out")
    words, settings = [str(argument) for argument in arguments], dict(os.environ)
    with Path("/dev/full").open("w") as full, (tmp_path / "said").open("w+") as said:
        streams = (os.open(os.devnull, os.O_RDONLY), full.fileno(), said.fileno())
        code = preloaded.asked(preloaded.process(), words, str(tmp_path), settings, streams)
        os.close(streams[0])
        said.seek(0)
        text = said.read()
    assert code == 1
    assert "No space left on device" in text
    assert "before that: complete and in place: " in text
