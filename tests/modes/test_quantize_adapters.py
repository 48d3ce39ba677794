"""Adapters and quantised weights: merged and then quantised, or in float on top; PEFT says what is right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import dequantised
import numpy as np
import onnx
import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, build

from lora_export import (
    AdapterSession,
    bank_onnx,
    capture_onnx,
    convert_adapter,
    load_adapter,
    merge_onnx,
    quantize_onnx,
    swap_onnx,
    verify,
)
from lora_export.errors import CheckpointError, GraphError
from lora_export.graph.exposed import lora_record_of
from lora_export.graph.quantised import quantised_in
from lora_export.reports.merge import summary_lines, warning_lines
from lora_export.storage.manifest import Manifest


def metadata(path):
    return {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}


def values_by_module(path):
    """Return module path → the values of its codes, float64 (N, K)."""
    found = dequantised.decoded(path)
    weights = [weight for record in quantised_in(metadata(path)) for weight in record.weights]
    return {weight.module: found[weight.codes] for weight in weights}


def first(outputs):
    """Return a session's first output: exporters give it different names."""
    return next(iter(outputs.values()))


def twin(path: Path) -> torch.nn.Module:
    """Return the base model in PyTorch with the values of a graph's codes as its weights."""
    model = build("llama")
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, decoded in values_by_module(path).items():
            modules[name].weight.copy_(torch.from_numpy(decoded.values))
    return model


def answer(model):
    with torch.no_grad():
        return model.eval()(**ARCHITECTURES["llama"].inputs()).logits.numpy()


def with_adapter(model, adapter):
    with tiny.quiet():
        return answer(PeftModel.from_pretrained(model, adapter))


@pytest.mark.parametrize("to", ["int4", "int8"])
def test_a_merge_is_quantised_after_the_merge(to, tmp_path):
    base, adapter = tiny.base_onnx("llama", "dynamo"), tiny.adapter("llama")
    out = tmp_path / "new folder" / "m.onnx"
    report = merge_onnx(base, adapter, out, quantize=to)
    with tiny.quiet():
        merged = PeftModel.from_pretrained(build("llama"), adapter).merge_and_unload()
    state = {name: value.detach().double().numpy() for name, value in merged.named_parameters()}
    found = values_by_module(out)
    assert {row.parameter.removesuffix(".weight") for row in report.plan.placed} <= found.keys() | {"lm_head"}
    for name, decoded in found.items():
        wanted = state[f"{name}.weight"]
        assert (np.abs(decoded.values - wanted) <= decoded.steps * (1 + 1e-4)).all()
        (weight,) = [w for w in report.quantised.record.weights if w.module == name]
        lost = np.linalg.norm(decoded.values - wanted) / np.linalg.norm(wanted)
        assert weight.relative == pytest.approx(lost, rel=1e-3)
    before = {name: value.detach().double().numpy() for name, value in build("llama").named_parameters()}
    lost = [np.linalg.norm(found[name].values - state[f"{name}.weight"]) for name in found]
    moved = [np.linalg.norm(state[f"{name}.weight"] - before[f"{name}.weight"]) for name in found]
    wanted = np.linalg.norm([a for a, b in zip(lost, moved, strict=True) if b]) / np.linalg.norm(moved)
    assert report.codes_over_delta == pytest.approx(wanted, rel=1e-3)
    assert any("against the float merge" in line for line in summary_lines(report, 1.0))
    got = tiny.run(out, tiny.feeds("llama", out))
    assert tiny.relative_error(got, answer(twin_of_merged(merged, found))) < 1e-5
    assert json.loads(out.with_suffix(".lora.json").read_text())["rounding"]["modules"].keys() == (
        {row.parameter.removesuffix(".weight") for row in report.plan.placed}
    )
    assert all(state.state == "ok" for state in verify(out).files)


def test_codes_that_lose_more_than_the_adapter_changed_are_warned_of(tmp_path):
    base, adapter = tiny.base_onnx("llama", "dynamo"), tiny.adapter("llama")
    report = merge_onnx(base, adapter, tmp_path / "m.onnx", weights=[0.01], quantize="int4")
    assert report.codes_over_delta > 1
    assert any("the codes lost more than the adapter changed" in line for line in warning_lines(report, ""))
    report = merge_onnx(base, adapter, tmp_path / "8.onnx", weights=[3.0], quantize="int8")
    assert not any("the codes lost" in line for line in warning_lines(report, ""))


def twin_of_merged(merged, found):
    modules = dict(merged.named_modules())
    with torch.no_grad():
        for name, decoded in found.items():
            modules[name].weight.copy_(torch.from_numpy(decoded.values))
    return merged


@pytest.mark.parametrize("way", ["swap first", "quantised first", "in one"])
def test_many_adapters_over_quantised_weights(way, tmp_path):
    base, out = tiny.base_onnx("llama", "dynamo"), tmp_path / "s.onnx"
    one, other = tiny.adapter("llama"), tiny.adapter("llama", seed=1)
    if way == "in one":
        swap_onnx(base, out, adapter=one, quantize="int4")
    elif way == "swap first":
        swap_onnx(base, tmp_path / "f.onnx", adapter=one)
        quantize_onnx(tmp_path / "f.onnx", out)
    else:
        quantize_onnx(base, tmp_path / "q.onnx")
        swap_onnx(tmp_path / "q.onnx", out, adapter=one)
    names = [row.key for row in onnx.load(out, load_external_data=False).metadata_props]
    assert "lora_export.quantised" in names
    assert len(values_by_module(out)) == 14
    record = lora_record_of(metadata(out), "s")
    assert not any(member.stored for module, member in record.members() if member.path != "lm_head")
    feeds = tiny.feeds("llama", out)
    assert tiny.relative_error(tiny.run(out, feeds), answer(twin(out))) < 1e-5
    session = AdapterSession(out)
    for name, folder in (("one", one), ("other", other)):
        session.load_adapter(name, folder)
    for name, folder in (("one", one), ("other", other), ("one", one)):
        got = first(session.run(feeds, adapter=name))
        assert tiny.relative_error(got, with_adapter(twin(out), folder)) < 1e-5
    assert tiny.relative_error(first(session.run(feeds)), answer(twin(out))) < 1e-5


def test_a_converted_adapter_fits_after_quantising(tmp_path):
    """The quantised graph is over the same base: its record names the same one."""
    base, adapter = tiny.base_onnx("llama", "dynamo"), tiny.adapter("llama")
    swap_onnx(base, tmp_path / "f.onnx", adapter=adapter)
    convert_adapter(adapter, tmp_path / "f.onnx", tmp_path / "a.onnx_adapter")
    quantize_onnx(tmp_path / "f.onnx", tmp_path / "q.onnx", to="int8")
    session, feeds = AdapterSession(tmp_path / "q.onnx"), tiny.feeds("llama", tmp_path / "q.onnx")
    session.load_adapter("a", tmp_path / "a.onnx_adapter")
    wanted = with_adapter(twin(tmp_path / "q.onnx"), adapter)
    assert tiny.relative_error(first(session.run(feeds, adapter="a")), wanted) < 1e-5


@pytest.mark.parametrize("pack", [False, True])
def test_a_bank_over_quantised_weights(pack, tmp_path):
    base, out = tiny.base_onnx("llama", "dynamo"), tmp_path / "b.onnx"
    slots = {"one": tiny.adapter("llama"), "other": tiny.adapter("llama", seed=1)}
    report = bank_onnx(base, slots, out, quantize="int4", pack=pack)
    lora = [row for row in report.quantised.rows if "lora_" in row.weight]
    assert lora
    assert {row.reason for row in lora} == {"a tensor of exposed LoRA"}
    feeds = tiny.feeds("llama", out)
    chosen = feeds | {"lora.adapter_weights": np.eye(2, dtype=np.float32)}
    got = tiny.run(out, chosen)
    for row, folder in enumerate(slots.values()):
        wanted = with_adapter(twin(out), folder)[row]
        assert tiny.relative_error(got[row], wanted) < 1e-5


def test_fused_siblings_are_one_quantised_weight(tmp_path):
    base, out, adapter = tiny.base_onnx("llama", "dynamo"), tmp_path / "s.onnx", tiny.adapter("llama")
    swap_onnx(base, tmp_path / "float.onnx", adapter=adapter, fuse_base=True)
    swap_onnx(base, out, adapter=adapter, fuse_base=True, quantize="int8")
    floats, feeds = dequantised.as_floats(out, tmp_path / "floats.onnx"), tiny.feeds("llama", out)
    loaded = AdapterSession(out)
    loaded.load_adapter("a", adapter)
    wanted = AdapterSession(tmp_path / "float.onnx")
    wanted.load_adapter("a", adapter)
    assert tiny.relative_error(tiny.run(out, feeds), tiny.run(floats, feeds)) < 1e-5
    got, exact = (first(session.run(feeds, adapter="a")) for session in (loaded, wanted))
    assert tiny.relative_error(got, exact) < 0.05


def test_dora_keeps_the_weights_that_its_norms_need(tmp_path):
    base, out, adapter = tiny.base_onnx("llama", "dynamo"), tmp_path / "s.onnx", tiny.adapter("llama", "dora")
    with pytest.raises(GraphError) as caught:
        swap_onnx(base, out, adapter=adapter, dora=True, quantize="int4")
    assert any("DoRA factors are computed from it" in problem for problem in caught.value.problems)
    report = swap_onnx(base, out, target_modules="q_proj,v_proj", dora=True, quantize="int4")
    kept = {row.module.rpartition(".")[2] for row in report.quantised.left if "DoRA" in row.reason}
    assert kept == {"q_proj", "v_proj"}
    assert len(values_by_module(out)) == 10


def test_a_capture_is_quantised_on_its_way(tmp_path):
    out = tmp_path / "c.onnx"
    graph, data = capture_onnx(tiny.checkpoint("llama"), out, quantize="int8", kv_cache=True)
    assert (graph, data) == (out, tmp_path / "c.onnx.data")
    assert len(values_by_module(out)) == 14
    got = tiny.run(out, tiny.feeds("llama", out))
    assert tiny.relative_error(got, answer(twin(out))) < 1e-5
    manifest = Manifest.read(out.with_suffix(".lora.json"))
    assert manifest.mode == "capture-onnx"
    assert [entry.name for entry in manifest.base] == ["config.json", "model.safetensors"]
    assert all(state.state == "ok" for state in verify(out).files)
    assert "lora_export.model" in metadata(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.lora.json", "c.onnx", "c.onnx.data"]


def test_a_folder_is_merged_and_quantised(tmp_path):
    out, adapter = tmp_path / "m.onnx", tiny.adapter("llama")
    report = merge_onnx(tiny.checkpoint("llama"), adapter, out, dtype="float16", quantize="int8")
    assert report.quantised is not None
    with tiny.quiet():
        merged = PeftModel.from_pretrained(build("llama"), adapter).merge_and_unload()
    found = values_by_module(out)
    state = {name: value.detach().double().numpy() for name, value in merged.named_parameters()}
    for name, decoded in found.items():
        lost = np.linalg.norm(decoded.values - state[f"{name}.weight"]) / np.linalg.norm(
            state[f"{name}.weight"]
        )
        assert lost < 0.01


def test_a_merged_graph_keeps_its_history_when_it_is_quantised(tmp_path):
    base, adapter = tiny.base_onnx("llama", "dynamo"), tiny.adapter("llama")
    merge_onnx(base, adapter, tmp_path / "m.onnx")
    quantize_onnx(tmp_path / "m.onnx", tmp_path / "q.onnx")
    before, after = (Manifest.read(tmp_path / f"{name}.lora.json") for name in "mq")
    assert (after.adapters, after.plan) == (before.adapters, before.plan)
    with pytest.raises(GraphError, match="merged into it already"):
        merge_onnx(tmp_path / "q.onnx", load_adapter(adapter), tmp_path / "again.onnx")


def test_a_dry_run_plans_the_weights_too(tmp_path):
    base, adapter = tiny.base_onnx("llama", "dynamo"), tiny.adapter("llama")
    report = merge_onnx(base, adapter, tmp_path / "m.onnx", quantize="int4", dry_run=True)
    assert report.as_dict()["quantised"]["rows"]
    report = swap_onnx(base, tmp_path / "s.onnx", adapter=adapter, quantize="int4", dry_run=True)
    assert report.as_dict()["quantised"]["rows"]
    assert not list(tmp_path.iterdir())


def test_an_unknown_type_is_refused_before_a_capture(tmp_path):
    folder, adapter = tiny.checkpoint("llama"), tiny.adapter("llama")
    for write in (
        lambda: merge_onnx(folder, adapter, tmp_path / "m.onnx", quantize="int2"),
        lambda: swap_onnx(folder, tmp_path / "m.onnx", adapter=adapter, quantize="int2"),
        lambda: bank_onnx(folder, {"a": adapter}, tmp_path / "m.onnx", quantize="int2"),
        lambda: capture_onnx(folder, tmp_path / "m.onnx", quantize="int2"),
    ):
        with pytest.raises(GraphError) as caught:
            write()
        assert caught.value.problems == ("to: 'int2', wanted int4 or int8",)


@pytest.mark.parametrize(
    ("name", "leaves"),
    [
        ("GPTQ", ("qweight", "qzeros", "g_idx", "scales")),
        ("AWQ", ("qweight", "qzeros", "scales")),
        ("compressed-tensors", ("weight_packed", "weight_scale")),
    ],
)
def test_packed_checkpoints_are_refused_by_name(name, leaves, tmp_path):
    """Before transformers asks for the packages that read them, with the way that there is."""
    folder = shutil.copytree(tiny.checkpoint("llama"), tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        stem = key.removesuffix("weight")
        shape = tensors.pop(key).shape
        tensors |= {f"{stem}{leaf}": torch.ones(shape, dtype=torch.int32) for leaf in leaves}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    adapter = tiny.adapter("llama")
    for write in (
        lambda: capture_onnx(folder, tmp_path / "q.onnx", quantize="int4"),
        lambda: capture_onnx(folder, tmp_path / "q.onnx", trace="outline"),
        lambda: swap_onnx(folder, tmp_path / "q.onnx", adapter=adapter, quantize="int4"),
    ):
        with pytest.raises(CheckpointError) as caught:
            write()
        text = str(caught.value)
        assert name in text
        assert "unquantised" in text
