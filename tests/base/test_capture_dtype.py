"""Checkpoints captured in float16 and bfloat16: as exact as PyTorch in it; merges are rounded once."""

import contextlib
import functools
import io
import json
import shutil
import warnings

import exposed_models as exposed
import ml_dtypes
import numpy as np
import onnx
import pytest
import tiny
import torch
from cached_runs import CHAINS, CachedGraph, reference
from onnx.reference import ReferenceEvaluator
from peft import PeftModel
from safetensors.numpy import load_file, save_file

from lora_export import CheckpointError, OutputError, bank_onnx, capture_onnx, merge_onnx, swap_onnx
from lora_export.base.capture.capture import capture_checkpoint
from lora_export.cli import _run
from lora_export.graph.captured import Captured
from lora_export.graph.exposed import WEIGHTS_INPUT
from lora_export.graph.onnx_file import load_graph

FLOATS = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

pytestmark = pytest.mark.slow


def each(*archs):
    return pytest.mark.parametrize(
        "arch", [pytest.param(arch, marks=pytest.mark.xdist_group(arch)) for arch in archs]
    )


@functools.cache
def captured(arch, dtype, kv_cache):
    folder = tiny.cache_folder() / arch / f"{dtype}-{kv_cache}"
    folder.mkdir(parents=True)
    return capture_checkpoint(tiny.checkpoint(arch), folder / "model.onnx", dtype=dtype, kv_cache=kv_cache)


def feeds(arch, path, dtype):
    inputs = tiny.feeds(arch, path)
    return {name: v.astype(FLOATS[dtype]) if v.dtype == np.float32 else v for name, v in inputs.items()}


def torch_error(arch, dtype, truth, adapter=None):
    """How far PyTorch in that dtype is from the truth, on a checkpoint that was rounded once."""
    model = tiny.build(arch)
    if adapter:
        with tiny.quiet():
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model = model.to(getattr(torch, dtype))
    inputs = {
        name: value.to(model.dtype) if value.is_floating_point() else value
        for name, value in tiny.ARCHITECTURES[arch].inputs().items()
    }
    with torch.no_grad():
        return tiny.relative_error(model(**inputs).logits.float().numpy(), truth)


def weights(path):
    return {str(value.name): value.const_value.numpy() for value in load_graph(path).initializers()}


@each("llama", "qwen2", "gpt2", "phi3", "bert", "vit")
def test_float16_is_as_exact_as_pytorchs(arch):
    path, truth = captured(arch, "float16", False), tiny.base_reference(arch)
    got = tiny.run(path, feeds(arch, path, "float16"))
    assert got.dtype == np.float16
    theirs = torch_error(arch, "float16", truth)
    assert 0 < tiny.relative_error(got, truth) < 2 * theirs < 4e-3


@each("llama", "gpt2", "bert")
def test_bfloat16_is_as_exact_as_pytorchs(arch):
    """By ONNX's own evaluator: onnxruntime's CPU provider has no bfloat16 kernels for much of it."""
    path, truth = captured(arch, "bfloat16", False), tiny.base_reference(arch)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        got = ReferenceEvaluator(onnx.load(path)).run(None, feeds(arch, path, "bfloat16"))[0]
    assert got.dtype == FLOATS["bfloat16"]
    theirs = torch_error(arch, "bfloat16", truth)
    assert 0 < tiny.relative_error(got.astype(np.float32), truth) < 2 * theirs < 4e-2


@each("llama", "gpt2")
def test_float16_with_a_cache(arch):
    path, truth = captured(arch, "float16", True), reference(tiny.build(arch))
    theirs = tiny.relative_error(reference(tiny.build(arch).half()), truth)
    for chain in CHAINS:
        assert 0 < tiny.relative_error(CachedGraph(path).run(chain), truth) < 2 * theirs < 4e-3


@pytest.mark.parametrize("dtype", FLOATS)
@each("llama", "vit")
def test_everything_but_ids_is_in_the_dtype(arch, dtype):
    path = captured(arch, dtype, arch == "llama")
    onnx.checker.check_model(path, full_check=True)
    proto = onnx.load(path, load_external_data=False).graph
    wanted = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}[dtype]
    for value in (*proto.input, *proto.output):
        whole = value.name in ("input_ids", "attention_mask", "position_ids")
        assert value.type.tensor_type.elem_type == (onnx.TensorProto.INT64 if whole else wanted), value.name
    stored = {name: values.numpy() for name, values in tiny.build(arch).state_dict().items()}
    found = weights(path)
    shared = [name for name in found if name in stored]
    assert len(shared) > 10
    for name in shared:
        assert found[name].dtype == FLOATS[dtype], name
        assert np.array_equal(found[name], stored[name].astype(FLOATS[dtype])), name
    record = Captured.from_metadata(load_graph(path).model.metadata_props)
    assert record.dtype == dtype


# A sum that is rounded once: (architecture, feature), with a transposed layer, biases and whole matrices.
MERGES = [("llama", "plain"), ("llama", "dora"), ("gpt2", "plain"), ("bert", "modules_to_save")]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("arch", "feature"),
    [pytest.param(*case, marks=pytest.mark.xdist_group(case[0]), id="-".join(case)) for case in MERGES],
)
def test_a_merge_is_rounded_once(arch, feature, dtype, tmp_path):
    """Each element is float16 (bfloat16) of the float32 merge, bit for bit."""
    folder, adapter = tiny.checkpoint(arch), tiny.adapter(arch, feature)
    merge_onnx(captured(arch, "float32", False), adapter, tmp_path / "exact.onnx")
    report = merge_onnx(folder, adapter, tmp_path / "m.onnx", dtype=dtype, rounding="exact")
    exact, got = weights(tmp_path / "exact.onnx"), weights(tmp_path / "m.onnx")
    rounded = twice = 0
    base = weights(captured(arch, "float32", False))
    for name in exact.keys() & base.keys():
        if exact[name].dtype != np.float32 or exact[name].size < 64:
            continue
        wanted = exact[name].astype(FLOATS[dtype])
        assert np.array_equal(got[name], wanted), name
        rounded += not np.array_equal(exact[name], base[name])
        # The other way round, into weights that are rounded already, gives other bits.
        delta = exact[name] - base[name]
        again = (base[name].astype(FLOATS[dtype]).astype(np.float32) + delta).astype(FLOATS[dtype])
        twice += not np.array_equal(again, wanted)
    assert rounded >= 2
    assert twice >= 2
    assert report.total.relative > 0
    assert {row.action for row in report.plan.rows} <= {"merge", "replace"}
    truth = tiny.reference(arch, adapter)
    if dtype == "float16":
        answer = tiny.run(tmp_path / "m.onnx", feeds(arch, tmp_path / "m.onnx", dtype))
        theirs = torch_error(arch, dtype, truth, adapter)
        assert 0 < tiny.relative_error(answer, truth) < 2 * theirs < 4e-3


@each("llama")
def test_verbs_capture_a_folder_in_float16_and_keep_its_record(arch, tmp_path, capsys):
    folder, adapter = tiny.checkpoint(arch), tiny.adapter(arch)
    truth = tiny.reference(arch, adapter)
    limit = 2 * torch_error(arch, "float16", truth, adapter)
    for verb, given in (("merge-onnx", adapter), ("swap-onnx", adapter), ("bank-onnx", f"a={adapter}")):
        output = tmp_path / f"{verb}.onnx"
        arguments = [verb, "--base", str(folder), "--adapter", str(given), "-o", str(output)]
        assert _run([*arguments, "--dtype", "float16", "--quiet"], False) == 0, capsys.readouterr().err
        inputs = feeds(arch, output, "float16")
        if verb == "swap-onnx":
            inputs |= exposed.tensors(output, adapter)
        if verb == "bank-onnx":
            inputs[WEIGHTS_INPUT] = np.ones((2, 1), np.float32)
        assert tiny.relative_error(tiny.run(output, inputs), truth) < limit
        found = Captured.from_metadata(load_graph(output).model.metadata_props)
        assert found == Captured(
            kind="decoder", kv_cache=False, dtype="float16", vocab_size=tiny.VOCAB, largest={"sequence": 64}
        )
    manifest = json.loads((tmp_path / "merge-onnx.lora.json").read_text())
    assert manifest["mode"] == "merge-onnx"
    assert {entry["name"] for entry in manifest["base"]} == {"config.json", "model.safetensors"}
    assert manifest["rounding"]
    assert len(manifest["plan"]["rows"]) == 14


@each("llama")
def test_unchanged_weights_stay_in_a_checkpoint_of_the_same_dtype(arch, tmp_path):
    with tiny.quiet():
        tiny.build(arch).half().save_pretrained(tmp_path)
    before, adapter = (tmp_path / "model.safetensors").read_bytes(), tiny.adapter(arch)
    for name, mode in (("m.onnx", merge_onnx), ("s.onnx", swap_onnx)):
        given = (tmp_path, adapter, tmp_path / name) if mode is merge_onnx else (tmp_path, tmp_path / name)
        more = {} if mode is merge_onnx else {"adapter": adapter}
        report = mode(*given, dtype="float16", kv_cache=True, share_base=True, **more)
        assert report.shared_bytes > 0
        fed = exposed.tensors(tmp_path / name, adapter) if mode is swap_onnx else {}
        model = PeftModel.from_pretrained(tiny.build(arch), adapter)
        assert tiny.relative_error(CachedGraph(tmp_path / name).run((5, 1, 3), fed), reference(model)) < 2e-3
    assert (tmp_path / "model.safetensors").read_bytes() == before
    with pytest.raises(OutputError, match="whose dtype is another"):
        swap_onnx(tmp_path, tmp_path / "b.onnx", adapter=adapter, dtype="bfloat16", share_base=True)


@each("llama")
def test_a_dry_run_prints_the_plan_and_captures_nothing(arch, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lora_export.base.capture.capture.capture_checkpoint", None)
    arguments = ["--base", str(tiny.checkpoint(arch)), "--adapter", str(tiny.adapter(arch)), "--dry-run"]
    assert _run(["merge-onnx", *arguments, "--dtype", "bfloat16", "-o", str(tmp_path / "m.onnx")], False) == 0
    assert "model.layers.1.mlp.down_proj.weight" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@each("llama")
def test_bad_dtypes(arch, tmp_path, capsys):
    folder, adapter = tiny.checkpoint(arch), tiny.adapter(arch)
    for mode in (
        lambda: merge_onnx(folder, adapter, tmp_path / "m.onnx", dtype="int8"),
        lambda: swap_onnx(folder, tmp_path / "m.onnx", adapter=adapter, dtype="int8"),
        lambda: bank_onnx(folder, {"a": adapter}, tmp_path / "m.onnx", dtype="int8"),
        lambda: capture_checkpoint(folder, tmp_path / "m.onnx", dtype="int8"),
    ):
        with pytest.raises(OutputError, match=r"no .*dtype 'int8'"):
            mode()
    base, out = tiny.base_onnx(arch, "dynamo"), str(tmp_path / "m.onnx")
    for verb, given in (("merge-onnx", adapter), ("swap-onnx", adapter), ("bank-onnx", f"a={adapter}")):
        arguments = [verb, "--adapter", str(given), "-o", out]
        assert _run([*arguments, "--base", str(folder), "--dtype", "int8"], False) == 2
        assert "'int8' is not one of" in capsys.readouterr().err
        assert _run([*arguments, "--base", str(base), "--dtype", "float16"], False) == 1
        assert "is a graph already: --dtype" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@each("llama")
def test_what_float16_cannot_hold_is_refused(arch, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny.checkpoint(arch), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = 7e4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="not finite in float16") as caught:
        capture_onnx(folder, tmp_path / "m.onnx", dtype="float16")
    assert list(caught.value.problems) == ["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match="not finite"):
        merge_onnx(folder, tiny.adapter(arch), tmp_path / "m.onnx", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
