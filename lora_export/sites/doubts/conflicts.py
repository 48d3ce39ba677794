"""Refuse targets of an adapter that have the same site, except equal whole copies of one parameter.

A parameter that a model has under two names (``cls.predictions.bias`` and ``cls.predictions.decoder.bias`` of
BERT) is under both in the file of a trainer that stores whole modules, and only once in a graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from lora_export.plan import Refusal
from lora_export.sites.target import Miss, Site, Target
from lora_export.storage.patch import Placement


def without_conflicts(sites: Sequence[Site], misses: Sequence[Miss]) -> tuple[list[Site], list[Miss]]:
    """Return the sites that no other target has, and for the others misses with the reason."""
    alone, lost = _equal_copies_once(sites, misses)
    clashes = _clashes(alone)
    lost += [Miss(site.target, Refusal("double", clashes[id(site)])) for site in alone if id(site) in clashes]
    return [site for site in alone if id(site) not in clashes], lost


def _clashes(sites: Iterable[Site]) -> dict[int, str]:
    """Return identity of a site → reason that names another site with the same values."""
    places: dict[tuple[str, int, int], list[tuple[int, int, Site]]] = defaultdict(list)
    for site in sites:
        for part in site.parts:
            spans = [(*_span(placement), site) for placement in part.placements]
            for use in part.uses:
                places[site.target.action, id(use.node), use.operand.index] += spans
    clashes: dict[int, str] = {}
    for found in places.values():
        found.sort(key=lambda span: span[:2])
        for (_, stop, one), (start, _, other) in pairwise(found):
            if start < stop and one is not other:
                for site, rival in ((one, other), (other, one)):
                    clashes[id(site)] = f"ambiguous: found where {_called(rival.target)} is found as well"
    return clashes


def _equal_copies_once(sites: Sequence[Site], misses: Sequence[Miss]) -> tuple[list[Site], list[Miss]]:
    """Let the first of equal copies of one parameter stand for those at the same site or without one."""
    kept: dict[object, Site] = {}
    for site in sites:
        place: object = _where(site) if site.target.action == "replace" else id(site)
        first = kept.get(place)
        if first is not None and not _say_the_same(first.target, site.target):
            place, first = id(site), None
        kept[place] = _with_copy(first, site.target) if first else site
    lost = []
    for miss in misses:
        stands = [place for place, site in kept.items() if _is_copy(miss, site.target)]
        for place in stands[:1]:
            kept[place] = _with_copy(kept[place], miss.target)
        lost += [] if stands else [miss]
    return list(kept.values()), lost


def _with_copy(site: Site, copy: Target) -> Site:
    names = (*site.target.tensor_names, *copy.tensor_names)
    evidence = f"{site.evidence}; {copy.key} is the same parameter, with the same values"
    return replace(site, target=replace(site.target, tensor_names=names), evidence=evidence)


def _is_copy(miss: Miss, placed: Target) -> bool:
    """Return True if a whole copy that was not found is of a parameter that was.

    A module may have the parameter of a module below it under its own name as well. Random values that are
    equal to the bit prove it; constant ones don't.
    """
    if miss.kind not in ("not found", "nameless") or not miss.target.action == placed.action == "replace":
        return False
    (above, _, leaf), (below, _, other) = miss.target.key.rpartition("."), placed.key.rpartition(".")
    if leaf != other or not below.startswith(f"{above}."):
        return False
    values = placed.values
    varied = values is not None and values.size > 1 and bool((values != values.flat[0]).any())
    return varied and _say_the_same(miss.target, placed)


def _where(site: Site) -> tuple[object, ...]:
    """Return a key that is equal for targets that change the same values for the same readers."""
    return tuple((*map(id, part.uses), *map(_span, part.placements)) for part in site.parts)


def _say_the_same(one: Target, other: Target) -> bool:
    first, second = one.values, other.values
    return (
        first is not None
        and second is not None
        and first.dtype == second.dtype
        and first.shape == second.shape
        and first.tobytes() == second.tobytes()
    )


def _span(placement: Placement) -> tuple[int, int]:
    start = placement.col if placement.transposed and placement.col else placement.row
    return start, start + placement.rows[1] - placement.rows[0]


def _called(target: Target) -> str:
    component = target.module.component if target.module else None
    return f"{component}/{target.key}" if component else target.key
