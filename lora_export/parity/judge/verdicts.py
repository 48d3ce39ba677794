"""Turn tallies into verdicts: what passes, by how much, and the reason for each limit.

Outputs are judged in groups (all layers of a cache are one), each by its worst member's figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from lora_export.parity.judge.limits import (
    CODES_EFFECT,
    EFFECT_CEILING,
    FACTOR,
    TIES_FACTOR,
    CodesLoss,
    Limit,
    StatedRounding,
    applied_limit,
    effect_limit,
    limit_of,
    pooled_own,
    pooled_ties,
)
from lora_export.parity.judge.metrics import Distance, Tally, group_of
from lora_export.parity.result import BASE, State, Verdict, state_name

_NOTHING_MOVES = "the adapter changes nothing on these feeds (B = 0, or what it changes is never read)"
_UNKNOWN = (
    "the reference was not run without the adapter, so its effect is not known; "
    "of a graph --base tells it, of saved outputs base/…"
)
StateTallies = Mapping[State, Mapping[str, Tally]]


@dataclass(frozen=True)
class Tolerance:
    """The user's tolerance.

    Attributes:
        rtol: Relative tolerance; None for ``auto``.
        atol: Absolute tolerance; None for ``auto``.
    """

    rtol: float | None = None
    atol: float | None = None

    @property
    def auto(self) -> bool:
        """True if the limits are derived from the dtypes."""
        return self.rtol is None

    def __str__(self) -> str:
        return "auto" if self.auto else f"{self.rtol:g},{self.atol:g}"


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Judge of tallies.

    Attributes:
        dtype: Type whose limits the candidate must keep.
        tolerance: The user's tolerance.
        rounding: Cost of rounding by the merge's manifest; None if nothing was merged or rounded.
        codes: Loss by quantising; None if the candidate has float weights, or a tolerance is given.
        switches: True if the candidate can run without the adapter.
        limits: (state, group) → its limits, set as states are judged.
    """

    dtype: str
    tolerance: Tolerance = field(default_factory=Tolerance)
    rounding: StatedRounding | None = None
    codes: CodesLoss | None = None
    switches: bool = False
    limits: dict[tuple[State, str], Limit] = field(default_factory=dict)

    def judge(self, tallies: StateTallies) -> list[Verdict]:
        """Return the verdicts on every state, and set `limits`."""
        worst_own: dict[str, float] = {}
        for outputs in tallies.values():
            for group, members in groups(outputs).items():
                own = pooled_own(list(members.values()))
                if own is not None:
                    worst_own[group] = max(worst_own.get(group, 0.0), own[1])
        verdicts: list[Verdict] = []
        for state, outputs in tallies.items():
            verdicts += finite_verdicts(state, outputs)
            for group, members in groups(outputs).items():
                verdicts += self._errors(state, group, members, worst_own.get(group))
            if state != BASE:
                verdicts += self.effects(state, outputs)
        still = {state_name(state) for state, outputs in tallies.items() if _moves_nothing(outputs)}
        return _one_moves(verdicts, still)

    def _errors(
        self, state: State, group: str, members: Mapping[str, Tally], worst_own: float | None
    ) -> list[Verdict]:
        counted = list(members.values())
        norm = math.sqrt(sum(tally.expected_squared for tally in counted)) or 1.0
        effect = math.sqrt(sum(tally.moved_squared for tally in counted)) / norm
        ties = pooled_ties(counted)
        limit = limit_of(
            self.dtype,
            pooled_own(counted),
            worst_own=worst_own,
            effect=effect,
            rounding=self.rounding,
            ties=ties,
            codes=self.codes,
        )
        each = {
            name: FACTOR * tally.relative(tally.own) + TIES_FACTOR * tally.relative(tally.ties or Distance())
            for name, tally in members.items()
            if tally.own is not None and not tally.own.infinite
        }
        self.limits[state, group] = limit = replace(limit, each=each, norm=norm)
        return self.errors(state_name(state), group, members, limit)

    def errors(
        self, state: str, group: str, members: Mapping[str, Tally], limit: Limit, kind: str = ""
    ) -> list[Verdict]:
        """Return the verdicts on the errors of a group of outputs.

        Args:
            state: Name of the state.
            group: Name of the group.
            members: Output → tally, of the group.
            limit: Limits for the tolerance ``auto``.
            kind: Name of the law, or "" if it is not a law.
        """
        label, usable = (f"{kind}: " if kind else ""), usable_members(members)
        if not usable:
            return []
        if not self.tolerance.auto:
            return [self._within(state, group, usable, label)]

        def share_of_limit(item: tuple[str, Tally]) -> float:
            # The limit is 0 where squares of the reference's values are infinite.
            allowed, error = limit.of(item[0])[0], item[1].relative(item[1].actual)
            return error / allowed if allowed else math.inf

        relative = max(usable.items(), key=share_of_limit)
        worst = max(usable.items(), key=lambda item: item[1].worst(item[1].actual))
        allowed, why = limit.of(relative[0])
        shown = f"{group} ({len(members)})" if len(members) > 1 else next(iter(members))

        def verdict(name: str, member: str, value: float, largest: float, why: str) -> Verdict:
            passed = value <= largest
            where = f"; in {member}" if len(members) > 1 and not passed else ""
            return Verdict(
                kind="law" if kind else "error",
                name=label + name,
                state=state,
                output=shown,
                value=value,
                limit=largest,
                passed=passed,
                why=why + where,
            )

        return [
            verdict(
                "relative error",
                relative[0],
                value=relative[1].relative(relative[1].actual),
                largest=allowed,
                why=why,
            ),
            verdict(
                "worst position",
                worst[0],
                value=worst[1].worst(worst[1].actual),
                largest=limit.worst,
                why=limit.why_worst,
            ),
        ]

    def _within(self, state: str, group: str, members: Mapping[str, Tally], label: str) -> Verdict:
        value = max(tally.actual.beyond for tally in members.values())
        why = f"largest |difference| / (atol + rtol × |reference|), as given: {self.tolerance}"
        name = f"{label}tolerance"
        return Verdict(
            kind="law" if label else "error",
            name=name,
            state=state,
            output=group,
            value=value,
            limit=1.0,
            passed=value <= 1.0,
            why=why,
        )

    def effects(self, state: State, outputs: Mapping[str, Tally]) -> list[Verdict]:
        """Return the verdicts on whether an adapter is applied."""
        name = state_name(state)
        judged = {output: tally for output, tally in outputs.items() if tally.moved}
        if not judged:
            return [_unproven(name, "", _UNKNOWN)]
        if _moves_nothing(outputs):
            # Without finite values nothing can be told, and they have failed already.
            return [_unproven(name, "", _NOTHING_MOVES)] if usable_members(judged) else []
        moving = {output: tally for output, tally in judged.items() if tally.moved_squared > 0}
        # The model's main outputs; a cache only if nothing else changes.
        main = {output: tally for output, tally in moving.items() if group_of(output) == output} or moving
        verdicts = []
        for output, tally in usable_members(main).items():
            verdicts += self._effect(name, output, tally)
        return verdicts

    def _effect(self, state: str, output: str, tally: Tally) -> list[Verdict]:
        own = tally.own if tally.own is not None and not tally.own.infinite else None
        share = None if own is None else abs(tally.applied(own) - 1)
        ratio = None if own is None else tally.error_over_effect(own)
        ties = 0.0 if tally.ties is None else tally.error_over_effect(tally.ties)
        value = abs(tally.applied(tally.actual) - 1)
        codes = (0.0, "")
        if self.codes is not None:
            codes = self.codes.share(tally.effect, self.switches), self.codes.why
        limit, why = applied_limit(
            self.dtype, share, None if ratio is None else max(ratio, ties), codes=codes
        )
        applied = value <= limit
        if not applied:
            why = f"{tally.applied(tally.actual):.3g} of the adapter's effect is there; {why}"
        verdicts = [
            Verdict(
                kind="effect",
                name="adapter applied",
                state=state,
                output=output,
                value=value,
                limit=limit,
                passed=applied,
                why=why,
            )
        ]
        # A given tolerance allows for an error of the base, such as quantising, which the drift leaves out.
        whole = self.tolerance.auto and self.codes is None
        value = (tally.error_over_effect if whole else tally.drift_over_effect)(tally.actual)
        if self.switches and codes[0]:
            codes = CODES_EFFECT * codes[0], f"{CODES_EFFECT:g} × {codes[1]}"
        limit, why = effect_limit(
            self.dtype, ratio, effect=tally.effect, rounding=self.rounding, ties=ties, codes=codes
        )
        if value > limit and codes[0] > EFFECT_CEILING:
            why = (
                f"codes as coarse as these ({codes[1]}) can hide an effect of {tally.effect:.2g}: it can't "
                "be shown that the adapter is applied; check the float graph, then quantise it"
            )
        if value > limit and ratio is not None and ratio > EFFECT_CEILING / 2:
            why = (
                f"PyTorch itself in {self.dtype} is off by {ratio:.2g} of the effect ({tally.effect:.2g}): "
                f"in this dtype it can't be shown that the adapter is applied; check a float32 export"
            )
        verdicts.append(
            Verdict(
                kind="effect",
                name="error / effect",
                state=state,
                output=output,
                value=value,
                limit=limit,
                passed=value <= limit,
                why=why,
            )
        )
        return verdicts


def _moves_nothing(outputs: Mapping[str, Tally]) -> bool:
    """Return whether the reference, as far as it was run without the adapter, is the same with it."""
    judged = [tally for tally in outputs.values() if tally.moved]
    return bool(judged) and not any(tally.moved_squared > 0 for tally in judged)


def _one_moves(verdicts: list[Verdict], still: Set[str]) -> list[Verdict]:
    """Return the verdicts, in which adapters without effect fail if no adapter has an effect.

    If another adapter changes the outputs, they are reported and pass. If the reference can't be run without
    the adapter, no effect can be required.

    Args:
        verdicts: All verdicts.
        still: Names of the states whose adapters have no effect.
    """
    effects = [verdict for verdict in verdicts if verdict.kind == "effect"]
    if any(verdict.counted for verdict in effects):
        return verdicts
    why = f"{_NOTHING_MOVES}: nothing shows that any adapter is applied"
    return [
        replace(verdict, passed=False, why=why)
        if verdict.kind == "effect" and verdict.state in still
        else verdict
        for verdict in verdicts
    ]


def _unproven(state: str, output: str, why: str) -> Verdict:
    return Verdict(
        kind="effect",
        name="adapter applied",
        state=state,
        output=output,
        value=math.nan,
        limit=math.inf,
        passed=True,
        why=why,
        counted=False,
    )


def usable_members(members: Mapping[str, Tally]) -> dict[str, Tally]:
    """Return the outputs without NaN and infinite values; the others have failed already."""
    return {
        name: tally for name, tally in members.items() if not tally.actual.infinite and not tally.infinite
    }


def groups(outputs: Mapping[str, Tally]) -> dict[str, dict[str, Tally]]:
    """Return group → its outputs."""
    found: dict[str, dict[str, Tally]] = {}
    for output, tally in outputs.items():
        found.setdefault(group_of(output), {})[output] = tally
    return found


def finite_verdicts(
    state: State, outputs: Mapping[str, Tally], law: str = "", right: str = "the reference"
) -> list[Verdict]:
    """Return one verdict on NaN and infinite values: they never pass, on either side.

    Args:
        state: Active adapters.
        outputs: Output → tally.
        law: Name of the law, or "" if it is not a law.
        right: Name of the side that the candidate is compared with.
    """
    problems, count = [], 0
    for output, tally in outputs.items():
        for side, found in (("the candidate", tally.actual.infinite), (right, tally.infinite)):
            if found:
                count += found
                problems.append(f"{output} of {side}: {found}")
    why = "no NaN and no Inf on either side"
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        why = "NaN or Inf in " + ", ".join(problems[:3]) + more
    name = f"{law}: finite" if law else "finite"
    return [
        Verdict(
            kind="finite",
            name=name,
            state=state_name(state),
            output="",
            value=float(count),
            limit=0.0,
            passed=not count,
            why=why,
        )
    ]


def largest_limit(limits: Mapping[tuple[State, str], Limit], states: Iterable[State], group: str) -> Limit:
    """Return the largest limit of a group in several states, for a batch whose rows are in these states."""
    found: Sequence[Limit] = [limits[state, group] for state in states if (state, group) in limits]
    widest = max(found, key=lambda limit: limit.relative)
    worst = max(found, key=lambda limit: limit.worst)
    each: dict[str, float] = {}
    for limit in found:
        each |= {output: max(value, each.get(output, 0.0)) for output, value in limit.each.items()}
    return Limit(
        relative=widest.relative,
        worst=worst.worst,
        why=widest.why,
        why_worst=worst.why_worst,
        each=each,
        ties=widest.ties,
        norm=widest.norm,
    )
