"""Check laws that hold for all weights: A→B→A gives A again, and rows of a batch don't influence each other.

Each law is checked while a feed's answers are at hand, and judged at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lora_export.adapter import Array
from lora_export.parity.feeds.made import Feed, rows_of
from lora_export.parity.judge.limits import EFFECT_CEILING, STEP, STEPS
from lora_export.parity.judge.metrics import Tally, group_of, is_logits
from lora_export.parity.judge.verdicts import Judge, finite_verdicts, groups, largest_limit
from lora_export.parity.result import ANY, BASE, State, Verdict, state_name
from lora_export.parity.sides.candidate import Candidate

Outputs = Mapping[str, Array]


@dataclass(frozen=True, kw_only=True)
class SideOutputs:
    """Outputs of all sides in a state.

    Attributes:
        expected: Outputs of the reference.
        actual: Outputs of the candidate.
        seen: The same with the expected values where these are read from padding (`padding`).
        own: Outputs of PyTorch in the candidate's dtype; None if it was not run.
        tied: Outputs of PyTorch with ties of routers chosen the other way; None if there are no ties.
    """

    expected: Outputs
    actual: Outputs
    seen: Outputs
    own: Outputs | None = None
    tied: Outputs | None = None


Answers = Mapping[State, SideOutputs]

_AGAIN = "the same adapter again after another one gives the same bits"


def masks_of(feed: Feed, output: str | None = None) -> list[Array]:
    """Return the masks of an output's padding: of the current tokens, and of these with the past ones.

    Args:
        feed: The feed.
        output: Name of the output. With an encoder and a decoder, only the masks of the output's side are
            returned, as both may have the same number of tokens and different paddings. None: of both sides.
    """
    current, every = feed.mask, feed.values.get("attention_mask")
    if "decoder_input_ids" in feed.values and output is not None:
        if "encoder" in output.replace("decoder", ""):
            current = None
        else:
            every = feed.values.get("decoder_attention_mask")
    return [mask for mask in (current, every) if mask is not None and mask.ndim == 2]


@dataclass(kw_only=True)
class Laws:
    """The laws' tallies over all feeds.

    Attributes:
        candidate: The side to check.
        tolerance: ``(rtol, atol)`` if the user gave one.
        mixed: Output → tally of a bank's rows in different states, against the reference.
        applied: State → output → tally of the same rows, to check each row's own adapter effect.
        permuted: Output → tally of permuted rows, against the candidate's rows in order.
        alone: Output → tally of a lone row, against the same row of a batch.
        again: (A, output) → largest relative difference of A→B→A.
        mixed_states: States of the rows of mixed batches.
        seen: States that `permuted` and `alone` were run in.
        states: All states that can be compared.
    """

    candidate: Candidate
    tolerance: tuple[float, float] | None = None
    mixed: dict[str, Tally] = field(default_factory=dict)
    applied: dict[State, dict[str, Tally]] = field(default_factory=dict)
    permuted: dict[str, Tally] = field(default_factory=dict)
    alone: dict[str, Tally] = field(default_factory=dict)
    again: dict[tuple[State, str], float] = field(default_factory=dict)
    mixed_states: set[State] = field(default_factory=set)
    seen: set[State] = field(default_factory=set)
    states: Sequence[State] = ()
    _turn: int = 0
    _next: int = 1
    _feeds: int = 0

    def check(
        self,
        feed: Feed,
        answers: Answers,
        pairs: Mapping[str, str],
        padding: Mapping[str, Array],
    ) -> None:
        """Check the laws that a feed allows to check.

        Args:
            feed: The feed.
            answers: State → outputs, for every state that can be compared.
            pairs: The candidate's output → the reference's.
            padding: The reference's output → which of its values are read from padding, for some.
        """
        self.states = states = list(answers)
        if self.candidate.switches and len(states) > 1:
            # Not the last state, which ran just now: no other run would be between.
            self._again(feed, answers, states[self._feeds % (len(states) - 1)])
            self._feeds += 1
        if feed.batch < 2 or not self._has_rows(feed):
            return
        rows = self._rows(states, feed.batch)
        actual = self.candidate.run(feed.values, rows)
        crossed = self.candidate.about.crossed
        names = [name for name in pairs if actual[name].shape[:1] == (feed.batch,) and name not in crossed]
        if len(set(rows)) > 1:
            self.mixed_states |= set(rows)
            expected = {
                name: np.stack([answers[state].expected[pairs[name]][row] for row, state in enumerate(rows)])
                for name in names
            }
            seen = {
                name: np.where(padding.get(pairs[name], False), expected[name], actual[name])
                for name in names
            }
            self._add(self.mixed, feed, names=names, expected=expected, actual=seen)
            self._add_applied(
                feed, answers, pairs={name: pairs[name] for name in names}, rows=rows, actual=seen
            )
        self.seen |= set(rows)
        order = list(reversed(range(feed.batch)))
        turned = self.candidate.run(rows_of(feed, order).values, [rows[row] for row in order])
        back = {name: turned[name][order] for name in names}
        self._add(self.permuted, feed, names=names, expected=actual, actual=back)
        if not self._takes_rows(feed):
            return
        one = self._turn % feed.batch
        only = rows_of(feed, [one])
        lone = self.candidate.run(only.values, rows[one : one + 1])
        kept = {name: actual[name][one : one + 1] for name in names}
        self._add(self.alone, only, names=names, expected=kept, actual=lone)

    @staticmethod
    def _has_rows(feed: Feed) -> bool:
        """Return True if the batch is the first axis of every input that rows don't share."""
        return all(
            name in feed.shared or values.shape[:1] == (feed.batch,) for name, values in feed.values.items()
        )

    def _takes_rows(self, feed: Feed) -> bool:
        """Return True if the batch's size can change: the first dimension of every unshared input varies."""
        return all(
            port.name in feed.shared or (bool(port.dims) and not isinstance(port.dims[0], int))
            for port in self.candidate.about.ports
            if port.name in feed.values
        )

    @property
    def notes(self) -> list[str]:
        """Notes on laws that could not be checked."""
        left = [state_name(state) for state in self.states if self.mixed and state not in self.mixed_states]
        if left:
            return [f"not among other rows of a batch: {', '.join(left)} (more: --samples, --batch)"]
        if not self.permuted:
            return ["no batch of several rows: permuted and lone rows were not checked"]
        if not self.alone:
            return ["the size of the batch can't be changed: lone rows were not checked"]
        if crossed := sorted(self.candidate.about.crossed):
            return [f"{', '.join(crossed)}: of pairs of rows; permuted and lone rows were not checked there"]
        return []

    def _rows(self, states: Sequence[State], batch: int) -> list[State]:
        """Return a state for each row; the next feed begins with another one."""
        self._turn += 1
        if self.candidate.about.mode == "bank":
            begin = self._next
            # With more states than rows, the next feed takes the next states, until each was in a batch with
            # others.
            self._next += batch if batch < len(states) else 1
            return [states[(row + begin) % len(states)] for row in range(batch)]
        return [states[self._turn % len(states)]] * batch

    def _again(self, feed: Feed, answers: Answers, state: State) -> None:
        again = self.candidate.run(feed.values, (state,) * feed.batch)
        for name, values in again.items():
            before = answers[state].actual[name]
            if np.array_equal(before, values, equal_nan=before.dtype.kind == "f"):
                difference = 0.0
            else:
                exact, found = before.astype(np.float64), values.astype(np.float64)
                difference = float(np.linalg.norm(found - exact) / (np.linalg.norm(exact) or 1.0))
            # max() would keep the value before a NaN.
            known = self.again.get((state, name), 0.0)
            self.again[state, name] = difference if math.isnan(difference) else max(known, difference)

    def _add(
        self,
        into: dict[str, Tally],
        feed: Feed,
        names: Iterable[str],
        expected: Mapping[str, Array],
        actual: Mapping[str, Array],
    ) -> None:
        for name in names:
            tally = into.setdefault(name, Tally(logits=is_logits(name), tolerance=self.tolerance))
            tally.add(
                expected[name],
                actual[name],
                own=None,
                without=None,
                actual_without=None,
                masks=masks_of(feed, name),
            )

    def _add_applied(
        self, feed: Feed, answers: Answers, pairs: Mapping[str, str], rows: Sequence[State], actual: Outputs
    ) -> None:
        """Compare each row of a mixed batch with the same row without an adapter."""
        if BASE not in answers:
            return
        base = answers[BASE]
        for row, state in enumerate(rows):
            if state == BASE:
                self._add_without(feed, answers, names=list(pairs), row=row, rows=rows, actual=actual)
                continue
            answer, at = answers[state], slice(row, row + 1)
            tallies = self.applied.setdefault(state, {})
            for name, other in pairs.items():
                tallies.setdefault(name, Tally(logits=is_logits(name), tolerance=self.tolerance)).add(
                    answer.expected[other][at],
                    actual[name][at],
                    own=None if answer.own is None else answer.own[other][at],
                    without=base.expected[other][at],
                    actual_without=base.seen[name][at],
                    masks=masks_of(rows_of(feed, [row]), name),
                    tied=None if answer.tied is None else answer.tied[other][at],
                )

    def _add_without(
        self,
        feed: Feed,
        answers: Answers,
        names: Sequence[str],
        row: int,
        rows: Sequence[State],
        actual: Outputs,
    ) -> None:
        """Compare a row without an adapter with the candidate's output where no row has an adapter.

        The possible error is the effect of another row's adapter, so that effect is the measure.
        """
        other = next((state for state in rows if state != BASE), None)
        if other is None:
            return
        at, tallies = slice(row, row + 1), self.applied.setdefault(BASE, {})
        for name in names:
            tallies.setdefault(name, Tally(logits=is_logits(name), tolerance=self.tolerance)).add(
                answers[BASE].seen[name][at],
                actual[name][at],
                own=None,
                without=answers[other].seen[name][at],
                actual_without=None,
                masks=masks_of(rows_of(feed, [row]), name),
            )

    def judge(self, judge: Judge) -> list[Verdict]:
        """Return the verdicts; the states must be judged first, as their limits are used."""
        verdicts: list[Verdict] = []
        if self.again:
            verdicts.append(self._judge_again(judge))
        verdicts += self._judge_applied(judge)
        for name, found, states, right in (
            ("mixed batch", self.mixed, self.mixed_states, "the reference"),
            ("permuted rows", self.permuted, self.seen, "its run before"),
            ("row alone", self.alone, self.seen, "its run before"),
        ):
            if not found:
                continue
            label = ", ".join(sorted(state_name(state) for state in states))
            broken = [entry for entry in finite_verdicts(BASE, found, name, right) if not entry.passed]
            verdicts += [Verdict(**{**vars(entry), "state": label}) for entry in broken]
            for group, members in groups(found).items():
                norm = math.sqrt(sum(tally.expected_squared for tally in members.values()))
                limit = largest_limit(judge.limits, states, group).over(norm)
                verdicts += judge.errors(label, group, members=members, limit=limit, kind=name)
        return verdicts

    def _judge_applied(self, judge: Judge) -> list[Verdict]:
        """Return verdicts on whether each row of a mixed batch has its own adapter."""
        if self.candidate.about.mode != "bank":
            return []
        if not self.mixed:
            why = "no batch of several rows, or one state: rows with different adapters were not checked"
            return [_uncounted(ANY, why)]
        verdicts: list[Verdict] = []
        for state, outputs in self.applied.items():
            telling = {name: tally for name, tally in outputs.items() if _is_telling(tally, judge.dtype)}
            found = [verdict for verdict in judge.effects(state, telling) if verdict.counted]
            verdicts += [replace(row, kind="law", name=f"mixed batch: {row.name}") for row in found]
            if not found:
                why = f"the adapter's effect on these rows is too small to measure in {judge.dtype}"
                verdicts.append(_uncounted(state_name(state), why))
        return verdicts

    def _judge_again(self, judge: Judge) -> Verdict:
        exact = self.candidate.about.provider == "cpu"
        why = _AGAIN if exact else "a GPU's kernels may add up in another order: the relative error's limit"

        def limit(state: State, output: str) -> float:
            return 0.0 if exact else judge.limits[state, group_of(output)].relative

        def beyond(entry: tuple[State, str]) -> float:
            value = self.again[entry]
            return math.inf if math.isnan(value) else value - limit(*entry)

        worst = max(self.again, key=beyond)
        value, largest = self.again[worst], limit(*worst)
        return Verdict(
            kind="law",
            name="A→B→A",
            state=state_name(worst[0]),
            output="",
            value=value,
            limit=largest,
            passed=value <= largest,
            why=why,
        )


def _uncounted(state: str, why: str) -> Verdict:
    return Verdict(
        kind="law",
        name="mixed batch",
        state=state,
        output="",
        value=math.nan,
        limit=math.inf,
        passed=True,
        why=why,
        counted=False,
    )


def _is_telling(tally: Tally, dtype: str) -> bool:
    """Return True if an adapter's effect on a few rows is far larger than the dtype's error there.

    Otherwise a good export could fail; the state's own batches, and the mixed batch's error, are judged
    anyway.
    """
    if not tally.moved_squared:
        return False
    if tally.own is None or tally.own.infinite:
        return STEPS * STEP[dtype] / (2 * tally.effect) <= EFFECT_CEILING / 2
    return tally.error_over_effect(tally.own) <= EFFECT_CEILING / 2
