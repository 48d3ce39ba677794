"""The checkpoint that an adapter names as its base is compared with where it is here, and that is said."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file
from small_graphs import adapter, graph, linear, random, save

from lora_export import SiteError, bank_onnx, merge_onnx, swap_onnx
from lora_export.cli import _run

A, B = random(8, 8, seed=1), random(8, 8, seed=2)
NAMED = "g (float[B,8] x) => (float[B,N] y) { h = MatMul (x, a_weight) y = MatMul (h, b_weight) }"
NAMELESS = NAMED.replace("a_weight", "c0").replace("b_weight", "c1")


def base(folder, names=True, a=A):
    stored = {"a.weight" if names else "c0": a.T, "b.weight" if names else "c1": B.T}
    stored = {name: np.ascontiguousarray(values) for name, values in stored.items()}
    return save(graph(NAMED if names else NAMELESS, stored), folder)


def checkpoint(folder, **weights):
    folder.mkdir()
    stored = weights or {"a": A, "b": B}
    save_file({f"{name}.weight": values for name, values in stored.items()}, folder / "model.safetensors")
    return folder


def given(folder, name="sql", seed=1):
    modules = linear("a", 8, 8, seed=seed), linear("b", 8, 8, seed=seed + 1)
    return replace(adapter(*modules, base_model=str(folder)), name=name)


def merge(path, made, folder, **options):
    return merge_onnx(path, made, folder / "out.onnx", **options)


def swap(path, made, folder, **options):
    return swap_onnx(path, folder / "out.onnx", adapter=made, **options)


def bank(path, made, folder, **options):
    made = made if isinstance(made, list) else [made]
    return bank_onnx(path, {item.name: item for item in made}, folder / "out.onnx", **options)


MODES = pytest.mark.parametrize("mode", [merge, swap, bank])


@MODES
def test_names_are_verified_with_it(mode, tmp_path):
    folder = checkpoint(tmp_path / "c")
    report = mode(base(tmp_path), given(folder), tmp_path)
    assert all(row.reason.endswith("content agrees") for row in report.plan.rows)
    assert f"values compared with {folder}, which 'sql' names as its base" in report.plan.notes
    by_name = mode(base(tmp_path), given(folder), tmp_path, checkpoint=False, force=True)
    assert not any("content" in row.reason for row in by_name.plan.rows)
    assert not any("compared" in note for note in by_name.plan.notes)


@MODES
def test_where_names_are_gone_it_finds_them(mode, tmp_path):
    path, folder = base(tmp_path, names=False), checkpoint(tmp_path / "c")
    report = mode(path, given(folder), tmp_path)
    assert [row.place for row in report.plan.rows] == ["c0", "c1"]
    with pytest.raises(SiteError):
        mode(path, given(folder), tmp_path, checkpoint=False, force=True)


@MODES
def test_other_values_are_refused_and_the_folder_is_named(mode, tmp_path):
    """One weight was trained on after the export, or the folder was."""
    path, folder = base(tmp_path, a=random(8, 8, seed=9)), checkpoint(tmp_path / "c")
    with pytest.raises(SiteError) as refused:
        mode(path, given(folder), tmp_path)
    assert str(folder) in refused.value.message
    assert "'sql' names as its base" in refused.value.message
    assert [line.split()[0] for line in refused.value.problems] == ["a.weight"]
    assert "--no-checkpoint" in refused.value.hint
    assert "--checkpoint" in refused.value.hint
    assert not (tmp_path / "out.onnx").exists()
    mode(path, given(folder), tmp_path, checkpoint=False)


@MODES
def test_the_users_own_folder_comes_first(mode, tmp_path):
    wrong = checkpoint(tmp_path / "wrong", a=random(8, 8, seed=3), b=random(8, 8, seed=4))
    right = checkpoint(tmp_path / "right")
    report = mode(base(tmp_path), given(wrong), tmp_path, checkpoint=right)
    assert all(row.reason.endswith("content agrees") for row in report.plan.rows)
    (warning,) = report.plan.warnings
    assert f"'sql' names {wrong} as its base" in warning
    with pytest.raises(SiteError) as refused:
        mode(base(tmp_path), given(right), tmp_path, checkpoint=wrong, force=True)
    assert "--no-checkpoint" not in refused.value.hint


@MODES
def test_a_folder_that_says_nothing_is_a_note(mode, tmp_path):
    damaged, other = checkpoint(tmp_path / "damaged"), checkpoint(tmp_path / "other", z=A)
    (damaged / "model.safetensors").write_bytes(b"\x08")
    for folder, said in ((damaged, "damaged or incomplete"), (other, "stores none of the 2 parameters")):
        report = mode(base(tmp_path), given(folder), tmp_path, force=True)
        (note,) = [note for note in report.plan.notes if "values" in note]
        assert note.startswith("values were not compared")
        assert said in note
        assert str(folder) in note
        # The user typed no such path.
        assert "names" in note
        assert "as its base" in note


@MODES
@pytest.mark.parametrize("name", ["org/model", "", "x" * 5000, "/", "a\0b", "missing/folder"])
def test_what_is_no_folder_of_weights_is_left_alone(mode, name, tmp_path):
    report = mode(base(tmp_path), given(name), tmp_path)
    assert not any("compared" in note for note in report.plan.notes)


@pytest.mark.parametrize("mode", [merge, bank])
def test_two_adapters_of_one_folder_and_of_two(mode, tmp_path):
    folder, copy = checkpoint(tmp_path / "c"), checkpoint(tmp_path / "copy")
    link = tmp_path / "link"
    link.symlink_to(folder)
    both = [given(folder), given(link, "chat", 5)]
    report = mode(base(tmp_path), both, tmp_path)
    assert all(row.reason.endswith("content agrees") for row in report.plan.rows)
    report = mode(base(tmp_path), [given(folder), given(copy, "chat", 5)], tmp_path, force=True)
    assert all(row.reason.endswith("content agrees") for row in report.plan.rows)
    said = [note for note in report.plan.notes if note.startswith("values compared with")]
    assert sorted(note.split(",")[0].removeprefix("values compared with ") for note in said) == [
        str(folder),
        str(copy),
    ]
    assert not report.plan.warnings


@pytest.mark.parametrize("mode", [merge, bank])
def test_the_second_adapter_was_trained_on_other_values(mode, tmp_path):
    folder, other = checkpoint(tmp_path / "c"), checkpoint(tmp_path / "other", a=A, b=random(8, 8, seed=7))
    report = mode(base(tmp_path), [given(folder), given(other, "chat", 5)], tmp_path)
    (warning,) = report.plan.warnings
    assert f"'chat' names {other} as its base" in warning
    assert "1 of the parameters that change (b.weight)" in warning


def peft_folder(folder, names):
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["a", "b"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(names)}))
    factors = {}
    for name in ("a", "b"):
        factors[f"base_model.model.{name}.lora_A.weight"] = random(2, 8)
        factors[f"base_model.model.{name}.lora_B.weight"] = random(8, 2)
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("verb", ["merge-onnx", "swap-onnx", "bank-onnx"])
def test_on_the_command_line(verb, tmp_path, capsys):
    path, folder = base(tmp_path, a=random(8, 8, seed=9)), checkpoint(tmp_path / "c")
    made = peft_folder(tmp_path / "sql", folder)
    arguments = [verb, "--base", str(path), "-o", str(tmp_path / "o.onnx")]
    arguments += ["--adapter", f"sql={made}" if verb == "bank-onnx" else str(made)]
    assert _run(arguments, False) == 1
    said = capsys.readouterr().err
    assert str(folder) in said
    assert "--no-checkpoint" in said
    assert not (tmp_path / "o.onnx").exists()
    assert _run([*arguments, "--no-checkpoint", "--checkpoint", str(folder)], False) == 2
    assert "give either --checkpoint or --no-checkpoint, not both" in capsys.readouterr().err
    assert _run([*arguments, "--no-checkpoint"], False) == 0
    assert "--checkpoint" not in capsys.readouterr().err
    good = base(tmp_path / "good")
    arguments[2] = str(good)
    assert _run([*arguments, "--force"], False) == 0
    captured = capsys.readouterr()
    assert "found by name alone" not in captured.err
    assert f"values compared with {folder}" in captured.out + captured.err


def test_the_note_on_names_stands_where_values_could_be_compared(tmp_path, capsys):
    path, folder = base(tmp_path), checkpoint(tmp_path / "c")
    arguments = ["merge-onnx", "--base", str(path), "-o", str(tmp_path / "o.onnx"), "--dry-run"]
    arguments += ["--adapter", str(peft_folder(tmp_path / "sql", tmp_path / "nowhere"))]
    # Given, refused and asked to be silent: there is nothing to propose.
    more = {(): True, ("--checkpoint", str(folder)): False, ("--no-checkpoint",): False, ("--quiet",): False}
    for options, noted in more.items():
        assert _run([*arguments, *options], False) == 0
        assert ("found by name alone" in capsys.readouterr().err) is noted
