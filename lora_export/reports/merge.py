"""A merge's result as text and JSON: what went where, what rounding cost, and what to do about it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from lora_export.plan import Plan, align
from lora_export.rounding import WARN_LOST, WARN_RELATIVE, Rounding, total_of

# The modules with the greatest loss are named; the manifest has them all.
_WORST = 5
_HELP = {
    "checkpoint": "--dtype float32 (or float16) keeps more of it, and so does deploying with exposed LoRA",
    "onnx": "a float32 or float16 base keeps more of it, and so does deploying with exposed LoRA",
}


def merge_json(plan: Plan, costs: Mapping[str, Rounding], outputs: Mapping[str, Path]) -> str:
    """Return the report as one JSON object."""
    data = {
        "plan": plan.as_dict(),
        "rounding": {
            "total": total_of(costs.values()).as_dict(),
            "modules": {name: cost.as_dict() for name, cost in costs.items()},
        },
        "outputs": {name: str(path) for name, path in outputs.items()},
    }
    return json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False)


def merge_summary(plan: Plan, costs: Mapping[str, Rounding], outputs: Mapping[str, Path]) -> list[str]:
    """Return the lines that a user reads after a merge."""
    lines = [f"changed {len(plan.placed)} parameters; every tensor of the adapter is accounted for"]
    for row in plan.refused:
        lines.append(f"  left out (--allow-unmatched): {row.parameter}  {row.reason}")
    lines += [f"note: {note}" for note in plan.notes]
    lines += rounding_lines(costs)
    for name, path in outputs.items():
        size = f"  {path.stat().st_size / 1e6:.1f} MB" if path.is_file() else ""
        lines.append(f"wrote {name}: {path}{size}")
    return lines


def rounding_lines(costs: Mapping[str, Rounding]) -> list[str]:
    """Return what rounding cost: the total, and the modules that lost most."""
    total = total_of(costs.values())
    if not total.error_squared:
        return ["rounding: nothing of the adapters' change was lost"]
    lines = [
        f"rounding: error {total.relative:.2%} of ‖ΔW‖, {total.lost_share:.1%} of the changed weights "
        f"rounded back to the base ({total.sampled_share:.0%} of them measured)"
    ]
    worst = sorted(costs.values(), key=lambda cost: -cost.relative)[:_WORST]
    table = [("  module", "error/‖ΔW‖", "rounded back")]
    table += [(f"  {cost.label}", f"{cost.relative:.2%}", f"{cost.lost_share:.1%}") for cost in worst]
    return lines + align(table)


def rounding_warnings(costs: Mapping[str, Rounding], kind: str) -> Iterator[str]:
    """Yield a warning where rounding took more than the stated share of the adapters' change.

    Args:
        costs: What rounding cost, by module.
        kind: ``checkpoint`` or ``onnx``: what can be done differs.
    """
    total = total_of(costs.values())
    if total.relative > WARN_RELATIVE or total.lost_share > WARN_LOST:
        yield (
            f"rounding took {total.relative:.0%} of the adapter's change (warned above {WARN_RELATIVE:.0%}) "
            f"and put {total.lost_share:.0%} of the changed weights back to the base "
            f"(warned above {WARN_LOST:.0%}); "
            f"{_HELP[kind]}"
        )
