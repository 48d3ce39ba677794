"""Measure what adapters cost while a model serves: loading one, and switching between several."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from lora_export.bench.contenders import AdapterChoice, Contender
from lora_export.bench.opened import Opened
from lora_export.bench.rounds import Clock, Run
from lora_export.bench.statistics import Interval, mean_interval
from lora_export.bench.workloads import Workload

_LOADINGS = 5
_LOADINGS_S = 5.0
# Duration of a block of cycles: a median of several cycles is safe from single disturbances.
_BLOCK_S = 0.05
_LARGEST_BLOCK = 32
_MIN_BLOCKS = 5


@dataclass(frozen=True)
class AdapterLoading:
    """Time until an adapter is ready to run.

    Attributes:
        model: The model's label.
        adapter: The adapter's name.
        median_ms: Median time from the file (already in the system's file cache) to the device.
        loadings: Number of times that it was loaded.
    """

    model: str
    adapter: str
    median_ms: float
    loadings: int


@dataclass(frozen=True, kw_only=True)
class Swapping:
    """Cost of running with another adapter than the run before, when both are on the device.

    Attributes:
        model: The model's label.
        workload: The workload of the runs.
        adapters: Number of adapters that took turns.
        same_ms: Median of runs with the adapter of the run before.
        other_ms: Median of runs with another adapter.
        added_ms: Difference of the two, with its interval over blocks of cycles.
        cycles: Number of cycles; in each, every adapter ran twice in a row.
    """

    model: str
    workload: Workload
    adapters: int
    same_ms: float
    other_ms: float
    added_ms: Interval
    cycles: int


def load_adapters(
    contender: Contender,
    session: Opened,
    adapters: Sequence[AdapterChoice],
    clock: Clock = time.perf_counter,
) -> list[AdapterLoading]:
    """Load each adapter that has a file into a session several times, and return the times.

    Raises:
        LoraExportError: As for `AdapterSession.load_adapter`.
    """
    found = []
    for adapter in adapters:
        if adapter.path is None:
            continue
        times: list[float] = []
        while len(times) < _LOADINGS and sum(times) < _LOADINGS_S:
            start = clock()
            # A slot of the bank may already hold an adapter of this name.
            session.load(adapter.name, adapter.path, replace=bool(times) or contender.model.mode == "bank")
            times.append(clock() - start)
        median_ms = statistics.median(times) * 1e3
        found.append(AdapterLoading(contender.model.label, adapter.name, median_ms, len(times)))
    return found


def measure_swapping(
    model: str,
    workload: Workload,
    runs: Sequence[Run],
    seconds: float,
    clock: Clock = time.perf_counter,
) -> Swapping:
    """Run each adapter twice in a row, in cycles over all of them, and compare first and second runs.

    The second run of a pair has the adapter of the run before, the first one has another. In each cycle both
    kinds contain every adapter once, so that the cost of the adapters themselves cancels in their difference,
    which is taken between the medians of a block of cycles.

    Args:
        model: The model's label.
        workload: The workload of the runs.
        runs: A function for each adapter that runs the workload with it.
        seconds: Time budget; a few blocks are run in any case.
        clock: Function that returns seconds.

    Returns:
        The cost of switching adapters.
    """
    for run in runs:
        run()
    started = clock()
    for run in runs:
        run()
        run()
    cycle_s = clock() - started
    per_block = min(max(math.ceil(_BLOCK_S / cycle_s), 1), _LARGEST_BLOCK) if cycle_s > 0 else 1
    began = clock()
    same: list[list[float]] = []
    other: list[list[float]] = []
    while len(same) < _MIN_BLOCKS or clock() - began < seconds:
        pairs = [(_timed_ms(run, clock), _timed_ms(run, clock)) for _ in range(per_block) for run in runs]
        other.append([first for first, _ in pairs])
        same.append([second for _, second in pairs])
    added = [
        statistics.median(first) - statistics.median(second)
        for first, second in zip(other, same, strict=True)
    ]
    interval = mean_interval(added)
    assert interval is not None  # there are at least _MIN_BLOCKS
    same_ms, other_ms = (statistics.median(itertools.chain.from_iterable(kind)) for kind in (same, other))
    return Swapping(
        model=model,
        workload=workload,
        adapters=len(runs),
        same_ms=same_ms,
        other_ms=other_ms,
        added_ms=interval,
        cycles=per_block * len(same),
    )


def _timed_ms(run: Run, clock: Clock) -> float:
    start = clock()
    run()
    return (clock() - start) * 1e3
