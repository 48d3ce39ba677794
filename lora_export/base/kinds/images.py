"""Example images of a model, in the size that its folder states."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.base.kinds.model_kind import PROCESSOR, ROWS, noise
from lora_export.errors import CheckpointError
from lora_export.untrusted.documents import read_json
from lora_export.untrusted.places import is_file


def images(model: Any, config: Any, folder: Path) -> Any:
    """Return random images ``[rows, channels, height, width]`` in the model's dtype.

    Args:
        model: A transformers model.
        config: Its vision config.
        folder: Its folder.

    Raises:
        CheckpointError: Neither the config nor the image processor states a size, or one that is too large.
    """
    height, width = _size(config, folder)
    channels = next(
        (
            int(value)
            for name in ("num_channels", "in_channels", "in_chans")
            if (value := getattr(config, name, None))
        ),
        3,
    )
    return noise(model, (ROWS, channels, height, width), folder)


def _size(config: Any, folder: Path) -> tuple[int, int]:
    """Return height and width."""
    found = _read_size(getattr(config, "image_size", None))
    path = folder / PROCESSOR
    if found is None and is_file(path):
        written = read_json(path, CheckpointError, "save the image processor again")
        for name in ("crop_size", "size"):
            found = found or (_read_size(written.get(name)) if isinstance(written, Mapping) else None)
    if found is None:
        raise CheckpointError(
            f"{folder}: neither config.json (image_size) nor {PROCESSOR} (size) states how large the images "
            "are, which the graph needs",
            f'add "image_size" to config.json, or save the image processor in the folder as {PROCESSOR}',
        )
    return found


def _read_size(stated: Any) -> tuple[int, int] | None:
    """Return height and width as transformers means a stated size; None if it states none."""
    match stated:
        case bool():
            return None
        case int():
            return stated, stated
        case [int() as height, int() as width]:
            return height, width
        case {"height": int() as height, "width": int() as width}:
            return height, width
        case {"shortest_edge": int() as side}:
            # Images become squares of it where the processor crops them, as those for models of one size do.
            return side, side
        case _:
            return None
