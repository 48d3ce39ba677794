"""Graphs of mobius by its names, in each form that it builds: merged, swapped and as a bank, against PEFT."""

import shutil

import mobius_graphs as mobius
import numpy as np
import onnx_ir as ir
import pytest
import tiny
from exposed_models import tensors
from small_graphs import constants
from tiny_models import HEADS, HIDDEN, LAYERS

from lora_export import SiteError, bank_onnx, convert_adapter, merge_onnx, swap_onnx
from lora_export.sites.naming import names
from lora_export.sites.naming.evidence import weight_path

TOLERANCE = 2e-6
PROVIDERS = ("default", "cpu", "cuda", "dml", "mlx", "onnx-standard", "openvino", "qnn", "trt-rtx", "webgpu")


def group(family):
    return pytest.mark.xdist_group(f"mobius-{family}")


def forms():
    for family in mobius.FAMILIES:
        for provider in ("default", "cpu"):
            yield pytest.param(family, provider, marks=group(family), id=f"{family}-{provider}")
    for provider in PROVIDERS[2:]:
        yield pytest.param("qwen3", provider, marks=group("qwen3"), id=f"qwen3-{provider}")


def run(path, **more):
    return tiny.run(path, mobius.feeds(path) | more)


@pytest.mark.parametrize(("family", "provider"), forms())
def test_merged_by_name_is_peft(family, provider, tmp_path):
    base, adapter = mobius.base(family, provider), mobius.adapter(family)
    # Where mobius itself were wrong, PEFT would be no oracle.
    assert tiny.relative_error(run(base), mobius.answer(family)) < TOLERANCE
    report = merge_onnx(base, adapter, tmp_path / "m.onnx")
    # Beside what the file itself says (it trains biases).
    assert all("base_layer" in note for note in report.plan.notes)
    wanted = mobius.answer(family, adapter)
    assert tiny.relative_error(run(tmp_path / "m.onnx"), wanted) < TOLERANCE
    assert tiny.relative_error(mobius.answer(family), wanted) > 1e3 * TOLERANCE
    verified = merge_onnx(base, adapter, tmp_path / "v.onnx", checkpoint=mobius.checkpoint(family))
    assert all("content" in row.reason for row in verified.plan.rows), verified.plan.lines()


def test_the_providers_are_all_of_them():
    from mobius._execution_providers import ep_registry

    assert set(PROVIDERS) == set(ep_registry.names())


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("family", [pytest.param(f, marks=group(f)) for f in ("llama", "qwen2")])
def test_every_form_holds_the_sum(family, provider, dtype, tmp_path):
    """Each constant against W0 + scaling·B·A by hand, for forms that nothing here can run."""
    base, adapter = mobius.base(family, provider, dtype), mobius.adapter(family)
    merge_onnx(base, adapter, tmp_path / "m.onnx")
    before, after = constants(base), constants(tmp_path / "m.onnx")
    wanted = mobius.merged_weights(family, adapter, before)
    linears = sum(len(name.split("__axis")[0].split("__")) for name in wanted if "_proj.weight" in name)
    assert linears == 7 * LAYERS
    for name, values in wanted.items():
        assert tiny.relative_error(after[name], values) < {"f16": 1e-3, "bf16": 8e-3}[dtype], name
    changed = {name for name in after if name not in before or not np.array_equal(before[name], after[name])}
    assert changed == set(wanted)


@pytest.mark.parametrize(("family", "provider"), forms())
def test_swapped_by_name_is_peft(family, provider, tmp_path):
    base, graph = mobius.base(family, provider), tmp_path / "swap.onnx"
    swap_onnx(base, graph, adapter=mobius.adapter(family, 1), pack=family in ("qwen2", "mistral"))
    for adapter in (mobius.adapter(family, 1), mobius.adapter(family, 2, 6)):
        wanted = mobius.answer(family, adapter)
        assert tiny.relative_error(run(graph, **tensors(graph, adapter)), wanted) < TOLERANCE
    assert np.array_equal(run(graph), run(base))


@pytest.mark.parametrize(("family", "provider"), forms())
def test_bank_rows_are_peft(family, provider, tmp_path):
    named = {"a": mobius.adapter(family, 1), "b": mobius.adapter(family, 2, 6)}
    base, graph = mobius.base(family, provider), tmp_path / "bank.onnx"
    bank_onnx(base, named, graph)
    weights = np.array([[0, 1], [1, 0]], np.float32)
    got = run(graph, **{"lora.adapter_weights": weights})
    wanted = np.stack([mobius.answer(family, named[name])[row] for row, name in enumerate("ba")])
    assert tiny.relative_error(got, wanted) < TOLERANCE


@pytest.mark.parametrize("provider", ["default", "cpu"])
def test_a_converted_file_runs_in_onnxruntime(provider, tmp_path):
    import onnxruntime as ort

    base, adapter = mobius.base("qwen3", provider), mobius.adapter("qwen3")
    swap_onnx(base, tmp_path / "swap.onnx", target_modules=list(mobius.FAMILIES["qwen3"].targets))
    convert_adapter(adapter, tmp_path / "swap.onnx", tmp_path / "a.onnx_adapter")
    loaded, options = ort.LoraAdapter(), ort.RunOptions()
    loaded.Load(str(tmp_path / "a.onnx_adapter"))
    options.add_active_adapter(loaded)
    session = ort.InferenceSession(str(tmp_path / "swap.onnx"), providers=["CPUExecutionProvider"])
    got = session.run(["logits"], mobius.feeds(tmp_path / "swap.onnx"), options)[0]
    assert tiny.relative_error(got, mobius.answer("qwen3", adapter)) < TOLERANCE


PACKS = {
    "q.weight_t": "q.weight",
    "a.q_proj.weight__a.k_proj.weight__a.v_proj.weight__axis_0__concat_t": "a.qkv_proj.weight",
    "a.q_proj.weight__a.k_proj.weight__a.v_proj.weight__axis_0__concat": "a.qkv_proj.weight",
    "a.q_proj.weight_t__a.k_proj.weight_t__a.v_proj.weight_t__axis_1__concat": "a.qkv_proj.weight",
    "a.q_proj.weight_t__a.k_proj.weight_t__a.v_proj.weight_t__axis_-1__concat": "a.qkv_proj.weight",
    "a.q_proj.bias__a.k_proj.bias__a.v_proj.bias__axis_0__concat": "a.qkv_proj.bias",
    "a.gate_proj.weight__a.up_proj.weight__axis_0__concat_t": "a.gate_up_proj.weight",
}
NOT_PACKS = (
    # Another order, a part missing, of two modules, along the inputs, of weights and biases.
    "a.k_proj.weight__a.q_proj.weight__a.v_proj.weight__axis_0__concat_t",
    "a.q_proj.weight__a.k_proj.weight__axis_0__concat_t",
    "a.q_proj.weight__b.k_proj.weight__a.v_proj.weight__axis_0__concat_t",
    "a.q_proj.weight__a.k_proj.weight__a.v_proj.weight__axis_1__concat_t",
    "a.q_proj.weight_t__a.k_proj.weight_t__a.v_proj.weight_t__axis_0__concat",
    "a.q_proj.weight_t__a.k_proj.weight__a.v_proj.weight_t__axis_1__concat",
    "a.q_proj.weight__a.k_proj.bias__a.v_proj.weight__axis_0__concat",
    "a.q_proj.weight__a.k_proj.weight__a.v_proj.weight__axis_0__concat_fused",
)


def test_names_of_folded_constants():
    assert {name: weight_path(name) for name in PACKS} == PACKS
    known = {
        f"a.{leaf}.{kind}"
        for leaf in ("q_proj", "k_proj", "v_proj", "qkv_proj")
        for kind in ("weight", "bias")
    }
    for name in NOT_PACKS:
        assert weight_path(name) not in known | {f"{path}_t" for path in known}
    assert names.fused_of(["q_proj.weight", "k_proj.weight", "v_proj.weight"]) == "qkv_proj.weight"


def test_a_pack_of_unknown_parts_is_refused(tmp_path):
    """Its parts' rows aren't known: by name it has no place, and no other weight is taken for it."""
    base, adapter = mobius.base("llama", "cpu"), mobius.adapter("llama", 1)
    model = ir.load(base)
    for name, value in list(model.graph.initializers.items()):
        if "q_proj" in name:
            value.name = name.replace("v_proj", "z_proj")
    ir.save(model, tmp_path / "base.onnx", external_data="base.onnx.data")
    with pytest.raises(SiteError) as refused:
        merge_onnx(tmp_path / "base.onnx", adapter, tmp_path / "m.onnx")
    assert {line.split("  ")[0].split(".")[-2] for line in refused.value.problems} == {
        "q_proj",
        "k_proj",
        "v_proj",
    }


@pytest.mark.xdist_group("qwen2_moe")
@pytest.mark.parametrize("exchanged", [False, True], ids=["", "exchanged"])
def test_single_experts_are_placed_by_values(exchanged, tmp_path):
    """Which half of a stack is gate and which is up: a checkpoint that says otherwise is refused."""
    from safetensors.numpy import load_file, save_file

    base, adapter = tiny.base_onnx("qwen2_moe", "mobius"), tiny.adapter("qwen2_moe", "target_parameters")
    folder = tiny.checkpoint("qwen2_moe")
    with pytest.raises(SiteError, match="give --checkpoint to compare them"):
        merge_onnx(base, adapter, tmp_path / "m.onnx")
    if not exchanged:
        merge_onnx(base, adapter, tmp_path / "m.onnx", checkpoint=folder)
        got = tiny.run(tmp_path / "m.onnx", tiny.feeds("qwen2_moe", tmp_path / "m.onnx"))
        assert tiny.relative_error(got, tiny.reference("qwen2_moe", adapter)) < TOLERANCE
        return
    stored, other = load_file(folder / "model.safetensors"), {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    swapped = {
        name: stored[name.replace(leaf, other[leaf])] if ".experts." in name and leaf in other else values
        for name, values in stored.items()
        for leaf in [name.split(".")[-2]]
    }
    (tmp_path / "c").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "c")
    save_file(swapped, tmp_path / "c" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SiteError) as refused:
        merge_onnx(base, adapter, tmp_path / "m.onnx", checkpoint=tmp_path / "c")
    assert {line.split("  ")[0].split(".")[-1] for line in refused.value.problems} == {"gate_up_proj"}


@pytest.mark.xdist_group("gpt2")
def test_modules_that_mobius_renames_are_found_by_value(tmp_path):
    """GPT-2's c_attn is q, k and v there, c_fc is up_proj: by name nothing is guessed."""
    adapter = tiny.adapter("gpt2")
    base = tiny.export("gpt2", "mobius", tmp_path / "base")
    with pytest.raises(SiteError):
        merge_onnx(base, adapter, tmp_path / "m.onnx")
    merge_onnx(base, adapter, tmp_path / "m.onnx", checkpoint=tiny.checkpoint("gpt2"))
    swap_onnx(base, tmp_path / "s.onnx", adapter=adapter, checkpoint=tiny.checkpoint("gpt2"))
    feeds = tiny.feeds("gpt2", base)
    past = {name: np.zeros((2, HEADS, 0, HIDDEN // HEADS), np.float32) for name in feeds if "past" in name}
    wanted = tiny.reference("gpt2", adapter)
    assert tiny.relative_error(tiny.run(tmp_path / "m.onnx", feeds | past), wanted) < TOLERANCE
    swapped = tensors(tmp_path / "s.onnx", adapter)
    assert tiny.relative_error(tiny.run(tmp_path / "s.onnx", feeds | past | swapped), wanted) < TOLERANCE
