"""Choices of experts that rounding may turn: which ones are found, and that exactly those are turned."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_export.parity.judge.limits import FACTOR, limit_of
from lora_export.parity.judge.metrics import Distance, Tally
from lora_export.runtimes.torch.ties import TopkCall, near_ties, record_choices, turn_ties

SCORES = torch.tensor(
    [
        [0.9, 0.1, 0.5, 0.4999],  # the second and the third are near
        [0.9, 0.1, 0.5, 0.3],
        [0.5, 0.4999, 0.9, 0.1],  # here too
        [0.9, 0.8999, 0.1, 0.0],  # the two that are taken are near: no tie
    ],
    dtype=torch.float64,
)


def taken(scores, count=2):
    return [set(row) for row in torch.topk(scores, count, dim=-1).indices.tolist()]


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.topk(SCORES, 2),
        lambda: torch.topk(SCORES, 2, dim=-1, sorted=False),
        lambda: torch.topk(input=SCORES, k=2, dim=1),
        lambda: SCORES.topk(2),
        lambda: SCORES.topk(k=2, dim=-1),
    ],
)
def test_every_way_to_call_topk_is_recorded(call):
    with record_choices() as found:
        answer = call()
    (choice,) = found
    assert torch.equal(choice.scores, SCORES)
    assert choice.count == 2
    assert torch.equal(answer.indices, call().indices)


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.topk(SCORES, 2, dim=0),
        lambda: torch.topk(SCORES, 2, largest=False),
        lambda: torch.topk(SCORES, 4),
        lambda: SCORES.sort(-1),
    ],
)
def test_what_leaves_nothing_or_takes_otherwise_is_no_choice(call):
    with record_choices() as found:
        call()
    assert found == []


def test_a_tie_is_nearer_than_what_the_dtype_loses_of_gaps():
    rng = np.random.default_rng(0)
    rounded = SCORES + torch.from_numpy(rng.normal(0, 1e-4, SCORES.shape))
    ties = near_ties([TopkCall(SCORES, 2)], [TopkCall(rounded, 2)], FACTOR)

    exact, found = SCORES.numpy(), rounded.numpy()
    order = np.argsort(-exact, axis=-1)
    rows = np.arange(len(exact))
    gaps = [values[rows, order[:, 1]] - values[rows, order[:, 2]] for values in (exact, found)]
    lost = 1.4826 * np.sort(np.abs(gaps[1] - gaps[0]))[1]  # of four, torch's median is the second
    assert ties.gaps == pytest.approx((FACTOR * lost,))
    assert ties.near == (gaps[0] < FACTOR * lost).sum() == 2
    assert ties.of == 4


def test_a_token_that_went_elsewhere_before_makes_no_others_a_tie():
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.standard_normal((80, 60)))
    rounded = scores + torch.from_numpy(rng.normal(0, 1e-4, scores.shape))
    before = near_ties([TopkCall(scores, 4)], [TopkCall(rounded, 4)], FACTOR)
    rounded[3] = torch.from_numpy(rng.standard_normal(60))
    rounded[7, 0] = -torch.inf
    scores[7, 0] = -torch.inf
    after = near_ties([TopkCall(scores, 4)], [TopkCall(rounded, 4)], FACTOR)
    assert abs(after.near - before.near) <= 1
    assert after.gaps == pytest.approx(before.gaps, rel=0.2)


def test_without_a_loss_nothing_is_a_tie():
    assert near_ties([TopkCall(SCORES, 2)], [TopkCall(SCORES, 2)], FACTOR).near == 0


def test_runs_that_chose_among_different_things_can_not_be_compared():
    ties = near_ties([TopkCall(SCORES, 2)], [TopkCall(SCORES[:2], 2)], FACTOR)
    assert (ties.near, ties.of) == (0, 0)


def test_only_ties_are_turned():
    rounded = SCORES + torch.tensor([0, 0, 1e-3, 0], dtype=torch.float64)  # of the third or of its rival
    ties = near_ties([TopkCall(SCORES, 2)], [TopkCall(rounded, 2)], FACTOR)
    with turn_ties(ties):
        turned = taken(SCORES)
    assert taken(SCORES) == [{0, 2}, {0, 2}, {0, 2}, {0, 1}]
    assert turned == [{0, 3}, {0, 2}, {1, 2}, {0, 1}]


def test_each_call_has_its_own_gap():
    apart = SCORES * 1000
    choices = [TopkCall(apart, 2), TopkCall(SCORES, 2)]
    noise = torch.tensor([0, 0, 1e-3, 0], dtype=torch.float64)
    ties = near_ties(choices, [TopkCall(apart + noise, 2), TopkCall(SCORES + noise, 2)], FACTOR)
    with turn_ties(ties):
        first, second = taken(apart), taken(SCORES)
    assert first == taken(apart)
    assert second != taken(SCORES)


def test_what_ties_cost_is_added_and_is_a_larger_share_of_fewer_positions():
    tally = Tally(own=Distance(squared=1e-6), expected_squared=4.0, positions=4)
    plain = limit_of("float16", (5e-4, 5e-4), 5e-4, 0.5, None)
    wider = limit_of("float16", (5e-4, 5e-4), 5e-4, 0.5, None, (0.01, 0.1))
    assert wider.relative > plain.relative + 0.01
    assert wider.worst > plain.worst + 0.1
    assert "ties of routers" in wider.why
    wider = wider.__class__(**{**vars(wider), "norm": tally.expected_norm})
    assert wider.over(tally.expected_norm).relative == wider.relative
    assert wider.over(tally.expected_norm / 2).relative == pytest.approx(wider.relative + wider.ties)
    assert plain.over(1e-3).relative == plain.relative


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_scores_are_turned_too(dtype):
    scores = torch.tensor([[3.0, 0.9, 0.9, 0.1], [3.0, 0.9, 0.5, 0.1]], dtype=dtype)
    exact, noise = scores.double(), torch.tensor([[0, 1e-4, -1e-4, 0]], dtype=torch.float64)
    ties = near_ties([TopkCall(exact, 2)], [TopkCall(exact + noise, 2)], FACTOR)
    assert ties.near == 1
    with turn_ties(ties):
        turned = taken(scores)
    assert turned[0] != taken(scores)[0]
    assert turned[0] <= {0, 1, 2}
    assert turned[1] == taken(scores)[1]
