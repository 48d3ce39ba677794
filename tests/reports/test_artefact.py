"""`lora-export inspect` of what lora-export writes: graphs, manifests, engines, kits, folders."""

from __future__ import annotations

import collections
import json

import numpy as np
import onnx
import output_cases
import pytest
import tiny

from lora_export import bank_onnx, capture_onnx, load_adapter, merge_onnx, swap_onnx
from lora_export.cli import _run
from lora_export.engines.record import record_path
from lora_export.errors import GraphError
from lora_export.reports.adapter.facts import inspect_adapter
from lora_export.reports.adapter.to_text import MAX_MODULES, plain_lines
from lora_export.storage.manifest import Manifest


def said(capsys, *arguments):
    capsys.readouterr()
    code = _run(["inspect", *map(str, arguments)], False)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def facts(capsys, *arguments):
    return json.loads(said(capsys, *arguments, "--json"))


def made(verb, folder):
    (folder / "out").mkdir()
    arguments = output_cases.CASES[verb].arguments(folder, folder / "out")
    assert _run([str(word) for word in arguments], False) == 0


def test_graphs(tmp_path, capsys):
    """Counts and inputs are those that onnx reads; LoRA's are told apart."""
    base, adapter = tiny.base_onnx("llama", "torchscript"), tiny.adapter("llama")
    swap_onnx(base, tmp_path / "swap.onnx", adapter=adapter)
    bank_onnx(base, {"a": adapter, "b": tiny.adapter("llama", seed=1)}, tmp_path / "bank.onnx")
    merge_onnx(base, adapter, tmp_path / "merged.onnx")
    modules = {module.path for module in load_adapter(adapter).modules.values()}
    for path in (base, *(tmp_path / f"{mode}.onnx" for mode in ("swap", "bank", "merged"))):
        found, model = facts(capsys, path), onnx.load(path)
        assert found["kind"] == "graph"
        assert found["operators"] == dict(collections.Counter(node.op_type for node in model.graph.node))
        held = {tensor.name for tensor in model.graph.initializer}
        # The weights of a bank's rows are fed by each request.
        plain = {value.name for value in model.graph.input if ".lora_" not in value.name} - held
        assert {port["name"] for port in found["inputs"]} == plain
        files = [path, *(path.parent / name for name in found["data"])]
        assert found["size_bytes"] == sum(file.stat().st_size for file in files)
        text = said(capsys, path)
        assert all(port["name"] in text for port in found["inputs"])
    lora = facts(capsys, tmp_path / "swap.onnx")["lora"]
    assert (lora["mode"], set(lora["modules"])) == ("swap", modules)
    assert facts(capsys, tmp_path / "bank.onnx")["lora"]["slots"] == ["a", "b"]
    merged = facts(capsys, tmp_path / "merged.onnx")
    assert merged["lora"] is None
    assert load_adapter(adapter).sha256 in merged["merged"][0]
    assert facts(capsys, base)["merged"] == []


@pytest.mark.parametrize("lost", [0, 2])
def test_inputs_that_a_tool_took_for_constants_are_told(lost, tmp_path, capsys):
    """Simplifiers do, and the record in the graph stays: convert-adapter and sessions refuse it."""
    swap_onnx(tiny.base_onnx("llama", "torchscript"), tmp_path / "swap.onnx", adapter=tiny.adapter("llama"))
    model = onnx.load(tmp_path / "swap.onnx", load_external_data=False)
    taken = [value for value in model.graph.input if ".lora_" in value.name][:lost]
    for value in taken:
        model.graph.input.remove(value)
    onnx.save(model, tmp_path / "swap.onnx")
    assert facts(capsys, tmp_path / "swap.onnx")["lora"]["lost_inputs"] == [value.name for value in taken]
    assert (f"{lost} of its LoRA inputs became constants" in said(capsys, tmp_path / "swap.onnx")) == bool(
        lost
    )


def test_a_captured_graph(tmp_path, capsys):
    capture_onnx(tiny.checkpoint("llama"), tmp_path / "m.onnx", kv_cache=True)
    captured = facts(capsys, tmp_path / "m.onnx")["captured"]
    assert (captured["kind"], captured["kv_cache"], captured["dtype"]) == ("decoder", True, "float32")
    config = json.loads((tiny.checkpoint("llama") / "config.json").read_text())
    assert captured["vocab_size"] == config["vocab_size"]


@pytest.mark.parametrize("verb", ["merge-onnx", "swap-onnx", "bank-onnx"])
def test_manifests(verb, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert (
        _run([str(word) for word in output_cases.CASES[verb].arguments(tmp_path, tmp_path / "out")], False)
        == 0
    )
    (path,) = (tmp_path / "out").glob("*.lora.json")
    found, stored = facts(capsys, path), json.loads(path.read_text())
    assert (found["kind"], found["mode"]) == ("manifest", verb)
    assert found["adapters"] == stored["adapters"]
    text = said(capsys, path)
    assert all(entry["sha256"] in text for entry in stored["adapters"])
    # Under another name it is known by what is in it.
    other = path.rename(path.with_name("renamed.json"))
    assert facts(capsys, other)["mode"] == verb


@pytest.mark.parametrize("what", ["build-engine", "kit"])
def test_engines_and_kits(what, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert (
        _run([str(word) for word in output_cases.CASES[what].arguments(tmp_path, tmp_path / "out")], False)
        == 0
    )
    if what == "kit":
        (folder,) = (tmp_path / "out").glob("*.kit")
        found = facts(capsys, folder)
        assert (found["kind"], found["built"]) == ("kit", [])
        text = said(capsys, folder)
        assert "build.sh" in text
        # Nothing is said of an engine that is not there yet.
        assert ".engine: tensorrt" in text
        assert ", not built" in text
        assert "0 bytes" not in text
        assert not [line for line in text.splitlines() if line.rstrip(", ") != line]
        return
    (engine,) = (tmp_path / "out").glob("*.engine")
    record = record_path(engine)
    stored = json.loads(record.read_text())
    for path in (engine, record):
        found = facts(capsys, path)
        assert (found["kind"], found["sha256"]) == (stored["kind"], stored["sha256"])
        assert stored["targets"][0] in said(capsys, path)


def test_a_folder_for_genai(tmp_path, capsys):
    config = {
        "model": {"type": "llama", "context_length": 64, "vocab_size": 7, "decoder": {"filename": "m.onnx"}}
    }
    (tmp_path / "genai_config.json").write_text(json.dumps(config))
    (tmp_path / "a.onnx_adapter").touch()
    assert facts(capsys, tmp_path)["adapters"] == ["a.onnx_adapter"]
    text = said(capsys, tmp_path)
    assert "m.onnx, which is missing" in text
    (tmp_path / "m.onnx").touch()
    assert "missing" not in said(capsys, tmp_path / "genai_config.json")


@pytest.mark.parametrize("name", ["/etc/passwd", "../beside.onnx", "link.onnx"])
def test_a_folder_for_genai_is_not_left(name, tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "beside.onnx").write_text("x")
    (folder / "link.onnx").symlink_to(tmp_path / "beside.onnx")
    config = {"model": {"type": "x", "decoder": {"filename": name}}}
    (folder / "genai_config.json").write_text(json.dumps(config))
    assert f"{name}, which is not in the folder" in said(capsys, folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [("m.onnx", "x"), ("m.lora.json", "{}"), ("x.json", "{"), ("genai_config.json", '{"model": 1}')],
)
def test_damaged_ones_are_errors(name, content, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    assert _run(["inspect", str(tmp_path / name)], False) == 1
    assert "Error: " in capsys.readouterr().err


def test_options_about_adapters_are_refused(tmp_path, capsys):
    assert _run(["inspect", str(tiny.base_onnx("bert", "torchscript")), "--rank", "4"], False) == 2
    assert "is a graph: omit --rank" in capsys.readouterr().err


def test_many_modules_are_summed_up(tmp_path, monkeypatch):
    """By name, shape, rank and scaling; the sum of the squares of all ‖ΔW‖ stays what it is."""
    report = inspect_adapter(load_adapter(tiny.adapter("llama", "patterns")))
    assert len(plain_lines(report)) > len(report.modules)
    assert len(report.modules) <= MAX_MODULES
    monkeypatch.setattr("lora_export.reports.adapter.to_text.MAX_MODULES", 3)
    lines = plain_lines(report)
    start = next(number for number, line in enumerate(lines) if line.startswith("modules "))
    rows = [line.split() for line in lines[start + 1 : lines.index("", start)]]
    assert sum(int(row[1]) for row in rows) == len(report.modules)
    norms = np.array([module.norm for module in report.modules])
    assert np.isclose(np.linalg.norm([float(row[-1]) for row in rows]), np.linalg.norm(norms), rtol=1e-3)
    assert f"‖ΔW‖ {np.linalg.norm(norms):.4g}" in "\n".join(lines)
    for module in report.modules:
        assert module.module not in "\n".join(lines)
        assert module.module in "\n".join(plain_lines(report, modules=True))


def test_ports_without_a_shape_and_of_other_types(tmp_path, capsys):
    float32 = onnx.TensorProto.FLOAT
    tensor = onnx.helper.make_tensor_type_proto(float32, ["n"])
    types = {
        "plain": (tensor, "float32", ["n"]),
        "unshaped": (onnx.helper.make_tensor_type_proto(float32, None), "float32", None),
        "text": (onnx.helper.make_tensor_type_proto(onnx.TensorProto.STRING, [2]), "string", [2]),
        "list": (onnx.helper.make_sequence_type_proto(tensor), "sequence of float32", ["n"]),
        "maybe": (onnx.helper.make_optional_type_proto(tensor), "optional float32", ["n"]),
        "both": (
            onnx.helper.make_optional_type_proto(onnx.helper.make_sequence_type_proto(tensor)),
            "optional sequence of float32",
            ["n"],
        ),
    }
    inputs = [onnx.helper.make_value_info(name, kind) for name, (kind, *_) in types.items()]
    nodes = [onnx.helper.make_node("Identity", [name], [f"{name}_out"]) for name in types]
    outputs = [onnx.helper.make_value_info(f"{name}_out", kind) for name, (kind, *_) in types.items()]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", inputs, outputs), ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    found, text = facts(capsys, tmp_path / "m.onnx"), said(capsys, tmp_path / "m.onnx")
    for ports, ending in ((found["inputs"], ""), (found["outputs"], "_out")):
        seen = {port["name"]: (port["dtype"], port["dims"]) for port in ports}
        assert seen == {f"{name}{ending}": tuple(wanted) for name, (_, *wanted) in types.items()}
    rows = {line.split()[0]: line for line in text.splitlines()}
    assert "unknown" in rows["unshaped"]
    assert "optional sequence of float32" in rows["both"]


@pytest.mark.parametrize("rows", [5, None, "x", [5], [None], {}])
def test_a_manifest_with_other_rows_is_refused(rows, tmp_path):
    manifest = {"mode": "merge-onnx", "base": [], "adapters": [], "rounding": {}, "plan": {"rows": []}}
    path = tmp_path / "m.lora.json"
    path.write_text(json.dumps(manifest))
    assert _run(["inspect", str(path)], False) == 0
    path.write_text(json.dumps({**manifest, "plan": {"rows": rows}}))
    with pytest.raises(GraphError) as caught:
        Manifest.read(path)
    assert "plan.rows" in caught.value.problems[0]
    assert _run(["inspect", str(path)], False) == 1


def test_of_a_long_manifest_the_first_lines_are_shown(tmp_path, capsys):
    entry = {"name": "x", "size_bytes": 1, "sha256": ""}
    data = {
        "mode": "merge",
        "base": [entry] * 5000,
        "adapters": [{"name": f"a{i}"} for i in range(5000)],
        "plan": {"rows": [{"action": str(i)} for i in range(5000)]},
        "rounding": {"x": float("nan")},
        "files": {f"f{i}": entry for i in range(5000)},
        "format": 1,
    }
    (tmp_path / "x.lora.json").write_text(json.dumps(data))
    text = said(capsys, tmp_path / "x.lora.json")
    assert len(text.splitlines()) < 210
    assert text.count("… and 4900 more") == 2
    assert facts(capsys, tmp_path / "x.lora.json")["rounding"] == {"x": "nan"}
