"""Bring each target of an adapter to its place in a graph.

The order of evidence (each is described in `evidence`): scope, node name, folded-from, weight name, then
the same for renamed, fused and split modules, then content. Rules:

1. One change of prefix holds for the whole adapter (`names.find_prefixes`).
2. A weight's name is believed only where the node that reads it does not name another module.
3. More than one constant for a target is an ambiguity, unless their bytes are the same.
4. Where the checkpoint is at hand, every match by name must also match by content.
5. Every reader of a weight is the module's, or known to be another's (`readers.doubt`).
6. No two targets have the same place.
7. What is not found is a `Miss` with its reason; nothing is guessed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

from lora_export.adapter import Array
from lora_export.graph import GraphFile
from lora_export.patch import Placement
from lora_export.sites import fit, matrices, names, readers
from lora_export.sites.evidence import FOLDED, NODE_NAME, SCOPE, SOURCES, WEIGHT_NAME, collect
from lora_export.sites.slot import Use
from lora_export.sites.target import Miss, Part, Site, Target, WeightOf
from lora_export.sites.uses import find_uses
from lora_export.sites.verify import check_content, search, tile, unconfirmed

# Part of the evidence where a checkpoint is at hand and the graph's weight is quantised.
NOT_COMPARED = "quantised, its values are not compared"


class Resolver:
    """The weights of one graph, ready to be asked for targets.

    Args:
        graph: The graph.
        weight_of: Looks up a target's weight in the base checkpoint; enables content.
        branches: Places are wanted beside the weights, not in them: quantised weights have such places too.
    """

    def __init__(
        self, graph: GraphFile, weight_of: WeightOf | None = None, *, branches: bool = False
    ) -> None:
        self.uses = find_uses(graph)
        self._evidence = collect(self.uses)
        self._known = {key for table in self._evidence.values() for key in table}
        self.weight_of = weight_of
        self._weight_of = weight_of or (lambda target: None)
        self._has_checkpoint = weight_of is not None
        self._wanted: set[str] = set()
        self._branches = branches

    def resolve(self, targets: Sequence[Target], flattened: bool = False) -> tuple[list[Site], list[Miss]]:
        """Return a site or a miss for each target."""
        keys = {id(target): target.key for target in targets}
        misses: list[Miss] = []
        if flattened:
            keys, misses = self._unflatten(targets)
            targets = [target for target in targets if id(target) in keys]
        prefixes = names.find_prefixes(keys.values(), self._known)
        if len(prefixes) > 1 and not self._has_checkpoint:
            where = ", ".join(sorted(f"{p.strip or '∅'} → {p.add or '∅'}" for p in prefixes)[:4])
            reason = f"ambiguous: its name fits the graph under several prefixes ({where})"
            return [], [*misses, *(Miss(target, reason) for target in targets)]
        prefix = prefixes[0] if len(prefixes) == 1 else None
        self._wanted = {prefix.apply(key) or "" for key in keys.values()} if prefix else set()
        found = [self._find(target, keys[id(target)], prefix) for target in targets]
        misses += [miss for miss in found if isinstance(miss, Miss)]
        placed = [site for site in found if isinstance(site, Site)]
        if flattened and self._branches:
            # The names of what is exposed are paths, with their dots.
            placed = [replace(s, target=replace(s.target, key=keys[id(s.target)])) for s in placed]
        sites, claimed = _without_conflicts(placed)
        return sites, [*misses, *claimed]

    def named_uses(self) -> Iterator[tuple[Use, str]]:
        """Yield each use that has a name, with the one to be believed; of repeated calls the first one's."""
        best: dict[int, str] = {}
        for source in reversed(SOURCES):
            for key, uses in sorted(self._evidence[source].items(), key=lambda item: len(item[1])):
                best.update((id(use), key) for use in uses)
        for use in self.uses:
            if id(use) in best:
                yield use, best[id(use)]

    def _find(self, target: Target, key: str, prefix: names.Prefix | None) -> Site | Miss:
        wanted = self._weight_of(target)
        if matrices.is_matrix(target):
            found = matrices.find_matrix(target, wanted, partial(self._search, key, prefix))
        else:
            found = self._search(key, prefix, target, wanted)
        if isinstance(found, Miss) and not found.reason:
            return Miss(target, self._not_found(target))
        return found

    def _search(
        self, key: str, prefix: names.Prefix | None, target: Target, wanted: Array | None
    ) -> Site | Miss:
        found = self._by_name(target, key, prefix, wanted) if prefix else Miss(target, "")
        if isinstance(found, Miss) and wanted is not None:
            found = self._by_content(target, found, wanted)
        return found

    def _unflatten(self, targets: Sequence[Target]) -> tuple[dict[int, str], list[Miss]]:
        """Give kohya's underscored paths their dots back, from the paths that the graph knows."""
        table = names.Flattened(self._known)
        keys, misses = {}, []
        for target in targets:
            fitting = table.find(target.key)
            if len(fitting) == 1:
                keys[id(target)] = fitting[0]
            elif fitting:
                misses.append(Miss(target, f"ambiguous: may be {', '.join(fitting[:4])}"))
            else:
                misses.append(Miss(target, self._not_found(target)))
        return keys, misses

    def _not_found(self, target: Target) -> str:
        leaf = target.path.rpartition(".")[2]
        near = sorted(key for key in self._known if key.rpartition(".")[0].endswith(leaf))[:2]
        if near:
            return f"not found; the graph has {', '.join(near)}"
        return (
            "not found: no node or weight of the graph names it (pruned by the exporter, or names are gone)"
        )

    def _by_name(self, target: Target, key: str, prefix: names.Prefix, wanted: Array | None) -> Site | Miss:
        reason = unread = ""
        for variant in names.variants(key):
            keys = [prefix.apply(name) or "" for name in variant.keys]
            path = keys[0].rpartition(".")[0]
            for source in SOURCES:
                named = [self._evidence[source].get(name, ()) for name in keys]
                groups = [self._candidates(target, path, source, uses) for uses in named]
                if not all(groups):
                    unread = unread or _unread(named)
                    continue
                evidence = source + (f"; {variant.how}" if variant.how else "")
                found = self._fit(target, path, groups, variant.part, evidence, wanted is not None)
                if isinstance(found, Site):
                    problem = readers.doubt(found, path, source, self.uses)
                    found = replace(
                        found, evidence=found.evidence + readers.repeated_calls(found, path, source)
                    )
                    return Miss(target, problem) if problem else self._verified(found, wanted)
                reason = reason or found.reason
        return Miss(target, reason or unread)

    def _candidates(self, target: Target, path: str, source: str, uses: Sequence[Use]) -> list[Use]:
        fitting = [use for use in uses if fit.accepts(target, use)]
        if target.held_turned is not None and source in (SCOPE, NODE_NAME):
            # A node's module may have several matrices of its own: the node doesn't say which one it reads.
            leaf = target.key.rpartition(".")[2]
            fitting = [use for use in fitting if not readers.reads_another(use, path, leaf)]
        if source != NODE_NAME:
            return fitting
        return [use for use in fitting if not self._is_module(target, path, readers.module_of(use.node))]

    def _is_module(self, target: Target, path: str, other: str | None) -> bool:
        """Whether ``sh_1``, taken for the second call of ``sh``, is known to be a module."""
        if other is None or other == path:
            return False
        key = f"{other}.{target.key.rpartition('.')[2]}"
        return key in self._wanted or self._weight_of(replace(target, key=key)) is not None

    def _fit(
        self,
        target: Target,
        path: str,
        groups: list[list[Use]],
        part: tuple[int, int] | None,
        evidence: str,
        verified: bool,
    ) -> Site | Miss:
        if refused := [why for group in groups for use in group if (why := self._refusal(use))]:
            tail = "" if self._branches else ": it can't be merged into"
            return Miss(target, f"{refused[0]}{tail}")
        if len(groups) > 1:
            return fit.place_split(target, groups, evidence)
        (uses,) = groups
        if not verified and evidence.partition(";")[0] in (FOLDED, WEIGHT_NAME):
            # Rule 2.
            foreign = readers.foreign_reader(path, uses)
            if foreign:
                return Miss(target, foreign)
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
        return fit.site_of(target, fits, evidence)

    def _refusal(self, use: Use) -> str:
        return use.no_branch if self._branches else use.refusal

    def _verified(self, site: Site, wanted: Array | None) -> Site | Miss:
        """Rule 4, and rescaled rows: a name alone can't tell that values were computed from the module's."""
        target = site.target
        if wanted is None:
            if reason := unconfirmed(target):
                return Miss(target, reason)
            for part in site.parts:
                if readers.folded_into_conv(target, part):
                    return Miss(
                        target,
                        f"the exporter computed {part.root.name!r} and may have folded a batch norm into it; "
                        "give --checkpoint to compare the values",
                    )
                if origin := readers.computed(target, part):
                    return Miss(
                        target,
                        f"the exporter computed {part.root.name!r} from {origin}; "
                        "give --checkpoint to compare the values",
                    )
            return site
        if any(use.quantised for part in site.parts for use in part.uses):
            return replace(site, evidence=f"{site.evidence}; {NOT_COMPARED}")
        parts = []
        for part in site.parts:
            checked = check_content(target, part, wanted)
            if isinstance(checked, str):
                return Miss(target, f"{checked} (found by {site.evidence})")
            parts.append(checked)
        return replace(site, parts=tuple(parts), evidence=f"{site.evidence}; content agrees")

    def _by_content(self, target: Target, miss: Miss, wanted: Array) -> Site | Miss:
        hits: dict[int, list[Part]] = {}
        for use in self.uses:
            if not fit.accepts(target, use) or use.quantised or self._refusal(use):
                continue
            if id(use.root) in hits:
                hits[id(use.root)] = [replace(part, uses=(*part.uses, use)) for part in hits[id(use.root)]]
            elif found := list(search(target, use, wanted)):
                hits[id(use.root)] = found
        parts = sorted((part for found in hits.values() for part in found), key=_first_row)
        nodes = max((len(part.uses) for part in parts), default=0)
        if nodes > 1:
            return Miss(target, f"ambiguous: its values are read by {nodes} nodes and no name tells which")
        if tile(target, parts):
            site = Site(target, tuple(parts), "content")
            problem = readers.doubt(site, target.path, "content", self.uses)
            return Miss(target, problem) if problem else site
        if parts:
            where = ", ".join(str(part.root.name) for part in parts[:4])
            return Miss(target, f"ambiguous: its values are found in {len(parts)} places ({where})")
        return miss if miss.reason else Miss(target, "not found: no weight of the graph holds its values")


def _first_row(part: Part) -> tuple[int, int]:
    return part.placements[0].rows


def _unread(named: Sequence[Sequence[Use]]) -> str:
    """Why weights of the right name have no use that a module of the target's kind makes."""
    operators = sorted({use.node.op_type for uses in named for use in uses})
    if not operators:
        return ""
    return f"its weight is read by {', '.join(operators)}, which no module of its kind is known to become"


def _without_conflicts(sites: list[Site]) -> tuple[list[Site], list[Miss]]:
    """Rule 6: two targets that would change the same values can't both be right."""
    places: dict[tuple[str, int, int], list[tuple[int, int, Site]]] = defaultdict(list)
    for site in sites:
        for part in site.parts:
            spans = [(*_span(placement), site) for placement in part.placements]
            for use in part.uses:
                places[site.target.action, id(use.node), use.slot.index] += spans
    clashes: dict[int, str] = {}
    for found in places.values():
        found.sort(key=lambda span: span[:2])
        for (_, stop, one), (start, _, other) in pairwise(found):
            if start < stop and one is not other:
                for site, rival in ((one, other), (other, one)):
                    clashes[id(site)] = f"ambiguous: found where {_called(rival.target)} is found as well"
    return (
        [site for site in sites if id(site) not in clashes],
        [Miss(site.target, clashes[id(site)]) for site in sites if id(site) in clashes],
    )


def _span(placement: Placement) -> tuple[int, int]:
    start = placement.col if placement.transposed and placement.col else placement.row
    return start, start + placement.rows[1] - placement.rows[0]


def _called(target: Target) -> str:
    component = target.module.component if target.module else None
    return f"{component}/{target.key}" if component else target.key
