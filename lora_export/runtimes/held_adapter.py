"""Hold an `Adapter` of the caller that a session reads again: its arrays may have been changed meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import numpy as np
from blake3 import blake3

from lora_export.adapter import Adapter, Array
from lora_export.errors import AdapterError
from lora_export.formats import as_adapter


class HeldAdapter:
    """An adapter whose values stay what they were when they were first read, or are refused.

    Only their hash is kept: copies would double the memory of every adapter.

    Args:
        adapter: The adapter.
        name: The adapter's name in requests.
    """

    def __init__(self, adapter: Adapter, name: str) -> None:
        self._adapter, self._name = adapter, name
        self._known = ""

    def read(self) -> Adapter:
        """Return the adapter.

        Raises:
            AdapterError: Its values are not those of the first call.
            InputChangedError: The adapter was loaded from a file that was written to since.
        """
        found = _hash_of(self._adapter)
        if self._known not in ("", found):
            raise AdapterError(
                f"adapter '{self._name}' had left the device, and its Adapter's arrays were written to since",
                "load it again with replace=True, or give load_adapter a copy that nobody changes",
            )
        self._known = found
        return as_adapter(self._adapter)


def _hash_of(adapter: Adapter) -> str:
    digest = blake3()
    for name, values in _arrays(adapter):
        digest.update(f"{name} {values.dtype} {values.shape}\n".encode())
        digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _arrays(adapter: Adapter) -> Iterator[tuple[str, Array]]:
    """Yield every array that an answer depends on, with its place."""
    for key, module in adapter.modules.items():
        for field in fields(module):
            if isinstance(values := getattr(module, field.name), np.ndarray):
                yield f"{key} {field.name}", values
    yield from adapter.extras.items()
    for key, rows in adapter.token_rows.items():
        yield f"{key} {rows.indices}", rows.values
