"""Medians, percentiles, ratios and their intervals, against numbers that numpy finds another way."""

import math

import numpy as np
import pytest

from lora_export.bench.statistics import (
    CONFIDENCE,
    Interval,
    mean_interval,
    ratio_interval,
    student_quantile,
    summarise,
)


def student_probability(t, degrees):
    """P(T < t) by adding up Student's density, on a grid that is fine where the density is large."""
    angles = np.linspace(-math.pi / 2, math.atan(t / math.sqrt(degrees)), 200_001)
    # With t = √n·tan(a) the density is proportional to cos(a)^(n-1).
    density = np.cos(angles) ** (degrees - 1)
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)
    return float(scale * np.trapezoid(density, angles))


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 10, 30, 501])
@pytest.mark.parametrize("probability", [0.6, 0.95, 0.975, 0.995])
def test_the_quantile_has_its_probability_below_it(degrees, probability):
    found = student_probability(student_quantile(probability, degrees), degrees)
    assert found == pytest.approx(probability, abs=1e-8)


def test_far_more_degrees_are_the_normal_distribution():
    normal = math.erf(student_quantile(0.975, 10**9) / math.sqrt(2)) / 2 + 0.5
    assert normal == pytest.approx(0.975, abs=1e-5)
    assert student_quantile(0.5, 7) == pytest.approx(0.0, abs=1e-9)


def test_a_summary_of_times():
    times = np.random.default_rng(0).gamma(3.0, 0.001, 1001)
    ordered = np.sort(times) * 1e3
    found = summarise(list(times))
    # Of 1001 sorted values the percentiles are values themselves.
    assert found.median_ms == pytest.approx(ordered[500])
    assert found.p95_ms == pytest.approx(ordered[950])
    assert found.iqr_ms == pytest.approx(ordered[750] - ordered[250])
    assert found.min_ms == pytest.approx(ordered[0])
    assert found.count == 1001


def test_one_time_is_its_own_summary():
    found = summarise([0.25])
    assert (found.median_ms, found.p95_ms, found.iqr_ms) == (250.0, 250.0, 0.0)


def test_a_ratio_is_the_geometric_mean_of_the_rounds():
    reference = np.random.default_rng(1).uniform(1, 5, 50)
    factors = np.random.default_rng(2).uniform(1.8, 2.2, 50)
    found = ratio_interval(list(reference * factors), list(reference))
    assert found.value == pytest.approx(np.prod(factors) ** (1 / 50))
    logs = np.log(factors)
    reach = student_quantile(0.975, 49) * math.sqrt(((logs - logs.mean()) ** 2).sum() / 49 / 50)
    assert math.log(found.high) - math.log(found.value) == pytest.approx(reach)
    assert math.log(found.value) - math.log(found.low) == pytest.approx(reach)


def test_drift_that_hits_both_does_not_widen_a_ratio():
    drift = np.exp(np.linspace(0, 3, 20))
    found = ratio_interval(list(1.5 * drift), list(drift))
    assert found.relative_width < 1e-12
    assert found.value == pytest.approx(1.5)


def test_the_other_way_round_is_the_inverse():
    random = np.random.default_rng(3)
    one, other = random.uniform(1, 2, 12), random.uniform(1, 2, 12)
    found, inverse = ratio_interval(one, other), ratio_interval(other, one)
    assert found.value == pytest.approx(1 / inverse.value)
    assert found.low == pytest.approx(1 / inverse.high)


def test_one_round_has_no_interval():
    assert ratio_interval([1.0], [2.0]) is None
    assert mean_interval([]) is None


def test_the_relative_width():
    assert Interval(2.0, 1.9, 2.2).relative_width == pytest.approx(0.15)
    assert Interval(0.0, -1.0, 1.0).relative_width == math.inf


@pytest.mark.parametrize("rounds", [3, 10, 40])
@pytest.mark.parametrize("noise", ["normal", "skewed"])
def test_an_interval_holds_the_true_ratio_as_often_as_it_says(rounds, noise):
    """Log ratios that are normal, and those of gamma-distributed times, in 600 simulated benchmarks."""
    random, truth, held, simulations = np.random.default_rng(rounds), 1.3, 0, 600
    for _ in range(simulations):
        if noise == "normal":
            own, reference = np.exp(random.normal(0, 0.1, (2, rounds)))
        else:
            own, reference = random.gamma(4.0, 1.0, (2, rounds))
        found = ratio_interval(truth * own, reference)
        held += found.low <= truth <= found.high
    # Four standard deviations of the count on either side.
    reach = 4 * math.sqrt(CONFIDENCE * (1 - CONFIDENCE) / simulations)
    assert abs(held / simulations - CONFIDENCE) < reach
