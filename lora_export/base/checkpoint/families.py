"""Derive from the models in a config where transformers defines them, and which of them use Conv1D."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_export.untrusted.places import is_folder

# Model families with Conv1D, which stores ``(in_dim, out_dim)``, and its names there (transformers
# ``pytorch_utils.Conv1D``).
CONV1D_FAMILIES = frozenset(
    {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"}
)
_CONV1D_NAMES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})


def model_types(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the config's ``model_type`` and those of its parts."""
    if isinstance(config.get("model_type"), str):
        yield config["model_type"]
    for value in config.values():
        if isinstance(value, Mapping):
            yield from model_types(value)


def is_conv1d(config: Mapping[str, Any], path: str, fan_in_fan_out: bool) -> bool:
    """Return True if a module is a Conv1D, in case the shape of its weight doesn't tell.

    Args:
        config: The base's config.
        path: Path of the module in the base; an adapter may have underscores for its dots.
        fan_in_fan_out: Value in the adapter's config. PEFT writes the value of the module that it replaced
            last, and corrects it for each module by its class (``tuners/lora/model.py``); it decides only if
            the class is unknown.
    """
    kinds = list(model_types(config))
    if not CONV1D_FAMILIES.isdisjoint(kinds):
        return path.rpartition(".")[2] in _CONV1D_NAMES
    known = bool(kinds) and source_folder(kinds[0]) is not None
    return fan_in_fan_out and not known


def source_folder(kind: str) -> Path | None:
    """Return the folder of the installed transformers that defines a model type, without importing it."""
    try:
        spec = importlib.util.find_spec("transformers")
    except (ImportError, ValueError):
        return None
    places = (spec.submodule_search_locations or []) if spec else []
    parts = kind.replace("-", "_").split("_")
    # A part's type is its model's with one more word: ``gemma3_text``.
    names = ["_".join(parts[:count]) for count in range(len(parts), 0, -1)]
    folders = (Path(place) / "models" / name for place in places for name in names if name)
    return next((folder for folder in folders if is_folder(folder)), None)
