"""What a converted adapter says of itself: the base it was made for, the adapter it was made of.

A converted file holds tensors as a graph takes them (`graph.exposed`). Transposed matrices can't be
told from their shapes (square ones least of all), so a file is known by what it says, never by its looks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_export.adapter import Adapter, Array
from lora_export.errors import AdapterError
from lora_export.storage.sums.seal import KEY, UNSEALED

FORMAT_KEY, FORMAT_NAME = "format", "lora-export"
LAYOUT_KEY, LAYOUT = "layout", "onnx"
ONLY_THIS_BASE_KEY = "only_this_base"
# 31 bits: the largest field that every converted format has room for.
_BASE_VERSION_BITS = 31


@dataclass(frozen=True)
class Provenance:
    """Where a converted adapter comes from and where it belongs.

    Attributes:
        adapter: Its name.
        adapter_sha256: Of the file it was made of.
        base: File name of the base graph.
        base_sha256: The base graph's identity.
        ranks: Module's name → rank of its tensors.
        kinds: Module's name → kind, of those that are not ``linear``.
        only_this_base: There are values that were computed from the base's: DoRA's factors, or the changes
            that make whole parameters of the base's.
        version: Of lora-export.
    """

    adapter: str
    adapter_sha256: str
    base: str
    base_sha256: str
    ranks: Mapping[str, int] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    only_this_base: bool = False
    version: str = ""

    def sealed_metadata(self) -> dict[str, str]:
        """Return `metadata` with a place for the file's seal (`seal_file`), as its first entry."""
        return {KEY: UNSEALED, **self.metadata()}

    def metadata(self) -> dict[str, str]:
        """Return text → text, as ``.safetensors`` files hold it; the same provenance gives the same texts."""
        return {
            FORMAT_KEY: FORMAT_NAME,
            LAYOUT_KEY: LAYOUT,
            "scaling": "folded into lora_B",
            "adapter": self.adapter,
            "adapter_sha256": self.adapter_sha256,
            "base": self.base,
            "base_sha256": self.base_sha256,
            "ranks": _json(self.ranks),
            "kinds": _json(self.kinds),
            ONLY_THIS_BASE_KEY: _json(self.only_this_base),
            "version": self.version,
        }


@dataclass(frozen=True)
class Writer:
    """How converted tensors are written in a format: an entry of `lora_export.formats.WRITERS`.

    Attributes:
        suffix: Of the output's name; empty for a folder.
        write: ``(path, tensors, provenance)``; names and values as the graph takes them.
        dtype: The only dtype that the format's reader takes, as `ExposedModule.dtype`; empty for any.
        refusal: ``(module's name, kind)`` → why the format's reader can't take a module, or an empty text.
        foreign: For graphs that lora-export did not make: their LoRA inputs have names of their own.
    """

    suffix: str
    write: Callable[[Path, Mapping[str, Array], Provenance], None]
    dtype: str = ""
    refusal: Callable[[str, str], str] = lambda name, kind: ""
    foreign: bool = False


def _json(value: Mapping[str, Any] | bool) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def is_converted(config: Mapping[str, Any]) -> bool:
    """Whether an adapter (`Adapter.config`), or a file's metadata, is in a graph's layout already."""
    return bool(config.get(LAYOUT_KEY) == LAYOUT)


def only_this_base(adapter: Adapter) -> bool:
    """Whether a converted adapter has values that were computed from its base's, see `Provenance`."""
    marked = is_converted(adapter.config) and adapter.config.get(ONLY_THIS_BASE_KEY) == _json(True)
    return marked or any(module.scale is not None for module in adapter.modules.values())


def base_version(base_sha256: str) -> int:
    """Return the part of a base's identity that fits into an integer; 0 where there is no identity."""
    return int(base_sha256[:16] or "0", 16) % (1 << _BASE_VERSION_BITS)


def base_problem(config: Mapping[str, Any], base_sha256: str) -> str:
    """Return in what a converted adapter's base differs from a graph's, or an empty text.

    Args:
        config: Of the adapter.
        base_sha256: Identity of the graph's base.
    """
    if not is_converted(config) or not base_sha256:
        return ""
    made_for = config.get("base_sha256")
    if made_for:
        return "" if made_for == base_sha256 else f"base sha256 {made_for}, the graph's is {base_sha256}"
    number = config.get("base_version")
    if not number or number == base_version(base_sha256):
        return ""
    return f"base version {number}, the graph's is {base_version(base_sha256)}"


def refuse_other_base(adapter: Adapter, base_sha256: str, where: str, any_base: bool) -> tuple[str, ...]:
    """Refuse an adapter that was converted for another base.

    Args:
        adapter: Any adapter; one that is not converted fits every base, as far as can be told here.
        base_sha256: Identity of the base (`manifest.identity_of`).
        where: The graph's file, for messages.
        any_base: Go on with another base, where the values are trained ones.

    Returns:
        A warning where it goes on with another base, else nothing.

    Raises:
        AdapterError: It was made for another base.
    """
    problems = [problem] if (problem := base_problem(adapter.config, base_sha256)) else []
    if not problems:
        return ()
    hint = "give the adapter that it was made of, or convert that for this graph (convert-adapter)"
    if only_this_base(adapter):
        problems.append(
            "some values were computed from that base's weights (DoRA's factors, or whole parameters as "
            "changes): they hold for no other base"
        )
    elif any_base:
        return (f"bound to another base than it was made for: {problem}",)
    else:
        hint += ", or go on with convert-adapter --any-base (any_base=True)"
    raise AdapterError(f"adapter '{adapter.name}' was made for another base than {where}", hint, problems)
