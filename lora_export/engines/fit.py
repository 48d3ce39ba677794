"""Whether an engine fits on the GPUs that it is for; asked before it is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lora_export.engines.admit import Admitted
from lora_export.engines.memory import MemoryEstimate, check_fit, estimate_memory
from lora_export.engines.record import BuildOptions, Profile
from lora_export.engines.targets import Target
from lora_export.errors import BackendError


@dataclass(frozen=True)
class Fit:
    """An engine on one GPU.

    Attributes:
        target: The GPU.
        verdict: ``fits``, ``tight``, ``no`` or ``unknown``.
        lines: For people.
        estimate: Before building.
    """

    target: Target
    verdict: str
    lines: tuple[str, ...]
    estimate: MemoryEstimate

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"target": self.target.name, "verdict": self.verdict, "estimate": asdict(self.estimate)}


def check_fits(
    admitted: Admitted,
    profiles: Sequence[Profile],
    targets: Sequence[Target],
    adapters: int,
    options: BuildOptions,
    *,
    ignore_memory: bool,
) -> dict[str, Fit]:
    """Return how the engine fits on each target, by name.

    Args:
        admitted: The graph.
        profiles: Which shapes the engine takes.
        targets: The GPUs.
        adapters: How many adapters have to fit beside it.
        options: With weight streaming, weights may stay in host memory.
        ignore_memory: Don't refuse what doesn't fit.

    Raises:
        BackendError: It doesn't fit on some of them.
    """
    estimate = estimate_memory(admitted.graph, admitted.exposed, profiles)
    fits = {}
    for target in targets:
        verdict, lines = check_fit(estimate, target, adapters, weight_streaming=options.weight_streaming)
        fits[target.name] = Fit(target, verdict, tuple(lines), estimate)
    refused = [fit for fit in fits.values() if fit.verdict == "no"]
    if refused and not ignore_memory:
        raise BackendError(
            f"the engine would not fit into the memory of {', '.join(fit.target.name for fit in refused)}",
            "give smaller --shape, fewer --adapters or --weight-streaming; or --ignore-memory to go on",
            [line for fit in refused for line in fit.lines],
        )
    return fits
