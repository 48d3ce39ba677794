"""`lora-export merge-onnx`: adapter feature × architecture × exporter, against PEFT-merged PyTorch."""

import json

import numpy as np
import onnx_ir as ir
import pytest
import tiny

from lora_export import load_adapter, merge_onnx
from lora_export.cli import _run
from lora_export.graph.onnx_file import load_graph
from lora_export.plan import unaccounted

TOLERANCE = 2e-6
EXPORTERS = tuple(name for name in tiny.EXPORTERS if name != "ort_fusions")

# A batch norm folded into a convolution can't be seen by name: these are refused without the checkpoint.
FOLDED_NORM = {("conv", "dynamo"), ("conv", "torchscript")}
# genai's builder renames the last norm, and for some models adds 1 to it: only its values can be trusted.
RENAMED_NORM = {("qwen2", "genai", "modules_to_save")}
# mobius has each expert's gate and up on their own; how they lie in the stack, only values tell.
SINGLE_EXPERTS = {("qwen2_moe", "mobius", "target_parameters")}


def group(arch):
    """Keep an architecture's tests in one xdist worker: each exports a model once."""
    return pytest.mark.xdist_group(arch)


def table():
    for arch, exporter in tiny.pairs(*EXPORTERS):
        for feature in tiny.ARCHITECTURES[arch].features:
            yield pytest.param(arch, exporter, feature, marks=group(arch), id=f"{arch}-{exporter}-{feature}")


def merged_error(arch, adapter, output):
    got = tiny.run(output, tiny.feeds(arch, output))
    return tiny.relative_error(got, tiny.reference(arch, adapter))


@pytest.mark.parametrize(("arch", "exporter", "feature"), table())
def test_merge_agrees_with_peft(arch, exporter, feature, tmp_path, capsys):
    base, adapter = tiny.base_onnx(arch, exporter), tiny.adapter(arch, feature)
    output = tmp_path / "merged.onnx"
    capsys.readouterr()
    arguments = ["merge-onnx", "--base", str(base), "--adapter", str(adapter), "-o", str(output), "--json"]
    if (arch, exporter) in FOLDED_NORM or (arch, exporter, feature) in RENAMED_NORM | SINGLE_EXPERTS:
        assert _run(arguments, False) == 1
        assert "--checkpoint" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
        arguments += ["--checkpoint", str(tiny.checkpoint(arch))]
        if feature == "bias":
            # The folded bias is not the module's any more: no value of the adapter can replace it.
            assert _run(arguments, False) == 1
            assert "does not hold the checkpoint's values" in capsys.readouterr().err
            return
    assert _run(arguments, False) == 0, capsys.readouterr().err
    plan = json.loads(capsys.readouterr().out)["plan"]["rows"]
    spoken = [name for row in plan for name in row["tensors"]]
    assert sorted(set(load_adapter(adapter).tensor_names)) == sorted(set(spoken))
    assert all(row["action"] != "refused" for row in plan)
    assert merged_error(arch, adapter, output) < TOLERANCE
    # The oracle can tell: the base without the adapter is far off.
    assert tiny.relative_error(tiny.base_reference(arch), tiny.reference(arch, adapter)) > 1e3 * TOLERANCE


@pytest.mark.parametrize(
    ("arch", "exporter"),
    [pytest.param(*pair, marks=group(pair[0]), id="-".join(pair)) for pair in tiny.pairs(*EXPORTERS)],
)
def test_checkpoint_verifies_every_match(arch, exporter, tmp_path):
    adapter = tiny.adapter(arch, "target_parameters" if arch == "qwen2_moe" else "plain")
    report = merge_onnx(
        tiny.base_onnx(arch, exporter), adapter, tmp_path / "m.onnx", checkpoint=tiny.checkpoint(arch)
    )
    assert merged_error(arch, adapter, tmp_path / "m.onnx") < TOLERANCE
    assert all("content" in row.reason for row in report.plan.rows), report.plan.lines()


def stripped(path, output):
    """Write a copy of a graph without names that lead anywhere and without metadata."""
    model = ir.load(path)
    for number, node in enumerate(model.graph.all_nodes()):
        node.name, node.doc_string = f"n{number}", None
        node.metadata_props.clear()
    values = {id(v): v for v in model.graph.initializers.values()}
    for number, value in enumerate(values.values()):
        value.metadata_props.clear()
        value.const_value.metadata_props.clear()
        value.name = f"c{number}"
    ir.save(model, output, external_data=f"{output.name}.data")
    return output


@pytest.mark.parametrize(
    ("arch", "exporter"),
    [pytest.param(*pair, marks=group(pair[0]), id="-".join(pair)) for pair in tiny.pairs(*EXPORTERS)],
)
def test_content_alone_finds_everything(arch, exporter, tmp_path):
    base = stripped(tiny.base_onnx(arch, exporter), tmp_path / "bare.onnx")
    stacked = arch == "qwen2_moe" and exporter != "mobius"
    adapter, output = tiny.adapter(arch, "target_parameters" if stacked else "plain"), tmp_path / "m.onnx"
    report = merge_onnx(base, adapter, output, checkpoint=tiny.checkpoint(arch))
    assert {row.reason for row in report.plan.rows} == {"content"}
    assert merged_error(arch, adapter, output) < TOLERANCE


@pytest.mark.parametrize(
    ("arch", "exporter"),
    [
        pytest.param(*pair, marks=group(pair[0]), id="-".join(pair))
        for pair in tiny.pairs("ort_fusions")
        if pair[0] in ("llama", "qwen2", "bert")
    ],
)
def test_fused_weights_without_names_are_found_by_content(arch, exporter, tmp_path):
    """`packed_matmul_N` of transformers' own exporter: q‖k‖v and gate‖up in one, no metadata."""
    adapter, output = tiny.adapter(arch), tmp_path / "m.onnx"
    merge_onnx(tiny.base_onnx(arch, exporter), adapter, output, checkpoint=tiny.checkpoint(arch))
    assert merged_error(arch, adapter, output) < TOLERANCE


def checkpoint_pairs():
    for arch in ("llama", "gpt2", "bert", "vit", "t5"):
        yield pytest.param(arch, marks=[group(arch), pytest.mark.slow])


@pytest.mark.parametrize("arch", checkpoint_pairs())
def test_checkpoint_folder_is_captured(arch, tmp_path):
    adapter, output = tiny.adapter(arch), tmp_path / "m.onnx"
    merge_onnx(tiny.checkpoint(arch), adapter, output)
    assert merged_error(arch, adapter, output) < TOLERANCE


@group("llama")
def test_blend_is_the_weighted_sum(tmp_path):
    """Oracle: PEFT's add_weighted_adapter with combination_type "cat"."""
    import torch
    from peft import PeftModel

    one, two = tiny.adapter("llama", "plain", 0), tiny.adapter("llama", "plain", 1)
    model = PeftModel.from_pretrained(tiny.build("llama"), one, adapter_name="one")
    model.load_adapter(two, adapter_name="two")
    model.add_weighted_adapter(["one", "two"], [0.7, -0.3], "blend", combination_type="cat")
    model.set_adapter("blend")
    with torch.no_grad():
        wanted = model(**tiny.ARCHITECTURES["llama"].inputs()).logits.numpy()
    output = tmp_path / "m.onnx"
    merge_onnx(tiny.base_onnx("llama", "dynamo"), [one, two], output, weights=[0.7, -0.3])
    got = tiny.run(output, tiny.feeds("llama", output))
    assert tiny.relative_error(got, wanted) < TOLERANCE


@group("llama")
def test_same_inputs_same_bytes_and_no_leftovers(tmp_path):
    base, adapter = tiny.base_onnx("llama", "dynamo"), tiny.adapter("llama")
    for name in ("one", "two"):
        merge_onnx(base, adapter, tmp_path / name / "m.onnx")
    for name in ("m.onnx", "m.onnx.data", "m.lora.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert len(list((tmp_path / "one").iterdir())) == 3


@group("bert")
@pytest.mark.slow
def test_a_captured_checkpoint_gives_the_same_bytes_and_names_no_file_of_this_machine(tmp_path):
    import transformers

    for name in ("one", "two"):
        merge_onnx(tiny.checkpoint("bert"), tiny.adapter("bert"), tmp_path / name / "m.onnx")
    for name in ("m.onnx", "m.onnx.data", "m.lora.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    graph = (tmp_path / "one" / "m.onnx").read_bytes()
    assert str(tmp_path).encode() not in graph
    assert transformers.__path__[0].encode() not in graph


@group("llama")
def test_base_is_not_touched_and_the_rest_of_the_graph_is_the_same(tmp_path):
    base, adapter = tiny.base_onnx("llama", "torchscript"), tiny.adapter("llama")
    before = {path.name: path.read_bytes() for path in base.parent.iterdir() if path.is_file()}
    report = merge_onnx(base, adapter, tmp_path / "m.onnx")
    assert before == {path.name: path.read_bytes() for path in base.parent.iterdir() if path.is_file()}
    changed = {row.place for row in report.plan.rows}
    old, new = load_graph(base), load_graph(tmp_path / "m.onnx")
    assert [n.name for n in old.graph.all_nodes()] == [n.name for n in new.graph.all_nodes()]
    values = {v.name: v.const_value.numpy() for v in new.initializers()}
    for value in old.initializers():
        same = np.array_equal(value.const_value.numpy(), values[value.name])
        assert same == (value.name not in changed), value.name


@group("llama")
def test_share_base_keeps_w0_once(tmp_path):
    """Three tasks in the base's folder: W0 once, plus each task's changed matrices; each runs."""
    model = ir.load(tiny.base_onnx("llama", "dynamo"))
    base = tmp_path / "base.onnx"
    ir.save(model, base, external_data="base.onnx.data")
    for seed in range(3):
        adapter, output = tiny.adapter("llama", "plain", seed), tmp_path / f"task{seed}.onnx"
        report = merge_onnx(base, adapter, output, share_base=True)
        assert merged_error("llama", adapter, output) < TOLERANCE
        shapes = {row.place: ir.load(base).graph.initializers[row.place].shape for row in report.plan.rows}
        needed = sum(4 * np.prod(tuple(shape)) for shape in shapes.values())
        assert needed <= report.size_bytes <= needed + 64 * len(shapes)
        assert report.shared_bytes > 0
    assert merged_error("llama", tiny.adapter("llama", "plain", 0), tmp_path / "task0.onnx") < TOLERANCE


@group("bert")
@pytest.mark.slow
def test_share_base_with_the_checkpoints_own_safetensors(tmp_path):
    import shutil

    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny.checkpoint("bert"), folder)
    before = (folder / "model.safetensors").read_bytes()
    adapter, output = tiny.adapter("bert"), folder / "merged.onnx"
    report = merge_onnx(folder, adapter, output, share_base=True)
    assert merged_error("bert", adapter, output) < TOLERANCE
    assert report.shared_bytes > 0
    locations = {
        v.const_value.location
        for v in load_graph(output).initializers()
        if hasattr(v.const_value, "location")
    }
    assert locations == {"merged.onnx.data", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == before


@group("llama")
def test_share_base_refuses_a_folder_that_onnxruntime_would_refuse(tmp_path):
    from lora_export import OutputError

    model = ir.load(tiny.base_onnx("llama", "dynamo"))
    (tmp_path / "a").mkdir()
    ir.save(model, tmp_path / "a" / "base.onnx", external_data="base.data")
    base, output = tmp_path / "a" / "base.onnx", tmp_path / "b" / "m.onnx"
    with pytest.raises(OutputError, match="can't be shared"):
        merge_onnx(base, tiny.adapter("llama"), output, share_base=True)
    assert not output.parent.exists()


@group("llama")
def test_manifest_round_trip_and_every_tensor_in_it(tmp_path):
    from lora_export.storage.manifest import Manifest

    adapter = load_adapter(tiny.adapter("llama", "patterns"))
    merge_onnx(tiny.base_onnx("llama", "dynamo"), adapter, tmp_path / "m.onnx")
    text = (tmp_path / "m.lora.json").read_text()
    manifest = Manifest.from_json(text)
    manifest.save(tmp_path / "again.lora.json")
    assert (tmp_path / "again.lora.json").read_text() == text
    assert manifest.adapters[0]["sha256"] == adapter.sha256
    spoken = {name for row in manifest.plan["rows"] for name in row["tensors"]}
    assert spoken == set(adapter.tensor_names)
    assert unaccounted(adapter.tensor_names, []) == list(adapter.tensor_names)
    scalings = {key: module.scaling for key, module in adapter.modules.items()}
    assert {key: entry["scaling"] for key, entry in manifest.adapters[0]["modules"].items()} == scalings


@group("llama")
def test_dry_run_writes_nothing(tmp_path, capsys):
    base, adapter = tiny.base_onnx("llama", "dynamo"), tiny.adapter("llama")
    arguments = ["merge-onnx", "--base", str(base), "--adapter", str(adapter), "--dry-run"]
    assert _run([*arguments, "-o", str(tmp_path / "m.onnx")], False) == 0
    assert "model.layers.1.mlp.down_proj.weight" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
