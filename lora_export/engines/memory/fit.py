"""Check whether an engine fits on the GPUs that it is for, before it is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lora_export.engines.memory.estimate import MemoryEstimate, check_fit, estimate_memory
from lora_export.engines.prepare.prepare import Admitted
from lora_export.engines.record import BuildOptions, Profile
from lora_export.errors import BackendError
from lora_export.machines.targets import Gpu


@dataclass(frozen=True)
class Fit:
    """A verdict on whether an engine fits on one GPU.

    Attributes:
        target: The GPU.
        verdict: ``fits``, ``tight``, ``no`` or ``unknown``.
        lines: The reasons, for people.
        estimate: Estimate of the engine's memory.
    """

    target: Gpu
    verdict: str
    lines: tuple[str, ...]
    estimate: MemoryEstimate

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"target": self.target.name, "verdict": self.verdict, "estimate": asdict(self.estimate)}


def check_fits(
    admitted: Admitted,
    profiles: Sequence[Profile],
    targets: Sequence[Gpu],
    adapters: int,
    options: BuildOptions,
    *,
    ignore_memory: bool,
) -> dict[str, Fit]:
    """Return how the engine fits on each target, by name.

    Args:
        admitted: The graph.
        profiles: Shapes that the engine takes.
        targets: The GPUs.
        adapters: Number of adapters that have to fit with it.
        options: Options of the compiler; with weight streaming, weights may stay in host memory.
        ignore_memory: Don't refuse an engine that doesn't fit.

    Raises:
        BackendError: The engine doesn't fit on some of them.
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
            _how_to_fit(
                profiles,
                adapters,
                options=options,
                estimate=estimate,
                targets=[fit.target for fit in refused],
            ),
            [line for fit in refused for line in fit.lines],
        )
    return fits


def _how_to_fit(
    profiles: Sequence[Profile],
    adapters: int,
    options: BuildOptions,
    estimate: MemoryEstimate,
    targets: Sequence[Gpu],
) -> str:
    """Return the options that would need less memory and that this graph and request leave open."""
    ways = []
    if any(shapes[0] != shapes[2] for profile in profiles for shapes in profile.shapes.values()):
        ways.append("a smaller --shape")
    if adapters > 1:
        ways.append("fewer --adapters")
    streamed = (check_fit(estimate, target, adapters, weight_streaming=True)[0] for target in targets)
    if not options.weight_streaming and any(verdict != "no" for verdict in streamed):
        ways.append("--weight-streaming")
    give = (
        [f"give {' or '.join(ways)}"] if ways else ["build for a GPU with more memory (lora-export targets)"]
    )
    return "; or ".join([*give, "--ignore-memory to go on"])
