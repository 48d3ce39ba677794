"""Run both sides on the same feeds in every state, and add up their differences feed by feed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from lora_export.adapter import Array
from lora_export.errors import BackendError
from lora_export.parity.feeds.made import Feed
from lora_export.parity.judge.limits import FACTOR
from lora_export.parity.judge.metrics import Tally, group_of, is_logits
from lora_export.parity.laws import Laws, SideOutputs, masks_of
from lora_export.parity.padding import read_from_padding, without_padding
from lora_export.parity.result import ANY, BASE, OutputMetrics, Scatter, State, Verdict, state_name
from lora_export.parity.sides.candidate import Candidate
from lora_export.parity.sides.reference import Reference, pair_outputs
from lora_export.runtimes.torch.reference import TorchReference
from lora_export.runtimes.torch.ties import TopkCall, near_ties, record_choices, turn_ties

_POINTS = 400
_FAR = 4.0


@dataclass(kw_only=True)
class Comparison:
    """The comparison so far.

    Attributes:
        candidate: The side to check.
        reference: The side that is right by definition.
        own: PyTorch in the candidate's dtype; None if it is not run.
        states: The states to compare, the base first if the candidate has it.
        laws: Laws to check on each feed's answers.
        tolerance: ``(rtol, atol)`` if the user gave one.
        tallies: State → output → tally.
        scatter: A few values of each state's main output.
        notes: Notes for the user.
        pairs: The candidate's output → the reference's.
        missing: Outputs of the reference that the candidate lacks.
    """

    candidate: Candidate
    reference: Reference
    own: TorchReference | None
    states: Sequence[State]
    laws: Laws
    tolerance: tuple[float, float] | None = None
    tallies: dict[State, dict[str, Tally]] = field(default_factory=dict)
    scatter: list[Scatter] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pairs: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    _errors: dict[State, dict[int, float]] = field(default_factory=dict)
    _feeds: int = 0
    _largest: dict[tuple[State, str], float] = field(default_factory=dict)
    _near: int = 0
    _choices: int = 0
    _padding: set[str] = field(default_factory=set)

    def add(self, feed: Feed) -> None:
        """Run both sides on a feed in every state.

        Raises:
            BackendError: A side can't be run, or the outputs can't be compared.
        """
        without: Mapping[str, Array] | None = None
        actual_without: Mapping[str, Array] | None = None
        if BASE not in self.states and self.reference.has(BASE):
            without = self.reference.run(feed.values, BASE)
        answers = {}
        padding: dict[str, Array] | None = None
        for state in self.states:
            # Without PyTorch's own run there are no choices to compare with, and torch may be missing.
            recording: AbstractContextManager[list[TopkCall]] = nullcontext([])
            if self.own is not None:
                recording = record_choices()
            with recording as choices:
                expected = self.reference.run(feed.values, state)
            if padding is None:
                padding = read_from_padding(feed, expected, partial(self._run_reference, state=state))
                self._padding |= padding.keys()
            actual = self.candidate.run(feed.values, (state,) * feed.batch)
            own, tied = self._run_own(feed, state, choices)
            self._check(expected, actual, without)
            seen = without_padding(actual, expected, padding, self.pairs)
            own, tied = (
                None if found is None else without_padding(found, expected, padding) for found in (own, tied)
            )
            compared = None if state == BASE else without
            self._tally(
                state,
                feed,
                expected=expected,
                actual=seen,
                own=own,
                tied=tied,
                without=compared,
                actual_without=actual_without,
            )
            if state == BASE:
                without, actual_without = expected, seen
            answers[state] = SideOutputs(expected=expected, actual=actual, seen=seen, own=own, tied=tied)
        self.laws.check(feed, answers, self.pairs, padding or {})
        self._feeds += 1

    def _run_reference(self, feed: Feed, state: State) -> Mapping[str, Array]:
        return self.reference.run(feed.values, state)

    def _run_own(
        self, feed: Feed, state: State, choices: Sequence[TopkCall]
    ) -> tuple[Mapping[str, Array] | None, Mapping[str, Array] | None]:
        """Run PyTorch in the candidate's dtype, and if there are ties again with the other choices."""
        if self.own is None:
            return None, None
        with record_choices() as chosen:
            own = self.own.run(feed.values, state)
        ties = near_ties(choices, chosen, FACTOR)
        self._near += ties.near
        self._choices += ties.of
        if not ties.near:
            return own, None
        with turn_ties(ties):
            return own, self.own.run(feed.values, state)

    def _check(
        self, expected: Mapping[str, Array], actual: Mapping[str, Array], without: Mapping[str, Array] | None
    ) -> None:
        if not self.pairs:
            where = self.candidate.about.path
            self.pairs = pair_outputs(
                list(actual), list(expected), where, ordered=self.reference.about["kind"] != "saved"
            )
            self.notes += [
                f"the candidate's output '{name}' is compared with the reference's '{other}'"
                for name, other in self.pairs.items()
                if name != other
            ]
            paired = set(self.pairs.values())
            self.missing = [name for name in expected if name not in paired]
            if texts := [name for name, values in actual.items() if not _is_number(values)]:
                raise BackendError(
                    f"outputs of {where.name} are not numbers: {', '.join(texts)}",
                    "check a graph whose outputs are numbers",
                )
        different = [
            f"{name}: candidate {actual[name].shape}, {side} {_shape(values, other)}"
            for side, values in (("reference", expected), ("reference without adapter", without))
            for name, other in self.pairs.items()
            if values is not None and _shape(values, other) != str(actual[name].shape)
        ]
        if different:
            raise BackendError(
                f"{len(different)} outputs of the candidate and the reference have different shapes",
                "the two are different models: another vocabulary, another number of labels, or another head",
                different,
            )

    def _tally(
        self,
        state: State,
        feed: Feed,
        expected: Mapping[str, Array],
        actual: Mapping[str, Array],
        own: Mapping[str, Array] | None,
        tied: Mapping[str, Array] | None,
        without: Mapping[str, Array] | None,
        actual_without: Mapping[str, Array] | None,
    ) -> None:
        into = self.tallies.setdefault(state, {})
        for name, other in self.pairs.items():
            tally = into.setdefault(name, Tally(logits=is_logits(other), tolerance=self.tolerance))
            tally.add(
                expected[other],
                actual[name],
                own=None if own is None else own[other],
                without=None if without is None else without[other],
                actual_without=None if actual_without is None else actual_without[name],
                masks=masks_of(feed, other),
                tied=None if tied is None else tied[other],
            )
            self._note_worst(
                state, tally, expected=expected[other], actual=actual[name], masks=masks_of(feed, other)
            )
            largest = float(np.abs(expected[other]).max(initial=0.0))
            self._largest[state, name] = max(self._largest.get((state, name), 0.0), largest)
        main = next((name for name in self.pairs if group_of(name) == name), None)
        if main is not None and not any(entry.state == state_name(state) for entry in self.scatter):
            self._scatter(state, main, expected[self.pairs[main]], actual[main])

    def _note_worst(
        self, state: State, tally: Tally, expected: Array, actual: Array, masks: Sequence[Array]
    ) -> None:
        """Record a feed's own error, so that an error which only one feed shows is localised on that feed."""
        alone = Tally()
        alone.add(expected, actual, own=None, without=None, actual_without=None, masks=masks)
        lost = alone.actual.infinite or alone.infinite
        error = math.inf if lost else alone.relative(alone.actual)
        known = self._errors.setdefault(state, {})
        known[self._feeds] = max(known.get(self._feeds, 0.0), error)

    def telling_feed(self, state: State, feeds: Sequence[Feed]) -> Feed:
        """Return the feed to localise on: that with most tokens, unless another's error is far larger."""
        errors = self._errors.get(state, {})
        size = [sum(values.size for values in feed.values.values()) for feed in feeds]
        largest = max(range(len(feeds)), key=size.__getitem__)
        worst = max(errors, key=errors.__getitem__, default=largest)
        return feeds[worst if errors.get(worst, 0.0) > _FAR * errors.get(largest, 0.0) else largest]

    def coverage(self) -> list[Verdict]:
        """Return a verdict for each output that was not compared, or compared at no position."""
        verdicts = []
        for name in self.missing:
            why = f"the candidate has no '{name}', which the reference returns: it was not compared"
            lost = is_logits(name)  # pooled or hidden states may be missing, but not the logits
            verdicts.append(
                Verdict(
                    kind="error",
                    name="not compared",
                    state=ANY,
                    output=name,
                    value=math.nan,
                    limit=math.inf,
                    passed=not lost,
                    why=why,
                    counted=lost,
                )
            )
        for state, outputs in self.tallies.items():
            empty = [name for name, tally in outputs.items() if not tally.positions]
            if empty:
                why = f"no position of {', '.join(empty)} was compared: all of them are padding"
                where = state_name(state)
                verdicts.append(
                    Verdict(
                        kind="error",
                        name="not compared",
                        state=where,
                        output="",
                        value=math.nan,
                        limit=math.inf,
                        passed=False,
                        why=why,
                    )
                )
        return verdicts

    def _scatter(self, state: State, name: str, expected: Array, actual: Array) -> None:
        step = max(1, expected.size // _POINTS)
        chosen = [
            values.reshape(-1)[::step][:_POINTS].astype(np.float64).tolist() for values in (expected, actual)
        ]
        self.scatter.append(Scatter(state_name(state), name, tuple(chosen[0]), tuple(chosen[1])))

    def metrics(self) -> list[OutputMetrics]:
        """Return the figures of every state and output."""
        return [
            tally.metrics(state_name(state), name)
            for state, outputs in self.tallies.items()
            for name, tally in outputs.items()
        ]

    def told_apart(self, output: str, state: State) -> float | None:
        """Return the difference from which values can be told apart; None if PyTorch was not run."""
        tally = self.tallies[state][output]
        if tally.own is None or tally.own.infinite:
            return None
        return FACTOR * tally.own.max_abs + (tally.ties.max_abs if tally.ties is not None else 0.0)

    @property
    def all_notes(self) -> list[str]:
        """Notes for the user, after all feeds."""
        notes = [*self.notes]
        if self._padding:
            notes.append(
                f"{', '.join(sorted(self._padding))}: the model reads padding in some rows, whose "
                "values mean nothing: they were not compared"
            )
        if not self._near:
            return notes
        return [
            *notes,
            f"{self._near} of {self._choices:,} choices of experts are a tie in the candidate's dtype: "
            "either is right, and the limits contain the difference",
        ]

    def largest_value(self, output: str, state: State) -> float:
        """Return the reference's largest absolute value of an output."""
        return self._largest[state, output]


def _is_number(values: Array) -> bool:
    return values.dtype.kind in "fiub" or values.dtype.name == "bfloat16"


def _shape(outputs: Mapping[str, Array], name: str) -> str:
    return str(outputs[name].shape) if name in outputs else "has no such output"
