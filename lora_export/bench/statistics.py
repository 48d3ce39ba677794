"""From single times to numbers that can be compared: medians, percentiles, a ratio with its interval.

A ratio is estimated from *paired* rounds: in each round every contender runs once, in a shuffled order, so
that what disturbs the machine for longer than a round (heat, other programs) disturbs all of them. In each
round the times of a contender and of the first one give one ratio; the logarithms of these ratios have a mean
and a Student interval, whose exponentials are the ratio (a geometric mean) and its bounds. Paired differences
get the same interval without logarithms. See "Statistically Rigorous Java Performance Evaluation"
(Georges, Buytaert, Eeckhout, OOPSLA 2007, section 3) for Student intervals of repeated runs, and "Rigorous
Benchmarking in Reasonable Time" (Kalibera, Jones, ISMM 2013) for the ratio as what is to be reported.

An interval speaks of the models as they are opened in this process. Another opening may place memory
otherwise and give a ratio some percent away; a model against itself shows how much.
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
# Above this, Student's distribution is the normal one to five digits of the quantile.
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
        """The bounds' distance as a share of the estimate."""
        return (self.high - self.low) / abs(self.value) if self.value else math.inf


@dataclass(frozen=True)
class Latency:
    """How long runs took.

    Attributes:
        count: How many were timed.
        median_ms: Half of them took no longer.
        p95_ms: 95 % of them took no longer.
        iqr_ms: Spread: the middle half lies within so much (interquartile range).
        min_ms: The fastest.
    """

    count: int
    median_ms: float
    p95_ms: float
    iqr_ms: float
    min_ms: float


def summarise(times_s: Sequence[float]) -> Latency:
    """Return what is said of single times, in seconds; there must be one at least."""
    times = np.asarray(times_s, np.float64) * 1e3
    lower, median, upper, p95 = np.percentile(times, [25, 50, 75, 95])
    return Latency(len(times), float(median), float(p95), float(upper - lower), float(times.min()))


def ratio_interval(times_s: Times, reference_s: Times) -> Interval | None:
    """Return how much longer a contender takes than the reference.

    Args:
        times_s: One time for each round.
        reference_s: The reference's in the same rounds.

    Returns:
        The ratio; None for fewer than two rounds, which have no interval.
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
    """Return the value that Student's t stays below with a probability of 0.5 to 1.

    Args:
        probability: At least 0.5, below 1.
        degrees: Degrees of freedom, at least 1.
    """
    degrees = min(degrees, _NORMAL_DEGREES)
    low, high = 0.0, math.pi / 2  # of atan(t / √degrees): every t has its place between them
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if 0.5 + _within(middle, degrees) / 2 < probability:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(low)


def _within(angle: float, degrees: int) -> float:
    """Return the probability that abs(t) stays below √degrees · tan(angle).

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
