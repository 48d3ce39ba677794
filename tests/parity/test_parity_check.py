"""`check_parity` from end to end: every kind of candidate, reference and feeds, and what the report says.

Small graphs are compared with numpy's answers, models of the zoo with PEFT's in float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import broken_exports as broken
import engine_files
import numpy as np
import onnx
import pytest
import tiny
from parity_cases import (
    TEXT,
    A,
    B,
    assert_passes,
    banked,
    base,
    failures,
    feeds,
    llama,
    merged,
    of,
    peft_logits,
    proven,
    rewritten,
    right,
    saved,
    swapped,
)
from session_graphs import P, Q
from small_graphs import graph, save

from lora_export import Adapter, load_adapter, save_adapter
from lora_export.errors import BackendError
from lora_export.parity.check import check_parity
from lora_export.parity.feeds.made import InputPort, make_feeds
from lora_export.parity.judge.limits import FACTOR, STEP
from lora_export.parity.result import ParityReport
from lora_export.reports.parity.baseline import compare_reports
from lora_export.reports.parity.to_json import report_json
from lora_export.storage.hashes import identity_of_graph

machine = engine_files.machine


def stored(given: Adapter, folder: Path) -> Path:
    save_adapter(given, folder)
    return folder


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
    # Both are sums of the same squares, rounded in another order.
    assert limit >= FACTOR * row.own_relative * (1 - 1e-12)
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
    port = InputPort("input_ids", "int64", ("batch", "sequence"))
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
    with pytest.raises(BackendError, match="does not state how many heads"):
        check_parity(candidate, reference, generate=3)


@llama
def test_graphs_with_other_inputs(tmp_path):
    with pytest.raises(BackendError, match="different inputs") as found:
        check_parity(broken.base("llama"), broken.base("llama", kv_cache=True))
    assert any("past_key_values.0.key" in problem for problem in found.value.problems)


def reread(report: ParityReport) -> None:
    """What is written can be a baseline."""
    assert compare_reports(ParityReport.from_json(json.loads(report_json(report))), report) == []


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
