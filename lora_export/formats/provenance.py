"""The provenance of a converted adapter: the base it was made for, and the adapter it was made from.

A converted file holds tensors in a graph's layout (`graph.exposed`). Shapes don't show whether matrices are
transposed (square ones least of all), so a file is identified by its metadata, never by its tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
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


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The origin of a converted adapter, and the base that it belongs to.

    Attributes:
        adapter: Name of the adapter.
        adapter_sha256: Hash of the file it was made from.
        base: File name of the base graph.
        base_sha256: The base graph's identity.
        ranks: Module's name → rank of its tensors.
        kinds: Module's name → kind, for modules that are not ``linear``.
        only_this_base: True if values were computed from the base's: DoRA's factors, or changes that turn the
            base's parameters into whole ones of the adapter.
        version: Version of lora-export.
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
        """Return text → text, as ``.safetensors`` files hold it; equal provenances give equal texts."""
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


@dataclass(frozen=True, kw_only=True)
class Writer:
    """The writer of a format for converted tensors: an entry of `lora_export.formats.WRITERS`.

    Attributes:
        suffix: Ending of the output's name; empty for a folder.
        write: Function of ``(path, tensors, provenance)``; names and values in the graph's layout.
        dtype: The only dtype that the format's reader takes, as `ExposedModule.dtype`; empty for any.
        refusal: ``(module's name, kind)`` → reason why the format's reader can't take a module, or "".
        foreign: True if it is for graphs of other tools, whose LoRA inputs have names of their own.
    """

    suffix: str
    write: Callable[[Path, Mapping[str, Array], Provenance], None]
    dtype: str = ""
    refusal: Callable[[str, str], str] = lambda name, kind: ""
    foreign: bool = False


def _json(value: Mapping[str, Any] | bool) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def is_converted(config: Mapping[str, Any]) -> bool:
    """Return whether an adapter (by its `Adapter.config`, or a file's metadata) is in a graph's layout."""
    return bool(config.get(LAYOUT_KEY) == LAYOUT)


def only_this_base(adapter: Adapter) -> bool:
    """Return whether a converted adapter has values computed from its base's, see `Provenance`."""
    marked = is_converted(adapter.config) and adapter.config.get(ONLY_THIS_BASE_KEY) == _json(True)
    return marked or any(module.scale is not None for module in adapter.modules.values())


def base_version(base_sha256: str) -> int:
    """Return the part of a base's identity that fits into an integer; 0 without an identity."""
    return int(base_sha256[:16] or "0", 16) % (1 << _BASE_VERSION_BITS)


def base_problem(config: Mapping[str, Any], base_sha256: str) -> str:
    """Return the difference between a converted adapter's base and a graph's, or "".

    Args:
        config: Config of the adapter.
        base_sha256: Identity of the graph's base.
    """
    if not is_converted(config) or not base_sha256:
        return ""
    made_for = config.get("base_sha256")
    if made_for:
        return "" if made_for == base_sha256 else f"base sha256 {made_for}, but the graph's is {base_sha256}"
    number = config.get("base_version")
    if not number or number == base_version(base_sha256):
        return ""
    return f"base version {number}, but the graph's is {base_version(base_sha256)}"


def refuse_other_base(adapter: Adapter, base_sha256: str, where: str, any_base: bool) -> tuple[str, ...]:
    """Refuse an adapter that was converted for another base.

    Args:
        adapter: Any adapter; one that is not converted is not checked here.
        base_sha256: Identity of the base (`manifest.identity_of`).
        where: The graph's file, for messages.
        any_base: Go on with another base, unless values were computed from the adapter's own.

    Returns:
        A warning if it goes on with another base, else nothing.

    Raises:
        AdapterError: The adapter was made for another base.
    """
    problems = [problem] if (problem := base_problem(adapter.config, base_sha256)) else []
    if not problems:
        return ()
    hint = "give the adapter that it was made from, or convert that one for this graph (convert-adapter)"
    if only_this_base(adapter):
        problems.append(
            "some values were computed from that base's weights (DoRA's factors, or whole parameters as "
            "changes): they are valid only for that base"
        )
    elif any_base:
        return (f"bound to another base than it was made for: {problem}",)
    else:
        hint += ", or go on with convert-adapter --any-base (any_base=True)"
    raise AdapterError(f"adapter '{adapter.name}' was made for another base than {where}", hint, problems)


def refuse_other_bases(adapters: Sequence[Adapter], base_sha256: str) -> None:
    """Raise `AdapterError` for files that were converted for a graph of another base."""
    problems = [
        f"{adapter.name}: {problem}"
        for adapter in adapters
        if (problem := base_problem(adapter.config, base_sha256))
    ]
    if problems:
        raise AdapterError(
            "adapters were converted for another base",
            "give the adapters that they were made from",
            problems,
        )
