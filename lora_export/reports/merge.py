"""Write the result of a merge as text: changed parameters, the cost of rounding, and help against it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from lora_export.modes.merging.report import MergeReport
from lora_export.plan import align
from lora_export.reports.quantised import quantised_lines, weight_lines
from lora_export.storage.rounding import WARN_LOST, WARN_RELATIVE, Rounding, total_of
from lora_export.untrusted.places import exists
from lora_export.untrusted.shown import limited

if TYPE_CHECKING:
    from lora_export.modes.branches.output import ExposeReport

# Number of modules that are named, those with the greatest loss; the manifest has them all.
_WORST = 3


def report_json(report: MergeReport | ExposeReport) -> str:
    """Return the report as one JSON object."""
    return json.dumps(report.as_dict(), indent=1, sort_keys=True, ensure_ascii=False)


def plan_lines(report: MergeReport | ExposeReport) -> list[str]:
    """Return the lines that a dry run prints."""
    lines = report.plan.lines()
    if report.quantised:
        lines += ["", *weight_lines(report.quantised)]
    lines += [f"dry run: {size_text(report.size_bytes)} of weights would be written"]
    existing = [str(path) for path in report.outputs.values() if exists(path)]
    if existing:
        lines.append(f"note: --force would be needed, there is already: {', '.join(existing)}")
    return lines


def summary_lines(report: MergeReport, seconds: float) -> list[str]:
    """Return the lines that a user reads after a merge."""
    changed = len({row.parameter for row in report.plan.placed})
    shared = f", {size_text(report.shared_bytes)} shared with the base" if report.shared_bytes else ""
    written = f"{size_text(report.size_bytes)} of weights written"
    lines = [f"changed {changed} parameters in {seconds:.1f} s: {written}{shared}"]
    lines += limited([f"note: {note}" for note in report.plan.notes], "notes")
    lines += _rounding_lines(report.roundings)
    lines += quantised_lines(report.quantised) if report.quantised else []
    if (codes := report.codes_over_delta) is not None:
        lines.append(f"codes of the merged weights lost {codes:.2g} × ‖ΔW‖ against the float merge")
    return lines + [f"wrote {path}" for path in report.outputs.values()]


def _rounding_lines(costs: Mapping[str, Rounding]) -> list[str]:
    total = total_of(costs.values())
    if not total.error_squared:
        return ["rounding: nothing of the adapter's change was lost"]
    worst = sorted(costs.values(), key=lambda cost: (-cost.relative, cost.label))[:_WORST]
    table = [("rounding", "error / ‖ΔW‖", "changes lost", "measured")]
    table += [
        (cost.label, f"{cost.relative:.2%}", f"{cost.lost_share:.2%}", f"{cost.sampled_share:.0%}")
        for cost in [total, *worst]
    ]
    legend = "(error: ‖round(W) − W‖ / ‖ΔW‖; changes lost: weights that came out as they were before)"
    return [*align(table), legend]


def size_text(count: int) -> str:
    """Return a number of bytes in the largest unit that fits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def warning_lines(report: MergeReport, help_for_rounding: str) -> Iterator[str]:
    """Yield the warnings that are printed even with ``--quiet``.

    Args:
        report: The merge.
        help_for_rounding: Hint on how to keep more of an adapter than the written type does.
    """
    for row in report.plan.refused:
        yield f"warning: left out: {row.parameter}: {row.reason}"
    for warning in report.plan.warnings:
        yield f"warning: {warning}"
    if report.left_out:
        yield f"warning: not copied, they hold unmerged weights: {', '.join(report.left_out)}"
    if (codes := report.codes_over_delta or 0.0) > 1:
        yield (
            f"warning: the codes lost more than the adapter changed ({codes:.2g} × ‖ΔW‖): check the answers, "
            "or keep the adapter in float with swap-onnx --quantize"
        )
    total = report.total
    if total.relative > WARN_RELATIVE or total.lost_share > WARN_LOST:
        yield (
            "warning: rounding to the stored type lost much of the adapter: "
            f"error {total.relative:.0%} of ‖ΔW‖ (warned above {WARN_RELATIVE:.0%}), {total.lost_share:.0%} "
            f"of the changed weights are as before (warned above {WARN_LOST:.0%})"
        )
        yield f"hint: {help_for_rounding}"
