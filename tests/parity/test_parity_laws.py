"""Each law of a parity check fails a candidate that breaks it, and it alone; a good one keeps them all.

The candidates are doubles in numpy: x·W for each row, plus x·Δ of the row's adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_export.graph.captured import BATCH, SEQUENCE
from lora_export.graph.stored_types import StoredTypes
from lora_export.parity.comparison import Comparison
from lora_export.parity.feeds.made import Feed, InputPort
from lora_export.parity.judge.verdicts import Judge, Tolerance
from lora_export.parity.laws import Laws, masks_of
from lora_export.parity.result import BASE, State, Verdict, state_of
from lora_export.parity.sides.candidate import About, Candidate

Array = Any
A, B = state_of("a"), state_of("b")
IN, OUT = 5, 7
PORTS = (
    InputPort("x", "float32", (BATCH, SEQUENCE, IN)),
    InputPort("attention_mask", "int64", (BATCH, SEQUENCE)),
)


def matrix(seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal((IN, OUT))


W, DELTAS = matrix(0), {"a": matrix(1), "b": matrix(2)}


def answer(values: Mapping[str, Array], rows: Sequence[State], dtype: type = np.float32) -> dict[str, Array]:
    x = values["x"].astype(np.float64)
    deltas = np.stack([sum((w * DELTAS[name] for name, w in state), np.zeros_like(W)) for state in rows])
    return {"logits": (x @ W + np.einsum("bsi,bio->bso", x, deltas)).astype(dtype)}


class Good(Candidate):
    """Right in every way; the others break one."""

    def __init__(self, mode: str = "swap", provider: str = "cpu", ports: Sequence[InputPort] = PORTS) -> None:
        types = StoredTypes("float32", {}, ())
        about = About(
            path=Path("m.onnx"),
            mode=mode,
            runtime="onnxruntime",
            provider=provider,
            ports=tuple(ports),
            outputs=("logits",),
            types=types,
        )
        super().__init__(about, {})
        self.asked: list[State] = []

    def states(self, blend: State) -> list[State]:
        return [BASE, A, B]

    def run(self, values: Mapping[str, Array], rows: Sequence[State]) -> dict[str, Array]:
        self.asked.append(rows[0])
        return self.changed(answer(values, self.used(rows)), values)

    def used(self, rows: Sequence[State]) -> Sequence[State]:
        return rows

    def changed(self, outputs: dict[str, Array], values: Mapping[str, Array]) -> dict[str, Array]:
        return outputs

    def lora_inputs(self, values: Mapping[str, Array], rows: Sequence[State]) -> dict[str, Array]:
        return {}


class Truth:
    """The reference."""

    about: Mapping[str, Any] = {"kind": "checkpoint", "path": "truth", "dtype": "float64"}

    def has(self, state: State) -> bool:
        return True

    def run(self, values: Mapping[str, Array], state: State) -> dict[str, Array]:
        return answer(values, [state] * len(values["x"]), np.float64)


def feed(batch: int, seed: int = 0, padded: bool = False) -> Feed:
    x = np.random.default_rng(seed).standard_normal((batch, 3, IN)).astype(np.float32)
    mask = np.ones((batch, 3), np.int64)
    if padded:
        mask[-1, -1] = mask[0, 0] = 0
    return Feed(f"{seed}: batch {batch}", {"x": x, "attention_mask": mask})


FEEDS = (feed(1), feed(4, 1), feed(3, 2, padded=True), feed(4, 3))


def checked(
    candidate: Candidate,
    states: Sequence[State] = (BASE, A, B),
    feeds: Sequence[Feed] = FEEDS,
    tolerance: Tolerance | None = None,
) -> tuple[list[Verdict], Laws]:
    """Run a candidate on all feeds; return the laws' verdicts."""
    pair = None if tolerance is None else (tolerance.rtol, tolerance.atol)
    laws = Laws(candidate=candidate, tolerance=pair)
    comparison = Comparison(
        candidate=candidate, reference=Truth(), own=None, states=list(states), laws=laws, tolerance=pair
    )
    for one in feeds:
        comparison.add(one)
    judge = Judge(dtype="float32", tolerance=tolerance or Tolerance())
    judge.judge(comparison.tallies)
    return laws.judge(judge), laws


def failed(verdicts: Sequence[Verdict]) -> set[str]:
    """Return which laws are broken."""
    assert all(verdict.kind in ("law", "finite") for verdict in verdicts)
    return {verdict.name.partition(":")[0] for verdict in verdicts if not verdict.passed}


def checked_laws(verdicts: Sequence[Verdict]) -> set[str]:
    return {verdict.name.partition(":")[0] for verdict in verdicts}


# --- good ones -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", [None, Tolerance(1e-4, 1e-4)])
@pytest.mark.parametrize("provider", ["cpu", "cuda"])
@pytest.mark.parametrize("mode", ["swap", "bank"])
def test_a_good_candidate_keeps_every_law(mode, provider, tolerance):
    verdicts, laws = checked(Good(mode, provider), tolerance=tolerance)
    assert failed(verdicts) == set()
    mixed = {"mixed batch"} if mode == "bank" else set()
    assert checked_laws(verdicts) == {"A→B→A", "permuted rows", "row alone"} | mixed
    assert laws.notes == []


def test_a_merged_graph_keeps_the_laws_of_rows():
    verdicts, _ = checked(Good("plain"), [A])
    assert failed(verdicts) == set()
    assert checked_laws(verdicts) == {"permuted rows", "row alone"}


# --- A→B→A -----------------------------------------------------------------------------------------------


class Stale(Good):
    """Stays with an adapter when the one before it is asked for again."""

    def used(self, rows):
        before = self.asked[-3:-1]
        return [before[1]] * len(rows) if len(before) == 2 and before[0] == rows[0] != before[1] else rows


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
@pytest.mark.parametrize("states", [(BASE, A, B), (BASE, A), (A, B)], ids=["two", "one", "no-base"])
def test_an_adapter_that_stays_is_noticed(states, provider):
    verdicts, _ = checked(Stale(provider=provider), states, [feed(1, seed) for seed in range(2)])
    assert failed(verdicts) == {"A→B→A"}


def test_a_run_that_is_repeated_has_another_one_between():
    for states in ((BASE, A), (BASE, A, B)):
        candidate = Good()
        checked(candidate, states, [feed(1, seed) for seed in range(4)])
        runs = len(states) + 1
        for start in range(0, len(candidate.asked), runs):
            *first, again = candidate.asked[start : start + runs]
            assert again in first
            assert again != first[-1]


class Drifting(Good):
    """Gives a little less at every run."""

    by = 1e-7

    def changed(self, outputs, values):
        factor = np.float32(1 - self.by * len(self.asked))
        return {name: found * factor for name, found in outputs.items()}


def test_on_a_cpu_the_same_run_gives_the_same_bits_on_a_gpu_nearly_so():
    assert "A→B→A" in failed(checked(Drifting())[0])
    drifting = Drifting(provider="cuda")
    assert "A→B→A" not in failed(checked(drifting)[0])
    drifting.by = 1e-4
    assert "A→B→A" in failed(checked(drifting)[0])


class SmallBeside(Good):
    """A second output that is known less well: it may not lend its limit to the first."""

    def changed(self, outputs, values):
        logits = outputs["logits"]
        odd = np.float32(1 + 1e-5 * (len(self.asked) % 2))
        return {"logits": logits * odd, "rough": logits * np.float32(1.01)}


def test_on_a_gpu_each_output_has_its_own_limit():
    class Both(Truth):
        def run(self, values, state):
            logits = super().run(values, state)["logits"]
            return {"logits": logits, "rough": logits}

    candidate = SmallBeside(provider="cuda")
    laws = Laws(candidate=candidate)
    comparison = Comparison(
        candidate=candidate, reference=Both(), own=Both2(), states=[BASE, A, B], laws=laws
    )
    for one in FEEDS:
        comparison.add(one)
    judge = Judge(dtype="float32")
    judge.judge(comparison.tallies)
    assert judge.limits[A, "rough"].relative > 1e-2
    assert "A→B→A" in failed(laws.judge(judge))


class Both2(Truth):
    """PyTorch in a low precision: off in one of two outputs."""

    def run(self, values, state=BASE):
        logits = super().run(values, state)["logits"]
        return {"logits": logits * (1 + 1e-8), "rough": logits * 1.01}


class NoNumberAgain(Good):
    """Returns NaN when a state comes again, and is right after it."""

    def changed(self, outputs, values):
        repeated = len(self.asked) == 4
        return {name: found * np.float32(np.nan if repeated else 1) for name, found in outputs.items()}


def test_no_number_when_a_state_comes_again_is_noticed_though_later_runs_are_right():
    candidate = NoNumberAgain()
    verdicts, _ = checked(candidate, feeds=[feed(1, seed) for seed in range(6)])
    (found,) = [verdict for verdict in verdicts if verdict.name == "A→B→A"]
    assert not found.passed
    assert np.isnan(found.value)
    assert found.state == "no adapter"


# --- rows ------------------------------------------------------------------------------------------------


class OneForAll(Good):
    """Uses the first row's adapter for all rows."""

    def used(self, rows):
        return [rows[0]] * len(rows)


class NextRow(Good):
    """Uses the next row's adapter."""

    def used(self, rows):
        return [*rows[1:], rows[0]]


@pytest.mark.parametrize("kind", [OneForAll, NextRow])
@pytest.mark.parametrize("tolerance", [None, Tolerance(1e-4, 1e-4)])
def test_a_bank_that_mixes_up_its_rows_is_noticed(tolerance, kind):
    assert "mixed batch" in failed(checked(kind("bank"), tolerance=tolerance)[0])


class OfTheBatch(Good):
    """Lets rows know of each other."""

    def changed(self, outputs, values):
        return {
            name: found + np.float32(1e-3) * found.mean(0, keepdims=True) for name, found in outputs.items()
        }


@pytest.mark.parametrize("mode", ["plain", "swap", "bank"])
def test_a_row_that_depends_on_its_batch_is_noticed(mode):
    verdicts, _ = checked(OfTheBatch(mode), [A] if mode == "plain" else (BASE, A, B))
    assert "row alone" in failed(verdicts)
    assert "permuted rows" not in failed(verdicts)


class OfThePlace(Good):
    """Lets a row's place in the batch matter."""

    def changed(self, outputs, values):
        return {
            name: found * (1 + np.float32(1e-3) * np.arange(len(found), dtype=np.float32)[:, None, None])
            for name, found in outputs.items()
        }


@pytest.mark.parametrize("mode", ["plain", "swap", "bank"])
def test_a_row_that_depends_on_its_place_is_noticed(mode):
    verdicts, _ = checked(OfThePlace(mode), [A] if mode == "plain" else (BASE, A, B))
    assert {"permuted rows", "row alone"} <= failed(verdicts)


class NoNumberAlone(Good):
    """Has no numbers for a batch of one that was a row of a batch."""

    def changed(self, outputs, values):
        alone = len(values["x"]) == 1
        return {name: found * np.float32(np.nan if alone else 1) for name, found in outputs.items()}


@pytest.mark.filterwarnings("error")
def test_a_law_does_not_pass_with_values_that_are_no_numbers():
    verdicts, _ = checked(NoNumberAlone(), feeds=FEEDS[1:])
    assert failed(verdicts) == {"row alone"}
    assert {verdict.kind for verdict in verdicts if not verdict.passed} == {"finite"}


class PaddingOfTheBatch(Good):
    """Computes something else at padded positions, which nobody reads."""

    def changed(self, outputs, values):
        noise = np.float32(len(values["x"]) + 1e3 * len(self.asked))
        padded = (values["attention_mask"] == 0)[..., None]
        return {name: np.where(padded, noise, found) for name, found in outputs.items()}


def test_padded_positions_break_no_law_of_rows():
    verdicts, _ = checked(PaddingOfTheBatch("bank"), feeds=[feed(3, seed, padded=True) for seed in range(3)])
    assert failed(verdicts) == {"A→B→A"}  # it asks for the same bits, everywhere


# --- what can't be checked -------------------------------------------------------------------------------


def test_batches_of_one_say_that_rows_were_not_checked():
    verdicts, laws = checked(OfTheBatch("bank"), feeds=[feed(1), feed(1, 1)])
    assert checked_laws(verdicts) == {"A→B→A", "mixed batch"}
    assert not next(verdict for verdict in verdicts if verdict.name == "mixed batch").counted
    assert any("rows were not checked" in note for note in laws.notes)


FIXED = [InputPort(port.name, port.dtype, (4, *port.dims[1:])) for port in PORTS]


@pytest.mark.parametrize("mode", ["swap", "bank"])
def test_of_a_fixed_batch_only_lone_rows_are_not_checked(mode):
    verdicts, laws = checked(Good(mode, ports=FIXED), feeds=[feed(4), feed(4, 1)])
    assert failed(verdicts) == set()
    assert checked_laws(verdicts) == {"A→B→A", "permuted rows"} | (
        {"mixed batch"} if mode == "bank" else set()
    )
    assert any("lone rows were not checked" in note for note in laws.notes)


@pytest.mark.parametrize("kind", [OneForAll, NextRow])
def test_a_bank_of_a_fixed_batch_that_mixes_up_its_rows_is_noticed(kind):
    assert "mixed batch" in failed(checked(kind("bank", ports=FIXED), feeds=[feed(4), feed(4, 1)])[0])


@pytest.mark.parametrize("kind", [OneForAll, NextRow])
def test_rows_mixed_up_fail_where_the_error_is_within_the_limit(kind):
    """A weak adapter, or a wide tolerance: the rows' own effect tells."""
    candidate = kind("bank")
    verdicts, _ = checked(candidate, tolerance=Tolerance(1e9, 1e9))
    assert {verdict.name for verdict in verdicts if not verdict.passed} == {
        "mixed batch: adapter applied",
        "mixed batch: error / effect",
    }
    assert failed(checked(Good("bank"), tolerance=Tolerance(1e9, 1e9))[0]) == set()


def test_a_bank_in_one_state_says_that_rows_were_not_mixed():
    verdicts, _ = checked(OneForAll("bank"), [BASE])
    (mixed,) = [verdict for verdict in verdicts if verdict.name == "mixed batch"]
    assert not mixed.counted
    assert "were not checked" in mixed.why


class WithCounter(Good):
    """Returns a value that no row has a part of."""

    def changed(self, outputs, values):
        return {**outputs, "scale": np.float32([1, 2, 3])}


def test_an_output_without_rows_is_left_to_the_comparison():
    class Both(Truth):
        def run(self, values, state):
            return {**super().run(values, state), "scale": np.array([1.0, 2, 3])}

    candidate = WithCounter("bank")
    laws = Laws(candidate=candidate)
    comparison = Comparison(candidate=candidate, reference=Both(), own=None, states=[BASE, A], laws=laws)
    for one in (feed(4), feed(2, 1)):
        comparison.add(one)
    judge = Judge(dtype="float32")
    judge.judge(comparison.tallies)
    verdicts = laws.judge(judge)
    assert failed(verdicts) == set()
    assert {verdict.output for verdict in verdicts if "row" in verdict.name} == {"logits"}


def test_inputs_that_rows_share_are_no_hindrance():
    ports = (*PORTS, InputPort("cache_position", "int64", (SEQUENCE,)))
    one = feed(4)
    with_steps = Feed(
        one.label, {**one.values, "cache_position": np.arange(3)}, frozenset({"cache_position"})
    )
    verdicts, _ = checked(OfTheBatch(ports=ports), feeds=[with_steps])
    assert "row alone" in failed(verdicts)


# --- masks -----------------------------------------------------------------------------------------------


def test_encoder_and_decoder_have_their_own_masks():
    encoder, decoder = np.array([[1, 1, 0]]), np.array([[0, 1, 1]])
    ids = np.zeros((1, 3), np.int64)
    given = {"input_ids": ids, "attention_mask": encoder, "decoder_input_ids": ids}
    both = Feed("both", {**given, "decoder_attention_mask": decoder})
    # The two have as many tokens: by its length alone either mask would fit either output.
    for name, mask in (("encoder_last_hidden_state", encoder), ("logits", decoder)):
        assert all(np.array_equal(found, mask) for found in masks_of(both, name))
        assert masks_of(both, name)
    assert masks_of(Feed("encoder's only", given), "logits") == []
    assert len(masks_of(Feed("encoder's only", given), "encoder_last_hidden_state")) == 1
    (mask,) = {id(found) for found in masks_of(both, "present.0.encoder.key")}
    assert mask == id(encoder)


def test_a_cache_has_the_mask_of_all_its_tokens():
    mask = np.array([[0, 1, 1, 1, 0]])
    past = np.zeros((1, 2, 3, 4), np.float32)
    one = Feed("past", {"input_ids": np.zeros((1, 2)), "attention_mask": mask, "past_key_values.0.key": past})
    current, every = masks_of(one, "present.0.key")
    assert current.tolist() == [[True, False]]
    assert every.tolist() == mask.tolist()


class NeighbourForBase(Good):
    """Gives rows without adapter that of another row."""

    def used(self, rows):
        other = next((state for state in rows if state != BASE), BASE)
        return [other if state == BASE else state for state in rows]


@pytest.mark.parametrize("tolerance", [None, Tolerance(1e9, 1e9)])
def test_a_row_without_adapter_that_gets_its_neighbours_is_noticed(tolerance):
    verdicts, _ = checked(NeighbourForBase("bank"), tolerance=tolerance)
    names = {(verdict.name, verdict.state) for verdict in verdicts if not verdict.passed}
    assert ("mixed batch: adapter applied", "no adapter") in names


class Faint(Truth):
    """PyTorch in the candidate's dtype: off by more than the adapters move."""

    def run(self, values, state):
        return {name: found + 50 * np.abs(found).max() for name, found in super().run(values, state).items()}


def test_rows_in_which_rounding_drowns_the_effect_prove_nothing():
    laws = Laws(candidate=Good("bank"))
    comparison = Comparison(
        candidate=Good("bank"), reference=Truth(), own=Faint(), states=[BASE, A, B], laws=laws
    )
    for one in FEEDS:
        comparison.add(one)
    judge = Judge(dtype="float16")
    judge.judge(comparison.tallies)
    mixed = [verdict for verdict in laws.judge(judge) if verdict.name == "mixed batch"]
    assert {verdict.state for verdict in mixed} == {"a", "b"}
    assert all(verdict.passed and not verdict.counted for verdict in mixed)


def test_states_that_were_never_among_others_are_said():
    def after(count):
        verdicts, laws = checked(Good("bank"), feeds=[feed(2, seed) for seed in range(count)])
        assert failed(verdicts) == set()
        return [note for note in laws.notes if "not among other rows" in note]

    assert len(after(1)) == 1  # two rows, three states
    assert after(2) == []
