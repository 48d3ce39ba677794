"""List the contenders to time: each model, with each choice of adapters if it takes adapters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export.bench.model import BenchModel


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter that the user named.

    Attributes:
        name: The adapter's name in runs.
        path: File or folder of the adapter; None for a slot of the bank.
    """

    name: str
    path: Path | None = None


@dataclass(frozen=True)
class Contender:
    """A model with a choice of adapters: one row of the result.

    Attributes:
        label: Name in the report.
        model: The model.
        adapters: The adapter of a swap model, or none; for a bank the adapters that its rows use in turn,
            followed by the base.
    """

    label: str
    model: BenchModel
    adapters: tuple[str, ...] = ()

    def choice(self, batch: int) -> dict[str, Any]:
        """Return the adapter arguments of `AdapterSession.run` for a run of ``batch`` rows."""
        if self.model.mode == "bank":
            turn = itertools.cycle((*self.adapters, None))
            return {"adapters": list(itertools.islice(turn, batch))}
        return {"adapter": self.adapters[0] if self.adapters else None} if self.model.mode else {}


def plan_contenders(models: Sequence[BenchModel], adapters: Sequence[AdapterChoice]) -> tuple[Contender, ...]:
    """Return the contenders in the models' order; the others are compared with the first.

    A swap model runs with the first adapter and without any; a bank with its rows mixed.
    """
    names, found = [adapter.name for adapter in adapters], []
    for model in models:
        if model.mode == "swap":
            found += [Contender(f"{model.label} + {name}", model, (name,)) for name in names[:1]]
            found.append(Contender(f"{model.label}, no adapter", model))
        elif model.mode == "bank":
            found.append(Contender(f"{model.label}, rows mixed", model, tuple(names) or model.slots))
        else:
            found.append(Contender(model.label, model))
    return tuple(found)
