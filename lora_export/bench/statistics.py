"""Turn single times into numbers that can be compared: medians, percentiles, a ratio with its interval.

A ratio is estimated from *paired* rounds: in each round every contender runs once, in a shuffled order, so
that a disturbance longer than a round (heat, other programs) affects all of them. In each
round the times of a contender and of the first one give one ratio; the logarithms of these ratios have a mean
and a Student interval, whose exponentials are the ratio (a geometric mean) and its bounds. Paired differences
get the same interval without logarithms. See "Statistically Rigorous Java Performance Evaluation"
(Georges, Buytaert, Eeckhout, OOPSLA 2007, section 3) for Student intervals of repeated runs, and "Rigorous
Benchmarking in Reasonable Time" (Kalibera, Jones, ISMM 2013) for reporting the ratio.

An interval is valid for the models as opened in this process. In another process memory may be placed
differently, and the ratio may differ by some percent; timing a model against itself shows how much.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_export.adapter import Array

CONFIDENCE = 0.95
METHOD = (
    "95 % Student interval of the mean log ratio over paired rounds (Georges, Buytaert, Eeckhout 2007; "
    "Kalibera, Jones 2013); the ratio is the geometric mean"
)
# With more degrees, Student's quantile equals the normal one in five digits.
_NORMAL_DEGREES = 100_000
_BISECTIONS = 80

Times = Sequence[float] | Array


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds that hold the true value with `CONFIDENCE`.

    Attributes:
        value: The estimate.
        low: Lower bound.
        high: Upper bound.
    """

    value: float
    low: float
    high: float

    @property
    def relative_width(self) -> float:
        """Distance of the bounds as a share of the estimate."""
        return (self.high - self.low) / abs(self.value) if self.value else math.inf


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Summary of the times of runs.

    Attributes:
        count: Number of timed runs.
        median_ms: Time that half of the runs did not exceed.
        p95_ms: Time that 95 % of the runs did not exceed.
        iqr_ms: Width of the middle half of the times (interquartile range).
        min_ms: Time of the fastest run.
    """

    count: int
    median_ms: float
    p95_ms: float
    iqr_ms: float
    min_ms: float


def summarise(times_s: Sequence[float]) -> Latency:
    """Return the summary of single times in seconds; at least one is needed."""
    times = np.asarray(times_s, np.float64) * 1e3
    lower, median, upper, p95 = np.percentile(times, [25, 50, 75, 95])
    return Latency(
        count=len(times),
        median_ms=float(median),
        p95_ms=float(p95),
        iqr_ms=float(upper - lower),
        min_ms=float(times.min()),
    )


def ratio_interval(times_s: Times, reference_s: Times) -> Interval | None:
    """Return the ratio of a contender's times to the reference's.

    Args:
        times_s: The contender's time in each round.
        reference_s: The reference's time in the same rounds.

    Returns:
        The ratio with its interval; None for fewer than two rounds.
    """
    logs = np.log(np.asarray(times_s, np.float64)) - np.log(np.asarray(reference_s, np.float64))
    found = mean_interval(logs)
    return found and Interval(*(math.exp(bound) for bound in (found.value, found.low, found.high)))


def mean_interval(values: Times) -> Interval | None:
    """Return the mean of independent values with its Student interval; None for fewer than two."""
    numbers = np.asarray(values, np.float64)
    if len(numbers) < 2:
        return None
    mean = float(numbers.mean())
    error = float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    reach = student_quantile(0.5 + CONFIDENCE / 2, len(numbers) - 1) * error
    return Interval(mean, mean - reach, mean + reach)


@functools.cache
def student_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t distribution for a probability from 0.5 to 1.

    Args:
        probability: At least 0.5, below 1.
        degrees: Degrees of freedom, at least 1.
    """
    degrees = min(degrees, _NORMAL_DEGREES)
    low, high = 0.0, math.pi / 2  # bounds of atan(t / √degrees), for any t
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if 0.5 + _within(middle, degrees) / 2 < probability:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(low)


def _within(angle: float, degrees: int) -> float:
    """Return the probability that abs(t) is below √degrees · tan(angle).

    For whole degrees it is a finite sum: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3
    (odd) and 26.7.4 (even).
    """
    cosine = math.cos(angle)
    term = cosine if degrees % 2 else 1.0
    total = 0.0 if degrees == 1 else term
    for k in range(3 if degrees % 2 else 2, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    if degrees % 2:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
