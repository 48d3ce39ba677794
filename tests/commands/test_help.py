"""What the command line says beside results: help, what comes next, errors for programs, completion."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import numpy as np
import output_cases
import pytest
import session_graphs
import tiny
from safetensors.numpy import save_file

from lora_export import LoraExportError, SiteError, merge_checkpoint
from lora_export.cli import _run, root
from lora_export.commands import COMMANDS
from lora_export.commands.verb import _VERBS, Verb
from lora_export.untrusted.shown import MAX_ALIKE, error_lines


def run(*arguments) -> int:
    return _run([str(argument) for argument in arguments], False)


def next_of(captured) -> list[str]:
    (line,) = [line for line in captured.err.splitlines() if line.startswith("next: ")]
    return shlex.split(line.removeprefix("next: "))[1:]


def test_python_minus_m():
    command = [sys.executable, "-m", "lora_export", "--version"]
    assert "lora-export" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_python_minus_m_runs_nothing_of_the_current_folder(tmp_path):
    loaded = "import sys, lora_export.cli; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    # Python imports some of its own before any code of ours.
    names = set(done.stdout.split()) - sys.stdlib_module_names - {"__main__", "lora_export"}
    assert "click" in names
    for name in names:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})")
    command = [sys.executable, "-m", "lora_export", "targets"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()


def test_without_a_verb_the_way_of_the_data_is_shown(capsys):
    assert _run([], False) == 2
    said = capsys.readouterr()
    assert not said.out
    assert "The way of the data:" in said.err
    assert "\\n" not in said.err
    assert not [line for line in said.err.splitlines() if len(line) > 100]


def test_every_verb_has_a_heading():
    assert sorted(name for names in _VERBS.values() for name in names) == sorted(COMMANDS)


@pytest.mark.parametrize("verb", list(COMMANDS))
def test_every_option_is_listed_once(verb, capsys):
    command = root.get_command(None, verb)
    assert isinstance(command, Verb)
    assert run(verb, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    for parameter in command.get_params(command.make_context(verb, [], resilient_parsing=True)):
        if parameter.param_type_name == "option":
            named = [
                line for line in lines if line.startswith("  ") and parameter.opts[-1] in line.split()[:2]
            ]
            assert named, parameter.opts


VERBS = ("merge", "merge-onnx", "swap-onnx", "bank-onnx", "convert-adapter", "inspect")


@pytest.mark.parametrize("verb", VERBS)
def test_the_next_command_can_be_run(verb, tmp_path, monkeypatch, capsys):
    """As it is printed, but for names of things that only the user has."""
    graph, adapter = output_cases.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    if verb == "inspect":
        assert run("inspect", adapter, "--base", graph) == 0
    else:
        case = output_cases.CASES[verb]
        assert run(*case.arguments(tmp_path, tmp_path / "out")) == 0
    words = next_of(capsys.readouterr())
    if verb == "merge":  # a capture wants a whole model: only that the command is one
        root.get_command(None, words[0]).make_context(words[0], words[1:])
        return
    quick = ["--seconds", "0.2", "--narrow", "1e-9"] if words[0] == "bench" else []
    assert run(*words, *quick) == 0, capsys.readouterr().err


@pytest.mark.parametrize("resident", ["initializers", "inputs"])
def test_what_comes_next_asks_bench_for_no_option_that_it_lacks(resident, tmp_path, monkeypatch, capsys):
    """The file does not state its alpha, which only the bank's own command was told."""
    monkeypatch.chdir(tmp_path)
    session_graphs.base(tmp_path)
    rng = np.random.default_rng(0)
    factors = {"p.A.weight": (2, 4), "p.B.weight": (5, 2)}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in factors.items()}
    save_file(tensors, tmp_path / "plain.safetensors")
    options = ["--alpha", 8, "--resident", resident, "-o", "bank.onnx"]
    assert run("bank-onnx", "--base", "base.onnx", "--adapter", "a=plain.safetensors", *options) == 0
    words = next_of(capsys.readouterr())
    assert words[0] == "bench"
    assert run(*words, "--seconds", "0.1", "--narrow", "1e-9") == 0, capsys.readouterr().err


def test_parity_comes_next_where_the_checkpoint_is_known(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    adapter = tiny.adapter("bert")
    out = tmp_path / "with a space" / "m.onnx"
    assert run("merge-onnx", "--base", tiny.checkpoint("bert"), "--adapter", adapter, "-o", out) == 0
    words = next_of(capsys.readouterr())
    assert words[0] == "parity"
    assert run(*words) == 0
    assert next_of(capsys.readouterr())[0] == "build-engine"


@pytest.mark.parametrize("option", ["--quiet", "--json", "--dry-run"])
def test_nothing_comes_next_where_nobody_reads_it(option, tmp_path, capsys):
    graph, adapter = output_cases.inputs(tmp_path)
    assert run("merge-onnx", "--base", graph, "--adapter", adapter, "-o", tmp_path / "m.onnx", option) == 0
    assert "next:" not in capsys.readouterr().err


def test_nothing_comes_next_within_a_recipe(tmp_path, capsys):
    graph, adapter = output_cases.inputs(tmp_path)
    recipe = tmp_path / "r.yaml"
    step = {"base": str(graph), "adapter": str(adapter), "output": str(tmp_path / "m.onnx")}
    said = {"name": "one", "description": "One step.", "needs": [], "steps": [{"merge-onnx": step}]}
    recipe.write_text(json.dumps(said))
    assert run("run", recipe) == 0, capsys.readouterr().err
    assert "next:" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (["inspect", "nothing", "--json"], 1, "AdapterError"),
        (["merge-onnx", "--json"], 2, "MissingParameter"),
        (["inspect", "--json", "--nothing"], 2, "NoSuchOption"),
    ],
)
def test_errors_as_json(arguments, code, kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert _run(arguments, False) == code
    said = capsys.readouterr()
    error = json.loads(said.out)["error"]
    assert (error["kind"], error["exit_code"]) == (kind, code)
    assert error["message"]
    assert "Error: " in said.err, "a person may read along"


def test_all_problems_are_in_the_json(tmp_path, capsys):
    adapter, base = tiny.adapter("llama"), tiny.checkpoint("bert")
    with pytest.raises(LoraExportError) as caught:
        merge_checkpoint(base, adapter, tmp_path / "m")
    assert run("merge", "--base", base, "--adapter", adapter, "-o", tmp_path / "m", "--json") == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert caught.value.problems
    assert error["problems"] == list(caught.value.problems)
    assert (error["message"], error["hint"]) == (caught.value.message, caught.value.hint)


def test_one_line_for_one_reason():
    alike = [f"layers.{number}.q  is not in the base" for number in range(40)]
    error = SiteError("40 modules have no place", "", [alike[0], "head  shapes differ", *alike[1:]])
    assert error_lines(error.message, error.problems)[1:] == [
        "  layers.0.q, layers.1.q, layers.2.q and 37 more  is not in the base",
        "  head  shapes differ",
    ]
    few = alike[:MAX_ALIKE]
    assert error_lines("x", few)[1:] == [f"  {line}" for line in few]


COMPLETION = {
    "bash": ({"COMP_WORDS": "lora-export mer", "COMP_CWORD": "1"}, "plain,merge-onnx"),
    "zsh": ({"COMP_WORDS": "lora-export mer", "COMP_CWORD": "1"}, "merge-onnx"),
    "fish": ({"COMP_WORDS": "lora-export mer", "COMP_CWORD": "mer"}, "plain,merge-onnx"),
}


@pytest.mark.parametrize("shell", COMPLETION)
def test_completion(shell):
    """What the pages say to put into a shell's start-up file, and what it asks for then."""
    command = [sys.executable, "-m", "lora_export"]

    def said(what, **environment):
        name = {"_LORA_EXPORT_COMPLETE": f"{shell}_{what}"}
        done = subprocess.run(
            command, env=os.environ | name | environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    assert "_LORA_EXPORT_COMPLETE" in said("source")
    words, wanted = COMPLETION[shell]
    assert wanted in said("complete", **words)
