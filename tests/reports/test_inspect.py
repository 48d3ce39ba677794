"""`lora-export inspect`: its figures, its forms of output, its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from lora_export.adapter import Adapter, LoraModule
from lora_export.cli import main
from lora_export.formats import load_adapter, save_adapter, writer_of
from lora_export.formats.provenance import Provenance
from lora_export.formats.reading.tensors import write_safetensors

RANDOM = np.random.default_rng(5)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    def module(path: str, out_dim: int, in_dim: int, rank: int, **kwargs: Any) -> LoraModule:
        a = RANDOM.standard_normal((rank, in_dim)).astype(np.float32)
        b = RANDOM.standard_normal((out_dim, rank)).astype(np.float32)
        return LoraModule(path, "linear", a, b, alpha=8, rank=rank, **kwargs)

    modules = {m.key: m for m in (module("layers.0.q", 6, 4, 2), module("layers.0.k<b>", 6, 4, 3))}
    extras = {"score.weight": np.ones((3, 6), np.float32)}
    made = Adapter("sql", "", "peft", modules, extras=extras, base_model="org/base")
    return save_adapter(made, tmp_path / "sql")


def run(*arguments: object, code: int = 0) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["inspect", *map(str, arguments)])
    assert caught.value.code == code


def test_json_says_everything(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(adapter, "--json")
    report = json.loads(capsys.readouterr().out)
    assert (report["format"], report["tuner"], report["base_model"]) == ("peft", "LoRA", "org/base")
    loaded = load_adapter(adapter)
    for row, module in zip(report["modules"], loaded.modules.values(), strict=True):
        left, right = module.factors(dtype=np.float64)
        wanted = np.linalg.svd(left @ right, compute_uv=False)[: module.rank]
        np.testing.assert_allclose(row["singular_values"], wanted, rtol=1e-10)
        assert row["norm"] == pytest.approx(np.linalg.norm(left @ right))
        assert (row["rank"], row["alpha"], row["scaling"]) == (module.rank, 8.0, 8 / module.rank)
    assert report["parameters"] == loaded.parameter_count == 2 * 10 + 3 * 10 + 18
    assert report["size_bytes"] == 4 * report["parameters"]
    assert report["extras"][0]["parameter"] == "score.weight"


def test_plain_text_where_stdout_is_no_terminal(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(adapter)
    text = capsys.readouterr().out
    assert "format    peft, LoRA" in text
    assert "layers.0.q     linear 6×4     2      8        4  float32" in text
    assert "replaces  score.weight 3×6 float32" in text
    assert "\x1b" not in text


def test_a_summary_explains_no_column_that_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factors = [RANDOM.standard_normal(shape).astype(np.float32) for shape in ((2, 4), (6, 2))]
    paths = [f"layers.{number}.q" for number in range(200)]
    modules = {
        module.key: module
        for module in (LoraModule(path, "linear", *factors, alpha=8, rank=2) for path in paths)
    }
    folder = save_adapter(Adapter("many", "", "peft", modules), tmp_path / "many")
    run(folder)
    summary = capsys.readouterr().out
    run(folder, "--modules")
    table = capsys.readouterr().out
    energy = np.cumsum(np.linalg.svd(factors[1] @ factors[0], compute_uv=False) ** 2)
    directions = int(np.searchsorted(energy, 0.9 * energy[-1])) + 1
    assert f"median of all modules: {directions} directions hold 90 %" in summary
    assert "σ₁" not in summary
    assert "σ₁: largest singular value" in table


def test_a_converted_file_says_what_it_was_made_of_and_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {
        "a.q.lora_A.weight": np.ones((5, 2), np.float32),
        "a.q.lora_B.weight": np.ones((2, 4), np.float32),
        "a.q.lora_B.bias": np.ones(4, np.float32),
    }
    provenance = Provenance(
        adapter="sql", adapter_sha256="ab" * 32, base="base.onnx", base_sha256="cd" * 32, ranks={"a.q": 2}
    )
    writer_of("safetensors").write(tmp_path / "c.safetensors", tensors, provenance)
    run(tmp_path / "c.safetensors")
    lines = capsys.readouterr().out.splitlines()
    assert "converted for base.onnx" in lines
    assert f"made from sql, sha256 {'ab' * 32}" in lines
    assert "size      22 parameters, 88 B, 1 modules" in lines
    assert "biases    of a.q" in lines
    run(tmp_path / "c.safetensors", "--json")
    report = json.loads(capsys.readouterr().out)
    assert (report["converted"], report["made_of"], report["made_of_sha256"]) == (True, "sql", "ab" * 32)
    assert report["modules"][0]["bias"]


def test_an_adapter_that_was_trained_says_on_what(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(adapter)
    text = capsys.readouterr().out
    assert "trained   on org/base" in text
    assert "made of" not in text
    assert "biases" not in text


def test_a_table_on_a_terminal(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "140")
    run(adapter)
    text = capsys.readouterr().out
    assert "layers.0.q" in text
    assert "linear 6×4" in text


@pytest.mark.parametrize("count", [1, 50])
def test_a_terminal_shows_names_letter_by_letter(
    count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where stdout is no terminal; rich would make a face of each ``:smile:``."""
    tensors = {
        f"base_model.model.layers.{i}.:smile:q.lora_{end}.weight": np.ones(shape, np.float32)
        for i in range(count)
        for end, shape in {"A": (1, 4), "B": (4, 1)}.items()
    }
    folder = tmp_path / "an :adult: adapter"
    folder.mkdir()
    write_safetensors(folder / "adapter_model.safetensors", tensors, {})
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [":smile:q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "a/:boom:"}))
    monkeypatch.setenv("COLUMNS", "200")
    said = []
    for is_terminal in (False, True):
        monkeypatch.setattr("sys.stdout.isatty", lambda is_so=is_terminal: is_so, raising=False)
        run(folder)
        said.append(capsys.readouterr().out)
    for word in (":smile:", ":adult:", ":boom:"):
        assert said[1].count(word) == said[0].count(word) > 0


def test_a_narrow_terminal_drops_columns_and_keeps_names_whole(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "50")
    run(adapter)
    text = capsys.readouterr().out
    assert "layers.0.k<b>" in text
    assert "90 %" in text
    assert "dtype" not in text


def test_share_of_a_checkpoint(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    base.mkdir()
    write_safetensors(base / "model.safetensors", {"w": np.zeros((68, 100), np.float16)}, {})
    run(adapter, "--base", base, "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["base"] == {"path": str(base), "parameters": 6800, "size_bytes": 13600}
    assert report["parameter_share"] == pytest.approx(0.01)
    assert report["size_share"] == pytest.approx(0.02)
    run(adapter, "--base", base)
    assert "1.000% of its parameters, 2.000% of its bytes" in capsys.readouterr().out


def test_share_of_an_onnx_file_with_external_data(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnx_ir as ir

    weight = ir.Value(name="w", const_value=ir.tensor(np.zeros((20, 17), np.float32), name="w"))
    node = ir.node("Identity", [weight])
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 18})
    model = ir.Model(graph, ir_version=10)
    ir.save(model, tmp_path / "m.onnx", external_data="m.onnx.data", size_threshold_bytes=0)
    run(adapter, "--base", tmp_path / "m.onnx", "--json")
    report = json.loads(capsys.readouterr().out)
    assert (report["base"]["parameters"], report["base"]["size_bytes"]) == (340, 1360)
    (tmp_path / "m.onnx.data").unlink()
    run(adapter, "--base", tmp_path / "m.onnx", code=1)
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing", None, "there is no base model at"),
        ("folder", {}, "holds no safetensors"),
        ("folder", {"model.safetensors": b"1234"}, "is damaged or incomplete"),
        ("folder", {"model.safetensors.index.json": b"{}"}, "has no 'weight_map'"),
        ("m.onnx", b"\xff\xff\xff", "is not a readable ONNX file"),
    ],
)
def test_wrong_bases(
    name: str, content: Any, message: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if isinstance(content, dict):
        (tmp_path / name).mkdir()
        for file, data in content.items():
            (tmp_path / name / file).write_bytes(data)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    run(adapter, "--base", tmp_path / name, code=1)
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_html_is_self_contained_and_escaped(adapter: Path, tmp_path: Path) -> None:
    run(adapter, "--plot", tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "layers.0.k&lt;b&gt;" in page
    assert "k<b>" not in page
    assert not any(word in page for word in ("http://", "https://", "<script", "src="))
    assert page.count("<path") == 2


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_pictures_are_the_same_bytes_each_time(ending: str, adapter: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = [tmp_path / f"{i}.{ending}" for i in range(2)]
    for file in files:
        run(adapter, "--plot", file)
    assert files[0].read_bytes() == files[1].read_bytes()
    if ending == "svg":
        ElementTree.parse(files[0])
    else:
        assert files[0].read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_names_the_pip_line(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run(adapter, "--plot", tmp_path / "a.png", code=1)
    assert "pip install 'lora-export[plot]'" in capsys.readouterr().err
    assert not list(tmp_path.glob("a.png*"))


def test_plot_does_not_overwrite_without_force(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.html").write_text("mine")
    run(adapter, "--plot", tmp_path / "a.html", code=1)
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "a.html").read_text() == "mine"
    run(adapter, "--plot", tmp_path / "a.html", "--force")
    assert (tmp_path / "a.html").read_text() != "mine"
    run(adapter, "--plot", tmp_path / "a.gif", code=2)


def test_a_wrong_adapter_lists_its_problems_without_a_traceback(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": 0, "use_qalora": True}))
    run(adapter, code=1)
    error = capsys.readouterr().err
    assert "config r: 0, wanted a whole number above 0" in error
    assert "config use_qalora" in error
    assert "hint:" in error
    assert "Traceback" not in error


def test_inspect_imports_nothing_heavy(adapter: Path) -> None:
    code = (
        "import sys\n"
        "from lora_export.cli import main\n"
        f"try: main(['inspect', {str(adapter)!r}])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'onnxruntime', 'tensorrt', 'transformers', 'matplotlib', 'onnx'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_help_imports_not_even_numpy() -> None:
    code = "import sys, lora_export.commands.inspect; assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
