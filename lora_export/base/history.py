"""What earlier merges have put into a base, by the manifest that the last of them has written beside it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Of a manifest's outputs: what had been merged before.
EARLIER = "earlier"


@dataclass(frozen=True)
class History:
    """All merges that led to a base.

    Attributes:
        adapters: SHA-256 of an adapter → its name.
        changed: Stored weight, and each parameter in it (`part_of`) → the adapters that changed it.
    """

    adapters: Mapping[str, str] = field(default_factory=dict)
    changed: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def outputs(self) -> dict[str, Any]:
        """Return what the next manifest says of it in its outputs; nothing of a base without a history."""
        return {EARLIER: {"adapters": self.adapters, "changed": self.changed}} if self.changed else {}


def history_of(manifest: Path) -> History:
    """Return what a manifest tells; nothing where it is missing, or none.

    Args:
        manifest: ``lora.json`` of a merged folder, ``OUT.lora.json`` of a merged graph.
    """
    try:
        record = json.loads(manifest.read_text("utf-8"))
        before = record["outputs"].get(EARLIER) or {"adapters": {}, "changed": {}}
        adapters = dict(before["adapters"])
        adapters |= {entry["sha256"]: entry["name"] for entry in record["adapters"] if entry["sha256"]}
        changed = defaultdict(list, {place: list(names) for place, names in before["changed"].items()})
        for row in record["plan"]["rows"]:
            for place in (
                str(row["place"]).split(", ") if row["action"] not in ("refused", "unchanged") else ()
            ):
                for stored in (place, part_of(place, row["parameter"])):
                    changed[stored].append(str(row["adapter"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return History()
    return History(adapters, dict(changed))


def part_of(stored: str, parameter: str) -> str:
    """Return how a parameter is called that is some rows of a stored weight."""
    return f"{stored} of {parameter}"
