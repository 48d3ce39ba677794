"""Cut rows out of a module's output, or reorder them: exactly, and without any other change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lora_export.adapter import Array, LoraModule
from lora_export.formats.schemes.rules import Spans


def take_rows(values: Array, spans: Spans) -> Array:
    """Return the rows of ``spans``, in their order."""
    if spans == ((0, len(values)),):
        return values
    return np.concatenate([values[start:stop] for start, stop in spans])


def cut_module(module: LoraModule, path: str, spans: Spans) -> LoraModule:
    """Return a module with the output rows ``spans`` of another, under a path of its own.

    Row i of ΔW is row i of lora_B times lora_A; DoRA's norm, its factor and the bias have one value for each
    row. lora_A, rank and alpha don't change, and so neither does the scaling.

    Args:
        module: A linear module, or a convolution of one group.
        path: The new path.
        spans: Ranges of rows, in their new order.
    """

    def vector(values: Array | None) -> Array | None:
        return None if values is None else take_rows(values, spans)

    return replace(
        module,
        path=path,
        lora_b=take_rows(module.lora_b, spans),
        magnitude=vector(module.magnitude),
        scale=vector(module.scale),
        lora_bias=vector(module.lora_bias),
    )
