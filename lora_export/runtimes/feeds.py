"""Check the feeds and outputs of a request against a model, and report all problems at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lora_export.adapter import Array
from lora_export.errors import BackendError
from lora_export.graph.exposed import WEIGHTS_INPUT

# A tensor on the runtime's device: an `onnxruntime.OrtValue`, or an engine's `DeviceTensor`.
DeviceValue = Any
# The feeds of a run: (input name, values).
Feeds = Sequence[tuple[str, Array | DeviceValue]]


class ModelInput(Protocol):
    """An input of a model of any runtime."""

    @property
    def name(self) -> str:
        """Name of the input."""

    @property
    def required(self) -> bool:
        """True if the input has no default."""

    @property
    def type(self) -> str:
        """Type of the input in the runtime's words."""


def check_feeds(
    path: Path,
    feeds: Mapping[str, Array | DeviceValue],
    inputs: Mapping[str, ModelInput],
    lora: Collection[str],
    type_problem: Callable[[str, object], str],
) -> None:
    """Refuse feeds that don't fit.

    Args:
        path: The model's file, for messages.
        feeds: The feeds of the request.
        inputs: Inputs that it may feed, and `WEIGHTS_INPUT`, which it may not.
        lora: LoRA's inputs.
        type_problem: Function that returns the problem of a value for an input, or an empty text.

    Raises:
        BackendError: Inputs missing, unknown or of another type; all of them are listed.
    """
    if not isinstance(feeds, Mapping):
        raise BackendError(
            f"the feeds of {path.name} are of type {type(feeds).__name__}", "give a dict of names and arrays"
        )
    problems = []
    for name, value in feeds.items():
        if name == WEIGHTS_INPUT and name in inputs:
            problems.append(f"{name}: run(adapters=…) sets it")
        elif name in lora:
            problems.append(f"{name}: a LoRA tensor; load_adapter and run(adapter=…) set it")
        elif name not in inputs:
            problems.append(f"{name}: not an input of the graph")
        elif isinstance(value, np.ma.MaskedArray):
            problems.append(f"{name}: a masked array, whose mask no model gets; give .filled(VALUE)")
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
    """Return the outputs to compute: all, or the requested ones.

    Raises:
        BackendError: The model lacks a requested output, or ``names`` is not a list of names.
    """
    if names is None:
        return known
    # A text would be read letter by letter.
    if isinstance(names, str | bytes) or not isinstance(names, Collection):
        raise BackendError(
            f"outputs is of type {type(names).__name__}, wanted a list of names",
            f"give outputs=[…] with some of: {', '.join(known)}",
        )
    if unknown := [name for name in names if name not in known]:
        raise BackendError(
            f"{path.name} has no output {', '.join(map(repr, unknown))}", f"it has: {', '.join(known)}"
        )
    if len(set(names)) < len(names):
        raise BackendError(f"outputs of {path.name} are asked for twice", "name each output once")
    return list(names)
