"""Read and write the adapters that merges have put into a graph, as entries of its own metadata.

Entries are ``NAME sha256=… weight=… part=…``, one for each adapter, joined by ``; ``. A graph with exposed
LoRA has them in its LoRA record, so that an adapter in its weights isn't applied a second time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from lora_export.adapter import Adapter
from lora_export.base.history.history import History
from lora_export.errors import AdapterError, GraphError
from lora_export.formats.provenance import is_converted
from lora_export.formats.reading.scope import overlap

MERGED_KEY = "lora_export.merged"
MERGED_BASE_KEY = "lora_export.merged_base"
# Key for adapters merged into the folder that a graph was captured from.
CAPTURED_KEY = "lora_export.merged_before_capture"
_UNKNOWN_WEIGHT = "?"
_SEPARATOR = "; "
_HASH = re.compile(r" sha256=(\S*) weight=")
# An adapter's factor, and the text that may follow it.
# Earlier versions wrote "None" where there is no component.
_PART = re.compile(r"[^;\s]+ part=(?:None(?=:))?([^;\s]+)")


def entries_of(adapters: Sequence[Adapter], factors: Sequence[float]) -> str:
    """Return the entries of merged adapters, with their factors."""
    return _SEPARATOR.join(
        _entry(adapter.name, adapter.sha256, str(factor), adapter.part)
        for adapter, factor in zip(adapters, factors, strict=True)
    )


def entries_before(history: History) -> str:
    """Return the entries of the adapters in a folder's manifest."""
    return _SEPARATOR.join(
        _entry(name, sha256, _UNKNOWN_WEIGHT, part or None)
        for sha256, parts in history.adapters.items()
        for part, name in parts.items()
    )


def joined_entries(*entries: str) -> str:
    """Join texts of entries."""
    return _SEPARATOR.join(filter(None, entries))


def merged_in(metadata: Mapping[str, str]) -> str:
    """Return all entries of a graph's metadata."""
    return joined_entries(metadata.get(CAPTURED_KEY, ""), metadata.get(MERGED_KEY, ""))


def merged_parts(merged: str, sha256: str) -> list[str | None]:
    """Return the parts of an adapter's file that are in a graph (`Adapter.part`), None for all of it.

    Args:
        merged: The graph's entries.
        sha256: Hash of the file.
    """
    # An adapter's name may hold anything, but hardly this.
    _, *entries = merged.split(f" sha256={sha256} weight=") if sha256 else [""]
    return [found and found[1] for found in map(_PART.match, entries)]


def not_in(merged: str, history: History) -> list[str]:
    """Return the names of adapters that are in a graph and, by its manifest, not in a folder.

    Args:
        merged: The graph's entries.
        history: History of the folder.
    """
    return [f"'{name}'" for name, sha256 in adapters_in(merged) if sha256 not in history.adapters]


def adapters_in(merged: str) -> Iterator[tuple[str, str]]:
    """Yield name and hash of each entry; a name begins at the first separator after the previous entry."""
    end = 0
    for found in _HASH.finditer(merged):
        separator = merged.find(_SEPARATOR, end, found.start()) if end else -len(_SEPARATOR)
        if (end and separator < 0) or not (name := merged[separator + len(_SEPARATOR) : found.start()]):
            continue
        yield name, found[1]
        end = found.end()


def refuse_merged_into(where: str, merged: str, adapters: Sequence[Adapter]) -> None:
    """Refuse adapters that are in a graph's weights already.

    Args:
        where: The graph's file.
        merged: The graph's entries.
        adapters: Adapters to merge into it, or to put beside its weights, converted ones included.

    Raises:
        GraphError: Some of the adapters, or parts of their files, are in it.
    """
    again = [adapter.name for adapter in adapters if _is_in(merged, adapter)]
    if again:
        raise GraphError(
            f"{where} has this adapter merged into it already",
            "give the graph that it was merged into (for LoRA inputs, one that was made from that)",
            again,
        )


def refuse_bound(adapter: Adapter, merged: str, where: str) -> None:
    """Refuse to bind an adapter to a graph that has it in its weights.

    Raises:
        AdapterError: The adapter is in them.
    """
    if _is_in(merged, adapter):
        raise AdapterError(
            f"adapter '{adapter.name}' is merged into the weights of {where} already: it would act twice",
            "omit it, because the graph without an adapter is the base with it; or make the graph from the "
            "base into which nothing was merged",
        )


def _is_in(merged: str, adapter: Adapter) -> bool:
    converted = is_converted(adapter.config)
    sha256 = str(adapter.config.get("adapter_sha256", "")) if converted else adapter.sha256
    return any(overlap(part, adapter.part, adapter.flattened) for part in merged_parts(merged, sha256))


def _entry(name: str, sha256: str, weight: str, part: str | None) -> str:
    return f"{name} sha256={sha256} weight={weight}" + (f" part={part}" if part is not None else "")
