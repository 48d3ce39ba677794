"""Format the words and numbers that every report of a `ParityReport` shares."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from lora_export.parity.result import Generated, OutputMetrics, ParityReport, Verdict
from lora_export.untrusted.shown import shown

_FEEDS = 6


def verdict_line(report: ParityReport) -> str:
    """Return the verdict of the whole check in one line: ``PASSED: 48 checks``."""
    failed = len(report.failed)
    # A verdict that proves nothing is not a passed check.
    checks = sum(verdict.counted or not verdict.passed for verdict in report.verdicts)
    empty = len(report.verdicts) - checks
    also = f"; {empty} more prove{'s' if empty == 1 else ''} nothing" if empty else ""
    if failed:
        where = report.localisation.module if report.localisation is not None else ""
        begins = f"; the error begins at {shown(where)}" if where else ""
        return f"FAILED: {failed} of {plural(checks, 'check')}{also}{begins}"
    if not report.passed:
        return f"FAILED: nothing was proven{also}"
    return f"PASSED: {plural(checks, 'check')}{also}"


def facts(report: ParityReport) -> list[tuple[str, str]]:
    """Return reference, candidate, adapters, feeds and tolerance as (label, text)."""
    reference, candidate = report.reference, report.candidate
    what = _texts(candidate, ("mode", "runtime", "provider", "dtype"))
    if sha := _short(candidate.get("sha256")):
        what.append(f"sha256 {sha}")
    found = [
        ("reference", _described(reference.get("path"), _texts(reference, ("kind", "dtype")))),
        ("candidate", _described(candidate.get("path"), what)),
    ]
    found += [("adapter", _adapter(adapter)) for adapter in report.adapters]
    feeds = [shown(feed.get("label", "")) for feed in report.feeds]
    more = f"; … and {len(feeds) - _FEEDS} more" if len(feeds) > _FEEDS else ""
    found.append(("feeds", f"{len(feeds)}: {'; '.join(feeds[:_FEEDS])}{more}" if feeds else "none"))
    return [*found, ("tolerance", shown(report.tolerance)), ("took", f"{report.seconds:.1f} s")]


def by_state(verdicts: Iterable[Verdict]) -> dict[str, list[Verdict]]:
    """Return the verdicts of each state, in their order."""
    grouped: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        grouped.setdefault(verdict.state, []).append(verdict)
    return grouped


def mark(verdict: Verdict) -> str:
    """Return ``ok``, ``FAIL``, or ``void`` for a passed verdict that proves nothing."""
    if not verdict.passed:
        return "FAIL"
    return "ok" if verdict.counted else "void"


def number(value: float | None) -> str:
    """Return a number in few characters: ``3.2e-07``, ``0.42``, ``nan``; "" for None."""
    if value is None:
        return ""
    if math.isnan(value):
        return "nan"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))  # a count
    # Small and large numbers get two digits, which are enough for an error.
    return f"{value:.1e}" if value and not 1e-2 <= abs(value) < 1e3 else f"{value:.3g}"


def relation(verdict: Verdict) -> str:
    """Return the value beside its limit: ``2.1e-04 ≤ 8.0e-04``, ``nan, limit 8.0e-04``, ``0.3, no limit``."""
    value, limit = number(verdict.value), number(verdict.limit)
    if verdict.limit == math.inf:
        return f"{value}, no limit"
    # A verdict may rest on more than these two numbers; then there is no sign between them.
    if math.isnan(verdict.value) or verdict.passed != (verdict.value <= verdict.limit):
        return f"{value}, limit {limit}"
    return f"{value} {'≤' if verdict.passed else '>'} {limit}"


def share_of_limit(verdict: Verdict) -> float:
    """Return the share of its limit that a value uses: 1 at the limit, 0 without one, infinite if unknown."""
    value, limit = verdict.value, verdict.limit
    if math.isnan(value) or math.isnan(limit):
        return math.inf
    if limit == math.inf or value <= 0:
        return 0.0
    return value / limit if limit > 0 else math.inf


def plural(count: int, what: str) -> str:
    """Return ``1 check``, ``3 checks``."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def metric_rows(metrics: Iterable[OutputMetrics]) -> list[tuple[str, ...]]:
    """Return the table of metrics with its heading, one row for each state and output."""
    numbers = ("relative", "PyTorch", "effect", "error/effect", "max abs", "mean abs", "cosine")
    table: list[tuple[str, ...]] = [("state", "output", *numbers)]
    for row in metrics:
        values = (
            row.relative,
            row.own_relative,
            row.effect,
            row.error_over_effect,
            row.max_abs,
            row.mean_abs,
        )
        cells = (*map(number, values), f"{row.cosine:.6f}")
        table.append((shown(row.state), shown(row.output), *cells))
    return table


def logit_rows(metrics: Iterable[OutputMetrics]) -> list[tuple[str, ...]]:
    """Return the table of metrics that only logits have, with its heading; only that without logits."""
    rows: list[tuple[str, ...]] = [("state", "output", "KL in nats", "top-1 equal", "top-5 equal")]
    for row in metrics:
        if row.kl is None and row.top1 is None and row.top5 is None:
            continue
        shares = (_percent(part) for part in (row.top1, row.top5))
        rows.append((shown(row.state), shown(row.output), number(row.kl), *shares))
    return rows


def generated_rows(generated: Iterable[Generated]) -> list[tuple[str, ...]]:
    """Return the table of generated tokens with its heading, one row for each prompt."""
    rows: list[tuple[str, ...]] = [("state", "prompt", "equal", "first difference")]
    for run in generated:
        total = max(len(run.reference), len(run.candidate))
        difference = ""
        if run.equal < total:
            wanted, seen = (
                str(tokens[run.equal]) if run.equal < len(tokens) else "the end"
                for tokens in (run.reference, run.candidate)
            )
            difference = f"token {run.equal + 1}: reference {wanted}, candidate {seen}"
            difference += ", a tie of the reference" if run.tie else ""
        rows.append(
            (shown(run.state), plural(len(run.prompt), "token"), f"{run.equal} of {total}", difference)
        )
    return rows


def _percent(part: float | None) -> str:
    return f"{part:.2%}" if part is not None and math.isfinite(part) else number(part)


def _described(path: Any, details: list[str]) -> str:
    name = shown(path or "unnamed")
    return f"{name} ({', '.join(details)})" if details else name


def _texts(mapping: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    return [shown(mapping[key]) for key in keys if mapping.get(key)]


def _short(sha: object) -> str:
    return f"{shown(sha)[:12]}…" if sha else ""


def _adapter(adapter: Mapping[str, Any]) -> str:
    details: list[str] = []
    if sha := _short(adapter.get("sha256")):
        details.append(f"sha256 {sha}")
    if adapter.get("modules") is not None:
        details.append(plural(int(adapter["modules"]), "module"))
    if scaling := adapter.get("scaling"):
        low, high = min(scaling), max(scaling)
        details.append(f"scaling {low:g}" if low == high else f"scaling {low:g} to {high:g}")
    return _described(adapter.get("name"), details)
