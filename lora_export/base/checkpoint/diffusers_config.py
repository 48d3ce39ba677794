"""Refuse a config of diffusers that asks for code of its own, for unknown classes or for absurd sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_export.base.checkpoint.layer_counts import MOST_ENTRIES, refuse_many_layers
from lora_export.base.checkpoint.own_code import named_code
from lora_export.base.kinds import DIFFUSERS
from lora_export.errors import CheckpointError
from lora_export.untrusted.fields import seen

EXPORT = (
    "export the model yourself and go on with that .onnx; an adapter can also be merged into the folder "
    "(lora-export merge)"
)


def refuse_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` if no model of diffusers is made from a config.

    Args:
        folder: Folder of the model, for messages.
        config: Its config.json.
    """
    name = config.get("_class_name")
    if named := named_code(config):
        raise CheckpointError(
            f"{folder}/config.json names Python code of its own ({', '.join(named)}), which is never run",
            EXPORT,
        )
    if not isinstance(name, str) or name not in DIFFUSERS:
        raise CheckpointError(
            f"{folder} holds a model of diffusers that can't be captured: _class_name is {seen(name)}, "
            f"wanted one of {', '.join(DIFFUSERS)}",
            EXPORT,
        )
    if config.get("quantization_config"):
        raise CheckpointError(f"the weights of {folder} are quantised", "give the unquantised folder")
    refuse_many_layers(folder, config)
    if problems := [f"{place}: {seen(one)}, wanted at most {MOST_ENTRIES}" for place, one in _large(config)]:
        raise CheckpointError(
            f"{folder}/config.json has numbers that are larger than in any model",
            "download it again, or write the numbers that the weights have",
            problems,
        )


def _large(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield place and value of each number, or sum of a list, that is too large.

    Sizes are among them: what diffusers computes from one when it makes a model is not always on the meta
    device.
    """
    levels: list[tuple[str, Any]] = [(key, value) for key, value in config.items()]
    while levels:
        place, value = levels.pop()
        if isinstance(value, Mapping):
            levels += [(f"{place}.{key}", part) for key, part in value.items()]
        elif isinstance(value, list):
            levels += [(place, part) for part in value if isinstance(part, list | Mapping)]
        entries = value if isinstance(value, list) else (value,)
        number = sum(abs(entry) for entry in entries if isinstance(entry, int))
        if number > MOST_ENTRIES:
            yield place, number
