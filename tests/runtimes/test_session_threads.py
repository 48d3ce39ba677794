"""`AdapterSession` under many threads: nobody sees another's adapter, a run keeps what it started with."""

import itertools
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
        with pytest.raises(AdapterError, match="no adapter is called 'a'"):
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


class Soak:
    """Runs functions in threads, each again and again until the time is over; raises what failed first."""

    def __init__(self, seconds):
        self.seconds, self.failures = seconds, []

    def run(self, *works):
        end, counts = time.monotonic() + self.seconds, [0] * len(works)

        def loop(number, work):
            dice = chance.Random(number)
            while time.monotonic() < end and not self.failures:
                try:
                    work(dice)
                except BaseException as failure:  # to be shown by the test, from whatever thread
                    self.failures.append(failure)
                counts[number] += 1

        threads = [threading.Thread(target=loop, args=each) for each in enumerate(works)]
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
        assert min(counts) >= 3, counts
        return sum(counts)


def answer_or_unknown(run, said):
    """Return a run's answer, or None where its adapter had just been unloaded; other errors go on."""
    try:
        return run()
    except AdapterError as unknown:
        if said not in str(unknown):
            raise
        return None


# Requests of several sizes: an answer to another's request differs as well as one by another's adapter.
REQUESTS = [feeds(batch, seed=60 + batch) for batch in (1, 3, 4)]


def alone(path, given):
    """Return an adapter's answers to the requests, from a session that never had another."""
    session = AdapterSession(path, threads=1)
    if given is not None:
        session.load_adapter("only", given)
    answers = [session.run(inputs, "only" if given else None)["y"] for inputs in REQUESTS]
    for inputs, answer in zip(REQUESTS, answers, strict=True):
        assert error(answer, wanted(given, inputs)) < 2e-6
    return answers


def test_soak_swap(tmp_path, record_property):
    """Sixteen threads for 15 s; 10 of them with adapters evicted, replaced, loaded and unloaded meanwhile."""
    path = swap(tmp_path)
    given = {None: None} | {f"n{seed}": both(seed, rank=1 + seed % 3) for seed in range(6)}
    own, turning = [both(seed) for seed in range(20, 24)], [both(seed) for seed in (30, 31)]
    bits = {name: alone(path, one) for name, one in given.items()}
    own_bits, turns = ([alone(path, one) for one in many] for many in (own, turning))
    known = [*bits.values(), *own_bits, *turns]
    assert len({answer.tobytes() for answers in known for answer in answers}) == len(known) * len(REQUESTS)

    def opened(**options):
        session = AdapterSession(path, threads=1, **options)
        for name, one in given.items():
            if name is not None:
                session.load_adapter(name, one)
        return session

    def use(dice):
        name, number = dice.choice(list(given)), dice.randrange(len(REQUESTS))
        assert np.array_equal(session.run(REQUESTS[number], name)["y"], bits[name][number])

    def use_turning(dice):
        number = dice.randrange(len(REQUESTS))
        answer = session.run(REQUESTS[number], "turning")["y"]
        assert any(np.array_equal(answer, answers[number]) for answers in turns)

    def use_passing(dice):
        number = dice.randrange(len(REQUESTS))
        answer = answer_or_unknown(
            lambda: session.run(REQUESTS[number], "passing")["y"], "no adapter is called"
        )
        assert answer is None or np.array_equal(answer, bits["n0"][number])

    def turn(dice):
        session.load_adapter("turning", dice.choice(turning), replace=True)

    def come_and_go(dice):
        session.load_adapter("passing", given["n0"])
        session.unload_adapter("passing")

    def bring(seed):
        """Return a user who loads an adapter, asks it, and takes it away."""

        def work(dice):
            session.load_adapter(f"own{seed}", own[seed])
            for number, answer in enumerate(own_bits[seed]):
                assert np.array_equal(session.run(REQUESTS[number], f"own{seed}")["y"], answer)
            session.unload_adapter(f"own{seed}")

        return work

    session = opened()
    tried = Soak(5).run(*[use] * 16)
    session = opened(max_adapters=3)
    session.load_adapter("turning", turning[0])
    brought = [bring(seed) for seed in range(len(own))]
    tried += Soak(10).run(*[use] * 6, *[use_turning] * 2, *[use_passing] * 2, turn, come_and_go, *brought)
    record_property("tried", tried)
    assert len(session.on_device) <= 3
    assert session.adapters == [*filter(None, given), "turning"]


def test_soak_bank(tmp_path, record_property):
    """Sixteen threads for 15 s, with rows of all kinds; 10 of them while a slot is filled and emptied."""
    residents, turning = (fitting(1, 0), fitting(2, 1)), [fitting(seed, 2) for seed in (40, 41)]
    path = bank(tmp_path, "defaults", *residents)
    blend = {"emotion": 0.5, "summary": 2.0}
    entries = ["emotion", "summary", None, blend]

    def answers(kinds, third):
        """Return request, rows → answer, from a session that nobody else uses."""
        quiet, found = AdapterSession(path, threads=1), {}
        if third is not None:
            quiet.load_adapter("turning", third)
        weighted = {
            "emotion": [(residents[0], 1.0)], "summary": [(residents[1], 1.0)], "turning": [(third, 1.0)]
        }  # fmt: skip
        weighted |= {None: [], str(blend): [(residents[0], 0.5), (residents[1], 2.0)]}
        for number, inputs in enumerate(REQUESTS):
            for rows in itertools.product(kinds, repeat=len(inputs["x"])):
                answer = found[number, str(rows)] = quiet.run(inputs, adapters=list(rows))["y"]
                for place, row in enumerate(rows):
                    adapters = weighted[str(row) if row is blend else row]
                    assert error(answer[place], wanted_blend(adapters, inputs, place)) < 2e-6
        return found

    bits = answers(entries, None)
    turned = [answers(["turning", "summary", None], one) for one in turning]
    assert len({answer.tobytes() for answer in bits.values()}) == len(bits)

    def use(dice):
        number = dice.randrange(len(REQUESTS))
        rows = tuple(dice.choices(entries, k=len(REQUESTS[number]["x"])))
        answer = session.run(REQUESTS[number], adapters=list(rows))["y"]
        assert np.array_equal(answer, bits[number, str(rows)])

    def use_turning(dice):
        number = dice.randrange(len(REQUESTS))
        rows = tuple(dice.choices(["turning", "summary", None], k=len(REQUESTS[number]["x"])))
        answer = answer_or_unknown(
            lambda: session.run(REQUESTS[number], adapters=list(rows))["y"], "no adapter 'turning'"
        )
        # Never one row by the adapter before and one by the adapter behind.
        assert answer is None or any(np.array_equal(answer, one[number, str(rows)]) for one in turned)

    def turn(dice):
        if dice.random() < 0.3:
            session.unload_adapter("turning")
        session.load_adapter("turning", dice.choice(turning), replace=True)

    session = AdapterSession(path, threads=1)
    tried = Soak(5).run(*[use] * 16)
    tried += Soak(10).run(*[use] * 9, *[use_turning] * 6, turn)
    record_property("tried", tried)
    assert session.adapters == ["emotion", "summary", "turning"]
