"""Refuse what neither a merge nor a branch computes of a convolution with groups."""

from __future__ import annotations

from lora_export.adapter import LoraModule
from lora_export.plan import Refusal


def grouped_dora(module: LoraModule) -> Refusal | None:
    """Return the refusal of DoRA on a grouped convolution; None for other modules.

    PEFT's factor is of B and A without their groups (``dora.py``, ``_DoraConvNdLayer``): neither a merge nor
    a branch computes it.
    """
    if not module.has_dora or module.groups == 1:
        return None
    detail = f"DoRA on a convolution of {module.groups} groups: PEFT's factor is of B·A without the groups"
    return Refusal("ambiguous", detail, "train the adapter without DoRA there (use_dora=False)")
