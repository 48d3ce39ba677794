"""Prove a site that names led to by its values, as far as they are known: rules 2 to 4 of `resolve`."""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest

from lora_export.plan import Refusal
from lora_export.sites.doubts import changed, readers
from lora_export.sites.doubts.inside import computes_with_weight
from lora_export.sites.naming.evidence import FOLDED, WEIGHT_NAME, computed_from, weight_path
from lora_export.sites.target import Miss, Site, Wanted
from lora_export.sites.values.verify import check_codes, check_content, unconfirmed

# Part of the evidence if there is a checkpoint and the graph's weight is quantised.
_NOT_COMPARED = "quantised, its values are not compared"


def proven(
    site: Site, wanted: Wanted | None, source: str, keys: tuple[str, ...], *, remedy: str
) -> Site | Miss:
    """Return a site that names led to, with what its values prove; a `Miss` if it is doubtful or wrong.

    Rows that were rescaled are found as well: a name alone can't tell that values were computed.

    Args:
        site: The site.
        wanted: The target's values in the checkpoint; None if they are not known.
        source: Kind of the name that led to it, one of `evidence.SOURCES`.
        keys: Names of its parts.
        remedy: Advice where only values would tell.
    """
    target = site.target
    named = keys if len(keys) == len(site.parts) else keys[:1] * len(site.parts)
    doubts = [
        changed.doubt_of(target, part, source, key) for part, key in zip(site.parts, named, strict=True)
    ]
    if source in (FOLDED, WEIGHT_NAME):
        path = keys[0].rpartition(".")[0]
        foreign = [readers.foreign_reader(path, part.uses) for part in site.parts] if len(keys) == 1 else []
        doubts = [doubt or also for doubt, also in zip_longest(doubts, foreign, fillvalue="")]
    if len(keys) == 1 and not all(doubts):
        # Rule 3: all of them hold the same bytes as the one whose name is believed.
        doubts = [""] * len(doubts)
    first = next((doubt for doubt in doubts if doubt), "")
    if wanted is None:
        if refusal := unconfirmed(target):
            return Miss(target, refusal)
        return Miss(target, Refusal("unproven", f"{first}; {remedy}")) if first else site
    if site.is_quantised:
        return _proven_codes(site, wanted, first)
    parts = []
    for part, doubt in zip(site.parts, doubts, strict=True):
        checked = check_content(target, part, wanted, trusted=not doubt)
        if isinstance(checked, Refusal):
            names = computed_from(part.root)
            if any(f".{weight_path(name)}".endswith(f".{key}") for name in names for key in keys):
                return Miss(target, computes_with_weight(names))
            return Miss(target, Refusal(checked.kind, f"{checked.detail} (found by {site.evidence})"))
        parts.append(checked)
    return replace(site, parts=tuple(parts), evidence=f"{site.evidence}; content agrees", proof="values")


def _proven_codes(site: Site, wanted: Wanted, doubt: str) -> Site | Miss:
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
