"""`check_parity` from end to end: every kind of candidate, reference and feeds, and what the report says.

Small graphs are compared with numpy's answers, models of the zoo with PEFT's in float64.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import broken_exports as broken
import engine_files
import numpy as np
import onnx
import pytest
import tiny
import torch
from safetensors.numpy import save_file
from session_graphs import P, Q, both
from small_graphs import delta, graph, random, save

from lora_export import Adapter, bank_onnx, load_adapter, merge_onnx, save_adapter, swap_onnx
from lora_export.errors import BackendError, GraphError
from lora_export.parity.check import check_parity
from lora_export.parity.feeds.made import InputPort, make_feeds
from lora_export.parity.judge.limits import FACTOR, STEP, STEPS
from lora_export.parity.result import BASE, ParityReport, Verdict
from lora_export.parity.tokens import generate, prompts_of, token_verdicts
from lora_export.reports.parity.baseline import compare
from lora_export.reports.parity.to_json import report_json
from lora_export.storage.manifest import identity_of_graph

Array = Any
machine = engine_files.machine
A, B = both(1), both(2, rank=4)
# y = q(p(x))
TEXT = """g (float[batch,4] x) => (float[batch,3] y) {
    t = MatMul(x, p_weight)  y = MatMul(t, q_weight)
}"""
X = random(4, 4, seed=3)
llama = pytest.mark.xdist_group("parity-llama")


def base(folder: Path, name: str = "base.onnx", **changed: Array) -> Path:
    weights = {"p.weight": P.T.copy(), "q.weight": Q.T.copy()} | changed
    return save(graph(TEXT, weights), folder, name)


def right(*given: tuple[Adapter, float], x: Array = X) -> Array:
    """Return y in float64 with adapters and their weights."""
    weights = {"p": P.astype(np.float64), "q": Q.astype(np.float64)}
    for adapter, weight in given:
        for module in adapter.modules.values():
            weights[module.path] = weights[module.path] + weight * delta(module)
    return x.astype(np.float64) @ weights["p"].T @ weights["q"].T


def merged(folder: Path, *adapters: Adapter, **options: Any) -> Path:
    merge_onnx(base(folder), list(adapters), folder / "merged.onnx", **options)
    return folder / "merged.onnx"


def swapped(folder: Path, **options: Any) -> Path:
    swap_onnx(base(folder), folder / "swap.onnx", target_modules=["p", "q"], max_rank=8, **options)
    return folder / "swap.onnx"


def banked(folder: Path, slots: Mapping[str, Adapter], **options: Any) -> Path:
    bank_onnx(base(folder), slots, folder / "bank.onnx", **options)
    return folder / "bank.onnx"


def saved(path: Path, outputs: Mapping[str, Array]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **outputs)
    else:
        save_file(dict(outputs), path)
    return path


def feeds(folder: Path, x: Array = X) -> Path:
    return saved(folder / "feeds.npz", {"x": x})


def stored(given: Adapter, folder: Path) -> Path:
    save_adapter(given, folder)
    return folder


def failures(report: ParityReport) -> str:
    return "\n".join(
        f"{v.kind} {v.name} [{v.state}] {v.output}: {v.value} > {v.limit} ({v.why})" for v in report.failed
    )


def assert_passes(report: ParityReport) -> None:
    assert report.passed, failures(report)


def of(report: ParityReport, kind: str, state: str | None = None) -> list[Verdict]:
    return [v for v in report.verdicts if v.kind == kind and state in (None, v.state)]


def proven(report: ParityReport) -> set[str]:
    """Return the states whose adapters are shown to be applied."""
    return {verdict.state for verdict in of(report, "effect") if verdict.counted and verdict.passed}


# --- saved outputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("mode", ["merged", "swap", "bank"])
def test_saved_outputs_with_their_states(mode, suffix, tmp_path):
    outputs = {"base/y": right(), "a/y": right((A, 1)), "b/y": right((B, 1))}
    given = {"a": A, "b": B}
    if mode == "merged":
        candidate, given = merged(tmp_path, A), {"a": A}
        del outputs["b/y"]
    else:
        candidate = swapped(tmp_path) if mode == "swap" else banked(tmp_path, given)
    reference = saved(tmp_path / f"right{suffix}", outputs)
    report = check_parity(reference, candidate, given, feeds=feeds(tmp_path))
    assert_passes(report)
    assert proven(report) == set(given)
    assert report.reference == {"kind": "saved", "path": str(reference), "dtype": "float64"}
    assert (report.candidate["mode"], report.candidate["dtype"]) == (mode, "float32")
    assert {row.state for row in report.metrics} == set(given) | (
        {"no adapter"} if mode != "merged" else set()
    )
    assert report.notes == ()
    for name, adapter in given.items():
        (row,) = [row for row in report.metrics if row.state == name]
        effect = np.linalg.norm(right((adapter, 1)) - right()) / np.linalg.norm(right((adapter, 1)))
        assert row.effect == pytest.approx(effect)
        assert row.relative == pytest.approx(0, abs=1e-6)
    # A wrong one among them is found and no other is blamed.
    outputs[f"{list(given)[-1]}/y"] = right((both(9), 1))
    wrong = check_parity(saved(tmp_path / f"w{suffix}", outputs), candidate, given, feeds=feeds(tmp_path))
    assert {v.state for v in wrong.failed if v.kind != "law"} == {list(given)[-1]}


def test_saved_outputs_without_a_name_are_those_of_a_merged_graph(tmp_path):
    reference = saved(tmp_path / "right.npz", {"y": right((A, 1))})
    report = check_parity(reference, merged(tmp_path, A), {"a": A}, feeds=feeds(tmp_path))
    assert_passes(report)
    (effect,) = of(report, "effect")
    assert not effect.counted
    limits = {v.name: v.limit for v in of(report, "error")}
    assert limits["relative error"] == pytest.approx(STEPS * STEP["float32"])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_saved_outputs_in_bfloat16(suffix, tmp_path):
    import ml_dtypes

    reference = saved(tmp_path / f"right{suffix}", {"y": right().astype(ml_dtypes.bfloat16)})
    report = check_parity(reference, base(tmp_path), feeds=feeds(tmp_path), dtype="bfloat16")
    assert_passes(report)
    assert report.reference["dtype"] == "bfloat16"
    assert [note for note in report.notes if "held to bfloat16" in note] == list(report.notes)
    # It can't tell whether a float32 export is as good as float32.
    report = check_parity(reference, tmp_path / "base.onnx", feeds=feeds(tmp_path))
    assert not report.passed
    assert any("coarser than float32" in note for note in report.notes)


def test_saved_states_that_the_candidate_has_not_are_said(tmp_path):
    reference = saved(tmp_path / "right.npz", {"base/y": right(), "a/y": right((A, 1)), "b/y": right((B, 1))})
    report = check_parity(reference, swapped(tmp_path), {"a": A}, feeds=feeds(tmp_path))
    assert_passes(report)
    assert [note for note in report.notes if "b" in note and "not compared" in note]


def test_a_base_that_was_not_saved_is_said(tmp_path):
    reference = saved(tmp_path / "right.npz", {"a/y": right((A, 1))})
    report = check_parity(reference, swapped(tmp_path), {"a": A}, feeds=feeds(tmp_path))
    assert_passes(report)
    assert any("base is not checked" in note for note in report.notes)
    assert not of(report, "error", "no adapter")


# --- graphs as the reference -------------------------------------------------------------------------------


def copied(path: Path, folder: Path) -> Path:
    """Return a graph that computes the same, in another file."""
    return broken.edited(path, folder / f"other-{path.name}", lambda model: None)


@pytest.mark.parametrize("with_base", [True, False])
def test_a_merged_graph_against_another_one(with_base, tmp_path):
    candidate = merged(tmp_path, A)
    reference = copied(candidate, tmp_path)
    options = {"base": tmp_path / "base.onnx"} if with_base else {}
    report = check_parity(reference, candidate, {"a": A}, **options)
    assert_passes(report)
    assert report.reference["kind"] == "onnx"
    assert proven(report) == ({"a"} if with_base else set())
    not_applied = check_parity(reference, tmp_path / "base.onnx", {"a": A}, tolerance="1e9,1e9", **options)
    # Only what is known without the adapter can tell, where errors don't count.
    assert not_applied.passed == (not with_base)


def test_a_bank_against_a_swap_graph(tmp_path):
    given = {"a": A, "b": B}
    report = check_parity(swapped(tmp_path), banked(tmp_path, given), given)
    assert_passes(report)
    assert proven(report) == {"a", "b"}
    assert {"mixed batch", "permuted rows", "row alone", "A→B→A"} == {
        verdict.name.partition(":")[0] for verdict in of(report, "law")
    }


def test_an_output_of_another_name_is_compared_where_it_is_the_only_one(tmp_path):
    text = TEXT.replace("=> (float[batch,3] y)", "=> (float[batch,3] result)").replace(" y = ", " result = ")
    other = save(graph(text, {"p.weight": P.T.copy(), "q.weight": Q.T.copy()}), tmp_path, "other.onnx")
    report = check_parity(base(tmp_path), other)
    assert_passes(report)
    assert any("'result'" in note and "'y'" in note for note in report.notes)


def test_outputs_that_the_candidate_lacks_are_said(tmp_path):
    text = TEXT.replace("=> (float[batch,3] y)", "=> (float[batch,3] y, float[batch,5] t)")
    more = save(graph(text, {"p.weight": P.T.copy(), "q.weight": Q.T.copy()}), tmp_path, "more.onnx")
    report = check_parity(more, base(tmp_path))
    assert_passes(report)
    (left,) = [verdict for verdict in report.verdicts if verdict.name == "not compared"]
    assert (left.output, left.counted) == ("t", False)


def test_a_candidate_without_logits_fails(tmp_path):
    text = TEXT.replace("=> (float[batch,3] y)", "=> (float[batch,3] y, float[batch,5] logits)")
    text = text.replace("t =", "logits =").replace("(t,", "(logits,")
    more = save(graph(text, {"p.weight": P.T.copy(), "q.weight": Q.T.copy()}), tmp_path, "more.onnx")
    report = check_parity(more, base(tmp_path))
    assert {(verdict.name, verdict.output) for verdict in report.failed} == {("not compared", "logits")}


def test_graphs_are_compared_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    other = shutil.copy(base(tmp_path), tmp_path / "other.onnx")
    assert check_parity(other, tmp_path / "base.onnx").passed


def test_a_base_tells_nothing_without_an_adapter(tmp_path):
    merged_graph = merged(tmp_path, A)
    with pytest.raises(BackendError, match="no adapter was given"):
        check_parity(merged_graph, base(tmp_path), base=base(tmp_path), tolerance=(2, 2))


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_weight_that_is_no_number(weight, tmp_path):
    with pytest.raises(BackendError, match="weights are"):
        check_parity(base(tmp_path), merged(tmp_path, A), {"a": A}, weights=[weight])


# --- blends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(0.25, 0.75), (1.0, -0.5)])
@pytest.mark.parametrize("said", ["manifest", "weights"])
def test_a_blend_is_checked_with_its_weights(said, weights, tmp_path):
    candidate = merged(tmp_path, A, B, weights=list(weights))
    reference = saved(
        tmp_path / "right.npz",
        {"base/y": right(), "y": right((A, weights[0]), (B, weights[1]))},
    )
    options = {"weights": weights} if said == "weights" else {}
    if said == "weights":
        (tmp_path / "merged.lora.json").unlink()
    given = {"a": A, "b": B}
    report = check_parity(reference, candidate, given, feeds=feeds(tmp_path), **options)
    assert_passes(report)
    (state,) = proven(report)
    assert state == " + ".join(
        name if weight == 1 else f"{weight:g} {name}" for name, weight in zip("ab", weights, strict=True)
    )
    assert all("is checked with weight" in note for note in report.notes)


@llama
def test_wrong_weights_of_a_blend_fail(tmp_path):
    given = {name: broken.adapter("llama", seed=seed, name=name) for seed, name in enumerate("ab")}
    merge_onnx(broken.base("llama"), list(given.values()), tmp_path / "m.onnx", weights=[0.3, 0.7])
    check = lambda **options: check_parity(  # noqa: E731
        tiny.checkpoint("llama"), tmp_path / "m.onnx", given, localise=False, **options
    )
    assert_passes(check())
    wrong = check(weights=[0.7, 0.3])
    assert {"error", "effect"} <= {verdict.kind for verdict in wrong.failed}


def rewritten(graph_path: Path, **fields: Any) -> None:
    path = graph_path.with_suffix(".lora.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    "fields",
    [
        {"adapters": [{"name": "a"}]},
        {"adapters": [1]},
        {"adapters": [{"name": "a", "sha256": "1-2", "weight": "much", "modules": {}}]},
        {"rounding": {"total": 3}},
        {"rounding": {"total": {"relative_error": "x"}}},
        {"rounding": {"total": {"relative_error": float("inf")}}},
        {"rounding": {"total": {"relative_error": -1.0}}},
        {"format": 77},
    ],
    ids=str,
)
def test_a_damaged_manifest_neither_helps_nor_stops(fields, tmp_path):
    candidate = merged(tmp_path, A)
    rewritten(candidate, **fields)
    reference = saved(tmp_path / "right.npz", {"base/y": right(), "a/y": right((A, 1))})
    report = check_parity(reference, candidate, {"a": A}, feeds=feeds(tmp_path))
    assert_passes(report)
    assert all(verdict.limit < 1 for verdict in of(report, "error"))
    assert not check_parity(reference, tmp_path / "base.onnx", {"a": A}, feeds=feeds(tmp_path)).passed


@pytest.mark.parametrize("changed", ["manifest", "graph", "data"])
def test_a_manifest_of_another_merge_raises_no_limit(changed, tmp_path):
    """What an earlier merge lost in rounding is no excuse for this graph."""
    candidate = merged(tmp_path, A)
    reference = saved(tmp_path / "right.npz", {"base/y": right(), "a/y": right((A, 1))})
    rewritten(candidate, rounding={"total": {"relative_error": 0.2}})
    check = lambda: check_parity(reference, candidate, {"a": A}, feeds=feeds(tmp_path))  # noqa: E731
    lenient = [verdict.limit for verdict in of(check(), "error")]
    if changed == "manifest":
        rewritten(candidate, outputs={"data": "merged.onnx.data", "identity": "of another"})
    elif changed == "graph":
        broken.edited(candidate, candidate, lambda model: model.metadata_props.add(key="other", value="1"))
    else:
        data = candidate.with_name("merged.onnx.data")
        data.write_bytes(data.read_bytes() + bytes(64))
        with pytest.raises(GraphError, match="have changed since it was made"):
            check()
        return
    report = check()
    assert any("is of another merge" in note for note in report.notes)
    strict = [verdict.limit for verdict in of(report, "error")]
    assert all(one < other for one, other in zip(strict, lenient, strict=True))


def test_a_manifest_that_names_other_adapters_is_said(tmp_path):
    candidate = merged(tmp_path, A, B)
    reference = saved(tmp_path / "right.npz", {"base/y": right(), "c/y": right((both(5), 1))})
    report = check_parity(reference, candidate, {"c": both(5)}, feeds=feeds(tmp_path))
    assert not report.passed
    assert any("does not name adapter 'c'" in note for note in report.notes)
    assert sum("which was not given" in note for note in report.notes) == 2


# --- the same weights with another scaling -----------------------------------------------------------------


def rescaled(given: Adapter, factor: float) -> Adapter:
    """Return an adapter of the same file whose configuration says another alpha."""
    modules = {
        key: dataclasses.replace(module, alpha=factor * module.alpha) for key, module in given.modules.items()
    }
    return dataclasses.replace(given, modules=modules)


def test_another_alpha_with_the_same_weights_fails_and_is_said(tmp_path):
    candidate, louder = merged(tmp_path, A), rescaled(A, 1.5)
    reference = saved(tmp_path / "right.npz", {"base/y": right(), "a/y": right((louder, 1))})
    report = check_parity(reference, candidate, {"a": louder}, feeds=feeds(tmp_path))
    assert {"error", "effect"} <= {verdict.kind for verdict in report.failed}
    assert any("another scaling" in note for note in report.notes)
    (about,) = report.adapters
    assert about["scaling"] != [module.scaling for module in A.modules.values()]


def test_two_adapters_of_one_file_are_told_apart_in_a_manifest(tmp_path):
    quiet = rescaled(A, 0.5)
    candidate = merged(tmp_path, A, quiet, weights=[0.2, 0.9])
    reference = saved(tmp_path / "right.npz", {"base/y": right(), "y": right((quiet, 0.9), (A, 0.2))})
    # In the other order: by the hash alone, each would get the other's weight, or both the last one's.
    report = check_parity(reference, candidate, {"quiet": quiet, "a": A}, feeds=feeds(tmp_path))
    assert_passes(report)
    assert proven(report) == {"0.9 quiet + 0.2 a"}
    assert all("is checked with weight" in note for note in report.notes)


def test_a_banks_slot_is_found_by_the_file_where_its_name_is_another(tmp_path):
    candidate = banked(tmp_path, {"first": A, "second": B})
    outputs = {"base/y": right(), "one/y": right((A, 1)), "two/y": right((B, 1))}
    reference = saved(tmp_path / "right.npz", outputs)
    assert_passes(check_parity(reference, candidate, {"two": B, "one": A}, feeds=feeds(tmp_path)))


def test_slots_of_one_file_need_their_names(tmp_path):
    quiet = rescaled(A, 0.5)
    candidate = banked(tmp_path, {"loud": A, "quiet": quiet})
    outputs = {"base/y": right(), "loud/y": right((A, 1)), "quiet/y": right((quiet, 1))}
    reference = saved(tmp_path / "right.npz", outputs)
    report = check_parity(reference, candidate, {"quiet": quiet, "loud": A}, feeds=feeds(tmp_path))
    assert_passes(report)
    assert proven(report) == {"loud", "quiet"}
    exchanged = check_parity(reference, candidate, {"quiet": A, "loud": quiet}, feeds=feeds(tmp_path))
    assert exchanged.passed  # the reference is saved under the slots' names: the files don't come into it


def test_slots_that_were_filled_from_other_files_are_said(tmp_path):
    candidate = banked(tmp_path, {"a": A, "b": B})
    outputs = {"base/y": right(), "a/y": right((A, 1))}
    report = check_parity(
        saved(tmp_path / "r.npz", outputs), candidate, {"a": both(7)}, feeds=feeds(tmp_path)
    )
    assert any("slot 'a' was filled from another file" in note for note in report.notes)
    assert any("no adapter was given for b" in note for note in report.notes)


def test_a_swap_graph_without_adapters_says_what_is_checked(tmp_path):
    reference = saved(tmp_path / "right.npz", {"base/y": right()})
    report = check_parity(reference, swapped(tmp_path), feeds=feeds(tmp_path))
    assert_passes(report)
    assert any("no adapter was given" in note for note in report.notes)


# --- engines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["plain", "merged", "swap", "bank"])
def test_an_engine_is_run_by_its_runtime(mode, machine, tmp_path):
    given = {"a": A, "b": B}
    if mode == "plain":
        onnx_path, given = base(tmp_path), {}
    elif mode == "merged":
        onnx_path, given = merged(tmp_path, A), {"a": A}
    elif mode == "swap":
        onnx_path = swapped(tmp_path, flavour="tensorrt")
    else:
        onnx_path = banked(tmp_path, given, flavour="tensorrt")
    engine = engine_files.engine_of(onnx_path)
    outputs = {"base/y": right(), "a/y": right((A, 1)), "b/y": right((B, 1))}
    reference = saved(tmp_path / "right.npz", outputs)
    report = check_parity(reference, engine, given, feeds=feeds(tmp_path))
    assert_passes(report)
    assert report.candidate["runtime"] == "tensorrt-rtx"
    assert report.candidate["provider"] == "cuda"
    assert report.candidate["mode"] == mode
    assert report.candidate["sha256"] == engine_files.record_of(engine).sha256
    assert any(call[0] == "execute_async_v3" for call in machine.calls)
    rows = {"permuted rows", "row alone"}
    wanted = {
        "plain": rows,
        "merged": rows,
        "swap": rows | {"A→B→A"},
        "bank": rows | {"A→B→A", "mixed batch"},
    }
    assert {verdict.name.partition(":")[0] for verdict in of(report, "law")} == wanted[mode]


def test_an_engine_of_another_graph_fails(machine, tmp_path):
    engine = engine_files.engine_of(base(tmp_path, **{"p.weight": 1.01 * P.T}))
    report = check_parity(saved(tmp_path / "right.npz", {"y": right()}), engine, feeds=feeds(tmp_path))
    assert {verdict.kind for verdict in report.failed} == {"error"}


def test_an_engine_against_a_graph_on_the_cpu(machine, tmp_path):
    engine = engine_files.engine_of(swapped(tmp_path, flavour="tensorrt"))
    given = {"a": A, "b": B}
    report = check_parity(banked(tmp_path, given), engine, given)
    assert_passes(report)
    assert proven(report) == {"a", "b"}


# --- a checkpoint, by PyTorch ------------------------------------------------------------------------------


def peft_logits(arch: str, folder: Path | None, values: Mapping[str, Array]) -> Array:
    """Return what PEFT computes in float64, unmerged; of Llama not the norms and rotations."""
    from peft import PeftModel

    model: Any = tiny.build(arch)
    if folder is not None:
        with tiny.quiet():
            model = PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        inputs = {name: torch.from_numpy(array) for name, array in values.items()}
        return model.double().eval()(**inputs).logits.numpy()


@pytest.mark.xdist_group("bert")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_figures_are_those_of_peft_in_float64(dtype, tmp_path):
    given = broken.adapter("bert")
    candidate = broken.export("merged", broken.base("bert", dtype), {"a": given}, tmp_path)
    values = {name: tensor.numpy() for name, tensor in tiny.ARCHITECTURES["bert"].inputs().items()}
    file = saved(tmp_path / "feeds.npz", values)
    report = check_parity(
        tiny.checkpoint("bert"), candidate, {"a": given}, feeds=file, reference_dtype="float64"
    )
    assert_passes(report)
    (row,) = report.metrics
    got = tiny.run(candidate, values).astype(np.float64)
    wanted, without = (peft_logits("bert", folder, values) for folder in (tiny.adapter("bert"), None))
    assert row.max_abs == pytest.approx(np.abs(got - wanted).max(), rel=1e-6)
    assert row.relative == pytest.approx(np.linalg.norm(got - wanted) / np.linalg.norm(wanted), rel=1e-6)
    assert row.effect == pytest.approx(np.linalg.norm(wanted - without) / np.linalg.norm(wanted), rel=1e-9)
    assert row.top1 == (got.argmax(-1) == wanted.argmax(-1)).mean()
    assert row.own_relative is not None
    assert STEP[dtype] / 16 < row.own_relative < 16 * STEP[dtype]
    (limit,) = [v.limit for v in of(report, "error") if v.name == "relative error"]
    assert limit >= FACTOR * row.own_relative
    assert [feed["shapes"] for feed in report.feeds] == [
        {name: list(array.shape) for name, array in values.items()}
    ]


@llama
@pytest.mark.parametrize("mode", ["swap", "bank"])
def test_all_that_a_report_says_of_adapters_and_states(mode, tmp_path):
    given = {
        name: broken.adapter("llama", f, i, name=name)
        for i, (name, f) in enumerate([("a", "plain"), ("b", "patterns")])
    }
    candidate = broken.export(mode, broken.base("llama"), given, tmp_path)
    report = check_parity(tiny.checkpoint("llama"), candidate, given, samples=4, seed=3)
    assert_passes(report)
    assert proven(report) == {"a", "b"}
    assert [about["name"] for about in report.adapters] == ["a", "b"]
    for about, adapter in zip(report.adapters, given.values(), strict=True):
        scalings = [module.scaling for module in adapter.modules.values()]
        assert about["scaling"] == [min(scalings), max(scalings)]
        assert about["modules"] == len(adapter.modules)
        assert about["sha256"] == adapter.sha256
    assert len(report.feeds) == 4
    assert {entry.state for entry in report.scatter} == {"no adapter", "a", "b"}
    again = check_parity(tiny.checkpoint("llama"), candidate, given, samples=4, seed=3)
    assert again.verdicts == report.verdicts


@llama
def test_a_candidate_is_held_to_the_dtype_that_is_said(tmp_path):
    rounded = broken.edited(broken.base("llama"), tmp_path / "r.onnx", broken.rounded_to_bfloat16)
    for dtype, passes in ((None, False), ("float32", False), ("bfloat16", True)):
        report = check_parity(tiny.checkpoint("llama"), rounded, dtype=dtype, localise=False)
        assert report.passed == passes, failures(report)
        assert report.candidate["dtype"] == (dtype or "float32")


def noisy(model: Any) -> None:
    """Change every matrix by a hundredth: far more than float32 loses, about what bfloat16 does."""
    generator = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2:
            values = onnx.numpy_helper.to_array(tensor)
            values = values * (1 + 0.01 * generator.standard_normal(values.shape).astype(np.float32))
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), tensor.name))


def saying(path: Path, key: str, **entries: Any) -> Path:
    """Change what a graph says of itself."""
    model = onnx.load(path)
    for entry in model.metadata_props:
        if entry.key == key:
            entry.value = json.dumps(json.loads(entry.value) | entries)
    path.write_bytes(model.SerializeToString())
    return path


@llama
@pytest.mark.parametrize("unread", [False, True])
def test_the_metadata_of_a_candidate_do_not_widen_its_limits(unread, tmp_path):
    """A float32 graph that calls itself bfloat16, one with unused bfloat16 weights as well."""

    def changed(model: Any) -> None:
        noisy(model)
        if unread:
            values = onnx.helper.make_tensor(
                "unread", onnx.TensorProto.BFLOAT16, [1024, 1024], b"\0" * 2**21, True
            )
            model.graph.initializer.append(values)

    candidate = broken.edited(broken.base("llama"), tmp_path / "m.onnx", changed)
    saying(candidate, "lora_export.model", dtype="bfloat16")
    report = check_parity(tiny.checkpoint("llama"), candidate, localise=False)
    assert not report.passed
    assert report.candidate["dtype"] == "float32"
    assert any(
        "say that it computes in bfloat16, but its outputs are float32" in note for note in report.notes
    )
    asked = check_parity(tiny.checkpoint("llama"), candidate, localise=False, dtype="bfloat16")
    assert asked.candidate["dtype"] == "bfloat16"


@llama
def test_a_manifest_does_not_excuse_more_than_its_dtype_can_lose(tmp_path):
    given = broken.adapter("llama")
    candidate = broken.export("merged", broken.base("llama"), {"a": given}, tmp_path)
    right = check_parity(tiny.checkpoint("llama"), candidate, {"a": given}, localise=False)
    assert_passes(right)
    broken.edited(candidate, candidate, noisy)
    manifest = json.loads(candidate.with_suffix(".lora.json").read_text())
    identity = identity_of_graph(candidate, candidate.with_name(str(manifest["outputs"]["data"])))
    rewritten(
        candidate,
        rounding={"total": {"relative_error": 1e9}},
        outputs=manifest["outputs"] | {"identity": identity},
    )
    report = check_parity(tiny.checkpoint("llama"), candidate, {"a": given}, localise=False)
    assert not report.passed
    assert any("no more is believed than weights in float32 can lose" in note for note in report.notes)


@llama
def test_metadata_do_not_shorten_what_is_compared(tmp_path):
    candidate = broken.edited(broken.base("llama"), tmp_path / "m.onnx", lambda model: None)
    saying(candidate, "lora_export.dims", sequence={"max": 1})
    report = check_parity(tiny.checkpoint("llama"), candidate, localise=False)
    assert_passes(report)
    assert max(size for feed in report.feeds for size in feed["shapes"]["input_ids"]) == 16
    assert any("say at most 1 for sequence, the reference takes" in note for note in report.notes)


@llama
@pytest.mark.parametrize("size", [1, 10**8])
def test_metadata_do_not_choose_the_token_ids_where_the_reference_is_a_graph(size, tmp_path):
    candidate = broken.edited(broken.base("llama"), tmp_path / "m.onnx", lambda model: None)
    saying(candidate, "lora_export.model", vocab_size=size)
    report = check_parity(broken.base("llama"), candidate, localise=False)
    assert_passes(report)
    wanted = check_parity(broken.base("llama"), stored_copy(tmp_path), localise=False)
    assert [feed["shapes"] for feed in report.feeds] == [feed["shapes"] for feed in wanted.feeds]
    # How many of the token ids were read.
    assert report.notes == wanted.notes


def stored_copy(folder: Path) -> Path:
    return broken.edited(broken.base("llama"), folder / "copy.onnx", lambda model: None)


def test_a_vocabulary_beyond_all_models_is_refused(tmp_path):
    port = InputPort("input_ids", np.dtype(np.int64), ("batch", "sequence"))
    with pytest.raises(BackendError) as caught:
        make_feeds([port], None, vocab_size=10**8)
    assert "a vocabulary of 100000000 tokens" in "".join(caught.value.problems)


@llama
def test_progress_is_said(tmp_path):
    heard: list[tuple[str, float]] = []
    check_parity(
        tiny.checkpoint("llama"), broken.base("llama"), samples=2, progress=lambda *said: heard.append(said)
    )
    assert [share for _, share in heard] == sorted(share for _, share in heard)
    assert sum(what.startswith("feed ") for what, _ in heard) == 2


# --- greedy tokens -----------------------------------------------------------------------------------------


@llama
@pytest.mark.parametrize("cached", [True, False])
def test_greedy_tokens_are_those_of_peft(cached, tmp_path):
    given = broken.adapter("llama")
    graph_path = broken.base("llama", kv_cache=cached)
    candidate = broken.export("merged", graph_path, {"a": given}, tmp_path)
    report = check_parity(tiny.checkpoint("llama"), candidate, {"a": given}, generate=5, samples=2)
    assert_passes(report)
    assert len(report.generated) == 2
    for found in report.generated:
        assert found.equal == 5
        tokens = list(found.prompt)
        for token in found.reference:
            ids = np.array([tokens])
            values = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            assert token == peft_logits("llama", tiny.adapter("llama"), values)[0, -1].argmax()
            tokens.append(token)
    (verdict,) = of(report, "tokens")
    assert (verdict.value, verdict.counted) == (0, True)


@llama
def test_other_greedy_tokens_fail(tmp_path):
    given = broken.adapter("llama")
    candidate = broken.export("merged", broken.base("llama"), {"a": broken.not_applied(given)}, tmp_path)
    report = check_parity(
        tiny.checkpoint("llama"), candidate, {"a": given}, generate=12, localise=False, samples=2
    )
    (verdict,) = of(report, "tokens")
    assert not verdict.passed
    different = [found for found in report.generated if found.reference != found.candidate]
    assert verdict.value == len(different) > 0
    for found in different:
        assert found.reference[: found.equal] == found.candidate[: found.equal]
        assert found.reference[found.equal] != found.candidate[found.equal]


TOKENS = [InputPort("input_ids", np.dtype(np.int64), ("batch", "sequence"))]
CLOSE = 1e-4


def walker(nudge: float = 0.0, at: int = 3, other: float = CLOSE):
    """Return a model that counts; behind token ``at`` the next two are apart by ``other`` alone."""

    def run(values: Mapping[str, Array]) -> dict[str, Array]:
        ids = values["input_ids"]
        logits = np.zeros((*ids.shape, 10), np.float32)
        last = int(ids[0, -1])
        logits[0, -1, (last + 1) % 10] = 1
        if last == at:
            logits[0, -1, (last + 2) % 10] = 1 - other + nudge
        return {"logits": logits}

    return run


@pytest.mark.parametrize(("apart", "tie"), [(CLOSE, True), (0.1, False)])
def test_a_difference_between_tokens_that_are_as_good_is_a_tie(apart, tie):
    found = generate(walker(other=apart), walker(2 * apart, other=apart), TOKENS, [1, 2], 6, BASE, 10 * CLOSE)
    assert (found.reference, found.candidate) == ((3, 4), (3, 5))
    assert (found.equal, found.tie) == (1, tie)
    (verdict,) = token_verdicts([found], 6, {"no adapter": 10 * CLOSE})
    assert verdict.passed == tie
    assert verdict.value == (0 if tie else 1)
    assert ("tie" in verdict.why) == tie


def test_a_tie_at_the_first_token_proves_nothing():
    found = generate(walker(), walker(2 * CLOSE), TOKENS, [3], 6, BASE, 10 * CLOSE)
    (verdict,) = token_verdicts([found], 6, {"no adapter": 10 * CLOSE})
    assert (found.equal, verdict.passed, verdict.counted) == (0, True, False)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_tokens_of_logits_that_are_no_numbers_never_pass(value, side):
    def run(values: Mapping[str, Array]) -> dict[str, Array]:
        logits = walker()(values)["logits"]
        logits[0, -1, 4] = value
        return {"logits": logits}

    sides = (run, walker()) if side == 0 else (walker(), run)
    # Behind 3 comes 4: both choose the same one, though on one side it is no number.
    found = generate(*sides, TOKENS, [3], 6, BASE, math.inf)
    assert not found.tie
    (verdict,) = token_verdicts([found], 6, {"no adapter": math.inf})
    assert not verdict.passed


def test_prompts_leave_padding_out():
    from lora_export.parity.feeds.made import Feed

    ids = np.arange(12).reshape(1, 12)
    mask = np.ones_like(ids)
    mask[0, :2] = 0
    assert prompts_of([Feed("one", {"input_ids": ids, "attention_mask": mask})], 2) == [tuple(range(2, 10))]


# --- files -------------------------------------------------------------------------------------------------


def test_adapters_are_read_from_their_files_and_called_as_these(tmp_path):
    paths = [stored(given, tmp_path / name) for name, given in (("one", A), ("two", B))]
    loaded = [load_adapter(path) for path in paths]
    outputs = {"base/y": right(), "one/y": right((A, 1)), "two/y": right((B, 1))}
    reference = saved(tmp_path / "right.npz", outputs)
    report = check_parity(reference, swapped(tmp_path), paths, feeds=feeds(tmp_path))
    assert_passes(report)
    assert [about["name"] for about in report.adapters] == [given.name for given in loaded] == ["one", "two"]


def test_nothing_is_written_beside_the_models(tmp_path):
    given, candidate = {"a": A}, merged(tmp_path, A)
    reference = saved(tmp_path / "right.npz", {"base/y": right(), "a/y": right((A, 1))})
    file = feeds(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    check_parity(reference, candidate, given, feeds=file)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_weights_beside_a_candidate_belong_to_its_identity(tmp_path):
    found = []
    for factor in (1, 2):
        folder = tmp_path / str(factor)
        model, apart = onnx.load(base(folder, **{"p.weight": factor * P.T})), folder / "apart.onnx"
        onnx.save(model, apart, save_as_external_data=True, location="w.bin", size_threshold=0)
        reference = saved(folder / "right.npz", {"y": factor * right()})
        report = check_parity(reference, apart, feeds=feeds(folder))
        assert_passes(report)
        found.append((apart.read_bytes(), report.candidate["sha256"]))
    # The graphs are the same bytes, their weights are not.
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


@llama
def test_tokens_of_a_reference_whose_logits_have_another_name(tmp_path):
    def renamed(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            node.output[:] = ["scores" if name == "logits" else name for name in node.output]
        model.graph.output[0].name = "scores"

    candidate = broken.base("llama")
    reference = broken.edited(candidate, tmp_path / "scores.onnx", renamed)
    report = check_parity(reference, candidate, generate=3)
    assert [entry.equal for entry in report.generated] == [3, 3]


@llama
def test_a_cache_without_sizes_can_not_begin_empty(tmp_path):
    def unnamed(model: onnx.ModelProto) -> None:
        for port in model.graph.input:
            if port.name.startswith("past_key_values."):
                port.type.tensor_type.shape.dim[1].dim_param = "heads"

    candidate = broken.base("llama", kv_cache=True)
    reference = broken.edited(candidate, tmp_path / "heads.onnx", unnamed)
    with pytest.raises(BackendError, match="does not say how many heads"):
        check_parity(candidate, reference, generate=3)


@llama
def test_graphs_with_other_inputs(tmp_path):
    with pytest.raises(BackendError, match="different inputs") as found:
        check_parity(broken.base("llama"), broken.base("llama", kv_cache=True))
    assert any("past_key_values.0.key" in problem for problem in found.value.problems)


def reread(report: ParityReport) -> None:
    """What is written can be a baseline."""
    assert compare(ParityReport.from_json(json.loads(report_json(report))), report) == []


def test_reports_of_runs_in_which_something_was_not_compared_can_be_read_again(tmp_path):
    text = TEXT.replace("=> (float[batch,3] y)", "=> (float[batch,3] y, float[batch,5] t)")
    more = save(graph(text, {"p.weight": P.T.copy(), "q.weight": Q.T.copy()}), tmp_path, "more.onnx")
    report = check_parity(more, base(tmp_path))
    assert_passes(report)
    reread(report)


def test_a_failed_check_against_a_graph_can_be_read_again(tmp_path):
    wrong = base(tmp_path, "wrong.onnx", **{"p.weight": 1.5 * P.T})
    report = check_parity(base(tmp_path), wrong)
    assert not report.passed
    assert report.localisation is not None
    assert json.loads(report_json(report))["localisation"]["state"] == "no adapter"
    assert ParityReport.from_json(report.as_dict()).as_dict() == report.as_dict()
