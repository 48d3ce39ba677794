"""Who is timed: each model, and of a model that takes adapters each way in which it is run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export.runtimes.model_file import BenchModel


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter that the user named.

    Attributes:
        name: What runs call it.
        path: Its file or folder; None: a slot that the bank has.
    """

    name: str
    path: Path | None = None

    @classmethod
    def parse(cls, text: str) -> AdapterChoice:
        """Read ``NAME=PATH`` or ``NAME``; either part may turn out to be empty."""
        name, equals, path = text.partition("=")
        return cls(name, Path(path) if equals else None)


@dataclass(frozen=True)
class Contender:
    """One row of the result.

    Attributes:
        label: What the report calls it.
        model: The model.
        adapters: Of a swap model the adapter, or none; of a bank those that its rows have in turn, the base
            being the last of them.
    """

    label: str
    model: BenchModel
    adapters: tuple[str, ...] = ()

    def choice(self, batch: int) -> dict[str, Any]:
        """Return what a run of so many rows is told, as `AdapterSession.run` takes it."""
        if self.model.mode == "bank":
            turn = itertools.cycle((*self.adapters, None))
            return {"adapters": list(itertools.islice(turn, batch))}
        return {"adapter": self.adapters[0] if self.adapters else None} if self.model.mode else {}


def plan_contenders(models: Sequence[BenchModel], adapters: Sequence[AdapterChoice]) -> tuple[Contender, ...]:
    """Return the contenders, in the models' order: the first is what the others are compared with.

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
