"""Distances between two runs against plain formulas of numpy and PyTorch over all that was fed."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from lora_export.parity.judge.metrics import Tally, group_of, is_logits, valid_positions

Array = Any
LOGITS = (3, 5, 17)
CACHE = (2, 3, 6, 4)


def random(shape: tuple[int, ...], seed: int = 0, scale: float = 1) -> Array:
    return scale * np.random.default_rng(seed).standard_normal(shape)


def runs(shape: tuple[int, ...], seed: int = 0) -> tuple[Array, Array, Array]:
    """Return what the reference says, what a candidate says, and what the reference says without adapter."""
    wanted = random(shape, seed, 3)
    return wanted, wanted + random(shape, seed + 100, 0.01), wanted - random(shape, seed + 200, 0.5)


def tally_of(*feeds: tuple[Any, ...], **options: Any) -> Tally:
    """Add (wanted, got, own, without, actual_without, masks), as many of them as are given."""
    tally = Tally(**options)
    for feed in feeds:
        tally.add(*feed, *[None] * (5 - len(feed)))
    return tally


def rows(values: Array) -> Array:
    return values.reshape(-1, values.shape[-1])


def norm(values: Array) -> float:
    return float(np.linalg.norm(np.asarray(values, np.float64).reshape(-1)))


# --- distances -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [LOGITS, CACHE, (4, 7), (6,), ()], ids=str)
def test_distances_are_those_of_all_feeds_together(shape):
    feeds = [runs(shape, seed) for seed in range(3)]
    tally = tally_of(*[(wanted, got, None, without) for wanted, got, without in feeds])
    # Every feed as rows of one matrix: the vectors along the last axis.
    wanted, got, without = (
        np.concatenate([np.atleast_1d(feed[i]).reshape(-1, (shape or (1,))[-1]) for feed in feeds])
        for i in range(3)
    )
    difference = got - wanted
    found = tally.metrics("a", "values")
    assert found.max_abs == pytest.approx(np.abs(difference).max())
    assert found.mean_abs == pytest.approx(np.abs(difference).mean())
    assert found.relative == pytest.approx(norm(difference) / norm(wanted))
    by_row = np.sqrt((difference**2).sum(-1))
    typical = math.sqrt((wanted**2).sum(-1).mean())
    assert found.worst_position == pytest.approx(by_row.max() / typical)
    assert found.cosine == pytest.approx((wanted * got).sum() / norm(wanted) / norm(got))
    assert found.effect == pytest.approx(norm(wanted - without) / norm(wanted))
    assert found.error_over_effect == pytest.approx(norm(difference) / norm(wanted - without))
    assert (found.kl, found.top1, found.top5, found.own_relative) == (None,) * 4


def test_feeds_of_other_shapes_add_up():
    small, large = runs((1, 2, 17)), runs((4, 9, 17), 1)
    tally = tally_of(small[:2], large[:2])
    difference = [norm(got - wanted) for wanted, got, _ in (small, large)]
    wanted = [norm(feed[0]) for feed in (small, large)]
    assert tally.relative(tally.actual) == pytest.approx(math.hypot(*difference) / math.hypot(*wanted))
    assert tally.positions == 1 * 2 + 4 * 9


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_values_of_any_dtype_are_compared_in_float64(dtype):
    wanted, got, _ = runs(LOGITS)
    stored = got.astype(dtype)
    tally = tally_of((wanted, stored), logits=True)
    exact = stored.astype(np.float64)
    assert tally.relative(tally.actual) == pytest.approx(norm(exact - wanted) / norm(wanted), rel=1e-12)
    assert tally.actual.max_abs == np.abs(exact - wanted).max()


def test_what_pytorch_loses_is_measured_in_the_same_way():
    wanted, got, without = runs(LOGITS)
    own = wanted + random(LOGITS, 9, 0.1)
    tally = tally_of((wanted, got, own, without))
    assert tally.own is not None
    assert tally.relative(tally.own) == pytest.approx(norm(own - wanted) / norm(wanted))
    assert tally.metrics("a", "logits").own_relative == pytest.approx(norm(own - wanted) / norm(wanted))
    swapped = tally_of((wanted, own, got, without))
    assert swapped.actual == tally.own
    assert swapped.own == tally.actual


def test_against_zeros_the_relative_error_is_the_difference():
    got = random(LOGITS)
    tally = tally_of((np.zeros(LOGITS), got))
    assert tally.relative(tally.actual) == pytest.approx(norm(got))
    assert tally.worst(tally.actual) == pytest.approx(max(norm(row) for row in rows(got)))
    same = tally_of((np.zeros(LOGITS), np.zeros(LOGITS)))
    assert same.relative(same.actual) == 0
    assert same.metrics("a", "x").cosine == 1


def test_equal_runs_are_at_no_distance():
    wanted = random(LOGITS)
    found = tally_of((wanted, wanted.copy()), logits=True).metrics("no adapter", "logits")
    assert (found.max_abs, found.mean_abs, found.relative, found.worst_position, found.kl) == (0,) * 5
    assert (found.top1, found.top5) == (1, 1)
    assert found.cosine == pytest.approx(1)


# --- padding -------------------------------------------------------------------------------------------


def test_padded_positions_of_logits_do_not_count():
    wanted, got, without = runs(LOGITS)
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    got[mask == 0] += 1e6
    found = tally_of((wanted, got, None, without, None, [mask]), logits=True)
    kept = mask == 1
    assert found.positions == kept.sum()
    assert found.relative(found.actual) == pytest.approx(norm(got[kept] - wanted[kept]) / norm(wanted[kept]))
    assert found.effect == pytest.approx(norm(wanted[kept] - without[kept]) / norm(wanted[kept]))
    assert found.metrics("a", "logits").top1 <= 1


def test_padded_positions_of_a_cache_do_not_count():
    wanted, got, _ = runs(CACHE)
    total = np.ones((CACHE[0], CACHE[2]), np.int64)
    total[0, :2] = total[1, -1] = 0
    padded = np.broadcast_to((total == 0)[:, None, :, None], CACHE)
    got[padded] += 1e6
    # The mask of the current tokens is shorter, and does not fit.
    tally = tally_of((wanted, got, None, None, None, [total[:, 4:], total]))
    kept = ~padded
    assert tally.values == kept.sum()
    assert tally.relative(tally.actual) == pytest.approx(norm(got[kept] - wanted[kept]) / norm(wanted[kept]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_padded_may_be_no_number(value):
    wanted, got, _ = runs(LOGITS)
    mask = np.ones(LOGITS[:2], bool)
    mask[1, 2] = False
    got[1, 2], wanted[1, 2] = value, value
    tally = tally_of((wanted, got, None, None, None, [mask]))
    assert (tally.infinite, tally.actual.infinite) == (0, 0)
    assert math.isfinite(tally.relative(tally.actual))


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 17), (2, 5, 17), (3, 4, 6, 7)], ids=str)
def test_a_mask_of_another_length_or_batch_leaves_nothing_out(shape):
    assert valid_positions(shape, [np.zeros((3, 5), bool)]) is None


# --- the effect ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 0.5, 1, 2, -1])
def test_the_applied_share_is_what_was_put_in(share):
    wanted, _, without = runs(LOGITS)
    effect = wanted - without
    aside = random(LOGITS, 5)
    aside -= (aside * effect).sum() / (effect**2).sum() * effect  # what is no part of the effect
    tally = tally_of((wanted, without + share * effect + 0.3 * aside, None, without))
    assert tally.applied(tally.actual) == pytest.approx(share, abs=1e-12)
    length = math.hypot((share - 1) * norm(effect), 0.3 * norm(aside))
    assert tally.error_over_effect(tally.actual) == pytest.approx(length / norm(effect))


def test_the_share_is_measured_from_the_candidates_own_base_where_it_has_one():
    wanted, _, without = runs(LOGITS)
    offset = 0.4 * (wanted - without)  # of both its runs: a wrong base
    actual_without, got = without + offset, wanted + offset
    tally = tally_of((wanted, got, got, without, actual_without))
    assert tally.applied(tally.actual) == pytest.approx(1)
    assert tally.own is not None
    assert tally.applied(tally.own) == pytest.approx(1.4)


def test_without_an_effect_there_is_no_share():
    wanted, got, _ = runs(LOGITS)
    tally = tally_of((wanted, got, None, wanted.copy()))
    assert tally.moved
    assert tally.effect == 0
    assert math.isnan(tally.applied(tally.actual))
    assert tally.error_over_effect(tally.actual) == math.inf
    assert tally.metrics("a", "logits").error_over_effect is None


# --- distributions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [17, 5, 3, 1])
@pytest.mark.parametrize("scale", [0.01, 1, 300])
def test_distributions_are_compared_as_pytorch_does(classes, scale):
    shape = (*LOGITS[:2], classes)
    wanted, noise = random(shape, 0, scale), random(shape, 1, scale)
    got = wanted + 0.3 * noise
    found = tally_of((wanted, got), logits=True).metrics("a", "logits")
    exact, other = (torch.from_numpy(rows(values)) for values in (wanted, got))
    kl = torch.nn.functional.kl_div(
        other.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert found.kl == pytest.approx(float(kl), rel=1e-9, abs=1e-12)
    assert found.top1 == pytest.approx(float((exact.argmax(-1) == other.argmax(-1)).double().mean()))
    count = min(5, classes)
    tops = [values.topk(count).indices for values in (exact, other)]
    shares = [len(set(a.tolist()) & set(b.tolist())) / count for a, b in zip(*tops, strict=True)]
    assert found.top5 == pytest.approx(np.mean(shares))


# --- NaN and infinite values ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["wanted", "got", "without"])
def test_values_that_are_no_numbers_are_counted_and_leave_no_figure(side, value):
    good, (wanted, got, without) = runs(LOGITS, 1), runs(LOGITS)
    {"wanted": wanted, "got": got, "without": without}[side][2, 3, 4:6] = value
    tally = tally_of(
        (good[0], good[1], good[1], good[2]), (wanted, got, got, without), logits=True, tolerance=(0.1, 0.1)
    )
    assert (tally.infinite, tally.actual.infinite) == ((0, 2) if side == "got" else (2, 0))
    found = tally.metrics("a", "logits")
    figures = (found.max_abs, found.mean_abs, found.relative, found.cosine, found.kl, found.top1, found.top5)
    assert all(math.isnan(figure) for figure in figures)


@pytest.mark.filterwarnings("error")
def test_both_sides_are_counted_where_both_are_no_numbers():
    wanted, got, _ = runs(LOGITS)
    wanted[0, 0, 0] = got[0, 0, 0] = got[1, 1, 1] = np.nan
    tally = tally_of((wanted, got))
    assert (tally.infinite, tally.actual.infinite) == (1, 2)


@pytest.mark.filterwarnings("error")
def test_a_base_of_the_candidate_that_is_no_number_does_not_hide_the_share():
    wanted, _, without = runs(LOGITS)
    tally = tally_of((wanted, wanted, None, without, np.full(LOGITS, np.nan)))
    assert tally.applied(tally.actual) == pytest.approx(1)


# --- a tolerance of the user's ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tolerance", [(1e-2, 1e-3), (0.0, 1e-2), (1e-2, 0.0)])
@pytest.mark.parametrize("error", [1e-4, 1e-2, 1])
def test_a_tolerance_is_that_of_numpy(error, tolerance):
    wanted = random(LOGITS)
    wanted[0, 0, 0] = 0
    for got in (wanted + error * random(LOGITS, 1), wanted.copy()):
        tally = tally_of((wanted, got), tolerance=tolerance)
        rtol, atol = tolerance
        assert (tally.actual.beyond <= 1) == np.allclose(got, wanted, rtol=rtol, atol=atol)


# --- names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "group", "logits"),
    [
        ("logits", "logits", True),
        ("start_logits", "start_logits", True),
        ("present.0.key", "present.*.key", False),
        ("present.11.decoder.value", "present.*.decoder.value", False),
        ("hidden_states.3", "hidden_states.*", False),
        ("output_0", "output_0", False),
        ("model.logits", "model.logits", True),
        ("logits_mask", "logits_mask", False),
    ],
)
def test_outputs_are_known_by_their_names(output, group, logits):
    assert group_of(output) == group
    assert is_logits(output) == logits
