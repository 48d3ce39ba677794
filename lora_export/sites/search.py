"""Find targets in a graph by their values, where no name led to them: the last of `resolve`'s evidence."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from lora_export.adapter import Array
from lora_export.graph.onnx_file import release
from lora_export.plan import Refusal
from lora_export.sites import fit, matrices, whole
from lora_export.sites.doubts import readers
from lora_export.sites.operand import Use
from lora_export.sites.target import ConstantPart, ExpertStack, Miss, Site, Target, Wanted, WeightOf
from lora_export.sites.values.fingerprints import Places, find_places
from lora_export.sites.values.verify import orientations, search, tile


class ValueSearch:
    """A search for the values of one adapter's targets.

    Args:
        uses: The weights that an output of the graph depends on.
        searched: Those of them that are compared: not quantised, and possible sites.
        weight_of: Look-up in the checkpoint; None without one.
        names: The graph's names for the adapter's targets.
        hint_of: Function that returns a hint for parts whose readers can't be told apart, or "".
        remedy: Advice where only values would tell.
    """

    def __init__(
        self,
        uses: Sequence[Use],
        searched: Sequence[Use],
        weight_of: WeightOf | None,
        names: Collection[str],
        *,
        hint_of: Callable[[Sequence[ConstantPart]], str],
        remedy: str,
    ) -> None:
        self._hint_of, self._remedy = hint_of, remedy
        self._uses, self._searched, self._weight_of, self._names = uses, searched, weight_of, names

    def find_all(self, found: Sequence[Site | Miss]) -> list[Site | Miss]:
        """Find targets that no name led to by their values, all in one pass over the graph's constants."""
        misses = [item for item in found if isinstance(item, Miss)]
        forms = {id(miss.target): self._sought(miss.target) for miss in misses}
        lost = [form for several in forms.values() for form in several]
        sought = [target for target in lost if target.experts == 1 and target.kind != "vector"]
        places = find_places(self._searched if lost else [], sought, self._matrices)
        return [
            whole.choose(item.target, list(self._each(item, forms[id(item.target)], places)), self._remedy)
            if isinstance(item, Miss) and forms[id(item.target)]
            else item
            for item in found
        ]

    def _sought(self, target: Target) -> list[Target]:
        """Return the forms of a target whose values are known."""
        if matrices.is_matrix(target):
            return []
        return [form for form in whole.forms_of(target) if self._values(form) is not None]

    def _each(
        self, miss: Miss, forms: Sequence[Target], places: Mapping[int, Places]
    ) -> Iterator[Site | Miss]:
        """Yield the site or the miss of each form of a target."""
        for form in forms:
            values = self._values(form)
            assert values is not None
            yield self.find(replace(miss, target=form), values, places.get(id(form)))

    def find(self, miss: Miss, wanted: Wanted, places: Places | None = None) -> Site | Miss:
        """Return the site with a target's values, among possible places (None: anywhere), or a miss."""
        target = miss.target
        hits: dict[int, list[ConstantPart]] = {}
        roots = None if places is None else {root for root, _ in places}
        for use in self._searched:
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
        if parts and target.for_all_ends and self._weight_of and self._weight_of.is_tied(target):
            # Any end of the tie without its own copy will do: `tied_ends` gives the change to the others.
            for part in parts:
                named = ((use, f"{readers.module_by_name(use.node)}.weight") for use in part.uses)
                own = [use for use, name in named if name not in self._names]
                if own and tile(target, [part]):
                    end = replace(part, uses=tuple(own[:1]))
                    return Site(
                        target=target, parts=(end,), evidence="content", proof="values", keys=(target.key,)
                    )
        if nodes > 1:
            reason = f"ambiguous: its values are read by {nodes} nodes and no name tells which"
            return Miss(target, Refusal("ambiguous", reason, self._hint_of(parts)))
        # Rows that a constant holds for two parts of the target can't be changed for one of them.
        if tile(target, parts) and len(parts) == len(hits):
            site = Site(
                target=target, parts=tuple(parts), evidence="content", proof="values", keys=(target.key,)
            )
            problem = readers.doubt(site, target.path, "content", self._uses)
            return Miss(target, Refusal("ambiguous", problem, self._hint_of(parts))) if problem else site
        if parts:
            where = ", ".join(str(part.root.name) for part in parts[:4])
            reason = f"ambiguous: its values are found in {len(parts)} places ({where})"
            return Miss(target, Refusal("ambiguous", reason, self._hint_of(parts)))
        if miss.reason:
            return miss
        return Miss(target, Refusal("not found", "not found: no weight of the graph holds its values"))

    def _values(self, target: Target) -> Wanted | None:
        return self._weight_of(target) if self._weight_of else None

    def _matrices(self, target: Target) -> list[Array]:
        values = self._values(target)
        return [] if values is None or isinstance(values, ExpertStack) else orientations(target, values)


def _first_row(part: ConstantPart) -> tuple[int, int]:
    return part.placements[0].rows
