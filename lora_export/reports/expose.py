"""Write the result of exposing LoRA as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from lora_export.graph.exposed import WEIGHTS_INPUT
from lora_export.modes.branches.output import ExposeReport
from lora_export.reports.merge import size_text
from lora_export.reports.quantised import quantised_lines
from lora_export.untrusted.shown import limited

_SHOWN = 4


def expose_summary_lines(report: ExposeReport, seconds: float) -> list[str]:
    """Return the lines that a user reads after exposing."""
    record = report.exposed
    kinds = Counter(module.kind for module in record.modules)
    members = sum(len(module.members) for module in record.modules)
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    packed = f" in {len(record.modules)} packs" if members > len(record.modules) else ""
    shared = f", {size_text(report.shared_bytes)} shared with the base" if report.shared_bytes else ""
    lines = [
        f"exposed {members} modules{packed} ({counted}) in {seconds:.1f} s: "
        f"{size_text(report.size_bytes)} of weights written{shared}"
    ]
    if record.mode == "bank":
        names = ", ".join(slot.name for slot in record.slots)
        lines.append(f"slots: {names}; chosen by the input {WEIGHTS_INPUT} [batch, {len(record.slots)}]")
    else:
        lines.append(f"ranks up to {record.max_rank}; tensors {', '.join(record.tensor_names()[:2])}, …")
    lines += limited([f"note: {note}" for note in report.plan.notes], "notes")
    lines += quantised_lines(report.quantised) if report.quantised else []
    return lines + [f"wrote {path}" for path in report.outputs.values()]


def expose_warning_lines(report: ExposeReport) -> Iterator[str]:
    """Yield the warnings that are printed even with ``--quiet``."""
    for row in report.plan.refused:
        yield f"warning: left out: {row.parameter}: {row.reason}"
    for warning in (*report.plan.warnings, *report.warnings):
        yield f"warning: {warning}"
