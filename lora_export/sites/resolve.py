"""Find the site of each target of an adapter in a graph.

The order of evidence (each is described in `evidence`): scope, node name, folded-from, weight name, then
the same for renamed, fused and split modules, then content. Rules:

1. One change of names holds for the whole adapter (`renaming`).
2. A weight's name is believed only if the node that reads it does not name another module, and if an exporter
   is known to give it (`changed.doubt_of`).
3. More than one constant for a target is an ambiguity, unless their bytes are the same.
4. With a checkpoint, every match by name must also match by content.
5. Every reader of a weight is the module's, or known to be another's (`readers.doubt`).
6. No two targets of an adapter have the same site (`conflicts`).
7. No other constant stands for another call of the module (`copies.other_calls`, `answers`, `fused`),
   none is read in the other orientation (`turned`), none is a copy's as well (`joined`), and its product is
   the module's (`inside`).
8. An output of the graph depends on a reader of the weight (`graph.reach`); else there is no site. A call on
   zeros is one of the readers, because the module's bias has an effect there.
9. A target that is not found is a `Miss` with its reason; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, zip_longest

from lora_export.adapter import Array
from lora_export.graph.onnx_file import GraphFile, release, shape_of
from lora_export.plan import Refusal, RefusalKind
from lora_export.sites import fit, matrices
from lora_export.sites.doubts import changed, readers, turned
from lora_export.sites.doubts.answers import computed_answers
from lora_export.sites.doubts.conflicts import without_conflicts
from lora_export.sites.doubts.contained import branch_beside
from lora_export.sites.doubts.copies import REMEDY, computed_parameters, computed_result, other_calls
from lora_export.sites.doubts.direct import MERGE, direct_readers
from lora_export.sites.doubts.fused import fused_answers
from lora_export.sites.doubts.inside import marked, more_than_product
from lora_export.sites.doubts.joined import copies_with_biases, joined_copies
from lora_export.sites.doubts.unused import is_read, is_read_with_bias, reach_of, unused, unused_sites
from lora_export.sites.naming import names
from lora_export.sites.naming.evidence import FOLDED, NODE_NAME, SCOPE, SOURCES, WEIGHT_NAME, collect
from lora_export.sites.naming.known_names import KnownNames
from lora_export.sites.naming.likeness import matrix_of
from lora_export.sites.naming.renaming import NOT_FOUND, Renaming, is_below, rename
from lora_export.sites.naming.towers import Kinds
from lora_export.sites.slot import Use
from lora_export.sites.target import BaseWeights, Miss, Part, Site, Stack, Target, Wanted, WeightOf
from lora_export.sites.uses import find_uses
from lora_export.sites.values.fingerprints import Places, find_places
from lora_export.sites.values.verify import (
    check_codes,
    check_content,
    orientations,
    search,
    tile,
    unconfirmed,
)
from lora_export.storage.patch import Placement

# Part of the evidence if there is a checkpoint and the graph's weight is quantised.
_NOT_COMPARED = "quantised, its values are not compared"


class Resolver:
    """Weights of one graph, in which targets are found.

    Args:
        graph: The graph.
        weight_of: The base checkpoint's weights; they make matches by content possible.
        branches: True for sites beside the weights, not in them: quantised weights have such sites too.

    Attributes:
        weight_of: Look-up in the checkpoint for targets of the adapter that was resolved last.
    """

    def __init__(
        self, graph: GraphFile, weight_of: BaseWeights | None = None, *, branches: bool = False
    ) -> None:
        self._graph = graph
        uses = find_uses(graph)
        self._reach = reach_of(graph, uses)
        self.uses = [use for use in uses if is_read_with_bias(self._reach, use)]
        self._named = collect(uses)
        self._evidence = self._named if len(self.uses) == len(uses) else collect(self.uses)
        keys = (key for table in self._named.values() for key in table)
        self._known = KnownNames(keys, self._shape, self._kinds)
        self._constants = list(graph.initializers())
        self._computed = computed_parameters(self._constants)
        self._base = weight_of
        self.weight_of: WeightOf | None = None
        self._wanted: set[str] = set()
        self._branches = branches

    def _kinds(self) -> Kinds:
        return self._base.kinds if self._base else frozenset()

    def _shape(self, key: str) -> tuple[int, ...] | None:
        """Return the shape of the constants that are a parameter by the graph's names, if they agree."""
        uses = [use for table in self._named.values() for use in table.get(key, ())]
        stored = {
            shape_of(use.root.const_value)
            for use in uses
            if use.root.const_value is not None and not use.quantised
        }
        return stored.pop() if len({matrix_of(shape) for shape in stored}) == 1 else None

    @property
    def known(self) -> frozenset[str]:
        """Parameter paths in the graph's names and in the checkpoint."""
        return self._known.names | (self._base.parameters if self._base else frozenset())

    def resolve(
        self, targets: Sequence[Target], flattened: bool = False, scope: str | None = None
    ) -> tuple[list[Site], list[Miss]]:
        """Return a site or a miss for each target of one adapter.

        Args:
            targets: Targets to find.
            flattened: True if their paths have underscores for dots.
            scope: Part of the adapter, or of the graph, that belongs (`renaming`, rule 7).
        """
        named = [target.named for target in targets]
        # If only the graph or only the checkpoint has a part's path, the other is that part.
        is_anywhere = scope is None or is_below(named, scope, flattened)
        here = is_anywhere or bool(self._known.under(scope or ""))
        # The look-up is for this adapter, whose names in the checkpoint differ from those in the graph.
        self.weight_of = self._base.for_adapter(named, flattened, scope) if self._base else None
        there = self.weight_of is not None and any(self.weight_of.names)
        if self._base and here and not is_anywhere and not there:
            self.weight_of = self._base.for_adapter(named, flattened, None)
        change = rename(named, self._known, flattened=flattened, scope=scope if here or not there else None)
        self._wanted = {name for name in change.names if name}
        named_so = [self._find(target, number, change) for number, target in enumerate(targets)]
        found = [self._explained(item, change) for item in self._by_content(named_so)]
        misses = [miss for miss in found if isinstance(miss, Miss)]
        if misses and self.weight_of is not None and self.weight_of.is_foreign:
            misses = [replace(miss, is_foreign=True) for miss in misses]
        placed = [site for site in found if isinstance(site, Site)]
        if flattened and self._branches:
            # The names of what is exposed are paths, with their dots.
            dotted = self._dotted(targets, change)
            placed = [replace(s, target=replace(s.target, key=dotted[id(s.target)])) for s in placed]
        sites, misses = without_conflicts(placed, misses)
        unread = unused_sites(self._graph, self._reach, sites)
        sites = [site for site in sites if id(site.target) not in unread]
        lost = {**unread, **self._other_calls(sites)}
        return [marked(site) for site in sites if id(site.target) not in lost], [*misses, *lost.values()]

    def _other_calls(self, sites: Sequence[Site]) -> dict[int, Miss]:
        """Apply rule 7; return identity of a target → its miss."""
        parameters = {*self._named[WEIGHT_NAME], *self._named[FOLDED]}
        parameters |= self._base.parameters if self._base else set()
        modules = {name.rpartition(".")[0] for name in (*parameters, *self._named[SCOPE])}
        targets = {id(site.target): site.target for site in sites}
        lost = {
            key: Miss(targets[key], why)
            for key, why in computed_answers(sites, self.uses, self._base).items()
        }
        if self._base is not None:
            changes = {name for name in (self.weight_of.names if self.weight_of else ()) if name}
            for key, refusal in fused_answers(sites, self.uses, self._base, changes).items():
                lost.setdefault(key, Miss(targets[key], refusal))
        for key, why in other_calls(sites, self.uses, self._computed, modules).items():
            lost[key] = Miss(targets[key], Refusal("ambiguous", f"ambiguous: {why}", REMEDY))
        for key, why in turned.other_orientations(sites, self.uses, parameters).items():
            lost[key] = Miss(targets[key], Refusal("ambiguous", f"ambiguous: {why}", fit.BOTH_WAYS))
        copies = dict(copies_with_biases(sites, self.uses, self._evidence))
        if self.weight_of is not None:
            copies |= joined_copies(sites, self.uses, self._evidence, self.weight_of)
        for key, why in direct_readers(sites, self.uses).items():
            lost[key] = Miss(targets[key], Refusal("ambiguous", f"ambiguous: {why}", MERGE))
        for key, (why, hint) in {**more_than_product(sites, self._base), **copies}.items():
            lost[key] = Miss(targets[key], Refusal("ambiguous", f"ambiguous: {why}", hint))
        return lost

    def _dotted(self, targets: Sequence[Target], change: Renaming) -> dict[int, str]:
        """Return each target's path with its dots: the graph's path, else the checkpoint's."""
        stored = self.weight_of.names if self.weight_of else change.names
        return {
            id(target): own or other or target.key
            for target, own, other in zip(targets, change.names, stored, strict=True)
        }

    def named_uses(self) -> Iterator[tuple[Use, str]]:
        """Yield each use that has a name, with its most trusted one; for repeated calls that of the first."""
        best: dict[int, str] = {}
        for source in reversed(SOURCES):
            for key, uses in sorted(self._evidence[source].items(), key=lambda item: len(item[1])):
                best.update((id(use), key) for use in uses)
        for use in self.uses:
            if id(use) in best:
                yield use, best[id(use)]

    def _find(self, target: Target, number: int, change: Renaming) -> Site | Miss:
        name, problem = change.names[number], change.problems.get(number, NOT_FOUND)
        lost = Miss(target, Refusal(problem.kind, str(problem) if problem.detail else ""))
        if matrices.is_matrix(target):
            held = self._weight(target)
            assert not isinstance(held, Stack)
            return matrices.find_matrix(target, held, partial(self._search, name, lost))
        if name is None:
            return lost
        found = self._by_name(target, name, self._weight(target))
        if isinstance(found, Site):
            for part in found.parts:
                release(part.root)
        return found

    def _search(self, name: str | None, lost: Miss, target: Target, wanted: Array | None) -> Site | Miss:
        """Look for one form of a module's own matrix, by its name and by its values."""
        found = replace(lost, target=target) if name is None else self._by_name(target, name, wanted)
        if isinstance(found, Miss) and wanted is not None:
            uses = [use for use in self.uses if not use.quantised and not self._refusal(use)]
            return self._searched(found, wanted, uses, None)
        return found

    def _weight(self, target: Target) -> Wanted | None:
        return self.weight_of(target) if self.weight_of else None

    def _explained(self, found: Site | Miss, change: Renaming) -> Site | Miss:
        """Add to a miss what the graph has instead, and a hint."""
        if isinstance(found, Site) and (contained := branch_beside(found)):
            return Miss(found.target, Refusal("contained", f"the graph {contained}"))
        if isinstance(found, Miss) and found.kind == "not found" and found.target.kind != "vector":
            constant = computed_result(found.target.key, self._constants)
            if constant:
                reason = f"not found: the exporter has computed what the module gives into {constant!r}"
                return Miss(found.target, Refusal("computed", reason))
        if isinstance(found, Miss) and not found.reason:
            found = self._not_found(found)
        unnamed = isinstance(found, Miss) and found.kind in ("not found", "nameless", "ambiguous")
        if isinstance(found, Miss) and unnamed and not found.refusal.hint:
            refusal = replace(found.refusal, hint=change.hint)
            return replace(found, refusal=refusal, tells_part=change.tells_part)
        return found

    def _not_found(self, lost: Miss) -> Miss:
        target = lost.target
        leaf = target.path.rpartition(".")[2]
        near = sorted(key for key in self._known.names if key.rpartition(".")[0].endswith(leaf))[:2]
        nameless = changed.nameless(target, self.uses)
        if nameless and self._base is None:
            reason = (
                f"not found: the graph's {', '.join(map(repr, nameless))} may hold it and have no module's "
                f"name; {self._remedy()}"
            )
            return replace(lost, refusal=Refusal("nameless", reason))
        if near:
            reason = f"not found; the graph has {', '.join(near)}"
        else:
            reason = "not found: nothing in the graph names it (pruned by the exporter, or names are gone)"
        return replace(lost, refusal=replace(lost.refusal, detail=reason))

    def _by_name(self, target: Target, key: str, wanted: Wanted | None) -> Site | Miss:
        refused: Miss | None = None
        unread = ""
        dead: list[Use] = []
        for variant in (*names.variants(key), *names.per_expert(key, target.experts)):
            path = variant.keys[0].rpartition(".")[0]
            for source in SOURCES:
                named = [self._evidence[source].get(name, ()) for name in variant.keys]
                groups = [self._candidates(target, path, source, uses) for uses in named]
                if not all(groups):
                    unread = unread or _unread(named)
                    every = [use for name in variant.keys for use in self._named[source].get(name, ())]
                    dead += [
                        use for use in every if not is_read(self._reach, use) and fit.accepts(target, use)
                    ]
                    continue
                evidence = source + (f"; {variant.how}" if variant.how else "")
                found = self._fit(
                    target,
                    path,
                    groups=groups,
                    part=variant.part,
                    evidence=evidence,
                    verified=wanted is not None,
                )
                if isinstance(found, Site):
                    problem = readers.doubt(found, path, source, self.uses)
                    calls = readers.repeated_calls(found, path, source)
                    found = replace(found, evidence=found.evidence + calls, keys=variant.keys)
                    if problem:
                        return Miss(target, Refusal("ambiguous", problem))
                    return self._verified(found, wanted, source, variant.keys)
                refused = refused or found
        if refused is None and dead:
            return unused(target, dead[0])
        return refused or Miss(target, Refusal("operator" if unread else "not found", unread))

    def _candidates(self, target: Target, path: str, source: str, uses: Sequence[Use]) -> list[Use]:
        fitting = [use for use in uses if fit.accepts(target, use)]
        if target.held_turned is not None and source in (SCOPE, NODE_NAME):
            # A node's module may have several matrices of its own; the node doesn't say which one it reads.
            leaf = target.key.rpartition(".")[2]
            fitting = [use for use in fitting if not readers.reads_another(use, path, leaf)]
        if source != NODE_NAME:
            return fitting
        return [use for use in fitting if not self._is_module(target, path, readers.module_of(use.node))]

    def _is_module(self, target: Target, path: str, other: str | None) -> bool:
        """Return True if ``sh_1``, taken for the second call of ``sh``, is known to be a module."""
        if other is None or other == path:
            return False
        key = f"{other}.{target.key.rpartition('.')[2]}"
        return key in self._wanted or (self._base is not None and self._base.stores(key))

    def _fit(
        self,
        target: Target,
        path: str,
        groups: list[list[Use]],
        part: tuple[int, int] | None,
        evidence: str,
        verified: bool,
    ) -> Site | Miss:
        if refused := next((use for group in groups for use in group if self._refusal(use)), None):
            tail = "" if self._branches else ": it can't be merged into"
            return Miss(target, Refusal(_kind_of(refused), f"{self._refusal(refused)}{tail}"))
        if len(groups) > 1 and target.experts > 1 and not verified:
            return Miss(
                target,
                Refusal(
                    "unproven",
                    "the graph has each expert's weights on their own, and only values tell how they were "
                    "taken from the stack; give --checkpoint to compare them",
                ),
            )
        if len(groups) > 1:
            return fit.place_split(target, groups, evidence)
        (uses,) = groups
        if not verified and evidence.partition(";")[0] in (FOLDED, WEIGHT_NAME):
            # Rule 2.
            foreign = readers.foreign_reader(path, uses)
            if foreign:
                return Miss(target, Refusal("unproven", f"{foreign}; {self._remedy()}"))
        fits: list[tuple[Use, tuple[Placement, ...]]] = []
        refusals: list[Refusal] = []
        for use in uses:
            placed = fit.place(target, use, part)
            if isinstance(placed, Refusal):
                refusals.append(placed)
            else:
                fits.append((use, placed))
        if not fits:
            return Miss(target, Refusal(refusals[0].kind, f"shapes differ: {refusals[0].detail}"))
        return fit.site_of(target, fits, evidence)

    def _refusal(self, use: Use) -> str:
        return use.no_branch if self._branches else use.refusal

    def _verified(self, site: Site, wanted: Wanted | None, source: str, keys: tuple[str, ...]) -> Site | Miss:
        """Apply rule 4, and find rescaled rows: a name alone can't tell that values were computed."""
        target = site.target
        named = keys if len(keys) == len(site.parts) else keys[:1] * len(site.parts)
        doubts = [
            changed.doubt_of(target, part, source, key) for part, key in zip(site.parts, named, strict=True)
        ]
        if source in (FOLDED, WEIGHT_NAME):
            path = keys[0].rpartition(".")[0]
            foreign = (
                [readers.foreign_reader(path, part.uses) for part in site.parts] if len(keys) == 1 else []
            )
            doubts = [doubt or also for doubt, also in zip_longest(doubts, foreign, fillvalue="")]
        if len(keys) == 1 and not all(doubts):
            # Rule 3: all of them hold the same bytes as the one whose name is believed.
            doubts = [""] * len(doubts)
        first = next((doubt for doubt in doubts if doubt), "")
        if wanted is None:
            if refusal := unconfirmed(target):
                return Miss(target, refusal)
            return Miss(target, Refusal("unproven", f"{first}; {self._remedy()}")) if first else site
        if site.is_quantised:
            return self._verified_codes(site, wanted, first)
        parts = []
        for part, doubt in zip(site.parts, doubts, strict=True):
            checked = check_content(target, part, wanted, trusted=not doubt)
            if isinstance(checked, Refusal):
                return Miss(target, Refusal(checked.kind, f"{checked.detail} (found by {site.evidence})"))
            parts.append(checked)
        return replace(site, parts=tuple(parts), evidence=f"{site.evidence}; content agrees", proof="values")

    def _verified_codes(self, site: Site, wanted: Wanted, doubt: str) -> Site | Miss:
        """Apply rule 4 to quantised weights, as far as their codes can be read."""
        compared = [check_codes(site.target, part, wanted) for part in site.parts]
        read = [match for match in compared if match is not None]
        names = ", ".join(repr(part.root.name) for part in site.parts)
        kind = "vector" if site.target.kind == "vector" else "weight"
        differs = f"the {kind} {names} does not hold the checkpoint's values"
        if any(not match.related for match in read):
            least = min(match.cosine for match in read)
            reason = f"{differs}, as far as its codes tell (least cosine {least:.3f})"
            return Miss(site.target, Refusal("values", f"{reason} (found by {site.evidence})"))
        if all(match.within for match in read) and len(read) == len(compared):
            evidence = f"{site.evidence}; content agrees within the quantiser's steps"
            return replace(site, evidence=evidence, proof="values")
        if doubt and read:
            return Miss(site.target, Refusal("values", f"{doubt}; {differs}"))
        if doubt:
            reason = "it is quantised, so its values can't be compared"
            return Miss(site.target, Refusal("unproven", f"{doubt}; {reason}"))
        # With quantisers that don't round to the nearest code, values may be further away.
        if len(read) == len(compared):
            evidence = f"{site.evidence}; content is near, as a quantiser leaves it"
            return replace(site, evidence=evidence, proof="values")
        return replace(site, evidence=f"{site.evidence}; {_NOT_COMPARED}", proof="codes")

    def _remedy(self) -> str:
        if self._base is not None:
            return "the checkpoint does not store it, so that its values can't be compared"
        return "give --checkpoint to compare the values"

    def _by_content(self, found: Sequence[Site | Miss]) -> list[Site | Miss]:
        """Find targets that no name led to by their values, all in one pass over the graph's constants."""
        lost = [item.target for item in found if isinstance(item, Miss)]
        lost = [t for t in lost if not matrices.is_matrix(t) and self._weight(t) is not None]
        uses = [use for use in self.uses if not use.quantised and not self._refusal(use)] if lost else []
        sought = [target for target in lost if target.experts == 1 and target.kind != "vector"]
        places = find_places(uses, sought, self._matrices)
        wanted = {id(target) for target in lost}
        return [
            self._searched(item, values, uses, places.get(id(item.target)))
            if isinstance(item, Miss)
            and id(item.target) in wanted
            and (values := self._weight(item.target)) is not None
            else item
            for item in found
        ]

    def _matrices(self, target: Target) -> list[Array]:
        values = self._weight(target)
        return [] if values is None or isinstance(values, Stack) else orientations(target, values)

    def _searched(
        self, miss: Miss, wanted: Wanted, uses: Sequence[Use], places: Places | None
    ) -> Site | Miss:
        """Return the site with a target's values, among possible places (None: anywhere), or a miss."""
        target = miss.target
        hits: dict[int, list[Part]] = {}
        roots = None if places is None else {root for root, _ in places}
        for use in uses:
            if roots is not None and id(use.root) not in roots:
                continue
            offsets = () if places is None else places.get((id(use.root), use.transposed), ())
            if (places is not None and id(use.root) not in hits and not offsets) or not fit.accepts(
                target, use
            ):
                continue
            if id(use.root) in hits:
                hits[id(use.root)] = [replace(part, uses=(*part.uses, use)) for part in hits[id(use.root)]]
            # Two places in one constant are an ambiguity; more need not be searched.
            elif parts := list(islice(search(target, use, wanted, offsets), 2)):
                hits[id(use.root)] = parts
            release(use.root)
        parts = sorted((part for parts in hits.values() for part in parts), key=_first_row)
        nodes = max((len(part.uses) for part in parts), default=0)
        if any(use.transposed != part.uses[0].transposed for part in parts for use in part.uses):
            reason = "ambiguous: its weight is read in both orientations"
            return Miss(target, Refusal("ambiguous", reason, fit.BOTH_WAYS))
        if parts and target.for_all_ends and self.weight_of and self.weight_of.is_tied(target):
            # Any end of the tie without its own copy will do: `tied_ends` gives the change to the others.
            for part in parts:
                named = ((use, f"{readers.module_of(use.node)}.weight") for use in part.uses)
                own = [use for use, name in named if name not in self._wanted]
                if own and tile(target, [part]):
                    end = replace(part, uses=tuple(own[:1]))
                    return Site(
                        target=target, parts=(end,), evidence="content", proof="values", keys=(target.key,)
                    )
        if nodes > 1:
            reason = f"ambiguous: its values are read by {nodes} nodes and no name tells which"
            return Miss(target, Refusal("ambiguous", reason))
        # Rows that a constant holds for two parts of the target can't be changed for one of them.
        if tile(target, parts) and len(parts) == len(hits):
            site = Site(
                target=target, parts=tuple(parts), evidence="content", proof="values", keys=(target.key,)
            )
            problem = readers.doubt(site, target.path, "content", self.uses)
            return Miss(target, Refusal("ambiguous", problem)) if problem else site
        if parts:
            where = ", ".join(str(part.root.name) for part in parts[:4])
            reason = f"ambiguous: its values are found in {len(parts)} places ({where})"
            return Miss(target, Refusal("ambiguous", reason))
        if miss.reason:
            return miss
        return Miss(target, Refusal("not found", "not found: no weight of the graph holds its values"))


def _kind_of(use: Use) -> RefusalKind:
    """Return the kind of a use's own refusal."""
    if use.quantised:
        return "integers" if use.no_branch else "quantised"
    if use.refusal and use.no_branch:
        return "operator"
    return "merge only" if use.no_branch else "branch only"


def _first_row(part: Part) -> tuple[int, int]:
    return part.placements[0].rows


def _unread(named: Sequence[Sequence[Use]]) -> str:
    """Return the reason why no use of weights with the right name is of the target's kind."""
    operators = sorted({use.node.op_type for uses in named for use in uses})
    if not operators:
        return ""
    return f"its weight is read by {', '.join(operators)}, which no module of its kind is known to become"
