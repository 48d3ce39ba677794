"""The rounds of a benchmark, on a clock that the contenders themselves move."""

import math

import numpy as np
import pytest

from lora_export.bench.adapters import measure_swapping
from lora_export.bench.rounds import MIN_ROUNDS, measure
from lora_export.bench.workloads import Workload

WORK = Workload("run", 1, 8)


class Clock:
    """Stands still until a contender runs."""

    def __init__(self):
        self.now, self.log, self.slow = 100.0, [], 1.0

    def __call__(self):
        return self.now

    def contender(self, name, seconds, noise=0.0, seed=0):
        """Return a run that takes so long, times a lognormal factor and what slows the machine down."""
        random = np.random.default_rng([seed, *name.encode()])

        def run():
            self.log.append(name)
            self.now += seconds * math.exp(noise * random.standard_normal()) * self.slow

        return run


def timed(clock, *contenders, **options):
    options = {"seconds": 1e9, "narrow": 0.02} | options
    return measure(contenders, clock=clock, **options)


def test_exact_contenders_give_exact_ratios_and_stop_at_the_fewest_rounds():
    clock = Clock()
    found = timed(clock, clock.contender("a", 2.0), clock.contender("b", 3.0))
    assert found.stopped_by == "narrow"
    assert found.count == MIN_ROUNDS
    assert set(found.times_s[0]) == {2.0}
    assert set(found.times_s[1]) == {3.0}
    assert found.ratio(1).value == pytest.approx(1.5)
    assert found.seconds == pytest.approx(clock.now - 100.0)


def test_noise_makes_more_rounds_until_the_interval_is_narrow():
    clock = Clock()
    contenders = [clock.contender("a", 1.0, 0.05), clock.contender("b", 1.2, 0.05)]
    found = timed(clock, *contenders, narrow=0.01)
    assert found.stopped_by == "narrow"
    assert found.ratio(1).relative_width < 0.01
    # Width is about 4·σ·√2/√rounds.
    assert found.count > (2 * 2 * 0.05 * math.sqrt(2) / 0.01) ** 2 / 2
    assert found.ratio(1).value == pytest.approx(1.2, rel=0.02)


def test_every_ratio_has_to_be_narrow():
    clock = Clock()
    quiet, loud = clock.contender("quiet", 1.0), clock.contender("loud", 1.0, 0.1)
    found = timed(clock, clock.contender("a", 1.0), quiet, loud, narrow=0.05)
    assert found.ratio(1).relative_width < 1e-9
    assert found.ratio(2).relative_width < 0.05
    assert found.count > MIN_ROUNDS


def test_time_ends_it_first():
    clock = Clock()
    contenders = [clock.contender("a", 1.0, 0.5), clock.contender("b", 1.0, 0.5)]
    found = timed(clock, *contenders, seconds=60.0, narrow=1e-6)
    assert found.stopped_by == "time"
    longest = max(sum(blocks) for blocks in zip(*found.blocks_s, strict=True))
    assert 60.0 <= found.seconds <= 60.0 + longest + 1e-9


def test_one_round_is_made_however_short_the_time():
    clock = Clock()
    found = timed(clock, clock.contender("a", 5.0), clock.contender("b", 5.0), seconds=0.001)
    assert (found.stopped_by, found.count, found.ratio(1)) == ("time", 1, None)


def test_a_contender_alone_stops_when_its_time_is_known():
    clock = Clock()
    found = timed(clock, clock.contender("a", 1.0, 0.1), narrow=0.03)
    assert found.stopped_by == "narrow"
    logs = np.log(found.blocks_s[0])
    assert 2 * 1.96 * logs.std(ddof=1) / math.sqrt(len(logs)) < 0.031


def test_warm_up_and_the_first_run_of_a_block_are_not_counted():
    clock, seen = Clock(), []

    def run():
        clock.log.append("a")
        # The first run compiles, and each block's first finds cold caches.
        cold = len(clock.log) == 1 or (seen and seen[-1] == "b")
        seen.append("a")
        clock.now += 0.9 if cold else 0.001

    def other():
        seen.append("b")
        clock.now += 0.002

    found = timed(clock, run, other, narrow=1e-9, seconds=30.0)
    assert min(found.runs_per_block) > 1
    assert max(found.times_s[0]) == pytest.approx(0.001)
    assert len(clock.log) > len(found.times_s[0]) + found.count


def test_short_runs_come_in_blocks_and_long_ones_alone():
    clock = Clock()
    short = timed(clock, clock.contender("a", 0.0021), clock.contender("b", 0.0041))
    assert short.runs_per_block == (10, 5)  # 20 ms of each
    assert [len(times) for times in short.times_s] == [short.count * 10, short.count * 5]
    clock.log.clear()
    slow = timed(clock, clock.contender("a", 0.5), clock.contender("b", 0.6))
    assert slow.runs_per_block == (1, 1)
    # Two for the warm-up, then one a round: nothing is thrown away.
    assert clock.log.count("a") == 2 + slow.count


def test_a_fast_contender_beside_a_slow_one_keeps_its_uncounted_run():
    """After the slow one has had the caches the fast one's first run is cold: it must not be its time."""
    clock, last = Clock(), [None]

    def fast():
        clock.log.append("fast")
        clock.now += 0.004 if last[0] == "fast" else 0.008
        last[0] = "fast"

    def slow():
        clock.log.append("slow")
        clock.now += 0.4
        last[0] = "slow"

    for first in (0, 1):
        clock.log.clear()
        contenders = [fast, slow] if first == 0 else [slow, fast]
        found = timed(clock, *contenders, seconds=30.0, narrow=1e-9)
        assert found.runs_per_block[first] in (5, 6)
        assert found.runs_per_block[1 - first] == 1
        assert max(found.times_s[first]) == pytest.approx(0.004)
        # The slow one's warm-up is two runs: in the rounds none of it is thrown away.
        assert clock.log.count("slow") == 2 + found.count
    assert found.ratio(1).value == pytest.approx(0.01)


def test_the_order_is_shuffled_by_the_seed():
    def order(seed):
        clock = Clock()
        contenders = [clock.contender(name, 1.0) for name in "abc"]
        rounds = timed(clock, *contenders, seed=seed).count
        timed_runs = clock.log[-3 * rounds :]
        return ["".join(timed_runs[i : i + 3]) for i in range(0, len(timed_runs), 3)]

    first = order(0)
    assert all(sorted(entry) == ["a", "b", "c"] for entry in first)
    assert len(set(first)) > 2
    assert first == order(0)
    assert first != order(1)


def test_a_machine_that_slows_down_hits_all_alike():
    clock = Clock()

    def tick(share):
        clock.slow *= 1.05

    contenders = [clock.contender("a", 1.0, 0.002), clock.contender("b", 2.0, 0.002)]
    found = timed(clock, *contenders, narrow=0.005, tick=tick)
    assert found.blocks_s[0][-1] > 1.4 * found.blocks_s[0][0]
    assert found.ratio(1).value == pytest.approx(2.0, rel=0.01)
    assert found.ratio(1).relative_width < 0.005


@pytest.mark.parametrize("truth", [1.0, 1.1])
def test_intervals_hold_the_truth_though_they_decide_when_to_stop(truth):
    """An A/A and an A/B run, 400 times: stopping when an interval is narrow must not spoil it."""
    held, simulations = 0, 400
    for seed in range(simulations):
        clock = Clock()
        contenders = [clock.contender("a", 1.0, 0.05, seed), clock.contender("b", truth, 0.05, seed)]
        found = timed(clock, *contenders, narrow=0.05, seed=seed).ratio(1)
        held += found.low <= truth <= found.high
    assert 0.91 < held / simulations < 0.985


def test_progress_is_told_each_round():
    clock, shares = Clock(), []
    found = timed(clock, clock.contender("a", 1.0, 0.5), seconds=40.0, narrow=1e-9, tick=shares.append)
    assert len(shares) == found.count
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


# --- taking turns ----------------------------------------------------------------------------------------


def turning(clock, costs, change, noise=0.0):
    """Return a run for each adapter, which takes its own time and more after another one."""
    last, random = [None], np.random.default_rng(5)

    def make(name, seconds):
        def run():
            more = change if last[0] != name else 0.0
            last[0] = name
            clock.now += seconds * math.exp(noise * random.standard_normal()) + more

        return run

    return [make(name, seconds) for name, seconds in enumerate(costs)]


def test_what_a_change_adds_is_found_whatever_the_adapters_cost():
    clock = Clock()
    found = measure_swapping("m", WORK, turning(clock, [0.010, 0.030, 0.020], 0.002), 5.0, clock)
    assert found.added_ms.value == pytest.approx(2.0)
    assert found.other_ms - found.same_ms == pytest.approx(2.0)
    assert found.adapters == 3


def test_a_change_that_costs_nothing_has_zero_in_its_interval():
    clock = Clock()
    found = measure_swapping("m", WORK, turning(clock, [0.010, 0.011], 0.0, noise=0.1), 20.0, clock)
    assert found.added_ms.low < 0 < found.added_ms.high
    assert found.added_ms.high - found.added_ms.low < 1.0


def test_swapping_stops_with_its_time():
    clock = Clock()
    measure_swapping("m", WORK, turning(clock, [0.010, 0.010], 0.0), 3.0, clock)
    assert 3.0 <= clock.now - 100.0 < 4.0
