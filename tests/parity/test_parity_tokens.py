"""Greedy tokens of a parity check, ties among them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import broken_exports as broken
import numpy as np
import pytest
import tiny
from parity_cases import Array, assert_passes, llama, of, peft_logits

from lora_export.parity.check import check_parity
from lora_export.parity.feeds.made import InputPort
from lora_export.parity.result import BASE
from lora_export.parity.tokens import generate, prompts_of, token_verdicts


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


TOKENS = [InputPort("input_ids", "int64", ("batch", "sequence"))]


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
