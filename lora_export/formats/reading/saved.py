"""Write whole parameters of an adapter (``modules_to_save``, ``bias``) as changes of the base's.

A head W that replaces W0 is W0 + ΔW, and ΔW is a product of rank min(out, in): one factor is ΔW itself, the
other the identity. So a graph with exposed LoRA takes a classifier's head like any adapter, with the number
of labels as the rank.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lora_export.adapter import Array, Kind, LoraModule

# Above this rank the two factors cost too much compared with the base.
LARGEST_RANK = 256


def change_of(path: str, kind: Kind, new: Array, old: Array, tensor_names: tuple[str, ...]) -> LoraModule:
    """Return the change from ``old`` to ``new``, matrices ``(out_dim, in_dim)``, as factors with scaling 1.

    Args:
        path: Module path.
        kind: ``linear``, or ``embedding`` for ``(num_embeddings, dim)``.
        new: The adapter's values.
        old: The base's values.
        tensor_names: Names of the adapter's tensors that it comes from.
    """
    difference = (new.astype(np.float64) - old.astype(np.float64)).astype(np.float32)
    if kind == "embedding":
        difference = difference.T
    rows, cols = difference.shape
    rank = min(rows, cols)
    a, b = (difference, np.eye(rows)) if rows <= cols else (np.eye(cols), difference)
    return LoraModule(
        path,
        kind,
        a.astype(np.float32),
        b.astype(np.float32),
        alpha=float(rank),
        rank=rank,
        tensor_names=tensor_names,
    )


def with_bias(module: LoraModule, change: Array, tensor_names: tuple[str, ...]) -> LoraModule:
    """Return the module with a change of its bias ``(out_dim,)`` added."""
    scaled = change.astype(np.float64) / module.scaling
    if module.lora_bias is not None:
        scaled = scaled + module.lora_bias.astype(np.float64)
    names = (*module.tensor_names, *(name for name in tensor_names if name not in module.tensor_names))
    return replace(module, lora_bias=scaled, tensor_names=names)
