"""Bring each target of an adapter to its place in a graph.

The order of evidence (each is described in `evidence`): scope, node name, folded-from, weight name, then
the same for renamed, fused and split modules, then content. Rules:

1. One change of prefix holds for the whole adapter (`names.find_prefixes`).
2. A weight's name is believed only where the node that reads it does not name another module.
3. More than one constant for a target is an ambiguity, unless their bytes are the same.
4. Where the checkpoint is at hand, every match by name must also match by content.
5. What is not found is a `Miss` with its reason; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.graph import GraphFile, stored_matrix
from lora_export.patch import Placement
from lora_export.sites import content, fit, names
from lora_export.sites.evidence import (
    FOLDED,
    SOURCES,
    WEIGHT_NAME,
    collect,
    node_path,
    scope_path,
)
from lora_export.sites.slot import Use
from lora_export.sites.target import Miss, Part, Site, Target
from lora_export.sites.uses import find_uses

# Canonical weight of a parameter path in the base checkpoint, or None where the checkpoint has none.
WeightOf = Callable[[Target], Array | None]


class Resolver:
    """The weights of one graph, ready to be asked for targets.

    Args:
        graph: The graph.
        weight_of: Looks up a target's weight in the base checkpoint; enables content.
    """

    def __init__(self, graph: GraphFile, weight_of: WeightOf | None = None) -> None:
        self.uses = find_uses(graph)
        self._evidence = collect(self.uses)
        self._known = {key for table in self._evidence.values() for key in table}
        self._weight_of = weight_of

    def resolve(self, targets: Sequence[Target], flattened: bool = False) -> tuple[list[Site], list[Miss]]:
        """Return a site or a miss for each target."""
        wanted = {id(target): target.key for target in targets}
        misses: list[Miss] = []
        if flattened:
            wanted, misses = self._unflatten(targets)
            targets = [target for target in targets if id(target) in wanted]
        prefixes = names.find_prefixes(wanted.values(), self._known)
        sites: list[Site] = []
        if len(prefixes) > 1 and self._weight_of is None:
            where = ", ".join(sorted(f"{p.strip or '∅'} → {p.add or '∅'}" for p in prefixes)[:4])
            reason = f"ambiguous: its name fits the graph under several prefixes ({where})"
            return [], [*misses, *(Miss(target, reason) for target in targets)]
        prefix = prefixes[0] if len(prefixes) == 1 else None
        for target in targets:
            found = self._by_name(target, wanted[id(target)], prefix) if prefix else Miss(target, "")
            if isinstance(found, Miss) and self._weight_of is not None:
                found = self._by_content(target, found)
            if isinstance(found, Miss):
                misses.append(found if found.reason else Miss(target, self._not_found(target)))
            else:
                sites.append(found)
        return sites, misses

    def _unflatten(self, targets: Sequence[Target]) -> tuple[dict[int, str], list[Miss]]:
        """Give kohya's underscored paths their dots back, from the paths that the graph knows."""
        table: dict[str, set[str]] = {}
        for key in self._known:
            table.setdefault(names.flatten(key), set()).add(key)
        wanted, misses = {}, []
        for target in targets:
            flat = names.flatten(target.key)
            keys = table.get(flat) or {k for f, ks in table.items() if f.endswith("_" + flat) for k in ks}
            if len(keys) == 1:
                wanted[id(target)] = next(iter(keys))
            elif keys:
                misses.append(Miss(target, f"ambiguous: may be {', '.join(sorted(keys)[:4])}"))
            else:
                misses.append(Miss(target, self._not_found(target)))
        return wanted, misses

    def _not_found(self, target: Target) -> str:
        leaf = target.path.rpartition(".")[2]
        near = sorted(key for key in self._known if key.rpartition(".")[0].endswith(leaf))[:2]
        if near:
            return f"not found; the graph has {', '.join(near)}"
        return (
            "not found: no node or weight of the graph names it (pruned by the exporter, or names are gone)"
        )

    def _by_name(self, target: Target, key: str, prefix: names.Prefix) -> Site | Miss:
        reason = ""
        for variant in names.variants(key):
            keys = [prefix.apply(name) for name in variant.keys]
            for source in SOURCES:
                groups = [self._candidates(target, source, name) for name in keys]
                if not all(groups):
                    continue
                evidence = source + (f"; {variant.how}" if variant.how else "")
                path = str(keys[0]).rpartition(".")[0]
                found = self._fit(target, path, groups, variant.part, evidence)
                if isinstance(found, Site):
                    return self._verified(found)
                reason = reason or found.reason
        return Miss(target, reason)

    def _candidates(self, target: Target, source: str, key: str | None) -> list[Use]:
        uses = self._evidence[source].get(key or "", ())
        return [use for use in uses if fit.accepts(target, use)]

    def _fit(
        self,
        target: Target,
        path: str,
        groups: list[list[Use]],
        part: tuple[int, int] | None,
        evidence: str,
    ) -> Site | Miss:
        refused = [use.refusal for group in groups for use in group if use.refusal]
        if refused:
            return Miss(target, f"{refused[0]}: it can't be merged into")
        if len(groups) > 1:
            return _fit_split(target, groups, evidence)
        uses = groups[0]
        source = evidence.partition(";")[0]
        if source in (FOLDED, WEIGHT_NAME) and (other := self._other_reader(path, uses)):
            return Miss(target, other)
        fits: list[tuple[Use, tuple[Placement, ...]]] = []
        reason = ""
        for use in uses:
            placed = fit.place(target, use, part)
            if isinstance(placed, str):
                reason = reason or placed
            else:
                fits.append((use, placed))
        if not fits:
            return Miss(target, f"shapes differ: {reason}")
        return _one_constant(target, fits, evidence)

    def _other_reader(self, path: str, uses: Iterable[Use]) -> str:
        """Rule 2: why a weight with the right name may hold other values, or an empty string."""
        if self._weight_of is not None:
            return ""
        for use in uses:
            reader = scope_path(use.node)
            reader = node_path(use.node) if reader is None else reader
            if reader and not _related(reader, path):
                return (
                    f"the weight {use.root.name!r} is read by a node of {reader!r}: the exporter may have "
                    "changed its values (a folded batch norm); give --checkpoint to compare them"
                )
        return ""

    def _verified(self, site: Site) -> Site | Miss:
        """Rule 4, and rescaled rows: a name alone can't tell that a batch norm was folded in."""
        target = site.target
        conv = [part for part in site.parts if target.kind == "conv" and _renamed(part)]
        wanted = None if self._weight_of is None else self._weight_of(target)
        if wanted is None:
            if conv:
                return Miss(
                    target,
                    f"the exporter renamed its weight to {conv[0].root.name!r} and may have folded a batch "
                    "norm into it; give --checkpoint to compare the values",
                )
            return site
        parts = []
        for part in site.parts:
            checked = _check_content(target, part, wanted)
            if isinstance(checked, str):
                return Miss(target, f"{checked} (found by {site.evidence})")
            parts.append(checked)
        return replace(site, parts=tuple(parts), evidence=f"{site.evidence}; content agrees")

    def _by_content(self, target: Target, miss: Miss) -> Site | Miss:
        assert self._weight_of is not None
        wanted = self._weight_of(target)
        if wanted is None or target.experts > 1:
            return miss
        hits: dict[int, Part] = {}
        for use in self.uses:
            if id(use.root) in hits:
                part = hits[id(use.root)]
                hits[id(use.root)] = replace(part, uses=(*part.uses, use))
            elif not use.refusal and fit.accepts(target, use):
                found = _search(target, use, wanted)
                if found is not None:
                    hits[id(use.root)] = found
        parts = sorted(hits.values(), key=lambda part: part.placements[0].rows)
        readers = max((len(part.uses) for part in parts), default=0)
        if readers > 1:
            return Miss(target, f"ambiguous: its values are read by {readers} nodes and no name tells which")
        if _tile(target, parts):
            return Site(target, tuple(parts), "content")
        if parts:
            where = ", ".join(str(part.root.name) for part in parts[:4])
            return Miss(target, f"ambiguous: its values are found in {len(parts)} weights ({where})")
        return miss if miss.reason else Miss(target, "not found: no weight of the graph holds its values")


def _fit_split(target: Target, groups: list[list[Use]], evidence: str) -> Site | Miss:
    """Fit a module that the exporter split along its rows into several weights."""
    parts, start = [], 0
    rows, cols = target.matrix
    for uses in groups:
        roots = {id(use.root) for use in uses}
        stored = fit.stored_shape(target, uses[0])
        transposed = uses[0].transposed and target.kind != "vector"
        height, width = (stored[1], stored[0]) if transposed else stored
        if len(roots) > 1 or width != cols:
            return Miss(target, f"shapes differ: a part of the split weight is {(height, width)}")
        placement = fit.placement_at(0, (start, start + height), transposed)
        parts.append(Part(uses[0].root, tuple(uses), (placement,)))
        start += height
    if start != rows:
        return Miss(target, f"shapes differ: the split weight has {start} rows, the adapter {rows}")
    return Site(target, tuple(parts), evidence)


def _one_constant(
    target: Target, fits: list[tuple[Use, tuple[Placement, ...]]], evidence: str
) -> Site | Miss:
    """Rule 3: one constant, or several with the same bytes (an exporter folds a shared weight once a use)."""
    roots: dict[int, list[tuple[Use, tuple[Placement, ...]]]] = {}
    for use, placed in fits:
        roots.setdefault(id(use.root), []).append((use, placed))
    parts = tuple(
        Part(group[0][0].root, tuple(use for use, _ in group), group[0][1]) for group in roots.values()
    )
    if any(use.transposed != group[0][0].transposed for group in roots.values() for use, _ in group):
        return Miss(target, "ambiguous: its weight is read in both orientations")
    if len(parts) > 1 and not _same_bytes([part.root for part in parts]):
        where = ", ".join(str(part.root.name) for part in parts[:4])
        return Miss(target, f"ambiguous: {len(parts)} weights have its name and shape ({where})")
    return Site(target, parts, evidence)


def _same_bytes(roots: list[ir.Value]) -> bool:
    first = roots[0].const_value
    assert first is not None
    for root in roots[1:]:
        assert root.const_value is not None
        if not np.array_equal(stored_matrix(first), stored_matrix(root.const_value)):
            return False
    return True


def _related(reader: str, path: str) -> bool:
    """Whether a node of module ``reader`` may read ``path``'s weight: itself, or a module around it."""
    reader_parts, parts = reader.split("."), path.split(".")
    while parts:
        if reader_parts[-len(parts) :] == parts:
            return True
        parts = parts[:-1]
    return False


def _renamed(part: Part) -> bool:
    """The exporter gave the weight a name of its own: it computed the values."""
    return not str(part.root.name).endswith(".weight") or any(
        scope_path(use.node) not in (None, str(part.root.name).removesuffix(".weight")) for use in part.uses
    )


def _canonical(target: Target, part: Part, placement: Placement) -> Array:
    """Return the stored rectangle of a placement, in canonical orientation."""
    assert part.root.const_value is not None
    matrix = stored_matrix(part.root.const_value)
    view = matrix.T if placement.transposed else matrix
    offset = placement.col if placement.transposed else placement.row
    start, stop = placement.rows
    return view[offset : offset + stop - start]


def _check_content(target: Target, part: Part, wanted: Array) -> Part | str:
    if target.kind == "vector" or target.experts > 1:
        return _check_whole(part, wanted)
    (placement,) = part.placements
    start, stop = placement.rows
    stored = _canonical(target, part, placement)
    matches = [content.compare(stored, matrix[start:stop]) for matrix in _orientations(target, wanted)]
    match = min(matches, key=lambda match: match.difference)
    if match.same:
        return part
    if match.scaled and target.kind == "conv":
        return replace(part, placements=(replace(placement, row_scale=match.row_scale),))
    return (
        f"the weight {part.root.name!r} does not hold the checkpoint's values "
        f"(relative difference {match.difference:.2g}, least cosine {match.cosine:.3f})"
    )


def _orientations(target: Target, wanted: Array) -> list[Array]:
    """Return the checkpoint's matrix; a square one also transposed: it may be a Conv1D's."""
    matrix = wanted.reshape(target.matrix)
    square = target.kind in ("linear", "any") and wanted.ndim == 2 and matrix.shape[0] == matrix.shape[1]
    return [matrix, matrix.T] if square else [matrix]


def _check_whole(part: Part, wanted: Array) -> Part | str:
    assert part.root.const_value is not None
    stored = np.asarray(part.root.const_value.numpy())
    for candidate in (wanted, wanted.swapaxes(-1, -2) if wanted.ndim > 1 else wanted):
        if candidate.shape == stored.shape:
            flat = (-1, candidate.shape[-1]) if candidate.ndim > 1 else (-1, 1)
            if content.compare(stored.reshape(flat), candidate.reshape(flat)).same:
                return part
    return f"the weight {part.root.name!r} does not hold the checkpoint's values"


def _search(target: Target, use: Use, wanted: Array) -> Part | None:
    """Find the target's values in a use's constant, also as some rows of it, or it as some rows of them."""
    assert use.root.const_value is not None
    transposed = use.transposed and target.kind != "vector"
    stored = stored_matrix(use.root.const_value)
    view = stored.T if transposed else stored
    rows, cols = target.matrix
    if view.shape[1] != cols or (target.kind == "vector" and len(view) != rows):
        return None
    for matrix in _orientations(target, wanted):
        fused = len(view) >= rows
        offset = content.find_rows(view, matrix) if fused else content.find_rows(matrix, view)
        if offset is None:
            continue
        covered = (0, rows) if fused else (offset, offset + len(view))
        placement = fit.placement_at(offset if fused else 0, covered, transposed)
        checked = _check_content(target, Part(use.root, (use,), (placement,)), wanted)
        if not isinstance(checked, str):
            return checked
    return None


def _tile(target: Target, parts: Sequence[Part]) -> bool:
    """Whether the parts are the whole target: one of them, or rows that follow each other."""
    row = 0
    for part in parts:
        start, stop = part.placements[0].rows
        if start != row:
            return False
        row = stop
    return row == target.matrix[0]
