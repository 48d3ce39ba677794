"""Limit the layers that a config asks for: transformers builds all of them before it looks at the weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_export.errors import CheckpointError
from lora_export.untrusted.fields import seen

# The deepest published model has 1000 (DeepNet, arXiv:2203.00555), the largest mixtures some hundred experts.
MOST = 2048
# num_hidden_layers, n_layer, encoder_layers, num_local_experts, depth, depths, num_blocks …
_COUNTS = re.compile(r"(?:.*_)?(?:layers?|experts|blocks|depths?)")


def refuse_many_layers(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` if a config, or a part of it, asks for more layers than any model has.

    Args:
        folder: Folder of the checkpoint, for messages.
        config: Its config.json.
    """
    problems = [f"{place}: {seen(count)}, wanted at most {MOST}" for place, count in _counts(config)]
    if problems:
        raise CheckpointError(
            f"{folder}/config.json asks for more layers than any model has",
            "download it again, or write the number of layers that the weights have",
            problems,
        )


def _counts(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    levels: list[tuple[str, Mapping[str, Any]]] = [("", config)]
    while levels:
        place, level = levels.pop()
        for key, value in level.items():
            if isinstance(value, dict):
                levels.append((f"{place}{key}.", value))
            for one in value if isinstance(value, list) else (value,):
                if isinstance(one, int) and one > MOST and _COUNTS.fullmatch(key):
                    yield f"{place}{key}", one
