"""Time contenders in turn, round after round, until the ratios are known well enough or time is up.

In each round every contender has one block of runs; the order is shuffled in each round. A block of short
runs begins with one that isn't counted, which brings the contender's weights back into the processor's
caches: what is timed is a model that serves one request after the other, not one that shares the caches with
other contenders. Whether runs are short is decided for each contender alone: a fast one timed with a slow one
must not lose its uncounted run.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lora_export.bench.statistics import Interval, ratio_interval

Run = Callable[[], object]
Clock = Callable[[], float]
Stop = Literal["narrow", "time"]

# Duration of a block of short runs: long compared with the resolution of clock and scheduler.
_BLOCK_S = 0.02
_LARGEST_BLOCK = 32
# Longer runs use far more memory than a cache holds: an uncounted run in each block would be wasted.
_LEAD_BELOW_S = 0.05
# During warm-up allocators grow, kernels are chosen and pages are loaded.
_WARM_UP_S = 0.3
_WARM_UP_RUNS = (2, 20)
# With fewer rounds an interval may be narrow by chance, and stopping would favour such chances.
MIN_ROUNDS = 10
# Factor by which the number of rounds grows between two checks of the intervals, for the same reason.
_LOOK_AGAIN = 1.1


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """Measured times.

    Attributes:
        times_s: Times of all counted runs, for each contender.
        blocks_s: Median of each round's block, for each contender.
        runs_per_block: Number of counted runs in a block, for each contender.
        seconds: Time that the whole measurement took.
        stopped_by: ``narrow``: every interval was narrow enough; ``time``: time was up.
    """

    times_s: tuple[tuple[float, ...], ...]
    blocks_s: tuple[tuple[float, ...], ...]
    runs_per_block: tuple[int, ...]
    seconds: float
    stopped_by: Stop

    @property
    def count(self) -> int:
        """Number of rounds."""
        return len(self.blocks_s[0])

    def ratio(self, contender: int) -> Interval | None:
        """Return the ratio of a contender's times to the first one's; None with fewer than two rounds."""
        return ratio_interval(self.blocks_s[contender], self.blocks_s[0])


def measure(
    contenders: Sequence[Run],
    *,
    seconds: float,
    narrow: float,
    seed: int = 0,
    clock: Clock = time.perf_counter,
    tick: Callable[[float], None] | None = None,
) -> Rounds:
    """Time contenders against each other.

    Args:
        contenders: Functions to time; the others are compared with the first.
        seconds: Time budget, warm-up included. At least one round is run.
        narrow: Stop when each ratio's interval is narrower than this share of the ratio; for a single
            contender, the interval of its time.
        seed: Seed of the order within rounds.
        clock: Function that returns seconds.
        tick: Function called after each round with the spent share of the time budget.

    Returns:
        The measured times.
    """
    began = clock()
    with _without_collector():
        typical = [_warm_up(run, clock) for run in contenders]
        counted = tuple(map(_runs_per_block, typical))
        lead = [seconds_of_run < _LEAD_BELOW_S for seconds_of_run in typical]
        times: list[list[float]] = [[] for _ in contenders]
        blocks: list[list[float]] = [[] for _ in contenders]
        order, shuffle = list(range(len(contenders))), random.Random(seed)
        look = MIN_ROUNDS
        stopped_by: Stop | None = None
        while stopped_by is None:
            shuffle.shuffle(order)
            for number in order:
                block = _block(contenders[number], counted[number], lead[number], clock)
                times[number] += block
                blocks[number].append(float(np.median(block)))
            spent = clock() - began
            if tick:
                tick(min(spent / seconds, 1.0) if seconds else 1.0)
            if len(blocks[0]) >= look:
                look = math.ceil(look * _LOOK_AGAIN)
                stopped_by = "narrow" if _known(blocks, narrow) else None
            if stopped_by is None and spent >= seconds:
                stopped_by = "time"
    return Rounds(
        times_s=tuple(map(tuple, times)),
        blocks_s=tuple(map(tuple, blocks)),
        runs_per_block=counted,
        seconds=spent,
        stopped_by=stopped_by,
    )


def _warm_up(run: Run, clock: Clock) -> float:
    """Run for a while to warm up; return the time of the fastest of these runs in seconds."""
    fewest, most = _WARM_UP_RUNS
    began, fastest = clock(), math.inf
    for number in range(most):
        start = clock()
        run()
        end = clock()
        fastest = min(fastest, end - start)
        if number + 1 >= fewest and end - began >= _WARM_UP_S:
            break
    return fastest


def _runs_per_block(typical: float) -> int:
    return min(max(math.ceil(_BLOCK_S / typical), 1), _LARGEST_BLOCK) if typical > 0 else 1


def _block(run: Run, counted: int, lead: bool, clock: Clock) -> list[float]:
    if lead:
        run()
    times = []
    for _ in range(counted):
        start = clock()
        run()
        times.append(clock() - start)
    return times


def _known(blocks: Sequence[Sequence[float]], narrow: float) -> bool:
    if len(blocks) == 1:
        found = [ratio_interval(blocks[0], np.ones(len(blocks[0])))]  # the time itself, as its ratio to 1 s
    else:
        found = [ratio_interval(own, blocks[0]) for own in blocks[1:]]
    return all(ratio is not None and ratio.relative_width < narrow for ratio in found)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Keep Python's garbage collector out of the times, as `timeit` does."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
