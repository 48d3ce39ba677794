"""Read a merged candidate's manifest: which adapters, with which weights, and what rounding cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export.adapter import Adapter
from lora_export.errors import AdapterError, GraphError
from lora_export.parity.judge.limits import StatedRounding
from lora_export.parity.result import BASE, State
from lora_export.storage.hashes import identity_of_graph
from lora_export.storage.manifest import Manifest
from lora_export.untrusted.documents import MAX_BYTES, open_regular
from lora_export.untrusted.links import leads_out
from lora_export.untrusted.places import is_there

_SUFFIX = ".lora.json"


@dataclass(frozen=True)
class Merged:
    """The state that a merged candidate is in.

    Attributes:
        state: Adapters and weights.
        rounding: Cost of rounding W0 + ΔW, if the manifest states it.
        notes: Notes on differences between the manifest and the user's arguments.
    """

    state: State = BASE
    rounding: StatedRounding | None = None
    notes: tuple[str, ...] = ()


def read_merged(graph: Path, adapters: Mapping[str, Adapter], weights: Sequence[float]) -> Merged:
    """Return the state that a plain candidate should be in.

    Args:
        graph: The candidate; its manifest is expected beside it.
        adapters: Adapters that the user says are merged into it.
        weights: Weight of each adapter; by default the manifest's, or 1.

    Raises:
        AdapterError: The numbers of weights and adapters differ.
    """
    if weights and len(weights) != len(adapters):
        raise AdapterError(
            f"{len(weights)} weights for {len(adapters)} adapters",
            "give one --weight for each --adapter" if adapters else "give --adapter too, or omit --weight",
        )
    notes: list[str] = []
    manifest = _manifest(graph, notes)
    if manifest is not None and not _is_of(manifest, graph):
        notes.append(
            f"{graph.with_suffix(_SUFFIX).name} belongs to another merge, or {graph.name} was changed since: "
            "its weights and rounding are ignored"
        )
        manifest = None
    left = _entries(manifest, graph, notes)
    listed = ", ".join(str(entry["name"]) for entry in left)
    state = []
    for number, (name, adapter) in enumerate(adapters.items()):
        entry = _entry_of(adapter, left)
        if entry is None and listed:
            notes.append(f"the manifest of {graph.name} does not name adapter '{name}'; it names: {listed}")
        if entry is not None:
            left.remove(entry)
            if _scalings(entry) != _scalings_of(adapter):
                notes.append(
                    f"adapter '{name}' has the weights of '{entry['name']}' in the manifest of {graph.name}, "
                    f"but another scaling: {_span(_scalings_of(adapter))}, there {_span(_scalings(entry))}"
                )
        weight = float(entry["weight"]) if entry is not None else 1.0
        chosen = weights[number] if weights else weight
        if entry is not None and chosen != weight:
            notes.append(
                f"adapter '{name}' was merged with weight {weight:g}, as the manifest of {graph.name} says; "
                f"it is checked with {chosen:g}"
            )
        elif chosen != 1 and not weights:
            notes.append(
                f"adapter '{name}' is checked with weight {weight:g}, as the manifest of {graph.name} says"
            )
        state.append((name, chosen))
    notes += [
        f"the manifest of {graph.name} names adapter '{entry['name']}', which was not given" for entry in left
    ]
    return Merged(tuple(state), _rounding(manifest, graph) if state else None, tuple(notes))


def _entries(manifest: Manifest | None, graph: Path, notes: list[str]) -> list[Mapping[str, Any]]:
    """Return the adapters of a manifest; none if it is not as we write it, as the manifest is optional."""
    try:
        return [
            {
                "name": str(entry["name"]),
                "sha256": str(entry["sha256"]),
                "weight": float(entry["weight"]),
                "scalings": {key: float(module["scaling"]) for key, module in entry["modules"].items()},
            }
            for entry in (manifest.adapters if manifest is not None else ())
        ]
    except (TypeError, ValueError, OverflowError, KeyError, AttributeError):
        notes.append(_ignored(graph, "its adapter entries are damaged"))
        return []


def _ignored(graph: Path, why: str) -> str:
    return f"{graph.with_suffix(_SUFFIX).name}: {why}; its weights and rounding are ignored"


def _entry_of(adapter: Adapter, entries: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the manifest's entry for an adapter's file; of several the one with its scaling.

    The hash covers the weights alone; the scaling is in another file.
    """
    same = [entry for entry in entries if adapter.sha256 and entry["sha256"] == adapter.sha256]
    return min(same, key=lambda entry: _scalings(entry) != _scalings_of(adapter), default=None)


def _scalings(entry: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = entry["scalings"]
    return found


def _scalings_of(adapter: Adapter) -> dict[str, float]:
    return {key: module.scaling for key, module in adapter.modules.items()}


def _span(scalings: Mapping[str, float]) -> str:
    low, high = min(scalings.values(), default=0.0), max(scalings.values(), default=0.0)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _manifest(graph: Path, notes: list[str]) -> Manifest | None:
    beside = graph.with_suffix(_SUFFIX)
    if not is_there(beside):
        return None
    if problem := leads_out(beside, graph):
        notes.append(_ignored(graph, f"it {problem}"))
        return None
    try:
        with open_regular(beside) as file:
            # One byte more than is read of any document is an error there.
            return Manifest.from_json(file.read(MAX_BYTES + 1).decode("utf-8"))
    # The manifest is optional: what it would have stated is measured anyway.
    except GraphError as error:
        notes.append(_ignored(graph, "; ".join((error.message, *error.problems[:1]))))
    except (OSError, UnicodeDecodeError) as error:
        notes.append(_ignored(graph, f"it can't be read ({type(error).__name__})"))
    return None


def _is_of(manifest: Manifest, graph: Path) -> bool:
    """Return True if a manifest is for exactly this graph and its data, as a limit depends on it."""
    identity, data = manifest.outputs.get("identity"), manifest.outputs.get("data")
    return identity == identity_of_graph(graph, graph.parent / Path(str(data)).name)


def _rounding(manifest: Manifest | None, graph: Path) -> StatedRounding | None:
    try:
        relative = float(manifest.rounding["total"]["relative_error"]) if manifest is not None else 0.0
    except (TypeError, ValueError, OverflowError, KeyError):
        return None
    return StatedRounding(relative, graph.with_suffix(_SUFFIX).name) if 0 < relative < math.inf else None
