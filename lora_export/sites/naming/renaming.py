"""One change of names that turns an adapter's parameter paths into a base's: the only rule for it.

Whatever an adapter is placed in (a checkpoint, a graph or its LoRA inputs, a PyTorch model), its paths are
compared with the paths that the base knows. Rules:

1. One change holds for the whole adapter: a prefix comes off, another comes in front; what has not the prefix
   stays as it is, and may only be a head outside of the numbered blocks.
2. The change counts only if everything of the adapter under it fits.
3. What comes off is an outer name (`known_names.is_outer`): never an index, never the name of one of several
   submodels (``encoder``, ``vision_model``, ``transformer_2``), and no name that is not known, which may be
   such a name: an adapter's decoder would become the encoder.
4. What comes in front is the base's outer name: not that of one of several submodels, but for the language
   model of a vision–language model.
5. Several changes that fit are an ambiguity.
6. Two parameters of one adapter never become the same one.
7. A *scope* that the user names (``model.encoder``) is the part that belongs: it may come off or in front
   whatever it is called, and what is missing under it is the user's to allow. It never becomes the language
   model of a base that has other parts, but for a scope that is one.
8. Flattened paths (kohya's underscores) get their dots from the base's paths, at path components only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lora_export.sites.naming.known_names import (
    KnownNames,
    has_index,
    has_language_model,
    has_submodel,
    is_flat_outer,
    is_outer,
    submodels_of,
)
from lora_export.sites.naming.names import Named, Prefix, flatten
from lora_export.sites.naming.offers import Offers, offers_of

_SHOWN = 4
NO_CHANGE = Prefix()


@dataclass(frozen=True)
class Problem:
    """Why a parameter has no name in the base.

    Attributes:
        kind: The base has none, or several that may be meant.
        detail: What was seen; empty where the names alone tell nothing.
    """

    kind: Literal["not found", "ambiguous"]
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


NOT_FOUND = Problem("not found")


@dataclass(frozen=True, kw_only=True)
class Renaming:
    """What became of an adapter's names.

    Attributes:
        names: For each parameter the base's path for it (perhaps one that the base lacks), or None.
        problems: Number of a parameter → why it has no name in the base.
        change: The change that was made.
        hint: What the user may give to place the adapter, or the part of it that belongs; it was tried.
        tells_part: The hint is about which part to name (``--component``).
        reach: How many parameters are placed where the user does so.
        doubt: What speaks against the part that the user named.
    """

    names: tuple[str | None, ...]
    problems: dict[int, Problem] = field(default_factory=dict)
    change: Prefix = NO_CHANGE
    hint: str = ""
    tells_part: bool = False
    reach: int = 0
    doubt: str = ""

    @property
    def note(self) -> str:
        """What was changed, for the plan; empty where nothing was."""
        return f"{said(self.change)}{self.doubt}" if self.change != NO_CHANGE else ""


def said(change: Prefix) -> str:
    """Return a change in words."""
    strip = f"'{change.strip}.' taken off" if change.strip else ""
    add = f"'{change.add}.' put in front" if change.add else ""
    return " and ".join(text for text in (strip, add) if text) or "no change"


def rename(
    wanted: Sequence[Named], known: KnownNames, *, flattened: bool = False, scope: str | None = None
) -> Renaming:
    """Return the base's path for each parameter of an adapter, under one change of names.

    Args:
        wanted: The adapter's parameters. Its low-rank changes decide; biases and whole parameters, which an
            exporter may drop, follow them.
        known: The base's.
        flattened: The adapter's paths have underscores for dots.
        scope: The part that belongs, as the user says it (rule 7).
    """
    return _Renamer(wanted, known, flattened, scope).run()


def is_below(wanted: Sequence[Named], scope: str, flattened: bool) -> bool:
    """Whether all of an adapter's paths are below a part that the user names (rule 7)."""
    front = f"{flatten(scope)}_" if flattened else f"{scope}."
    return all(named.key.startswith(front) for named in wanted)


def likeliest_change(keys: Sequence[str], known: KnownNames) -> Prefix:
    """Return the change under which most paths are known: to look for something, not to place anything."""
    counts = {
        change: sum(known.has(change.apply(key) or key) for key in keys)
        for change in sorted({NO_CHANGE, *known.changes(keys)}, key=str)
    }
    most = max(counts.values())
    best = [change for change, count in counts.items() if count == most]
    return best[0] if len(best) == 1 else NO_CHANGE


class _Renamer:
    def __init__(
        self, wanted: Sequence[Named], known: KnownNames, flattened: bool, scope: str | None
    ) -> None:
        self._wanted, self._known, self._flattened, self._given = wanted, known, flattened, scope
        # Tried for a hint: needs none of its own.
        self._is_first = True
        self._mark = "_" if flattened else "."
        self._scope = flatten(scope) if scope and flattened else scope
        low_rank = [n for n, named in enumerate(wanted) if named.action == "merge"]
        self._fits: dict[Prefix, frozenset[int]] = {}
        for self._deciding in (low_rank, list(range(len(wanted)))):
            keys = [wanted[number].key for number in self._deciding]
            changes = known.flat_changes(keys) if flattened else known.changes(keys)
            self._fits = {change: self._fitting(change) for change in sorted({NO_CHANGE, *changes}, key=str)}
            if any(self._fits.values()):
                break
        # Rule 7: is the scope a part of the adapter's paths, or of the base's?
        self._is_adapters = scope is not None and is_below(wanted, scope, flattened)
        # Flattened, a name may begin as the scope does and still be the base's part's (``decoder_embed``).
        self._bases = known.under(scope) if scope and (flattened or not self._is_adapters) else []

    def run(self) -> Renaming:
        """Choose the change and apply it."""
        chosen = self._chosen()
        if len(chosen) == 1:
            return self._applied(chosen[0])
        rivals = [] if chosen or self._scope else self._distinct(self._whole(self._fits))
        if len(chosen or rivals) > 1:
            return self._ambiguous(chosen or rivals)
        return self._refused()

    # Which change.

    def _fitting(self, change: Prefix) -> frozenset[int]:
        return frozenset(n for n in self._deciding if self._names(self._wanted[n].key, change))

    def _chosen(self) -> list[Prefix]:
        """Return the change that counts; several where they tie, none where none counts."""
        allowed = [change for change in self._fits if self._fits[change] and self._is_allowed(change)]
        if whole := self._whole(allowed):
            return self._distinct(whole)
        # Rule 2; a wrapper around the base, or a part that the user names, may lack something.
        parts = [
            change
            for change in allowed
            if change == NO_CHANGE
            or self._scope is not None
            or (self._is_whole_below(change) if change.strip else self._known.is_inside(change.add))
        ]
        most = max((len(self._fits[change]) for change in parts), default=0)
        return self._distinct([change for change in parts if len(self._fits[change]) == most])

    def _whole(self, changes: Iterable[Prefix]) -> list[Prefix]:
        return [change for change in changes if len(self._fits[change]) == len(self._deciding)]

    def _distinct(self, changes: Sequence[Prefix]) -> list[Prefix]:
        """Return the change that changes nothing if it is there, else one of each that differ in effect."""
        if NO_CHANGE in changes:
            return [NO_CHANGE]
        found: dict[tuple[tuple[str, ...], ...], Prefix] = {}
        for change in sorted(changes, key=lambda change: len(change.strip) + len(change.add)):
            effect = tuple(tuple(self._names(named.key, change)) for named in self._wanted)
            found.setdefault(effect, change)
        return list(found.values())

    def _is_allowed(self, change: Prefix) -> bool:
        if change.add in self._bases and not change.strip:
            return True  # Rule 7.
        if self._scope is not None and not self._is_adapters:
            return False
        scope = self._scope
        is_scoped = scope is not None and (scope == change.strip or self._is_below(scope, change.strip))
        may_strip = is_scoped or not change.strip or self._is_outer(change.strip)  # Rule 3.
        return may_strip and (not change.add or self._may_add(change))

    def _is_outer(self, path: str) -> bool:
        return is_flat_outer(path) if self._flattened else is_outer(path)

    def _may_add(self, change: Prefix) -> bool:
        """Rule 4."""
        if has_index(change.add):
            # Of a Sequential around the whole base.
            return not change.strip and self._known.is_inside(change.add)
        if change.strip and submodels_of(change.add):
            # Of a part that the user names, an inner name comes off (vision_tower.vision_model).
            return self._scope is not None and self._is_below(change.strip, self._flat(change.add))
        if self._known.is_inside(change.add):
            return True
        if has_language_model(change.add):
            # A vision tower that the user names is not the language model.
            return not (has_submodel(change.strip) if self._flattened else submodels_of(change.strip))
        if submodels_of(change.add) or self._known.has_rivals(change.add):
            return False
        # Beside others, a module is told by the blocks that it is in.
        keys = (self._wanted[number].key for number in self._fits[change])
        return any(has_index(key[len(change.strip) :]) for key in keys)

    def _is_whole_below(self, change: Prefix) -> bool:
        """Whether all below the prefix fits, and no other part of the adapter looks like that part."""
        below = {n for n in self._deciding if self._is_below(self._wanted[n].key, change.strip)}
        if not below <= self._fits[change]:
            return False
        rests = {self._wanted[n].key[len(change.strip) + 1 :] for n in below}
        others = [self._wanted[n].key for n in self._deciding if n not in below]
        return not any(
            has_index(rest) and key.endswith(f"{self._mark}{rest}") for key in others for rest in rests
        )

    def _flat(self, path: str) -> str:
        return flatten(path) if self._flattened else path

    def _is_below(self, key: str, path: str) -> bool:
        return key.startswith(f"{path}{self._mark}")

    # What comes of it.

    def _names(self, key: str, change: Prefix) -> list[str]:
        """Return the base's paths that a key may mean under a change; none where it does not fit."""
        if change.strip and change.add and key[len(change.strip) + 1 :].rpartition(".")[0].isdigit():
            return []  # Rule 3: of two lists of modules nothing but an index would be the same.
        if self._flattened:
            beside = change.strip and not self._is_below(key, change.strip) and has_index(key)
            return [] if beside else self._known.unflatten(key, change)
        if change.strip and not self._is_below(key, change.strip) and has_index(key):
            return []  # Rule 1: only a head may stand beside what the change is for.
        name = self._changed(key, change)
        return [name] if self._known.has(name) else []

    def _changed(self, key: str, change: Prefix) -> str:
        """Apply a change; a path that has not the prefix that comes off stays as it is."""
        return change.apply(key) or key

    def _applied(self, change: Prefix) -> Renaming:
        names: list[str | None] = []
        problems: dict[int, Problem] = {}
        for number, named in enumerate(self._wanted):
            fitting = self._names(named.key, change)
            if len(fitting) > 1:
                problems[number] = Problem("ambiguous", f"may be {', '.join(fitting[:_SHOWN])}")
            elif not fitting and self._flattened:
                problems[number] = NOT_FOUND
            if len(fitting) == 1 or self._flattened:
                names.append(fitting[0] if len(fitting) == 1 else None)
            else:
                names.append(self._changed(named.key, change))
        has_doubles = self._refuse_doubles(names, problems)
        if not has_doubles and len(self._fits[change]) == len(self._deciding):
            return Renaming(names=tuple(names), problems=problems, change=change, doubt=self._doubt())
        offers = self._offers(0 if has_doubles else len(self._fits[change]))
        text = f"say which of the file's models with {offers.text}" if has_doubles else ""
        text = text or f"{offers.text} takes the part that fits"
        hint = text if offers else ""
        return Renaming(
            names=tuple(names),
            problems=problems,
            change=change,
            hint=hint,
            tells_part=bool(offers),
            reach=offers.placed,
            doubt=self._doubt(),
        )

    def _doubt(self) -> str:
        kind = self._known.other_kind(self._given) if self._given else ""
        own = " and ".join(sorted(self._known.kinds))
        return (
            f", as --component says: it is for a model of the kind {kind}, the base is {own}" if kind else ""
        )

    def _refuse_doubles(self, names: list[str | None], problems: dict[int, Problem]) -> bool:
        """Rule 6; return whether there are any."""
        owners: dict[tuple[str, str], list[int]] = defaultdict(list)
        for number, (name, named) in enumerate(zip(names, self._wanted, strict=True)):
            if name is not None:
                owners[name, named.action].append(number)
        doubles = {place: numbers for place, numbers in owners.items() if len(numbers) > 1}
        for (name, _), numbers in doubles.items():
            for number in numbers:
                others = [_called(self._wanted[other]) for other in numbers if other != number]
                listed = ", ".join(others[:_SHOWN])
                problems[number] = Problem("ambiguous", f"{name} is where {listed} is found as well")
                names[number] = None
        return bool(doubles)

    # What to say where nothing counts.

    def _offers(self, least: int = 0) -> Offers:
        """Return what would place the adapter, or a part of it, if the user named it."""
        if not self._is_first:
            return Offers()
        ordered = sorted(self._fits, key=lambda change: len(self._fits[change]), reverse=True)
        return offers_of(
            self._wanted,
            self._known,
            [change for change in ordered if self._fits[change]],
            flattened=self._flattened,
            given=self._given,
            least=least,
            place=self._tried,
        )

    def _tried(self, wanted: Sequence[Named], scope: str | None) -> Sequence[str | None]:
        """Return the names that some of the adapter gets where the user says the scope."""
        again = _Renamer(wanted, self._known, self._flattened, scope)
        again._is_first = False
        found = again.run()
        return [None if n in found.problems else name for n, name in enumerate(found.names)]

    def _ambiguous(self, chosen: Sequence[Prefix]) -> Renaming:
        """Rule 5."""
        problems = {}
        for number, named in enumerate(self._wanted):
            fitting = sorted({name for change in chosen for name in self._names(named.key, change)})
            listed = ", ".join(fitting[:_SHOWN]) + (", …" if len(fitting) > _SHOWN else "")
            problems[number] = Problem("ambiguous", f"may be {listed}") if fitting else NOT_FOUND
        offers = self._offers()
        hint = f"say which with {offers.text}" if offers else ""
        names = (None,) * len(self._wanted)
        return Renaming(
            names=names, problems=problems, hint=hint, tells_part=bool(offers), reach=offers.placed
        )

    def _refused(self) -> Renaming:
        """Say why no change counts, and what the user may give."""
        offers, count = self._offers(), len(self._deciding)
        part = f"if that is the part that belongs, give {offers.text}" if offers else ""
        if self._scope is not None and not self._is_adapters and not self._bases:
            problem = Problem(
                "not found", f"neither the adapter nor the base has anything under '{self._given}'"
            )
            without = "give this adapter without --component"
            hint = f"give {offers.text}, or {without}" if offers else without
            return self._all(problem, hint, offers, tells_part=True)
        if offers.others and not offers:
            problem = Problem("not found", "what would fit is of another kind of model")
            return self._all(problem, self._of_others(offers), offers)
        most = max(map(len, self._fits.values()))
        if not most:
            return self._all(NOT_FOUND, part, offers)
        likeliest = [change for change, fits in self._fits.items() if len(fits) == most]
        own = [change for change in likeliest if not self._known.other_kind(change.strip)]
        best = [said(change) for change in own or likeliest]
        if not offers:
            found = " or ".join(best[:2])
            hint = (
                f"check the base: {most} of {count} parameters would fit with {found}, which is not its "
                "outer name; if they are meant, rename the adapter's tensors"
            )
            return self._all(Problem("not found", "not under its own path"), hint, offers)
        problem = Problem(
            "not found", "not under its own path; under another it may be a different part of the model"
        )
        return self._all(problem, f"{offers.placed} of {count} parameters fit elsewhere: {part}", offers)

    def _of_others(self, offers: Offers) -> str:
        """Say that all that would be placed belongs to another kind of model than the base."""
        own = " and ".join(sorted(self._known.kinds)) or "another"
        listed = ", ".join(f"{part} ({kind})" for part, kind in offers.others[:_SHOWN])
        return (
            f"the base is a model of the kind {own}, and what would fit of the adapter is of another: "
            f"{listed}; give the base of that part"
        )

    def _all(self, problem: Problem, hint: str, offers: Offers, tells_part: bool = False) -> Renaming:
        names, problems = (None,) * len(self._wanted), dict.fromkeys(range(len(self._wanted)), problem)
        told = tells_part or bool(offers)
        return Renaming(names=names, problems=problems, hint=hint, tells_part=told, reach=offers.placed)


def _called(named: Named) -> str:
    return f"{named.component}/{named.key}" if named.component else named.key
