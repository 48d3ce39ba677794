"""Choose the change of names that makes an adapter's paths a base's: rules 1 to 5 and 7 of `renaming`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

from lora_export.formats.schemes.known import flatten
from lora_export.sites.naming.fits import Below, Fits
from lora_export.sites.naming.known_names import (
    KnownNames,
    has_index,
    has_language_model,
    has_submodel,
    is_flat_outer,
    is_outer,
    submodels_of,
)
from lora_export.sites.naming.names import Named, Prefix

NO_CHANGE = Prefix()


def is_below(wanted: Sequence[Named], scope: str, flattened: bool) -> bool:
    """Return True if all of an adapter's paths are below a part that the user names (rule 7)."""
    front = f"{flatten(scope)}_" if flattened else f"{scope}."
    return all(named.key.startswith(front) for named in wanted)


class Choice:
    """The changes of names for one adapter and one base, and the choice among them.

    Args:
        wanted: The adapter's parameters.
        known: The base's paths.
        flattened: True if the adapter's paths have underscores for dots.
        scope: Part that belongs, as the user names it (rule 7).

    Attributes:
        fits: The parameters that the base has under each change.
        heads: Parameters outside of numbered blocks that the base has under their own paths.
        given: The scope as the user names it.
    """

    def __init__(
        self, wanted: Sequence[Named], known: KnownNames, flattened: bool, scope: str | None
    ) -> None:
        self._wanted, self._known, self._flattened = wanted, known, flattened
        self._mark = "_" if flattened else "."
        self.fits = Fits([named.key for named in wanted], known, flattened)
        self._low_rank = [n for n, named in enumerate(wanted) if named.action == "merge"]
        # Parameters that the base has under their own paths may be beside those of a change (rule 1).
        heads = {n: names for n, names in self.fits.own.items() if not has_index(wanted[n].key)}
        texts = {n: flatten(wanted[n].key) if flattened else wanted[n].key for n in heads}
        self.heads = Below(((text, n) for n, text in texts.items()), self._mark)
        self._deciding_heads = Below(
            ((text, n) for n, text in texts.items() if n in self.deciding), self._mark
        )
        self._lost_heads: dict[str, frozenset[int]] = {}
        self.belong(scope)

    def belong(self, scope: str | None) -> None:
        """Keep only the part that belongs, as the user names it."""
        self.given = scope
        self._scope = flatten(scope) if scope and self._flattened else scope
        # Rule 7: is the scope a part of the adapter's paths, or of the base's?
        self._is_adapters = scope is not None and is_below(self._wanted, scope, self._flattened)
        # A name may begin like the scope and still be one of the base's part: BERT's ``encoder.layer.0`` in
        # an ``encoder`` beside a ``decoder``, or flattened a ``decoder_embed``.
        self._bases = self._known.under(scope) if scope else []

    @cached_property
    def deciding(self) -> frozenset[int]:
        """Low-rank changes; if none of them fits under any change, all parameters."""
        low_rank = frozenset(self._low_rank)
        is_known = not low_rank.isdisjoint(self.fits.own) or any(
            not low_rank.isdisjoint(self.under(change)) for change in self._low_rank_changes or ()
        )
        return low_rank if is_known else frozenset(range(len(self._wanted)))

    @cached_property
    def changes(self) -> dict[Prefix, int] | None:
        """Each change → number of parameters that fit; None if there are too many changes."""
        if len(self.deciding) == len(self._low_rank):
            changes = self._low_rank_changes
        else:
            changes = self._changes_of(sorted(self.deciding))
        return None if changes is None else {change: self.count(change) for change in changes}

    @cached_property
    def _low_rank_changes(self) -> list[Prefix] | None:
        return self._changes_of(self._low_rank)

    def _changes_of(self, numbers: Sequence[int]) -> list[Prefix] | None:
        keys = [self._wanted[number].key for number in numbers]
        found = self._known.flat_changes(keys) if self._flattened else self._known.changes(keys)
        return None if found is None else sorted({NO_CHANGE, *found}, key=str)

    def under(self, change: Prefix) -> dict[int, list[str]]:
        """Return the parameters that a change is for and that fit, with the base's paths for each."""
        found = self.fits.under(change)
        if not (change.strip and change.add):
            return found
        # Rule 3: two lists of modules would have only an index in common.
        start = len(change.strip) + 1
        return {
            n: names
            for n, names in found.items()
            if not self._wanted[n].key[start:].rpartition(".")[0].isdigit()
        }

    def count(self, change: Prefix) -> int:
        """Return the number of deciding parameters that fit."""
        heads = self._deciding_heads
        beside = len(heads.numbers) - heads.count(change.strip)
        return len(self.deciding.intersection(self.under(change))) + beside

    @property
    def may_stay(self) -> bool:
        """True if all that decides fits under its own paths, and may."""
        is_known = bool(self.deciding) and self.deciding <= self.fits.own.keys()
        return is_known and (self._scope is None or self._is_adapters)

    @property
    def is_scope_unknown(self) -> bool:
        """True if neither the adapter nor the base has anything under the scope."""
        return self._scope is not None and not self._is_adapters and not self._bases

    def chosen(self) -> list[Prefix]:
        """Return the change that counts; several if they tie, none if none counts."""
        counts = self.changes or {}
        tried = counts
        if self._scope is not None and not self._is_adapters:
            # Rule 7: no other is allowed.
            tried = {change: count for change, count in counts.items() if change.add in self._bases}
        allowed = [change for change, count in tried.items() if count and self._is_allowed(change)]
        if whole := self._whole(allowed):
            return self._distinct(whole)
        # Rule 2; a wrapper around the base, or a part that the user names, may lack parameters.
        parts = [
            change
            for change in allowed
            if change == NO_CHANGE
            or self._scope is not None
            or (self._is_whole_below(change) if change.strip else self._known.is_inside(change.add))
        ]
        most = max((counts[change] for change in parts), default=0)
        return self._distinct([change for change in parts if counts[change] == most])

    def rivals(self) -> list[Prefix]:
        """Return the changes under which everything fits, allowed or not; none if the user names a scope."""
        return [] if self._scope else self._distinct(self._whole(self.changes or ()))

    def names(self, change: Prefix) -> dict[int, list[str]]:
        """Return the parameters that fit under a change, with the base's paths that each may mean."""
        # Rule 1: only a head may be beside the parameters that the change is for.
        span, own = self.heads.span(change.strip), self.fits.own
        beside = self.heads.numbers[: span.start] + self.heads.numbers[span.stop :]
        return {n: own[n] for n in beside} | self.under(change)

    def _whole(self, changes: Iterable[Prefix]) -> list[Prefix]:
        counts = self.changes or {}
        return [change for change in changes if counts[change] == len(self.deciding)]

    def _distinct(self, changes: Sequence[Prefix]) -> list[Prefix]:
        """Return the change that changes nothing if it is there, else one change of each effect."""
        if NO_CHANGE in changes:
            return [NO_CHANGE]
        found: dict[object, Prefix] = {}
        for change in sorted(changes, key=lambda change: len(change.strip) + len(change.add)):
            found.setdefault(self._effect(change), change)
        return list(found.values())

    def _effect(self, change: Prefix) -> object:
        """Return a key of a change's effect: the names that it gives, and the heads that lose theirs."""
        under, own = self.under(change), self.fits.own
        if change.strip not in self._lost_heads:
            span = self.heads.span(change.strip)
            self._lost_heads[change.strip] = frozenset(self.heads.numbers[span])
        lost = self._lost_heads[change.strip]
        kept = {n for n, names in under.items() if n in lost and names == own[n]}
        given = frozenset((n, tuple(names)) for n, names in under.items() if n not in kept)
        return given, lost - kept if kept else lost

    def _is_allowed(self, change: Prefix) -> bool:
        if change.add in self._bases and (not change.strip or self._is_outer(change.strip)):
            return True  # Rule 7; a class with a head around the adapter's model is none of its parts.
        if self._scope is not None and not self._is_adapters:
            return False
        scope = self._scope
        is_scoped = scope is not None and (scope == change.strip or self._is_below(scope, change.strip))
        may_strip = is_scoped or not change.strip or self._is_outer(change.strip)  # Rule 3.
        return may_strip and (not change.add or self._may_add(change))

    def _is_outer(self, path: str) -> bool:
        return is_flat_outer(path) if self._flattened else is_outer(path)

    def _may_add(self, change: Prefix) -> bool:
        """Return True if the prefix may be added (rule 4)."""
        if has_index(change.add):
            # The index is that of a Sequential around the whole base.
            return not change.strip and self._known.is_inside(change.add)
        if change.strip and submodels_of(change.add):
            # In a part that the user names, an inner name may be removed (vision_tower.vision_model).
            return self._scope is not None and self._is_below(change.strip, self._flat(change.add))
        if self._known.is_inside(change.add):
            return True
        if has_language_model(change.add):
            # A vision tower that the user names is not the language model.
            return not (has_submodel(change.strip) if self._flattened else submodels_of(change.strip))
        if submodels_of(change.add) or self._known.has_rivals(change.add):
            return False
        # A module beside others is identified by the blocks that it is in.
        keys = (self._wanted[n].key for n in self.under(change) if n in self.deciding)
        return any(has_index(key[len(change.strip) :]) for key in keys)

    def _is_whole_below(self, change: Prefix) -> bool:
        """Return True if all below the prefix fits, and no other part of the adapter looks like that part."""
        paths, mark = self._deciding_paths, self._mark
        span = paths.span(change.strip)
        if not self.under(change).keys() >= set(paths.numbers[span]):
            return False
        for number in paths.numbers[span]:
            rest = self._wanted[number].key[len(change.strip) + 1 :]
            first, last = self._ends.get(f"{mark}{rest}", (span.start, span.start))
            if has_index(rest) and (first < span.start or last >= span.stop):
                return False
        return True

    @cached_property
    def _deciding_paths(self) -> Below:
        return Below(((self._wanted[n].key, n) for n in self.deciding), self._mark)

    @cached_property
    def _ends(self) -> dict[str, tuple[int, int]]:
        """End of a deciding path, from a mark on → first and last position of such paths in their order."""
        found: dict[str, tuple[int, int]] = {}
        for place, number in enumerate(self._deciding_paths.numbers):
            key = self._wanted[number].key
            for start in (at for at, letter in enumerate(key) if letter == self._mark):
                found[key[start:]] = found.get(key[start:], (place, place))[0], place
        return found

    def _flat(self, path: str) -> str:
        return flatten(path) if self._flattened else path

    def _is_below(self, key: str, path: str) -> bool:
        return key.startswith(f"{path}{self._mark}")
