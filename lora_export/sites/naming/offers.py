"""Find values of ``--component`` with which a part of an adapter gets sites; each was tried when offered.

A part is the path of a submodel in the adapter's or the base's names; or one of the models that a file
serves; or both, if the adapter was made for such a model (``text_encoder:clip.text_model``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from itertools import chain, islice

from lora_export.formats.schemes.known import flatten
from lora_export.sites.naming.known_names import KnownNames, has_index
from lora_export.sites.naming.likeness import matrix_of
from lora_export.sites.naming.names import Named, Prefix

_SHOWN = 4
# Matches a path down to its last number that is not a module of its own, as `to_out.0` is.
_BLOCK = re.compile(r"(.*[._]\d+)[._](?!weight$|bias$)")
# Number of parts that are tried, each at the cost of renaming the adapter, and number of finds that end this.
_TRIED = 256
_ENOUGH = 24
# Largest number of parts that are offered to be merged in turn.
_TURNS = 8


# Function of the adapter's parameters below a part, and the part or None → the base's path or None for each.
Try = Callable[[Sequence[Named], str | None], Sequence[str | None]]


@dataclass(frozen=True, kw_only=True)
class Offers:
    """Parts of an adapter that would get sites.

    Attributes:
        options: Values for ``--component``; empty if nothing would get a site.
        placed: Number of the adapter's low-rank changes that get sites with the first option.
        is_whole: True if all of a part would get sites; else the rest needs ``--allow-unmatched``.
        others: Parts of another kind than the base that would get sites too → the kind.
        together: Parts that have all of the adapter's low-rank changes, each with sites of its own; empty if
            no parts do.
    """

    options: tuple[str, ...] = ()
    placed: int = 0
    is_whole: bool = True
    others: tuple[tuple[str, str], ...] = ()
    together: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.options)

    @property
    def text(self) -> str:
        """Options as a user types them."""
        listed = " or ".join(f"--component {option}" for option in self.options[:_SHOWN])
        listed += " or others" if len(self.options) > _SHOWN else ""
        return listed if self.is_whole else f"{listed} together with --allow-unmatched"

    @property
    def in_turn(self) -> str:
        """Way to merge all parts, as a user types it; empty if there is none."""
        if not self.together:
            return ""
        listed = ", then ".join(f"--component {part}" for part in self.together)
        return f"to merge all of it, give one part after the other, each with what the last wrote: {listed}"


@dataclass(frozen=True)
class _Outcome:
    """Sites of a part's low-rank changes.

    Attributes:
        sites: The adapter's path → the base's path, for those that have one; empty if a shape disagrees.
        is_whole: True if all have one.
    """

    sites: Mapping[str, str]
    is_whole: bool


def offers_of(
    wanted: Sequence[Named],
    known: KnownNames,
    changes: Iterable[Prefix],
    *,
    flattened: bool,
    given: str | None,
    least: int,
    place: Try,
) -> Offers:
    """Return the parts with which most of an adapter gets sites.

    Args:
        wanted: The adapter's parameters.
        known: The base's paths.
        changes: Changes of prefix under which the base has some of them, those with most first.
        flattened: True if the adapter's paths have underscores for dots.
        given: Value that the user gave already; it is not offered again.
        least: Number of changes with sites without any option; options with fewer are not offered.
        place: Function that returns the base's paths for the adapter's parameters below a part.
    """
    components = sorted({one.component for one in wanted if one.component})
    found: dict[str, _Outcome] = {}
    kinds: dict[str, str] = {}
    if len(components) > 1:
        for component in components:
            mine = [one for one in wanted if one.component == component]
            found[component] = _outcome(mine, known, place(mine, None))
            kinds[component] = known.other_kind(component)
    else:
        front = f"{components[0]}:" if components else ""
        for part in islice(_candidates(wanted, changes, flattened), _TRIED):
            if part == given or (given and not part.startswith(f"{given}.")):
                continue
            below = [one for one in wanted if _is_below(one.key, part, flattened)]
            names = place(below or wanted, part)
            outcome = _outcome(below or wanted, known, names)
            fitting = {one.key for one, name in zip(below or wanted, names, strict=True) if name is not None}
            if (below or outcome.is_whole) and not _tears(wanted, fitting):
                found[front + part] = outcome
                kinds[front + part] = known.other_kind(part)
            if len(found) == _ENOUGH:
                break
    total, mark = len(_low_rank(wanted)), "_" if flattened else "."
    own = {part: outcome for part, outcome in found.items() if not kinds[part]}
    others = _best({part: found[part] for part in found.keys() - own}, least, total, mark)
    return replace(
        _best(own, least, total, mark),
        others=tuple((part, kinds[part]) for part in others.options),
        together=() if components or flattened or given else _together(wanted, known, own, place),
    )


def _together(
    wanted: Sequence[Named], known: KnownNames, found: Mapping[str, _Outcome], place: Try
) -> tuple[str, ...]:
    """Return parts that have all of an adapter's low-rank changes, none of which has a site of another's."""
    keys = [wanted[number].key for number in _low_rank(wanted)]
    done: set[str] = set()
    sites: set[str] = set()
    chosen: list[str] = []
    largest = sorted(found, key=lambda part: (-len(found[part].sites), len(part)))
    modules = (key.rpartition(".")[0] for key in keys if key not in done and not has_index(key))
    for part in chain(largest, modules):
        below = [one for one in wanted if _is_below(one.key, part, flattened=False)]
        outcome = found[part] if part in found else _outcome(below, known, place(below, part))
        is_apart = done.isdisjoint(outcome.sites) and sites.isdisjoint(outcome.sites.values())
        if outcome.sites and outcome.is_whole and is_apart:
            chosen.append(part)
            done.update(outcome.sites)
            sites.update(outcome.sites.values())
        if len(chosen) > _TURNS:
            break
    return tuple(chosen) if 1 < len(chosen) <= _TURNS and done.issuperset(keys) else ()


def _candidates(wanted: Sequence[Named], changes: Iterable[Prefix], flattened: bool) -> Iterator[str]:
    seen: set[str] = set()
    for change in changes:
        for part in (change.strip, change.add):
            if part and part not in seen:
                seen.add(part)
                yield part
    if not flattened:
        yield from _shared(wanted, seen)


def _shared(wanted: Sequence[Named], seen: set[str]) -> Iterator[str]:
    """Yield the adapter's own paths above its numbered blocks, the shortest first."""
    for one in wanted:
        parts = one.key.split(".")
        for end in range(1, len(parts) - 1):
            path = ".".join(parts[:end])
            if has_index(path):
                break
            if path not in seen:
                seen.add(path)
                yield path


def _is_below(key: str, part: str, flattened: bool) -> bool:
    return key.startswith(f"{flatten(part)}_" if flattened else f"{part}.")


def _tears(wanted: Sequence[Named], fitting: AbstractSet[str]) -> bool:
    """Return True if only some parameters of a numbered block fit, so that they are not a part of a model."""
    low_rank = [wanted[number].key for number in _low_rank(wanted)]
    torn = {_block(key) for key in low_rank if key in fitting} & {
        _block(key) for key in low_rank if key not in fitting
    }
    return bool(torn - {""})


def _block(key: str) -> str:
    """Return the path of the innermost numbered block that a parameter is in, or ""."""
    match = _BLOCK.match(key)
    return match[1] if match else ""


def _outcome(wanted: Sequence[Named], known: KnownNames, names: Sequence[str | None]) -> _Outcome:
    """Return the sites of the low-rank changes, if all shapes agree."""
    low_rank, sites = _low_rank(wanted), {}
    for number in low_rank:
        name = names[number]
        if name is None:
            continue
        mine, theirs = wanted[number].shape, known.shape(name)
        if mine is not None and theirs is not None and matrix_of(mine) != matrix_of(theirs):
            return _Outcome({}, is_whole=False)
        sites[wanted[number].key] = name
    return _Outcome(sites, len(sites) == len(low_rank))


def _low_rank(wanted: Sequence[Named]) -> list[int]:
    """Return the numbers of the low-rank changes, or of all changes if none is low-rank."""
    return [n for n, one in enumerate(wanted) if one.action == "merge"] or list(range(len(wanted)))


def _best(outcomes: Mapping[str, _Outcome], least: int, total: int, mark: str) -> Offers:
    all_ = {part: (len(outcome.sites), outcome.is_whole) for part, outcome in outcomes.items()}
    found = {part: (n, whole) for part, (n, whole) in all_.items() if n > least or (whole and n == least)}
    is_whole = any(whole for _, whole in found.values())
    kept = {part: placed for part, (placed, whole) in found.items() if placed and whole == is_whole}
    # Of parts with the same effect, the shortest is kept.
    short = [
        part
        for part, placed in kept.items()
        if not any(part.startswith(f"{other}{mark}") and kept[other] >= placed for other in kept)
    ]
    # An option for all of the adapter says more than one for a part of it.
    options = [part for part in short if kept[part] == total] or short
    return Offers(
        options=tuple(sorted(options)),
        placed=max(map(kept.__getitem__, options), default=0),
        is_whole=is_whole,
    )
