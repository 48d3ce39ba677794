"""What adapters cost while a model serves: loading one, and taking turns instead of staying with one."""

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
# A block of cycles lasts about so long: a median of several keeps single disturbances out.
_BLOCK_S = 0.05
_LARGEST_BLOCK = 32
_MIN_BLOCKS = 5


@dataclass(frozen=True)
class AdapterLoading:
    """How long it takes until an adapter is ready to run.

    Attributes:
        model: The model's label.
        adapter: Its name.
        median_ms: From the file (which the system has in memory by then) to the device.
        loadings: How often it was loaded.
    """

    model: str
    adapter: str
    median_ms: float
    loadings: int


@dataclass(frozen=True)
class Swapping:
    """What it costs that a run has another adapter than the run before it; both are on the device.

    Attributes:
        model: The model's label.
        workload: What was run.
        adapters: How many took turns.
        same_ms: Median of runs with the adapter of the run before.
        other_ms: Median of runs with another one.
        added_ms: How much longer the latter take, with its interval over blocks of cycles.
        cycles: In each, every adapter ran twice in a row.
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
    """Load adapters that have a file into a session, each several times.

    Raises:
        LoraExportError: Whatever `AdapterSession.load_adapter` raises.
    """
    found = []
    for adapter in adapters:
        if adapter.path is None:
            continue
        times: list[float] = []
        while len(times) < _LOADINGS and sum(times) < _LOADINGS_S:
            start = clock()
            # A bank's slot may hold an adapter of this name from the beginning.
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
    """Run each adapter twice in a row, one after the other, again and again.

    The second run of a pair has the adapter of the run before, the first one has another. In each cycle both
    kinds contain every adapter once, so that what an adapter itself costs falls out of their difference; it
    is taken between the medians of a block of cycles.

    Args:
        model: The model's label.
        workload: What is run.
        runs: A run of it with each adapter.
        seconds: Time for it; a few blocks are made in any case.
        clock: Returns seconds.

    Returns:
        What taking turns costs.
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
    assert interval is not None  # there are several blocks
    same_ms, other_ms = (statistics.median(itertools.chain.from_iterable(kind)) for kind in (same, other))
    return Swapping(model, workload, len(runs), same_ms, other_ms, interval, per_block * len(same))


def _timed_ms(run: Run, clock: Clock) -> float:
    start = clock()
    run()
    return (clock() - start) * 1e3
