"""Find the site of each target of an adapter in a graph.

The order of evidence (each is described in `evidence`): scope, node name, folded-from, weight name, then
the same for renamed, fused and split modules, then content (`search`). Rules:

1. One change of names holds for the whole adapter (`renaming`).
2. A weight's name is believed only if the node that reads it does not name another module, and if an exporter
   is known to give it (`changed.doubt_of`).
3. More than one constant for a target is an ambiguity, unless their bytes are the same.
4. With a checkpoint, every match by name must also match by content (`proof`).
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

from lora_export.adapter import Array
from lora_export.graph.onnx_file import GraphFile, release, shape_of
from lora_export.plan import Refusal, RefusalKind
from lora_export.sites import fit, kinds, matrices, whole
from lora_export.sites.doubts import changed, readers, turned
from lora_export.sites.doubts.answers import computed_answers
from lora_export.sites.doubts.conflicts import without_conflicts
from lora_export.sites.doubts.contained import branch_beside
from lora_export.sites.doubts.copies import REMEDY, computed_parameters, computed_result, other_calls
from lora_export.sites.doubts.direct import MERGE, direct_readers
from lora_export.sites.doubts.fused import fused_answers
from lora_export.sites.doubts.inside import ARITHMETIC, computes_with_weight, marked, more_than_product
from lora_export.sites.doubts.joined import copies_with_biases, joined_copies
from lora_export.sites.doubts.packed import other_order
from lora_export.sites.doubts.unused import is_read, is_read_with_bias, reach_of, unused, unused_sites
from lora_export.sites.naming import names
from lora_export.sites.naming.choice import is_below
from lora_export.sites.naming.evidence import FOLDED, NODE_NAME, SCOPE, SOURCES, WEIGHT_NAME, collect_evidence
from lora_export.sites.naming.known_names import KnownNames
from lora_export.sites.naming.likeness import matrix_of
from lora_export.sites.naming.names import Named
from lora_export.sites.naming.renaming import NOT_FOUND, Renaming, rename
from lora_export.sites.naming.towers import Kinds
from lora_export.sites.operand import WEIGHTS, Use
from lora_export.sites.proof import proven
from lora_export.sites.search import ValueSearch
from lora_export.sites.target import (
    BaseWeights,
    ConstantPart,
    ExpertStack,
    Miss,
    Site,
    Target,
    Wanted,
    WeightOf,
)
from lora_export.sites.uses import find_uses, in_bodies
from lora_export.storage.patch import Placement

# Hint for a module whose weight another kind of module reads.
_OTHER_KIND = (
    "give the base that the adapter was trained on, as its exporter wrote it: a tool may have put a copy of "
    "a weight in the place of a call that read the same one (a tied head's)"
)
# Hint for modules with calls in a Loop, Scan or If, whose readers an exporter gives no names.
_OF_BODY = (
    "merge the adapter into the checkpoint (lora-export merge) and export the result: calls of the module in "
    "a loop or branch of the graph (torch.while_loop, scan, cond) have no names that tell them from others"
)
_EITHER = (
    "the file does not say whether it is a Linear or an Embedding, whose change is the transpose, and the "
    "graph uses its weight as both"
)


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
        self._named = collect_evidence(uses)
        self._evidence = self._named if len(self.uses) == len(uses) else collect_evidence(self.uses)
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
            self.weight_of = self._of_part(self._base, named, flattened, scope or "")
        change = rename(named, self._known, flattened=flattened, scope=scope if here or not there else None)
        self._wanted = {name for name in change.names if name}
        searched = [use for use in self.uses if not use.quantised and not self._refusal(use)]
        search = ValueSearch(
            self.uses, searched, self.weight_of, self._wanted, hint_of=self._hint_of, remedy=self._remedy()
        )
        named_so = [self._find(target, number, change, search) for number, target in enumerate(targets)]
        found = [self._explained(item, change) for item in search.find_all(named_so)]
        misses = [miss for miss in found if isinstance(miss, Miss)]
        if misses and self.weight_of is not None and self.weight_of.is_foreign:
            misses = [replace(miss, is_foreign=True) for miss in misses]
        placed = [site for site in found if isinstance(site, Site)]
        if flattened and self._branches:
            # The names of what is exposed are paths, with their dots.
            dotted = self._dotted(targets, change)
            placed = [
                replace(s, target=replace(s.target, key=dotted.get(id(s.target), s.target.key)))
                for s in placed
            ]
        sites, misses = without_conflicts(placed, misses)
        unread = unused_sites(self._graph, self._reach, sites)
        sites = [site for site in sites if id(site.target) not in unread]
        lost = {**unread, **self._other_calls(sites)}
        return [marked(site) for site in sites if id(site.target) not in lost], [*misses, *lost.values()]

    @staticmethod
    def _of_part(base: BaseWeights, named: Sequence[Named], flattened: bool, part: str) -> WeightOf:
        """Return the look-up for a part that the checkpoint is, or has without the wrapper in the graph."""
        names = part.split(".")
        found = base.for_adapter(named, flattened, None)
        for start in range(1, len(names)):
            if any(found.names):
                break
            found = base.for_adapter(named, flattened, ".".join(names[start:]))
        return found if any(found.names) else base.for_adapter(named, flattened, None)

    def _other_calls(self, sites: Sequence[Site]) -> dict[int, Miss]:
        """Apply rule 7; return identity of a target → its miss."""
        parameters = {*self._named[WEIGHT_NAME], *self._named[FOLDED]}
        parameters |= self._base.parameters if self._base else set()
        modules = {name.rpartition(".")[0] for name in (*parameters, *self._named[SCOPE])}
        targets = {id(site.target): site.target for site in sites}
        changes = {name for name in (self.weight_of.names if self.weight_of else ()) if name}
        answers = computed_answers(sites, self.uses, self._base, constants=self._constants, changed=changes)
        lost = {key: Miss(targets[key], why) for key, why in answers.items()}
        weights = (use for use in self.uses if use.operand.kind in WEIGHTS)
        remedy = _OF_BODY if in_bodies(weights, self._graph.graph) else REMEDY
        if self._base is not None:
            for key, refusal in fused_answers(sites, self.uses, self._base, changes).items():
                lost.setdefault(key, Miss(targets[key], refusal))
        for key, why in other_calls(sites, self.uses, self._computed, modules).items():
            lost[key] = Miss(targets[key], Refusal("ambiguous", f"ambiguous: {why}", remedy))
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

    def _find(self, target: Target, number: int, change: Renaming, search: ValueSearch) -> Site | Miss:
        name, problem = change.names[number], change.problems.get(number, NOT_FOUND)
        lost = Miss(target, Refusal(problem.kind, str(problem) if problem.detail else ""))
        if matrices.is_matrix(target):
            held = self._weight(target)
            assert not isinstance(held, ExpertStack)
            return matrices.find_matrix(target, held, partial(self._one_form, search, name, lost))
        if name is None:
            return lost
        found = whole.find_whole(target, partial(self._of_its_kind, name=name), self._remedy())
        if isinstance(found, Site):
            for part in found.parts:
                release(part.root)
        return found

    def _of_its_kind(self, target: Target, name: str) -> Site | Miss:
        """Look for a target by name; where its file doesn't say its kind, the operators decide."""
        wanted = self._weight(target)
        (first, _), *more = forms = kinds.forms_by_kind(target)
        if isinstance(wanted, ExpertStack) or not more:
            return self._by_name(first, name, wanted)
        sites: list[tuple[int, Site | Miss]] = []
        misses: list[Miss] = []
        for form, refusal in forms:
            values = wanted.T if wanted is not None and wanted.shape != form.shape else wanted
            found = self._by_name(form, name, values)
            if isinstance(found, Site):
                trust = SOURCES.index(found.evidence.partition(";")[0])
                sites.append((trust, Miss(target, refusal) if refusal else found))
            else:
                misses.append(found)
        best = [found for trust, found in sites if trust == min(trust for trust, _ in sites)]
        if len(best) > 1:
            return Miss(target, Refusal("kind", _EITHER, kinds.AS_PEFT))
        told = [miss for miss in misses if miss.reason and miss.refusal.hint != _OTHER_KIND] or misses
        return best[0] if best else replace(told[0], target=target)

    def _one_form(
        self, search: ValueSearch, name: str | None, lost: Miss, target: Target, wanted: Array | None
    ) -> Site | Miss:
        """Look for one form of a module's own matrix, by its name and by its values."""
        found = replace(lost, target=target) if name is None else self._by_name(target, name, wanted)
        if isinstance(found, Miss) and wanted is not None:
            return search.find(found, wanted)
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
        unread: Refusal | None = None
        dead: list[Use] = []
        for variant in (*names.variants(key), *names.per_expert(key, target.experts)):
            path = variant.keys[0].rpartition(".")[0]
            for source in SOURCES:
                named = [self._evidence[source].get(name, ()) for name in variant.keys]
                groups = [self._candidates(target, path, source, uses) for uses in named]
                if not all(groups):
                    unread = unread or _unread(target, named)
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
                        return Miss(target, Refusal("ambiguous", problem, self._hint_of(found.parts)))
                    if variant.part and wanted is None and (why := other_order(found, variant.part[1])):
                        return Miss(target, Refusal("unproven", f"{why}; {self._remedy()}"))
                    return proven(found, wanted, source, variant.keys, remedy=self._remedy())
                refused = refused or found
        if refused is None and dead:
            return unused(target, dead[0])
        return refused or Miss(target, unread or Refusal("not found", ""))

    def _candidates(self, target: Target, path: str, source: str, uses: Sequence[Use]) -> list[Use]:
        fitting = [use for use in uses if fit.accepts(target, use)]
        if target.held_turned is not None and source in (SCOPE, NODE_NAME):
            # A node's module may have several matrices of its own; the node doesn't say which one it reads.
            leaf = target.key.rpartition(".")[2]
            fitting = [use for use in fitting if not readers.reads_another(use, path, leaf)]
        if source != NODE_NAME:
            return fitting
        return [use for use in fitting if not self._is_module(target, path, readers.module_by_name(use.node))]

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
        # A module that is called on a constant has two: the one of another shape is not its weight.
        groups = [fit.without_operands(target, group, part) for group in groups]
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

    def _hint_of(self, parts: Sequence[ConstantPart]) -> str:
        """Return the hint for constants whose readers can't be told apart because some are in a body."""
        roots = {id(part.root) for part in parts}
        # A body's own input hides the way of a weight, so that all of its readers count.
        readers = [use for use in self.uses if id(use.root) in roots]
        return _OF_BODY if in_bodies(readers, self._graph.graph) else ""

    def _remedy(self) -> str:
        if self._base is not None:
            return "the checkpoint does not store it, so that its values can't be compared"
        return "give --checkpoint to compare the values"


def _kind_of(use: Use) -> RefusalKind:
    """Return the kind of a use's own refusal."""
    if use.quantised:
        return "integers" if use.no_branch else "quantised"
    if use.refusal and use.no_branch:
        return "operator"
    return "merge only" if use.no_branch else "branch only"


def _unread(target: Target, named: Sequence[Sequence[Use]]) -> Refusal | None:
    """Return the refusal if no use of weights with the right name is of the target's kind."""
    uses = [use for group in named for use in group]
    operators = ", ".join(sorted({use.node.op_type for use in uses}))
    if not uses:
        return None
    if target.kind in WEIGHTS and all(
        use.operand.kind in WEIGHTS and (use.operand.kind == "embedding") != (target.kind == "embedding")
        for use in uses
    ):
        found = "rows are looked up" if target.kind != "embedding" else "a product"
        return Refusal(
            "shape",
            f"the adapter has a {target.kind} module; the graph reads the weight with {operators} ({found})",
            _OTHER_KIND,
        )
    if all(use.node.op_type in ARITHMETIC for use in uses):
        return computes_with_weight([operators])
    return Refusal(
        "operator", f"its weight is read by {operators}, which no module of its kind is known to become"
    )
