"""Limit what a config asks for: transformers builds all of it before it looks at the weights.

These are layers and experts, labels (transformers gives each a name) and the entries of lists and mappings.
"""

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
_COUNTS = re.compile(r"(?:.*_)?(?:layers?|experts|blocks|depths?|hidden_groups|group_num)")
# Classifiers of ImageNet-21k have 21,843.
MOST_ENTRIES = 1 << 17
_LABELS = re.compile(r"(?:.*_)?(?:labels|classes)")


def refuse_many_layers(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` if a config, or a part of it, asks for more than any model has.

    Args:
        folder: Folder of the checkpoint, for messages.
        config: Its config.json.
    """
    problems = [f"{place}: {seen(count)}, wanted at most {most}" for place, count, most in _counts(config)]
    if problems:
        raise CheckpointError(
            f"{folder}/config.json asks for more layers or labels than any model has",
            "download it again, or write the numbers that the weights have",
            problems,
        )


def _counts(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, int]]:
    """Yield each number, list or mapping that is too large: its place, itself, and the limit."""
    levels: list[tuple[str, Mapping[str, Any]]] = [("", config)]
    while levels:
        place, level = levels.pop()
        for key, value in level.items():
            if isinstance(value, dict | list) and len(value) > MOST_ENTRIES:
                yield f"{place}{key}", value, MOST_ENTRIES
                continue
            if isinstance(value, dict):
                levels.append((f"{place}{key}.", value))
            for one in value if isinstance(value, list) else (value,):
                if isinstance(one, int) and one > MOST and _COUNTS.fullmatch(key):
                    yield f"{place}{key}", one, MOST
                if isinstance(one, int) and one > MOST_ENTRIES and _LABELS.fullmatch(key):
                    yield f"{place}{key}", one, MOST_ENTRIES
