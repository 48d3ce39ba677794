"""Limit what a config asks for: transformers builds all of it before it looks at the weights.

These are layers and experts, labels (transformers gives each a name) and the entries of lists and mappings;
in a config as transformers has read it, also all other numbers but sizes: models make lists of such lengths.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from lora_export.base.checkpoint.module_counts import weights_bytes
from lora_export.errors import CheckpointError
from lora_export.untrusted.fields import seen

# The deepest published model has 1000 (DeepNet, arXiv:2203.00555).
MOST = 2048
# num_hidden_layers, n_layer, encoder_layers, depth, depths, num_blocks …
_COUNTS = re.compile(r"(?:.*_)?(?:layers?|blocks|depths?|hidden_groups|group_num)")
# Classifiers of ImageNet-21k have 21,843. Doge states 16,384 experts, each a row of an embedding; those that
# are modules are counted with them.
MOST_ENTRIES = 1 << 17
_LABELS = re.compile(r"(?:.*_)?(?:labels|classes|experts)")
# Words in names of numbers that are larger in some model: of tokens, positions, sizes, angles and so on.
_LARGE = re.compile(
    r"(?:.*_)?(?:ids?|idx|index|indices|tokens?|vocab|positions?|len|length|ctx|context|window|chunk|sizes?|theta"
    r"|base|rope|seed|floor|offset|rates?|samples?|pixels?|labels|classes|steps?|freq|frequency|seq|seqlen|words"
    r"|buckets|embeddings|cutoffs?|distance)(?:_.*)?"
)
# Models that make a table of positions as lists of Python when they are built, 60 bytes a value, by the
# config's model_type. The largest published tables have a million values.
_TABLES = frozenset(
    {
        *("distilbert", "flaubert", "marian", "pegasus", "roformer", "xlm"),
        *("autoformer", "informer", "time_series_transformer"),
    }
)
_TABLE_VALUES, _BYTES_A_TABLE_VALUE = 1 << 21, 16


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


def refuse_large_numbers(folder: Path, config: Any) -> None:
    """Raise `CheckpointError` if a number in a config that transformers has read is too large for any model.

    Args:
        folder: Folder of the checkpoint, for messages.
        config: A ``PreTrainedConfig``.
    """
    if problems := [
        f"{place}: {one}, wanted at most {MOST_ENTRIES}" for place, one in _large_numbers(config)
    ]:
        raise CheckpointError(
            f"{folder}/config.json has numbers that are larger than in any model",
            "download it again, or write the numbers that the weights have",
            problems,
        )
    _refuse_long_tables(folder, config)


def _refuse_long_tables(folder: Path, config: Any) -> None:
    """Refuse a table of positions, made before any weight is read, that is too long for the weights."""
    positions, width = (getattr(config, name, None) for name in ("max_position_embeddings", "hidden_size"))
    if config.model_type not in _TABLES or not (isinstance(positions, int) and isinstance(width, int)):
        return
    stored = weights_bytes(folder)
    if positions * width > _TABLE_VALUES + stored // _BYTES_A_TABLE_VALUE:
        raise CheckpointError(
            f"{folder}/config.json asks for a table of {positions} positions of {width} values, but its "
            f"weights are {stored} bytes",
            "download it again, or write the number of positions that it has (max_position_embeddings)",
        )


def _large_numbers(config: Any) -> Iterator[tuple[str, int]]:
    """Yield place and value of each number, or sum of a list, that is too large and that a model may read."""
    levels = [("", config)]
    while levels:
        place, level = levels.pop()
        for one in fields(level):
            value = vars(level).get(one.name)  # without looking it up in the layers
            if is_dataclass(value):
                levels.append((f"{place}{one.name}.", value))
            entries = value if isinstance(value, list | tuple) else (value,)
            number = sum(entry for entry in entries if isinstance(entry, int) and entry > 0)
            if number > MOST_ENTRIES and not _LARGE.fullmatch(one.name):
                yield f"{place}{one.name}", number
