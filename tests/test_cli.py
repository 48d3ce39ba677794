"""Exit codes and messages of the command line as a whole."""

import subprocess
import sys

import click
import pytest

from lora_export import LoraExportError, ParityError
from lora_export.cli import _run, root
from lora_export.commands import COMMANDS


def call(*arguments):
    command = [sys.executable, "-c", "from lora_export.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_no_argument_shows_help():
    assert "merge-onnx" in call().stdout + call().stderr


def test_usage_errors_are_2():
    assert call("nothing").returncode == 2
    assert "No such command 'nothing'" in call("nothing").stderr
    assert call("merge-onnx").returncode == 2
    assert call("merge-onnx", "--nothing").returncode == 2


@pytest.mark.parametrize("verb", list(COMMANDS))
def test_every_verb_has_a_short_help_and_an_example(verb):
    command = root.get_command(None, verb)
    assert command.short_help
    done = call(verb, "--help")
    assert done.returncode == 0
    assert "Example" in done.stdout
    assert f"lora-export {verb}" in done.stdout


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (LoraExportError("rule", "mend it", ["one", "two"]), 1, "Error: rule\n  one\n  two\nhint: mend it\n"),
        (ParityError("apart"), 3, "Error: apart\n"),
        (KeyError("x"), 4, "defect of lora-export"),
        (click.exceptions.Abort(), 130, "nothing was replaced"),
        (BrokenPipeError(), 0, ""),
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
        done = call(*arguments, str(tmp_path / "nothing"))
        assert done.returncode == 1
        assert "Traceback" in done.stderr
    assert "Traceback" not in call("inspect", str(tmp_path / "nothing")).stderr
