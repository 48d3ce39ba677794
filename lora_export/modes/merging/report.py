"""Hold the result of a merge, whichever base it went into."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.plan import Plan
from lora_export.storage.rounding import Rounding, rounding_dict, total_of

if TYPE_CHECKING:
    # Reports of adapters alone need no onnx_ir, which that imports.
    from lora_export.modes.quantising.quantise import QuantisedWeights


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """Result of a merge, or with ``dry_run`` the result that it would have.

    Attributes:
        plan: Every tensor of the adapters and its site.
        roundings: Module → cost of rounding; empty for a dry run.
        outputs: Files that were (or would be) written: ``graph``, ``data``, ``manifest``, or ``folder``.
        size_bytes: Size of the written weights.
        shared_bytes: Size of the weights that stay in the base's files.
        left_out: Files of the base that were not copied, because they hold unmerged weights.
        dry_run: True if nothing was written.
        quantised: Weights that were quantised after the merge; None if all stay floats.
    """

    plan: Plan
    roundings: Mapping[str, Rounding] = field(default_factory=dict)
    outputs: Mapping[str, Path] = field(default_factory=dict)
    size_bytes: int = 0
    shared_bytes: int = 0
    left_out: tuple[str, ...] = ()
    dry_run: bool = False
    quantised: QuantisedWeights | None = None

    @property
    def total(self) -> Rounding:
        """Cost of rounding over all modules."""
        return total_of(self.roundings.values())

    @property
    def codes_over_delta(self) -> float | None:
        """‖dequantised − W‖ / ‖ΔW‖ over the merged weights that were quantised; None without any."""
        if self.quantised is None or self.quantised.record is None:
            return None
        lost = delta = 0.0
        for weight in self.quantised.record.weights:
            mine = [
                cost
                for label, cost in self.roundings.items()
                if cost.measured and (label == weight.module or weight.name in cost.tensors)
            ]
            if mine:
                lost += (weight.relative * weight.norm) ** 2
                delta += sum(cost.delta_squared * cost.elements / cost.measured for cost in mine)
        return math.sqrt(lost / delta) if delta else None

    def __str__(self) -> str:
        """Return a few lines: what was changed, what rounding cost, and the files."""
        lines = self.plan.summary(self.outputs.values(), self.dry_run)
        if self.roundings:
            lines.insert(1, f"rounding lost {self.total.relative:.2%} of the adapters' change")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "outputs": {name: str(path) for name, path in self.outputs.items()},
            "dry_run": self.dry_run,
            "size_bytes": self.size_bytes,
            "shared_bytes": self.shared_bytes,
            "plan": self.plan.as_dict(),
            "rounding": rounding_dict(self.roundings),
            "left_out": list(self.left_out),
            **({"quantised": self.quantised.as_dict()} if self.quantised else {}),
            **({} if (codes := self.codes_over_delta) is None else {"codes_over_delta": codes}),
        }
