"""Quantised candidates: limits follow from what the codes lost, and let no wrong export pass."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import onnx
import pytest
import tiny
from onnx import numpy_helper

from lora_export import bank_onnx, check_parity, load_adapter, merge_onnx, quantize_onnx, swap_onnx
from lora_export.errors import BackendError, GraphError
from lora_export.parity.judge.limits import (
    APPLIED_CEILING,
    CODES_FACTOR,
    CODES_MOST,
    EFFECT_CEILING,
    CodesLoss,
    applied_limit,
    effect_limit,
)

CALL = {"sequences": (1, 8), "samples": 2, "localise": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("quantised")


def made(path, make):
    if not path.exists():
        make(path)
    return path


def base():
    return tiny.base_onnx("llama", "dynamo")


def merged(folder, to):
    return made(folder / f"m{to}.onnx", lambda p: merge_onnx(base(), tiny.adapter("llama"), p, quantize=to))


def swap(folder, to):
    return made(
        folder / f"s{to}.onnx", lambda p: swap_onnx(base(), p, adapter=tiny.adapter("llama"), quantize=to)
    )


def failed(report):
    return {(verdict.kind, verdict.name) for verdict in report.failed}


@pytest.mark.parametrize("to", ["int4", "int8"])
def test_what_is_right_passes(folder, to):
    adapter = tiny.adapter("llama")
    for candidate in (merged(folder, to), swap(folder, to)):
        report = check_parity(tiny.checkpoint("llama"), candidate, adapter, **CALL)
        assert report.passed, report.failed
        assert any(f"is quantised to {to}" in note for note in report.notes)


def test_a_bank_passes(folder):
    slots = {"one": tiny.adapter("llama"), "other": tiny.adapter("llama", seed=1)}
    out = made(folder / "bank.onnx", lambda p: bank_onnx(base(), slots, p, quantize="int8"))
    assert check_parity(tiny.checkpoint("llama"), out, slots, **CALL).passed


@pytest.mark.parametrize("to", ["int4", "int8"])
def test_an_export_without_its_adapter_fails(folder, to):
    out = made(folder / f"bare{to}.onnx", lambda p: quantize_onnx(base(), p, to=to))
    report = check_parity(tiny.checkpoint("llama"), out, tiny.adapter("llama"), **CALL)
    assert ("effect", "adapter applied") in failed(report)


@pytest.mark.parametrize("to", ["int4", "int8"])
def test_another_adapter_fails(folder, to):
    other = tiny.adapter("llama", seed=1)
    report = check_parity(tiny.checkpoint("llama"), merged(folder, to), other, **CALL)
    assert ("effect", "adapter applied") in failed(report)


@pytest.mark.parametrize("to", ["int4", "int8"])
def test_codes_of_another_layer_fail(folder, tmp_path, to):
    """The metadata say what the codes should have lost, not what they did."""
    good = swap(folder, to)
    model = onnx.load(good)
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    names = [node.input[1] for node in model.graph.node if node.op_type == "MatMulNBits"]
    down = [name for name in names if held[name].dims == held[names[-1]].dims]
    values = [numpy_helper.to_array(held[name]).copy() for name in (down[0], down[-1])]
    for name, value in zip((down[-1], down[0]), values, strict=True):
        held[name].CopyFrom(numpy_helper.from_array(value, name))
    onnx.save(model, tmp_path / "w.onnx")
    report = check_parity(tiny.checkpoint("llama"), tmp_path / "w.onnx", tiny.adapter("llama"), **CALL)
    assert ("error", "relative error") in failed(report)


def test_a_record_can_widen_limits_only_so_far(folder, tmp_path):
    model = onnx.load(swap(folder, "int8"))
    for entry in model.metadata_props:
        if entry.key == "lora_export.quantised":
            records = json.loads(entry.value)
            for weight in records[0]["weights"]:
                weight["relative"] = 0.9
            entry.value = json.dumps(records)
    onnx.save(model, tmp_path / "w.onnx")
    report = check_parity(tiny.checkpoint("llama"), tmp_path / "w.onnx", tiny.adapter("llama"), **CALL)
    limits = [verdict.limit for verdict in report.verdicts if verdict.name == "relative error"]
    assert max(limits) < CODES_FACTOR * CODES_MOST["int8"] * 1.01
    assert any(f"at most {CODES_MOST['int8']:g}" in verdict.why for verdict in report.verdicts)


def test_codes_that_the_record_lacks_need_a_tolerance(folder, tmp_path):
    model = onnx.load(swap(folder, "int8"))
    kept = [entry for entry in model.metadata_props if entry.key != "lora_export.quantised"]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, tmp_path / "w.onnx")
    with pytest.raises(BackendError, match="no dtype tells how much that loses"):
        check_parity(tiny.checkpoint("llama"), tmp_path / "w.onnx", tiny.adapter("llama"), **CALL)
    report = check_parity(
        tiny.checkpoint("llama"), tmp_path / "w.onnx", tiny.adapter("llama"), tolerance=(0.2, 0.2), **CALL
    )
    assert report.passed


def test_a_damaged_record_is_an_error(folder, tmp_path):
    model = onnx.load(swap(folder, "int8"))
    for entry in model.metadata_props:
        if entry.key == "lora_export.quantised":
            entry.value = entry.value[:-10]
    onnx.save(model, tmp_path / "w.onnx")
    with pytest.raises(GraphError, match=r"lora_export\.quantised"):
        check_parity(tiny.checkpoint("llama"), tmp_path / "w.onnx", tiny.adapter("llama"), **CALL)


def test_the_manifest_is_still_the_merges(folder, tmp_path):
    """A merged graph that is quantised later is checked in the state that its merge says."""
    for name in ("m.onnx", "m.onnx.data", "m.lora.json"):
        assert not (tmp_path / name).exists()
    merge_onnx(base(), tiny.adapter("llama"), tmp_path / "m.onnx", weights=[0.5])
    quantize_onnx(tmp_path / "m.onnx", tmp_path / "q.onnx", to="int8")
    for leftover in tmp_path.glob("m.*"):
        leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover)
    report = check_parity(tiny.checkpoint("llama"), tmp_path / "q.onnx", tiny.adapter("llama"), **CALL)
    assert report.passed, report.failed
    assert any("weight 0.5" in note for note in report.notes)


def test_an_adapter_that_codes_may_hide_is_said(folder):
    """A weak adapter under 4 bits fails with the reason, and passes where the weights are floats."""
    weak = load_adapter(tiny.adapter("llama"))
    modules = {
        key: dataclasses.replace(module, lora_b=module.lora_b * 1e-3) for key, module in weak.modules.items()
    }
    weak = dataclasses.replace(weak, modules=modules)
    out = folder / "weak.onnx"
    merge_onnx(base(), weak, out, quantize="int4")
    report = check_parity(tiny.checkpoint("llama"), out, weak, **CALL)
    (verdict,) = [verdict for verdict in report.failed if verdict.name == "error / effect"]
    assert "can't be shown that the adapter is applied" in verdict.why
    merge_onnx(base(), weak, folder / "float.onnx")
    assert check_parity(tiny.checkpoint("llama"), folder / "float.onnx", weak, **CALL).passed


@pytest.mark.parametrize("effect", [1e-6, 1e-3, 0.5])
@pytest.mark.parametrize("relative", [0.0, 0.01, 10.0])
def test_no_limit_lets_a_missing_adapter_through(effect, relative):
    loss = CodesLoss(relative, "int4", activations=True)
    for switches in (False, True):
        share = (loss.share(effect, switches), loss.why)
        limit, _ = effect_limit("float32", 1e-6, effect=effect, rounding=None, codes=share)
        assert limit <= EFFECT_CEILING < 1
        assert applied_limit("float32", 1e-6, 1e-6, codes=share)[0] <= APPLIED_CEILING < 1
    assert np.isfinite(loss.cost)


def test_a_quantised_graph_against_its_float_graph(folder):
    """The command that `quantize-onnx` names as the next one."""
    out = made(folder / "bareint8.onnx", lambda path: quantize_onnx(base(), path, to="int8"))
    report = check_parity(base(), out, **CALL)
    assert report.passed, report.failed
    assert all(
        verdict.limit < CODES_FACTOR * 0.01 for verdict in report.verdicts if "relative" in verdict.name
    )
