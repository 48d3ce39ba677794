"""The folder that an adapter names as its base is compared with what the adapter goes into."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file
from small_graphs import adapter, embedding, graph, linear, random, save

from lora_export import AdapterError, AdapterSession, bank_onnx, convert_adapter, merge_checkpoint, swap_onnx
from lora_export.cli import _run

SHAPES = {"table": (11, 6), "up": (10, 6), "down": (6, 10), "square": (6, 6)}
W0 = {name: random(*shape, seed=number) for number, (name, shape) in enumerate(SHAPES.items())}
# TorchScript's form: the matrices are turned in the graph, and keep their names.
TEXT = """g (int64[N,3] ids) => (float[N,3,6] y) {
    up_t = Transpose <perm = [1, 0]> (up_weight)
    down_t = Transpose <perm = [1, 0]> (down_weight)
    square_t = Transpose <perm = [1, 0]> (square_weight)
    x = Gather (table_weight, ids)
    h = MatMul (x, up_t)
    g = MatMul (h, down_t)
    y = MatMul (g, square_t)
}"""
DTYPES = [np.float32, np.float16]


def checkpoint(folder, values=None, prefix="", dtype=np.float32):
    folder.mkdir()
    stored = {f"{prefix}{name}.weight": matrix.astype(dtype) for name, matrix in (values or W0).items()}
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["Small"]}))
    return folder


def trained_on(folder, seed=3):
    modules = [embedding("table", 11, 6)]
    modules += [linear(name, *SHAPES[name], seed=seed + n) for n, name in enumerate(("up", "down", "square"))]
    return replace(adapter(*modules, base_model=str(folder)), name="sql")


def base_graph(folder, dtype=np.float32):
    text = TEXT if dtype == np.float32 else TEXT.replace("float[", "float16[")
    return save(graph(text, {f"{name}.weight": W0[name].astype(dtype) for name in W0}), folder)


@pytest.fixture
def swap(tmp_path):
    swap_onnx(base_graph(tmp_path), tmp_path / "swap.onnx", adapter=trained_on(""), checkpoint=False)
    return tmp_path / "swap.onnx"


@pytest.fixture
def bank(tmp_path):
    empty = {"sql": trained_on(""), "other": trained_on("", 9)}
    bank_onnx(base_graph(tmp_path), empty, tmp_path / "bank.onnx", resident="inputs", checkpoint=False)
    return tmp_path / "bank.onnx"


def changed(name, entry=(1, 2), by=0.02):
    values = {key: matrix.copy() for key, matrix in W0.items()}
    values[name][entry] += by
    return values


def convert(path, made, tmp_path, **options):
    report = convert_adapter(made, path, tmp_path / "made.safetensors", force=True, **options)
    return report.notes, report.warnings


def load(path, made, tmp_path, **options):
    with AdapterSession(path) as session:
        return session.load_adapter("sql", made, replace=True, **options), ()


WAYS = pytest.mark.parametrize("way", [convert, load])


@pytest.mark.parametrize(("way", "form"), [(convert, "swap"), (load, "swap"), (load, "bank")])
def test_equal_values_are_said(way, form, tmp_path, request):
    path, folder = request.getfixturevalue(form), checkpoint(tmp_path / "c")
    notes, _ = way(path, trained_on(folder), tmp_path)
    assert f"values compared with {folder}, which 'sql' names as its base" in notes


@WAYS
@pytest.mark.parametrize("name", list(SHAPES))
def test_one_other_value_is_refused(way, name, swap, tmp_path):
    folder = checkpoint(tmp_path / "c", changed(name))
    made = trained_on(folder)
    with pytest.raises(AdapterError) as refused:
        way(swap, made, tmp_path)
    assert list(refused.value.problems) == [f"{name}.weight"]
    assert str(folder) in refused.value.message
    assert "--any-base" in refused.value.hint
    notes, warnings = way(swap, made, tmp_path, any_base=True)
    assert any("trained on" in text and str(folder) in text for text in (*notes, *warnings))


@pytest.mark.parametrize("name", list(SHAPES))
def test_a_bank_refuses_it_too(name, bank, tmp_path):
    with pytest.raises(AdapterError) as refused:
        load(bank, trained_on(checkpoint(tmp_path / "c", changed(name))), tmp_path)
    assert list(refused.value.problems) == [f"{name}.weight"]


@pytest.mark.parametrize("prefix", ["", "model.", "model.language_model."])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("exported", DTYPES)
def test_rounding_and_outer_names_are_no_other_values(exported, stored, prefix, tmp_path):
    swap_onnx(base_graph(tmp_path, exported), tmp_path / "s.onnx", adapter=trained_on(""), checkpoint=False)
    folder = checkpoint(tmp_path / "c", prefix=prefix, dtype=stored)
    notes, warnings = convert(tmp_path / "s.onnx", trained_on(folder), tmp_path)
    assert any(note.startswith("values compared with") for note in notes)
    assert not warnings


@WAYS
@pytest.mark.parametrize("name", ["org/model", "", "missing/folder", "x" * 5000, "a\0b"])
def test_a_base_that_is_not_here_says_nothing(way, name, swap, tmp_path):
    notes, warnings = way(swap, trained_on(name), tmp_path)
    assert not any("compared" in text for text in (*notes, *warnings))


@pytest.mark.parametrize("name", ["org/model", "", "x" * 5000, "a\0b"])
def test_merging_into_a_checkpoint_asks_no_base_that_is_not_here(name, tmp_path):
    report = merge_checkpoint(checkpoint(tmp_path / "base"), trained_on(name), tmp_path / "merged")
    assert not any("compared" in text for text in (*report.plan.notes, *report.plan.warnings))


@WAYS
def test_a_damaged_folder_is_a_note(way, swap, tmp_path):
    folder = checkpoint(tmp_path / "c")
    (folder / "model.safetensors").write_bytes(b"\x08")
    notes, _ = way(swap, trained_on(folder), tmp_path)
    assert any(note.startswith(f"values were not compared with {folder}") for note in notes)


def test_an_evicted_adapter_is_not_compared_again(swap, tmp_path):
    """What it was read from is compared by its hash, and the folder may be gone by then."""
    folder = checkpoint(tmp_path / "c")
    feeds = {"ids": np.array([[1, 2, 3]])}
    with AdapterSession(swap, max_adapters=1) as session:
        session.load_adapter("sql", trained_on(folder))
        first = session.run(feeds, adapter="sql")
        (folder / "model.safetensors").unlink()
        session.load_adapter("other", trained_on("", 9))
        session.run(feeds, adapter="other")
        again = session.run(feeds, adapter="sql")
    assert all(np.array_equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("name", [*SHAPES, None])
def test_merge_into_a_checkpoint_warns(name, tmp_path):
    folder = checkpoint(tmp_path / "base")
    own = checkpoint(tmp_path / "own", changed(name) if name else None, prefix="model.", dtype=np.float32)
    report = merge_checkpoint(folder, trained_on(own), tmp_path / "merged")
    assert f"values compared with {own}, which 'sql' names as its base" in report.plan.notes
    named = [warning for warning in report.plan.warnings if str(own) in warning]
    assert len(named) == (name is not None)
    assert all(f"({name}.weight)" in warning for warning in named)


def test_the_base_itself_needs_no_comparison(tmp_path):
    folder = checkpoint(tmp_path / "base")
    (tmp_path / "link").symlink_to(folder)
    for own in (folder, tmp_path / "link"):
        report = merge_checkpoint(folder, trained_on(own), tmp_path / "merged", force=True)
        assert not any("compared" in text for text in (*report.plan.notes, *report.plan.warnings))


def test_a_second_merge_is_not_compared_with_the_first_base(tmp_path):
    folder = checkpoint(tmp_path / "base")
    merge_checkpoint(folder, replace(trained_on(folder), sha256="1" * 64), tmp_path / "once")
    second = replace(trained_on(folder, 9), sha256="2" * 64)
    report = merge_checkpoint(tmp_path / "once", second, tmp_path / "twice")
    assert any("values were not compared" in note and "merged" in note for note in report.plan.notes)
    assert not any(str(folder) in warning for warning in report.plan.warnings)


def test_on_the_command_line(swap, tmp_path, capsys):
    made = tmp_path / "sql"
    made.mkdir()
    folder = checkpoint(tmp_path / "c", changed("up"))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["up"]}
    config |= {"base_model_name_or_path": str(folder)}
    (made / "adapter_config.json").write_text(json.dumps(config))
    factors = {"lora_A": random(2, 6), "lora_B": random(10, 2)}
    stored = {f"base_model.model.up.{name}.weight": values for name, values in factors.items()}
    save_file(stored, made / "adapter_model.safetensors")
    arguments = ["convert-adapter", str(made), "--for", str(swap), "-o", str(tmp_path / "sql.onnx_adapter")]
    assert _run(arguments, False) == 1
    said = capsys.readouterr().err
    assert str(folder) in said
    assert "up.weight" in said
    assert not (tmp_path / "sql.onnx_adapter").exists()
    assert _run([*arguments, "--any-base"], False) == 0
    assert "trained on" in capsys.readouterr().err
