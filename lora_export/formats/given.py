"""Read the adapters of a check, by name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from lora_export.adapter import Adapter
from lora_export.errors import AdapterError
from lora_export.formats import as_adapter

One = str | os.PathLike[str] | Adapter
Adapters = One | Sequence[One] | Mapping[str, One]


def named_adapters(given: Adapters) -> dict[str, Adapter]:
    """Read adapters; those without a name take their file's.

    Raises:
        AdapterError: Two have the same name, or one can't be read.
    """
    if isinstance(given, Mapping):
        return {name: as_adapter(one) for name, one in given.items()}
    listed = [given] if isinstance(given, str | os.PathLike | Adapter) else list(given)
    found: dict[str, Adapter] = {}
    for one in listed:
        adapter = as_adapter(one)
        if adapter.name in found:
            raise AdapterError(
                f"two adapters are called '{adapter.name}'",
                "give a mapping of names to adapters",
                [found[adapter.name].source, adapter.source],
            )
        found[adapter.name] = adapter
    return found
