"""Compare two parity reports, before and now: list what became worse by more than the noise between machines.

The limits of a check say whether an export is right; a baseline says whether it is still as good as before.
Two machines (or two versions of a runtime) sum in other orders and fuse other operations, so numbers differ:

- The error of a float network differs by up to about 2 between machines: that is the usual ``factor``.
- Below a floor of the coarser dtype all is noise. One operation errs by at most the unit roundoff u (2⁻²⁴
  for float32); over some tens of layers such errors add up like a random walk: a relative error of √16·u.
- KL is quadratic in the error δ of the logits, ½·Var(δ): its factor is ``factor``². With logits of the
  size of 10, its floor is ½·(10·4u)².
- top-1 differs where two logits are nearer than their error, 10·4u. With three positions in ten that have
  such a pair within 1, a share of 0.3·10·4u = 12u is noise, and one position more, since it can't be divided.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from lora_export.errors import LoraExportError
from lora_export.parity.result import Generated, OutputMetrics, ParityReport, Verdict
from lora_export.reports.parity.words import number, plural
from lora_export.untrusted.shown import MAX_LISTED, shown

FACTOR = 2.0
_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_LAYERS = 4.0  # √16
_LOGITS = 10.0
_NEAR_PAIRS = 0.3


@dataclass(frozen=True)
class Floors:
    """Largest values that are noise, whatever they were before, for one pair of dtypes.

    Attributes:
        relative: Relative error.
        kl: Kullback-Leibler divergence in nats.
        top1: Share of positions whose largest logit differs.
    """

    relative: float
    kl: float
    top1: float


@dataclass(frozen=True, kw_only=True)
class Regression:
    """Check or metric that is worse than in the baseline.

    Attributes:
        kind: ``verdict`` (passed and fails now), ``metric`` (worse by more than noise), ``vanished`` (not
            checked now), ``void`` (proved something and proves nothing now).
        name: Name of the check or metric.
        state: Name of the state.
        output: Name of the output, or "".
        before: The value in the baseline.
        now: The value now; NaN if there is none.
        limit: Largest value (of ``top1``: smallest) that is not a regression; NaN if there is none.
        why: Reason why it is a regression.
    """

    kind: Literal["verdict", "metric", "vanished", "void"]
    name: str
    state: str
    output: str
    before: float
    now: float
    limit: float
    why: str


def floors(*dtypes: str) -> Floors:
    """Return the noise of a comparison between dtypes: the coarsest's; unknown dtypes count as float32."""
    roundoff = max(_ROUNDOFF.get(dtype, _ROUNDOFF["float32"]) for dtype in dtypes)
    relative = _LAYERS * roundoff
    return Floors(relative, kl=0.5 * (_LOGITS * relative) ** 2, top1=_NEAR_PAIRS * _LOGITS * relative)


def compare_reports(old: ParityReport, new: ParityReport, factor: float = FACTOR) -> list[Regression]:
    """Return what is worse in a report than in its baseline; an empty list if it is as good.

    Args:
        old: The baseline.
        new: The report now.
        factor: How many times larger an error may be.

    Raises:
        LoraExportError: The baseline proves nothing, or the reports are of different checks; all reasons are
            listed.
    """
    if not (math.isfinite(factor) and factor >= 1):
        raise LoraExportError(
            f"a baseline's factor must be a number from 1 on, not {factor:g}", f"omit factor= for {FACTOR:g}"
        )
    if reasons := list(_incomparable(old, new)):
        raise LoraExportError(
            "the baseline can't be compared with this check",
            "write a new one: the same check without --baseline, with --report FILE.json",
            reasons,
        )
    found = list(_verdict_regressions(old.verdicts, new.verdicts))
    found += _token_regressions(old.generated, new.generated)
    return found + list(_metric_regressions(old, new, factor))


def regression_lines(regressions: Sequence[Regression]) -> list[str]:
    """Return the lines that a user reads after a comparison; the last one is the verdict."""
    text: list[str] = []
    for row in regressions[:MAX_LISTED]:
        what = ", ".join(shown(part) for part in (row.name, row.state, row.output) if part)
        values = [f"{number(row.before)} before, {number(row.now)} now"]
        values += [] if math.isnan(row.limit) else [f"limit {number(row.limit)}"]
        text += [f"WORSE  {what}: {', '.join(values)}", f"       {shown(row.why)}"]
    if (left := len(regressions) - MAX_LISTED) > 0:
        text.append(f"… and {left} more")
    if regressions:
        return [*text, f"FAILED: {plural(len(regressions), 'thing')} worse than the baseline"]
    return ["PASSED: nothing is worse than the baseline"]


def _incomparable(old: ParityReport, new: ParityReport) -> Iterator[str]:
    """Yield the reasons why two reports are not of the same check."""
    if not any(row.counted and row.passed for row in old.verdicts):
        yield "the baseline is empty: no check in it passed and proved something"
    for side, before, now, keys in (
        ("reference", old.reference, new.reference, ("kind", "dtype", "sha256")),
        ("candidate", old.candidate, new.candidate, ("mode", "dtype")),
    ):
        for key in keys:
            yield from _differs(f"{side}'s {key}", before.get(key), now.get(key))
    if not (old.reference.get("sha256") and new.reference.get("sha256")):
        # Without a hash only the folder's own name counts: its parents differ from machine to machine.
        names = [report.reference["path"].rstrip("/").rpartition("/")[2] for report in (old, new)]
        yield from _differs("reference's name", *names)
    adapters = [{row["name"]: row for row in report.adapters} for report in (old, new)]
    yield from _differs("adapters", *(", ".join(sorted(rows)) or "none" for rows in adapters))
    for name in sorted(adapters[0].keys() & adapters[1].keys()):
        for key in ("sha256", "modules", "scaling"):
            yield from _differs(f"adapter {name!r}: {key}", adapters[0][name][key], adapters[1][name][key])
    # With a wider tolerance checks pass that failed before.
    yield from _differs("tolerance", old.tolerance, new.tolerance)
    if reason := _feeds_differ(old.feeds, new.feeds):
        yield reason


def _differs(what: str, before: Any, now: Any) -> Iterator[str]:
    # A hash that one side lacks can't be compared.
    if before != now and not (what.endswith("sha256") and not (before and now)):
        yield f"the {what}: {shown(before)} in the baseline, {shown(now)} now"


def _feeds_differ(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> str:
    before, now = ({row["label"]: row for row in feeds} for feeds in (old, new))
    changed = sorted(
        label
        for label in before.keys() | now.keys()
        if label not in before or label not in now or _feed_differs(before[label], now[label])
    )
    if changed:
        listed = ", ".join(shown(label) for label in changed[:5])
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        return f"the feeds: {len(before)} in the baseline, {len(now)} now; not the same: {listed}{more}"
    return "" if len(old) == len(new) else f"the feeds: {len(old)} in the baseline, {len(new)} now"


def _feed_differs(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    # Only feeds from a file have a hash, and reports of older versions lack it.
    hashes = old.get("sha256"), new.get("sha256")
    return old["shapes"] != new["shapes"] or (all(hashes) and hashes[0] != hashes[1])


def _verdict_regressions(old: Sequence[Verdict], new: Sequence[Verdict]) -> Iterator[Regression]:
    before, now = _by_check(old), _by_check(new)
    for (kind, name, state, output), rows in before.items():
        current = now.get((kind, name, state, output), [])
        value, seen = _worst(rows), _worst(current)
        worse = partial(Regression, name=name, state=state, output=output, before=value, now=seen)
        if len(current) < len(rows):
            why = (
                f"checked {len(rows)} times before, {len(current)} now"
                if current
                else "is not checked any more"
            )
            yield worse(kind="vanished", limit=math.nan, why=why)
            continue
        failed = [row for row in current if not row.passed]
        if failed and all(row.passed for row in rows):
            why = f"passed, fails now: {failed[0].why}"
            yield worse(kind="verdict", limit=failed[0].limit, why=why)
        elif any(row.counted for row in rows) and not any(row.counted for row in current):
            yield worse(kind="void", limit=math.nan, why="proved something before, proves nothing now")
    for (kind, name, state, output), rows in now.items():
        if (kind, name, state, output) not in before and not all(row.passed for row in rows):
            yield Regression(
                kind="verdict",
                name=name,
                state=state,
                output=output,
                before=math.nan,
                now=_worst(rows),
                limit=rows[0].limit,
                why="a check that is new, and fails",
            )


def _token_regressions(old: Sequence[Generated], new: Sequence[Generated]) -> Iterator[Regression]:
    """Yield the states for which fewer tokens are requested now than were compared before."""
    # A run without a difference has as many tokens as were requested. If each run has one (a tie), that
    # number is unknown, and a tie is not a regression.
    asked = max((run.equal for run in new if run.equal == len(run.reference)), default=None)
    states = {run.state for run in new}  # a missing state's verdicts are reported above
    compared: dict[str, int] = {}
    for run in old:
        compared[run.state] = max(compared.get(run.state, 0), len(run.reference))
    for state, before in compared.items():
        if asked is not None and state in states and asked < before:
            why = "fewer greedy tokens are asked for: --generate is smaller"
            yield Regression(
                kind="vanished",
                name="greedy tokens",
                state=state,
                output="logits",
                before=before,
                now=asked,
                limit=math.nan,
                why=why,
            )


def _by_check(rows: Sequence[Verdict]) -> dict[tuple[str, str, str, str], list[Verdict]]:
    found: dict[tuple[str, str, str, str], list[Verdict]] = {}
    for row in rows:
        found.setdefault((row.kind, row.name, row.state, row.output), []).append(row)
    return found


def _worst(rows: Sequence[Verdict]) -> float:
    """Return the largest value; NaN is worse than any number, and stands for no value."""
    values = [row.value for row in rows]
    return math.nan if not values or any(map(math.isnan, values)) else max(values)


def _metric_regressions(old: ParityReport, new: ParityReport, factor: float) -> Iterator[Regression]:
    noise = floors(new.reference["dtype"], new.candidate["dtype"])
    current = {(row.state, row.output): row for row in new.metrics}
    for row in old.metrics:
        now = current.get((row.state, row.output))
        # Reports of older versions lack the number of positions.
        positions = (now.positions if now is not None else 0) or _positions(new.feeds)
        one = 1 / positions if positions else 0.0
        for name, before in _measured(row).items():
            worse = partial(Regression, name=name, state=row.state, output=row.output, before=before)
            value = None if now is None else getattr(now, name)
            if value is None:
                why = "is not measured any more"
                yield worse(kind="vanished", now=math.nan, limit=math.nan, why=why)
                continue
            limit, why = _limit(name, before, factor=factor, noise=noise, one=one)
            # The negation makes NaN worse.
            if not (value >= limit if name == "top1" else value <= limit):
                yield worse(kind="metric", now=value, limit=limit, why=why)


def _measured(row: OutputMetrics) -> dict[str, float]:
    """Return the numbers of a baseline that can become worse, so without NaN and infinity."""
    values = {"relative": row.relative, "kl": row.kl, "top1": row.top1}
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def _limit(name: str, before: float, factor: float, noise: Floors, one: float) -> tuple[float, str]:
    """Return the worst value that is not a regression, and its reason."""
    if name == "relative":
        floor = noise.relative
        return factor * max(
            before, floor
        ), f"more than {factor:g} × what it was or {number(floor)}, which is noise"
    if name == "kl":
        floor, squared = noise.kl, factor**2
        return squared * max(
            before, floor
        ), f"more than {squared:g} × what it was or {number(floor)}, which is noise"
    differ = factor * max(1 - before, noise.top1) + one
    return 1 - differ, f"more than {factor:g} × the positions that differed or {noise.top1:.2%}, and one more"


def _positions(feeds: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of positions that have logits, padding included; 0 if the feeds are not tokens."""
    return sum(math.prod(row["shapes"].get("input_ids", [0])) for row in feeds)
