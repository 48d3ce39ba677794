"""Read adapters as a caller gives them: a path, an `Adapter`, several of them, or by name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from lora_export.adapter import Adapter
from lora_export.errors import AdapterError
from lora_export.formats import as_adapter

AdapterLike = str | os.PathLike[str] | Adapter
Adapters = AdapterLike | Sequence[AdapterLike] | Mapping[str, AdapterLike]


def load_given(
    given: AdapterLike | Sequence[AdapterLike] | None, component: str | None = None
) -> list[Adapter]:
    """Read one adapter or several; none for None.

    Args:
        given: Paths that `load_adapter` reads, or `Adapter` values.
        component: The part of each that belongs, see `load_adapter`.

    Raises:
        AdapterError: An adapter can't be read.
        InputChangedError: The files of an `Adapter` were written to since it was loaded.
    """
    listed = [given] if isinstance(given, str | os.PathLike | Adapter) else list(given or ())
    return [as_adapter(one, component) for one in listed]


def named_adapters(given: Adapters) -> dict[str, Adapter]:
    """Read adapters; those without a name take their file's.

    Raises:
        AdapterError: Two have the same name, or one can't be read.
    """
    if isinstance(given, Mapping):
        return {name: as_adapter(one) for name, one in given.items()}
    found: dict[str, Adapter] = {}
    for adapter in load_given(given):
        if adapter.name in found:
            raise AdapterError(
                f"two adapters are called '{adapter.name}'",
                "give a mapping of names to adapters",
                [found[adapter.name].source, adapter.source],
            )
        found[adapter.name] = adapter
    return found
