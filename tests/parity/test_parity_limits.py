"""What limits follow from, and that no limit lets an export without its adapter through."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_export.parity.judge.limits import (
    APPLIED_CEILING,
    APPLIED_LIMIT,
    CEILING,
    EFFECT_CEILING,
    EFFECT_LIMIT,
    FACTOR,
    ROUNDING_FACTOR,
    STEP,
    STEPS,
    WORST_CEILING,
    WORST_FACTOR,
    WORST_OVER,
    Limit,
    StatedRounding,
    applied_limit,
    effect_limit,
    limit_of,
    pooled,
    pooled_own,
)
from lora_export.parity.judge.metrics import Tally
from lora_export.parity.judge.verdicts import Judge, Tolerance, largest_limit
from lora_export.parity.result import BASE, state_of

STATE = state_of("a")
DTYPES = list(STEP)
positive = st.floats(1e-12, 1e12)
roundings = st.none() | st.builds(StatedRounding, positive, st.just("model.lora.json"))


def random(seed: int, shape: tuple[int, ...] = (4, 3, 11)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def tally_of(wanted, got, own=None, without=None, **options) -> Tally:
    tally = Tally(**options)
    tally.add(wanted, got, own, without, None)
    return tally


# --- what limits follow from ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_steps_are_those_of_the_dtypes(dtype):
    import torch

    assert STEP[dtype] == torch.finfo(getattr(torch, dtype)).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_limit_is_a_multiple_of_what_pytorch_loses(dtype):
    own = 50 * STEP[dtype]
    limit = limit_of(dtype, (own, 3 * own), 5 * own, 0.1, None)
    assert limit.relative == pytest.approx(min(FACTOR * own, CEILING))
    most = max(WORST_CEILING, WORST_OVER * 5 * own)
    assert limit.worst == pytest.approx(min(WORST_FACTOR * 5 * own, most))
    assert f"PyTorch's own in {dtype}" in limit.why
    assert f"{own:.1e}" in limit.why


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_pytorch_loses_nothing_a_step_is_allowed(dtype):
    limit = limit_of(dtype, (0.0, 0.0), 0.0, 0.1, None)
    assert limit.relative == pytest.approx(FACTOR * STEP[dtype])
    assert limit.worst == pytest.approx(WORST_FACTOR * STEP[dtype])
    assert "step" in limit.why


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_run_of_pytorch_the_dtypes_step_counts(dtype):
    limit = limit_of(dtype, None, None, 0.1, None)
    assert limit.relative == pytest.approx(STEPS * STEP[dtype])
    assert limit.worst == pytest.approx(min(WORST_FACTOR * STEPS * STEP[dtype], WORST_CEILING))
    assert "no finite PyTorch run" in limit.why


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own", [None, 0.1, 0.3, 10.0])
@pytest.mark.parametrize("ties", [0.0, 0.5, 10.0])
def test_zeros_pass_no_limit(dtype, own, ties):
    known = None if own is None else (own, own)
    limit = limit_of(dtype, known, own, 0.1, StatedRounding(5.0, "m"), (ties, ties))
    wanted = random(0)
    tally = tally_of(wanted, np.zeros_like(wanted))
    assert tally.relative(tally.actual) == pytest.approx(1)
    assert limit.relative <= CEILING
    assert Limit(**{**vars(limit), "each": {"logits": 7.0}, "norm": 1e3}).over(1.0).of("logits")[0] <= CEILING


def test_a_pytorch_run_that_overflows_tells_nothing_of_the_limit():
    wanted = random(0)
    own = wanted + 1e-3
    assert pooled_own([tally_of(wanted, wanted, own)]) is not None
    own = own.copy()
    own[0, 0, 0] = np.inf
    assert pooled_own([tally_of(wanted, wanted, own)]) is None


def test_what_rounding_cost_is_added_in_proportion_to_the_effect():
    own = (1e-4, 2e-4)
    without = limit_of("float16", own, 2e-4, 0.3, None)
    limit = limit_of("float16", own, 2e-4, 0.3, StatedRounding(0.02, "m"))
    more = ROUNDING_FACTOR * 0.02 * 0.3
    assert limit.relative - without.relative == pytest.approx(more)
    assert limit.worst - without.worst == pytest.approx(more * WORST_FACTOR / FACTOR)
    assert "rounding" in limit.why
    assert limit_of("float16", own, 2e-4, 0.0, StatedRounding(0.02, "m")) == without


@given(st.sampled_from(DTYPES), st.floats(0, 1e6), st.floats(1, 1e3), st.floats(1, 100), roundings)
def test_the_limits_grow_with_what_pytorch_loses(dtype, own, worse, times, rounding):
    small = limit_of(dtype, (own, own), own * worse, 0.5, rounding)
    large = limit_of(dtype, (own * times, own), own * worse * times, 0.5, rounding)
    assert large.relative >= small.relative > 0
    assert large.worst >= small.worst > 0


def test_layers_are_pooled_as_one_vector():
    wanted, noise = [random(i) * 10**i for i in range(3)], [random(9 + i) * 0.01 for i in range(3)]
    own = [value + error for value, error in zip(wanted, noise, strict=True)]
    tallies = [tally_of(w, w + 2 * n, o) for w, n, o in zip(wanted, noise, own, strict=True)]
    together = np.linalg.norm(np.concatenate([np.ravel(n) for n in noise]))
    all_wanted = np.linalg.norm(np.concatenate([np.ravel(w) for w in wanted]))
    found = pooled_own(tallies)
    assert found is not None
    assert found[0] == pytest.approx(together / all_wanted)
    worst = [
        np.linalg.norm(n, axis=-1).max() / math.sqrt((w**2).sum(-1).mean())
        for w, n in zip(wanted, noise, strict=True)
    ]
    assert found[1] == pytest.approx(max(worst))
    assert pooled(tallies, [tally.actual for tally in tallies])[0] == pytest.approx(2 * found[0])
    assert pooled_own([tally_of(wanted[0], wanted[0])]) is None


def test_rows_in_different_states_have_the_largest_limit_of_these():
    limits = {
        (BASE, "logits"): Limit(relative=1, worst=9, why="one", why_worst="nine"),
        (STATE, "logits"): Limit(relative=2, worst=8, why="two", why_worst="eight"),
        (state_of("b"), "logits"): Limit(relative=5, worst=50, why="five", why_worst="fifty"),
    }
    found = largest_limit(limits, [BASE, STATE], "logits")
    assert (found.relative, found.worst) == (2, 9)
    assert (found.why, found.why_worst) == ("two", "nine")


# --- the effect ----------------------------------------------------------------------------------------


@given(st.sampled_from(DTYPES), st.none() | st.floats(0, math.inf), positive, roundings)
def test_the_limit_of_the_error_to_the_effect_stays_below_one(dtype, own, effect, rounding):
    limit, why = effect_limit(dtype, own, effect, rounding)
    assert EFFECT_LIMIT <= limit <= EFFECT_CEILING < 1
    assert why


@given(st.sampled_from(DTYPES), st.none() | st.floats(0, math.inf))
def test_the_limit_of_the_share_leaves_out_none_and_twice(dtype, own):
    limit, why = applied_limit(dtype, own)
    assert APPLIED_LIMIT <= limit <= APPLIED_CEILING < 0.5
    assert why


@pytest.mark.parametrize("own", [0.0, 0.01, 0.2, 0.39])
def test_the_limit_of_the_error_to_the_effect_follows_pytorch(own):
    assert effect_limit("float16", own, 0.1, None)[0] == pytest.approx(max(EFFECT_LIMIT, 2 * own))
    with_rounding = effect_limit("float16", own, 0.1, StatedRounding(0.01, "m"))[0]
    wanted = max(EFFECT_LIMIT, 2 * own + ROUNDING_FACTOR * 0.01)
    assert with_rounding == pytest.approx(min(wanted, EFFECT_CEILING))


def test_what_is_not_known_of_pytorch_does_not_pass():
    # Nothing is at most NaN.
    assert math.isnan(effect_limit("float16", math.nan, 0.1, None)[0])
    assert math.isnan(applied_limit("float16", math.nan)[0])


# --- nothing passes without its adapter ------------------------------------------------------------------


noises = st.floats(-12, 12)  # powers of ten


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    effect=noises,
    own=st.none() | noises,
    along=st.floats(-3, 3),
    noise=st.none() | noises,
    rounding=roundings,
    tolerance=st.sampled_from([Tolerance(), Tolerance(1e9, 1e9)]),
    share=st.sampled_from([0.0, 2.0, -1.0]),
    own_base=st.booleans(),
    seed=st.integers(0, 5),
)
def test_an_export_without_its_adapter_never_passes(
    dtype, effect, own, along, noise, rounding, tolerance, share, own_base, seed
):
    """Whatever the adapter's effect, what PyTorch loses, and in which direction, and what rounding cost."""
    without, moved = random(seed), 10**effect * random(seed + 10)
    wanted, got = without + moved, without + share * moved
    if noise is not None:
        got += 10**noise * random(seed + 30)
    moved = wanted - without  # what the sums left of it
    if not moved.any():
        return
    pytorch = None
    if own is not None:
        pytorch = wanted + 10**own * random(seed + 20) + along * moved
    tally = Tally(tolerance=None if tolerance.auto else (1e9, 1e9))
    tally.add(wanted, got, pytorch, without, without if own_base else None)
    judge = Judge(dtype=dtype, tolerance=tolerance, rounding=rounding)
    failed = [verdict for verdict in judge.judge({STATE: {"logits": tally}}) if not verdict.passed]
    assert {verdict.kind for verdict in failed} >= {"effect"}


@settings(max_examples=100, deadline=None)
@given(dtype=st.sampled_from(DTYPES), effect=st.floats(-2, 1), seed=st.integers(0, 5))
def test_an_export_with_all_of_its_adapter_passes(dtype, effect, seed):
    """The rule above would be easy to keep by failing always."""
    without = random(seed)
    wanted = without + 10**effect * random(seed + 10)
    lost = STEP[dtype] / 10 * random(seed + 20)
    tally = Tally()
    tally.add(wanted, wanted + lost, wanted - lost, without, None)
    verdicts = Judge(dtype=dtype).judge({STATE: {"logits": tally}})
    assert all(verdict.passed for verdict in verdicts)
    assert {"adapter applied", "error / effect"} <= {verdict.name for verdict in verdicts if verdict.counted}


# --- verdicts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [0.9, 1.1])
def test_an_error_passes_up_to_its_limit(times):
    wanted, noise = random(0), random(1)
    noise *= 1e-4 * np.linalg.norm(wanted) / np.linalg.norm(noise)
    tally = tally_of(wanted, wanted + times * FACTOR * noise, wanted + noise)
    (found,) = [
        verdict
        for verdict in Judge(dtype="float32").judge({BASE: {"logits": tally}})
        if verdict.name == "relative error"
    ]
    assert found.value == pytest.approx(times * FACTOR * 1e-4)
    assert found.limit == pytest.approx(FACTOR * 1e-4)
    assert found.passed == (times < 1)


def test_the_worst_layer_of_a_group_is_named():
    wanted = random(0)
    layers = {
        f"present.{i}.key": tally_of(wanted, wanted + (i == 2) * 0.5, wanted + 1e-5) for i in range(4)
    } | {"logits": tally_of(wanted, wanted, wanted + 1e-5)}
    failed = [verdict for verdict in Judge(dtype="float32").judge({BASE: layers}) if not verdict.passed]
    assert failed
    assert {verdict.output for verdict in failed} == {"present.*.key (4)"}
    assert all("present.2.key" in verdict.why for verdict in failed)


def test_one_bad_position_fails_though_all_others_are_right():
    wanted = random(0, (200, 50, 11))
    got = wanted + 1e-6 * random(1, wanted.shape)
    own = wanted + 1e-6 * random(2, wanted.shape)
    assert all(v.passed for v in Judge(dtype="float32").judge({BASE: {"x": tally_of(wanted, got, own)}}))
    got[7, 3] += 1e-4
    verdicts = Judge(dtype="float32").judge({BASE: {"x": tally_of(wanted, got, own)}})
    failed = [verdict for verdict in verdicts if not verdict.passed]
    assert [verdict.name for verdict in failed] == ["worst position"]


@pytest.mark.parametrize("side", ["candidate", "reference", "reference without adapter"])
@pytest.mark.parametrize("tolerance", [Tolerance(), Tolerance(1e9, 1e9)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("error")
def test_values_that_are_no_numbers_never_pass(value, tolerance, side):
    without = random(3)
    wanted = without + 0.1
    got = wanted.copy()
    {"candidate": got, "reference": wanted, "reference without adapter": without}[side][1, 2, 3] = value
    tally = tally_of(wanted, got, wanted, without, tolerance=None if tolerance.auto else (1e9, 1e9))
    failed = [
        v
        for v in Judge(dtype="float32", tolerance=tolerance).judge({STATE: {"logits": tally}})
        if not v.passed
    ]
    (finite,) = [verdict for verdict in failed if verdict.kind == "finite"]
    assert finite.value == 1
    assert f"logits of the {side.partition(' ')[0]}" in finite.why


def tallies_of(moves: dict[str, float]):
    without = random(0)
    return {
        state_of(name): {"logits": tally_of(without + move, without + move, None, without)}
        for name, move in moves.items()
    }


def test_adapters_without_any_effect_prove_nothing_and_fail():
    verdicts = Judge(dtype="float32").judge(tallies_of({"a": 0.0, "b": 0.0}))
    failed = [verdict for verdict in verdicts if not verdict.passed]
    assert [(verdict.kind, verdict.state) for verdict in failed] == [("effect", "a"), ("effect", "b")]
    assert all("B = 0" in verdict.why and not verdict.counted for verdict in failed)


def test_beside_an_adapter_with_an_effect_one_without_is_said_only():
    verdicts = Judge(dtype="float32").judge(tallies_of({"a": 0.0, "b": 0.1}))
    assert all(verdict.passed for verdict in verdicts)
    (said,) = [verdict for verdict in verdicts if not verdict.counted]
    assert (said.kind, said.state) == ("effect", "a")
    assert "B = 0" in said.why


def test_where_the_effect_is_not_known_it_is_said_and_does_not_fail():
    wanted = random(0)
    verdicts = Judge(dtype="float32").judge({STATE: {"logits": tally_of(wanted, wanted)}})
    assert all(verdict.passed for verdict in verdicts)
    (said,) = [verdict for verdict in verdicts if verdict.kind == "effect"]
    assert not said.counted
    assert "--base" in said.why


def test_an_output_that_the_adapter_does_not_move_is_not_asked_for_an_effect():
    without = random(0)
    tallies = {
        "encoder_last_hidden_state": tally_of(without, without, None, without),
        "logits": tally_of(without + 0.1, without + 0.1, None, without),
    }
    effects = [v for v in Judge(dtype="float32").judge({STATE: tallies}) if v.kind == "effect"]
    assert {verdict.output for verdict in effects} == {"logits"}
    assert all(verdict.counted for verdict in effects)


def test_a_tolerance_replaces_the_limits_of_errors_alone():
    without = random(0)
    wanted = without + random(1)
    got = wanted + 0.5 * random(2)
    found = Judge(dtype="float32", tolerance=Tolerance(10, 10)).judge(
        {STATE: {"logits": tally_of(wanted, got, None, without, tolerance=(10, 10))}}
    )
    assert {v.name for v in found if v.kind == "error"} == {"tolerance"}
    assert {v.kind for v in found if not v.passed} == {"effect"}


@pytest.mark.parametrize("applied", [True, False])
def test_with_a_tolerance_what_base_and_adapter_lose_alike_is_no_part_of_the_effect(applied):
    """As in a quantised graph, whose base is off by a third of what the adapter changes."""
    base, delta, noise = random(0), 0.2 * random(1), 0.06 * random(2)
    got = base + noise + (delta if applied else 0)
    tally = Tally(tolerance=(1.0, 1.0))
    tally.add(base + delta, got, None, base, base + noise)
    found = {
        verdict.name: verdict
        for verdict in Judge(dtype="float32", tolerance=Tolerance(1.0, 1.0)).effects(STATE, {"y": tally})
    }
    assert found["error / effect"].passed == applied
    assert found["adapter applied"].passed == applied
    assert found["error / effect"].value == pytest.approx(0 if applied else 1)
    strict = {verdict.name: verdict for verdict in Judge(dtype="float32").effects(STATE, {"y": tally})}
    assert not strict["error / effect"].passed
