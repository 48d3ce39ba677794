"""Both sides on the same feeds, in every state: what is added up, feed by feed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lora_export.adapter import Array
from lora_export.errors import BackendError
from lora_export.parity.candidate import Candidate
from lora_export.parity.feeds import Feed
from lora_export.parity.laws import Laws, masks_of
from lora_export.parity.limits import FACTOR
from lora_export.parity.metrics import Tally, group_of, is_logits
from lora_export.parity.reference import Reference, pair_outputs
from lora_export.parity.result import BASE, OutputMetrics, Scatter, State, state_name
from lora_export.runtimes.torch_reference import TorchReference
from lora_export.runtimes.torch_ties import Choice, near_ties, record_choices, turn_ties

_POINTS = 400


@dataclass
class Comparison:
    """The comparison so far.

    Attributes:
        candidate: What is checked.
        reference: What is right.
        own: PyTorch in the candidate's dtype.
        states: What is compared, the base first where the candidate has it.
        laws: Checked on each feed's answers.
        tolerance: ``(rtol, atol)`` where the user gave one.
        tallies: State → output → tally.
        scatter: A few values of each state's main output.
        notes: What a user should know.
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
    _pairs: dict[str, str] = field(default_factory=dict)
    _largest: dict[tuple[State, str], float] = field(default_factory=dict)
    _near: int = 0
    _choices: int = 0

    def add(self, feed: Feed) -> None:
        """Run both sides on a feed in every state.

        Raises:
            BackendError: A side can't be run, or the outputs can't be compared.
        """
        without: Mapping[str, Array] | None = None
        got_without: Mapping[str, Array] | None = None
        if BASE not in self.states and self.reference.has(BASE):
            without = self.reference.run(feed.values, BASE)
        answers = {}
        for state in self.states:
            with record_choices() as choices:
                wanted = self.reference.run(feed.values, state)
            got = self.candidate.run(feed.values, (state,) * feed.batch)
            own, tied = self._run_own(feed, state, choices)
            self._check(wanted, got, without)
            moved = None if state == BASE else without
            self._tally(state, feed, wanted, got, own, tied, moved, got_without)
            if state == BASE:
                without, got_without = wanted, got
            answers[state] = (wanted, got)
        self.laws.check(feed, answers, self._pairs)

    def _run_own(
        self, feed: Feed, state: State, choices: Sequence[Choice]
    ) -> tuple[Mapping[str, Array] | None, Mapping[str, Array] | None]:
        """Run PyTorch in the candidate's dtype; again with ties the other way, where there are any."""
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
        self, wanted: Mapping[str, Array], got: Mapping[str, Array], without: Mapping[str, Array] | None
    ) -> None:
        if not self._pairs:
            where = self.candidate.about.path
            self._pairs = pair_outputs(list(got), list(wanted), where)
            self.notes += [
                f"the candidate's output '{name}' is compared with the reference's '{other}'"
                for name, other in self._pairs.items()
                if name != other
            ]
            if left := [name for name in wanted if name not in self._pairs.values()]:
                self.notes.append(f"the candidate has no {', '.join(left)}: not compared")
        different = [
            f"{name}: candidate {got[name].shape}, {whose} {_shape(values, other)}"
            for whose, values in (("reference", wanted), ("reference without adapter", without))
            for name, other in self._pairs.items()
            if values is not None and _shape(values, other) != got[name].shape
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
        wanted: Mapping[str, Array],
        got: Mapping[str, Array],
        own: Mapping[str, Array] | None,
        tied: Mapping[str, Array] | None,
        without: Mapping[str, Array] | None,
        got_without: Mapping[str, Array] | None,
    ) -> None:
        into = self.tallies.setdefault(state, {})
        for name, other in self._pairs.items():
            tally = into.setdefault(name, Tally(is_logits(other), self.tolerance))
            tally.add(
                wanted[other],
                got[name],
                None if own is None else own[other],
                None if without is None else without[other],
                None if got_without is None else got_without[name],
                masks_of(feed, other),
                None if tied is None else tied[other],
            )
            largest = float(np.abs(wanted[other]).max(initial=0.0))
            self._largest[state, name] = max(self._largest.get((state, name), 0.0), largest)
        main = next((name for name in self._pairs if group_of(name) == name), None)
        if main is not None and not any(entry.state == state_name(state) for entry in self.scatter):
            self._scatter(state, main, wanted[self._pairs[main]], got[main])

    def _scatter(self, state: State, name: str, wanted: Array, got: Array) -> None:
        step = max(1, wanted.size // _POINTS)
        chosen = [
            values.reshape(-1)[::step][:_POINTS].astype(np.float64).tolist() for values in (wanted, got)
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
        """Return how far apart values of an output have to be to be told apart; None: PyTorch was not run."""
        tally = self.tallies[state][output]
        if tally.own is None:
            return None
        return FACTOR * tally.own.max_abs + (tally.ties.max_abs if tally.ties is not None else 0.0)

    @property
    def said(self) -> list[str]:
        """What a user should know, after all feeds."""
        if not self._near:
            return self.notes
        return [
            *self.notes,
            f"{self._near} of {self._choices:,} choices of experts are a tie in the candidate's dtype: "
            "either is right, and what the other costs is in the limits",
        ]

    def largest_value(self, output: str, state: State) -> float:
        """Return the reference's largest absolute value of an output."""
        return self._largest[state, output]


def _shape(outputs: Mapping[str, Array], name: str) -> tuple[int, ...] | str:
    return outputs[name].shape if name in outputs else "has no such output"
