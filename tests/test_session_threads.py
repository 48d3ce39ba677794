"""`AdapterSession` under many threads: nobody sees another's adapter, a run keeps what it started with."""

import random as chance
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime as ort
import pytest
from session_graphs import bank, both, feeds, fitting, swap, wanted, wanted_blend
from small_graphs import error

from lora_export import AdapterError, AdapterSession
from lora_export.runtimes import swap_adapters

SECONDS = 3.0  # a bound, not a target: the counts below end first on a quick machine
A, B = both(1), both(2, rank=4)


@pytest.fixture
def gate(monkeypatch):
    """Let threads called ``held`` stop inside ONNX Runtime's run, its inputs bound, until `open` is set."""

    class Gate:
        arrived, open = threading.Event(), threading.Event()

        def run(self, work):
            """Start ``work`` and return when it is inside its run."""
            pool = ThreadPoolExecutor(1, thread_name_prefix="held")
            future = pool.submit(work)
            assert self.arrived.wait(10)
            pool.shutdown(wait=False)
            return future

    held, real = Gate(), ort.InferenceSession.run_with_iobinding

    def run_with_iobinding(session, *arguments):
        if threading.current_thread().name.startswith("held"):
            held.arrived.set()
            assert held.open.wait(10)
        return real(session, *arguments)

    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", run_with_iobinding)
    yield held
    held.open.set()


def two(tmp_path, **options):
    session = AdapterSession(swap(tmp_path), threads=1, **options)
    session.load_adapter("a", A)
    if options.get("max_adapters") != 1:
        session.load_adapter("b", B)
    return session


@pytest.mark.parametrize("change", ["unload", "replace"])
def test_a_run_in_flight_finishes_with_what_it_started_with(tmp_path, gate, change):
    session, inputs = two(tmp_path), feeds()
    before = session.run(inputs, "a")["y"]
    running = gate.run(lambda: session.run(inputs, "a")["y"])
    if change == "unload":
        session.unload_adapter("a")
        with pytest.raises(AdapterError, match="there is no adapter 'a'"):
            session.run(inputs, "a")
    else:
        session.load_adapter("a", both(5), replace=True)
        assert error(session.run(inputs, "a")["y"], wanted(both(5), inputs)) < 2e-6
    gate.open.set()
    assert np.array_equal(running.result(10), before)


def test_an_adapter_in_use_is_not_evicted_until_its_run_ends(tmp_path, gate):
    session, inputs = two(tmp_path, max_adapters=1), feeds()
    before = session.run(inputs, "a")["y"]
    running = gate.run(lambda: session.run(inputs, "a")["y"])
    session.load_adapter("b", B)
    assert session.on_device == ["a", "b"]
    gate.open.set()
    assert np.array_equal(running.result(10), before)
    assert session.on_device == ["b"]


def test_runs_do_not_wait_for_each_other(tmp_path, gate):
    session, inputs = two(tmp_path), feeds()
    running = gate.run(lambda: session.run(inputs, "a")["y"])
    for name, given in (("a", A), ("b", B), (None, None)):  # returns although "a" is held inside its run
        assert error(session.run(inputs, name)["y"], wanted(given, inputs)) < 2e-6
    assert not running.done()


def test_runs_do_not_wait_for_a_load(tmp_path, monkeypatch):
    session, inputs = two(tmp_path), feeds()
    inside, go_on, real = threading.Event(), threading.Event(), swap_adapters.bind_adapter

    def slow(*arguments, **options):
        inside.set()
        assert go_on.wait(10)
        return real(*arguments, **options)

    monkeypatch.setattr(swap_adapters, "bind_adapter", slow)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(session.load_adapter, "c", both(3))
        assert inside.wait(10)
        assert error(session.run(inputs, "a")["y"], wanted(A, inputs)) < 2e-6
        assert session.adapters == ["a", "b"]
        go_on.set()
        loading.result(10)
    assert session.adapters == ["a", "b", "c"]


def test_a_run_in_flight_keeps_the_slots_it_started_with(tmp_path, gate):
    first, other = fitting(1, 0), fitting(8, 0)
    session = AdapterSession(bank(tmp_path, "defaults", first, fitting(2, 1)), threads=1)
    inputs, rows = feeds(2), ["emotion", None]
    before = session.run(inputs, adapters=rows)["y"]
    running = gate.run(lambda: session.run(inputs, adapters=rows)["y"])
    session.load_adapter("emotion", other, replace=True)
    assert error(session.run(inputs, adapters=rows)["y"][0], wanted_blend([(other, 1.0)], inputs, 0)) < 2e-6
    gate.open.set()
    assert np.array_equal(running.result(10), before)


def test_one_of_two_that_load_the_same_name_wins(tmp_path):
    session, inputs = AdapterSession(swap(tmp_path), threads=1), feeds()
    together = threading.Barrier(4)

    def load(seed):
        together.wait(10)
        try:
            session.load_adapter("same", both(seed))
        except AdapterError:
            return None
        return seed

    with ThreadPoolExecutor(4) as pool:
        winners = [seed for seed in pool.map(load, [1, 2, 3, 4]) if seed is not None]
    assert len(winners) == 1
    assert session.on_device == ["same"]
    assert error(session.run(inputs, "same")["y"], wanted(both(winners[0]), inputs)) < 2e-6


class Stress:
    """Runs functions in threads until each was called so often, or the time is over; keeps what failed."""

    def __init__(self):
        self.failures, self.calls = [], 0
        self._end = time.monotonic() + SECONDS

    def run(self, *works, count):
        def loop(work, seed):
            dice = chance.Random(seed)
            for _ in range(count):
                if time.monotonic() > self._end or self.failures:
                    return
                try:
                    work(dice)
                except BaseException as failure:  # to be shown by the test, from whatever thread
                    self.failures.append(failure)
                self.calls += 1

        threads = [threading.Thread(target=loop, args=(work, seed)) for seed, work in enumerate(works)]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)  # 500 times as often as usual: threads meet in every line
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        if self.failures:
            raise self.failures[0]
        assert self.calls >= len(works)


def answer_or_unknown(run, said):
    """Return a run's answer, or None where its adapter had just been unloaded; other errors go on."""
    try:
        return run()
    except AdapterError as unknown:
        if said not in str(unknown):
            raise
        return None


def test_swap_under_load(tmp_path):
    """Six adapters on a device for three, replaced, loaded and unloaded while eight threads use them."""
    session, inputs = AdapterSession(swap(tmp_path), threads=1, max_adapters=3), feeds()
    names = [f"n{seed}" for seed in range(6)]
    for seed, name in enumerate(names):
        session.load_adapter(name, both(seed, rank=1 + seed % 3))
    bits = {name: session.run(inputs, name)["y"] for name in [*names, None]}
    turns = []
    for seed in (30, 31):
        session.load_adapter("turning", both(seed), replace=True)
        turns.append(session.run(inputs, "turning")["y"])
    assert len({answer.tobytes() for answer in [*bits.values(), *turns]}) == 9

    def use(dice):
        name = dice.choice([*names, None])
        assert np.array_equal(session.run(inputs, name)["y"], bits[name])

    def use_turning(dice):
        answer = session.run(inputs, "turning")["y"]
        assert any(np.array_equal(answer, one) for one in turns)

    def use_passing(dice):
        answer = answer_or_unknown(lambda: session.run(inputs, "passing")["y"], "there is no adapter")
        assert answer is None or np.array_equal(answer, bits["n0"])

    def turn(dice):
        session.load_adapter("turning", both(30 + dice.randrange(2)), replace=True)

    def come_and_go(dice):
        session.load_adapter("passing", both(0, rank=1))
        session.unload_adapter("passing")

    Stress().run(*[use] * 5, use_turning, use_passing, turn, come_and_go, count=1000)
    assert len(session.on_device) <= 3
    assert session.adapters == [*names, "turning"]


def test_bank_under_load(tmp_path):
    """A slot is filled and emptied while rows of all kinds run."""
    residents = fitting(1, 0), fitting(2, 1)
    session = AdapterSession(bank(tmp_path, "defaults", *residents), threads=1)
    inputs = feeds(3)
    turns = [fitting(seed, 2) for seed in (40, 41)]
    fixed = session.run(inputs, adapters=["emotion", "summary", None])["y"]
    turned = []
    for given in turns:
        session.load_adapter("turning", given, replace=True)
        turned.append(session.run(inputs, adapters=["turning", "summary", None])["y"])

    def use(dice):
        assert np.array_equal(session.run(inputs, adapters=["emotion", "summary", None])["y"], fixed)

    def use_turning(dice):
        rows = ["turning", "summary", None]
        answer = answer_or_unknown(lambda: session.run(inputs, adapters=rows)["y"], "row 0: no adapter")
        assert answer is None or any(np.array_equal(answer, one) for one in turned)

    def turn(dice):
        if dice.random() < 0.3:
            session.unload_adapter("turning")
        session.load_adapter("turning", turns[dice.randrange(2)], replace=True)

    Stress().run(use, use, use_turning, use_turning, turn, count=1000)
