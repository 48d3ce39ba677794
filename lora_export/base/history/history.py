"""Read which adapters are merged into a base from the manifest that the last merge has written beside it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_export.adapter import Adapter
from lora_export.errors import CheckpointError
from lora_export.formats.reading.scope import overlap
from lora_export.storage.inputs import note_inputs
from lora_export.untrusted.documents import read_json
from lora_export.untrusted.fields import FieldError, from_plain
from lora_export.untrusted.places import is_there

# Name of the manifest beside the weights of a merged folder.
MANIFEST = "lora.json"
# Key of a manifest's outputs for earlier merges.
EARLIER = "earlier"
_HINT = (
    "it says what is merged into the base already: restore it from where the base came from; remove it only "
    "if nothing is"
)


@dataclass(frozen=True)
class _Merged:
    """Adapter of a manifest."""

    name: str
    sha256: str
    part: str | None = None


@dataclass(frozen=True)
class _Row:
    """Row of a manifest's plan."""

    adapter: str
    parameter: str
    action: str
    place: str


@dataclass(frozen=True)
class _Plan:
    rows: tuple[_Row, ...]


@dataclass(frozen=True)
class _Earlier:
    """Earlier merges of a manifest; the first manifests had only an adapter's name."""

    adapters: Mapping[str, str | Mapping[str, str]] = field(default_factory=dict)
    changed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Record:
    """Parts of a manifest that are read here."""

    adapters: tuple[_Merged, ...]
    outputs: Mapping[str, Any]
    plan: _Plan


@dataclass(frozen=True)
class History:
    """Merges that led to a base.

    Attributes:
        adapters: SHA-256 of an adapter's file → its merged parts (`Adapter.part`; an empty text for all of
            it), each with the adapter's name.
        changed: Stored weight, and each parameter in it (`rows_name`) → the adapters that changed it.
    """

    adapters: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    changed: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def merged(self, adapter: Adapter) -> str:
        """Return a text on the parts of an adapter's file that are in the base already; "" if none is."""
        before = self.adapters.get(adapter.sha256, {}) if adapter.sha256 else {}
        found = [
            f"'{name}'" + (f", its part {part.removeprefix('None').removeprefix(':')}" if part else "")
            for part, name in before.items()
            if overlap(part or None, adapter.part, adapter.flattened)
        ]
        return f"{adapter.name} (as {'; '.join(found)})" if found else ""

    def outputs(self) -> dict[str, Any]:
        """Return the history as outputs of the next manifest; empty for a base without a history."""
        return {EARLIER: {"adapters": self.adapters, "changed": self.changed}} if self.changed else {}


def history_of(manifest: Path, graph: Path | None = None) -> History:
    """Return the history in a manifest; an empty one if there is no manifest.

    A manifest that can't be read is an error: otherwise a second merge of an adapter, or a copy over an
    earlier merge's changes, would not be noticed.

    Args:
        manifest: ``lora.json`` of a merged folder, ``OUT.lora.json`` of a merged graph.
        graph: Path of the merged graph, which may be a link.

    Raises:
        CheckpointError: The file is damaged, not a manifest, or a link out of its folder.
    """
    # Also if there is no manifest: one that appears later belongs to another base.
    note_inputs([manifest])
    if not is_there(manifest):
        return History()
    try:
        record = from_plain(
            _Record,
            read_json(manifest, CheckpointError, _HINT, given=graph or manifest.parent),
            known_only=False,
        )
        before = record.outputs.get(EARLIER)
        earlier = _Earlier() if not before else from_plain(_Earlier, before)
    except FieldError as error:
        raise CheckpointError(
            f"{manifest}, the manifest of earlier merges, is damaged or not one", _HINT, error.problems
        ) from error
    adapters = {sha256: _parts(merged) for sha256, merged in earlier.adapters.items()}
    for entry in record.adapters:
        if entry.sha256:
            adapters.setdefault(entry.sha256, {})[entry.part or ""] = entry.name
    changed = defaultdict(list, {place: list(names) for place, names in earlier.changed.items()})
    for row in record.plan.rows:
        for place in row.place.split(", ") if row.action not in ("refused", "unchanged") else ():
            for stored in (place, rows_name(place, row.parameter)):
                changed[stored].append(row.adapter)
    return History(adapters, dict(changed))


def _parts(merged: str | Mapping[str, str]) -> dict[str, str]:
    """Return parts and names in an earlier manifest's entry; the first manifests had names without parts."""
    return {"": merged} if isinstance(merged, str) else dict(merged)


def rows_name(stored: str, parameter: str) -> str:
    """Return the name of a parameter that is some rows of a stored weight."""
    return f"{stored} of {parameter}"
