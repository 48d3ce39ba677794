"""Write which weights were quantised as text: what it cost, the worst of them, and all that were left."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_export.plan import align
from lora_export.untrusted.shown import limited

if TYPE_CHECKING:
    from lora_export.modes.quantising.find import WeightRow
    from lora_export.modes.quantising.quantise import QuantisedWeights

_NAMED = 3


def weight_lines(quantised: QuantisedWeights) -> list[str]:
    """Return a table of all weights, and what happens to each."""
    table = [("weight", "shape", "operator", "what happens")]
    for row in quantised.rows:
        action = row.reason and f"left: {row.reason}"
        shape = " × ".join(map(str, row.shape))
        table.append((row.module or row.weight, shape, row.operator, action or quantised.choice.to))
    return align(table)


def quantised_lines(quantised: QuantisedWeights) -> list[str]:
    """Return lines on what was quantised, what that cost, and what was left."""
    choice, record = quantised.choice, quantised.record
    count = len(quantised.rows) - len(quantised.left)
    form = "symmetric" if choice.is_symmetric else "with zero points"
    lines = [f"{choice.to}: {count} weights by {choice.method}, blocks of {choice.block_size}, {form}"]
    if record is not None and (worst := record.worst) is not None:
        lines.append(
            f"cost: ‖dequantised − W‖ / ‖W‖ is {record.mean:.2%} in the mean and {worst.relative:.2%} "
            f"at most, in {worst.module or worst.name}"
        )
    return lines + left_lines(quantised.left)


def left_lines(rows: Sequence[WeightRow]) -> list[str]:
    """Return a line for each reason why weights were left in float, with their number and some names."""
    found: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        found[row.reason].append(row.module or row.weight)
    return [
        f"left in float: {', '.join(limited(names, most=_NAMED))} ({reason})"
        for reason, names in found.items()
    ]
