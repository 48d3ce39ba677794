"""Recognise names that only an adapter's layers have: those of PEFT, diffusers, kohya and torchtune."""

from __future__ import annotations

import re
from collections.abc import Iterable

# A graph's names have dots or slashes between them.
_LAYER = re.compile(r"(?:^|[./])lora_(?:[ABEab]|embedding_[AB]|magnitude_vector|layer|down|up)(?=[./]|$)")
# The wrapped layer is all that is left in a TorchScript export, or if the adapter was merged inside of it. In
# other models a layer of this name is a block with layers of its own (DLA's).
_WRAPPED = re.compile(r"[./]base_layer(?:\.(?:weight|bias)\w*|/[^./]+)?$")
_SHOWN = 4


def adapters_among(names: Iterable[str]) -> list[str]:
    """Return some of the names that only an adapter's layers have, or an empty list."""
    found = dict.fromkeys(name for name in names if _LAYER.search(name) or _WRAPPED.search(name))
    return list(found)[:_SHOWN]
