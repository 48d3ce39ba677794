"""Parity of blends, of other scalings of the same weights, and of slots."""

from __future__ import annotations

import dataclasses

import broken_exports as broken
import pytest
import tiny
from parity_cases import (
    A,
    B,
    assert_passes,
    banked,
    feeds,
    llama,
    merged,
    of,
    proven,
    rewritten,
    right,
    saved,
    swapped,
)
from session_graphs import both

from lora_export import Adapter, merge_onnx
from lora_export.errors import GraphError
from lora_export.parity.check import check_parity


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
    assert any("belongs to another merge" in note for note in report.notes)
    strict = [verdict.limit for verdict in of(report, "error")]
    assert all(one < other for one, other in zip(strict, lenient, strict=True))


def test_a_manifest_that_names_other_adapters_is_said(tmp_path):
    candidate = merged(tmp_path, A, B)
    reference = saved(tmp_path / "right.npz", {"base/y": right(), "c/y": right((both(5), 1))})
    report = check_parity(reference, candidate, {"c": both(5)}, feeds=feeds(tmp_path))
    assert not report.passed
    assert any("does not name adapter 'c'" in note for note in report.notes)
    assert sum("which was not given" in note for note in report.notes) == 2


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
