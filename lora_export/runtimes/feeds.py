"""What a request feeds and asks for, checked against what a model takes: all that is wrong at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lora_export.adapter import Array
from lora_export.errors import BackendError
from lora_export.graph.exposed import WEIGHTS_INPUT

# A tensor that lies where the runtime wants it: an `onnxruntime.OrtValue`, an engine's `DeviceTensor`.
DeviceValue = Any
# What a run is fed: input name → values.
Feeds = Sequence[tuple[str, Array | DeviceValue]]


class Input(Protocol):
    """An input of a model, whatever the runtime calls its type."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def required(self) -> bool:
        """It has no default."""

    @property
    def type(self) -> str:
        """Its type in the runtime's words."""


def check_feeds(
    path: Path,
    feeds: Mapping[str, Array | DeviceValue],
    inputs: Mapping[str, Input],
    lora: Collection[str],
    type_problem: Callable[[str, object], str],
) -> None:
    """Refuse feeds that don't fit.

    Args:
        path: The model's file, for messages.
        feeds: What the request feeds.
        inputs: What it may feed, and `WEIGHTS_INPUT`, which it may not.
        lora: Inputs that are LoRA's.
        type_problem: Returns what is wrong with a value for an input, or an empty text.

    Raises:
        BackendError: Inputs missing, unknown or of another type; all of them are listed.
    """
    problems = []
    for name, value in feeds.items():
        if name == WEIGHTS_INPUT and name in inputs:
            problems.append(f"{name}: run(adapters=…) sets it")
        elif name in lora:
            problems.append(f"{name}: a LoRA tensor; load_adapter and run(adapter=…) set it")
        elif name not in inputs:
            problems.append(f"{name}: no input of the graph")
        elif problem := type_problem(name, value):
            problems.append(f"{name}: {problem}")
    own = [port for port in inputs.values() if port.name != WEIGHTS_INPUT]
    problems += [
        f"{port.name}: missing, {port.type}" for port in own if port.required and port.name not in feeds
    ]
    if problems:
        taken = ", ".join(port.name for port in own)
        raise BackendError(f"the feeds don't fit {path.name}", f"it takes: {taken}", problems)


def choose_outputs(path: Path, known: Sequence[str], names: Sequence[str] | None) -> Sequence[str]:
    """Return the outputs to compute: all of them, or those asked for.

    Raises:
        BackendError: The model has no such outputs.
    """
    if names is None:
        return known
    if unknown := [name for name in names if name not in known]:
        raise BackendError(
            f"{path.name} has no output {', '.join(map(repr, unknown))}", f"it has: {', '.join(known)}"
        )
    return names
