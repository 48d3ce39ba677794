"""Compare the size of a config's model with its weights: transformers makes up missing ones in memory."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from lora_export.base.checkpoint.module_counts import few_modules, weights_bytes
from lora_export.errors import CheckpointError

# Weights have at least two bits each; 64 MB are for values without weights (positions, masks, the adapter's).
_PER_BYTE, _BESIDE = 4, 16 << 20
_SHOWN = 4


def refuse_wide(folder: Path, kind: Any, config: Any) -> None:
    """Raise `CheckpointError` if a config describes a model many times larger than its weights.

    Args:
        folder: Of the checkpoint.
        kind: Class of transformers with which it is loaded.
        config: The config as transformers reads it.
    """
    import torch

    try:
        with few_modules(folder), torch.device("meta"):
            model = kind(deepcopy(config))
    except CheckpointError:
        raise
    except Exception:  # loading it says so, or works without
        return
    values = {name: value.numel() for name, value in (*model.named_parameters(), *model.named_buffers())}
    stored = weights_bytes(folder)
    if (count := sum(values.values())) > _PER_BYTE * stored + _BESIDE:
        largest = sorted(values, key=values.__getitem__, reverse=True)[:_SHOWN]
        raise CheckpointError(
            f"{folder}/config.json describes a model of {count} values, but its weights are {stored} bytes",
            "download it again, or write the sizes that the weights have",
            [f"{name}: {values[name]} values" for name in largest],
        )
