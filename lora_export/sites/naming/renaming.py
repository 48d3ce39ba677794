"""Turn an adapter's parameter paths into a base's by one change of names; no other code does so.

Whatever an adapter goes into (a checkpoint, a graph or its LoRA inputs, a PyTorch model), its paths are
compared with the paths that the base has. Rules:

1. One change holds for the whole adapter: a prefix is removed, another is added; paths without the removed
   prefix stay as they are, and may only be heads outside of the numbered blocks.
2. The change counts only if everything of the adapter under it fits.
3. The removed prefix is an outer name (`known_names.is_outer`): never an index, never the name of one of
   several submodels (``encoder``, ``vision_model``, ``transformer_2``), and never an unknown name, which may
   be such a name: an adapter's decoder would become the encoder.
4. The added prefix is the base's outer name: not that of one of several submodels, except the language model
   of a vision–language model.
5. Several changes that fit are an ambiguity.
6. Two parameters of one adapter never become the same one.
7. A *scope* that the user names (``model.encoder``) is the part that belongs: it may be removed or added
   whatever its name, and the user may allow what is missing under it. It never becomes the language model of
   a base that has other parts, unless the scope is one.
8. Flattened paths (kohya's underscores) get their dots from the base's paths, at path components only.
9. If the adapter and the base are of different versions of transformers, both are compared under names that
   no version changes (`versions`), and rules 1 to 6 hold for these.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Literal

from lora_export.formats.schemes.known import flatten
from lora_export.sites.naming.choice import NO_CHANGE, Choice
from lora_export.sites.naming.fits import Below, Fits
from lora_export.sites.naming.known_names import KnownNames
from lora_export.sites.naming.names import Named, Prefix
from lora_export.sites.naming.offers import Offers, offers_of
from lora_export.sites.naming.versions import OneVersion, in_one_version

_SHOWN = 4


@dataclass(frozen=True)
class NamingProblem:
    """Reason why a parameter has no name in the base.

    Attributes:
        kind: ``not found`` if the base has no name, ``ambiguous`` if it has several.
        detail: Details; empty if the names alone tell nothing.
    """

    kind: Literal["not found", "ambiguous"]
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


NOT_FOUND = NamingProblem("not found")
_CONVERTED = "names of another version of transformers converted"
_TOO_MANY = NamingProblem("ambiguous", "the ends of its names are the ends of too many of the base's")


@dataclass(frozen=True, kw_only=True)
class Renaming:
    """Result of renaming an adapter's parameters.

    Attributes:
        names: The base's path for each parameter (perhaps one that the base lacks), or None.
        problems: Number of a parameter → reason why it has no name in the base.
        change: The change that was made.
        hint: Hint on options with which the adapter, or the part that belongs, gets sites; it was tried.
        tells_part: True if the hint names a part to choose (``--component``).
        reach: Number of parameters that get sites if the user follows the hint.
        doubt: Evidence against the part that the user named.
        is_converted: True if names of another version of transformers were converted (rule 9).
    """

    names: tuple[str | None, ...]
    problems: dict[int, NamingProblem] = field(default_factory=dict)
    change: Prefix = NO_CHANGE
    hint: str = ""
    tells_part: bool = False
    reach: int = 0
    doubt: str = ""
    is_converted: bool = False

    @property
    def note(self) -> str:
        """Change in words, for the plan; empty if nothing was changed."""
        change = f"{change_text(self.change)}{self.doubt}" if self.change != NO_CHANGE else ""
        return " and ".join(filter(None, (_CONVERTED if self.is_converted else "", change)))


def change_text(change: Prefix) -> str:
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
        known: The base's paths.
        flattened: True if the adapter's paths have underscores for dots.
        scope: Part that belongs, as the user names it (rule 7).
    """
    renamer = _Renamer(wanted, known, flattened, scope)
    converted = None if flattened or scope else _converted(wanted, known, renamer.count())
    return converted or renamer.run()


def _converted(wanted: Sequence[Named], known: KnownNames, count: int) -> Renaming | None:
    """Return a renaming that converts names of another version, if it finds more than a number (rule 9)."""
    if count == len(wanted):
        return None
    version, keys = OneVersion(known), in_one_version(named.key for named in wanted)
    if not version.differs and keys == [named.key for named in wanted]:
        return None
    named = [replace(one, key=key) for one, key in zip(wanted, keys, strict=True)]
    renamer = _Renamer(named, version.known, flattened=False, scope=None)
    if renamer.count() <= count:
        return None
    found = renamer.run(has_hints=False)  # They would have names that are nobody's.
    if any(problem.kind == "ambiguous" for problem in found.problems.values()):
        return None
    names = tuple(None if name is None else version.own(name) for name in found.names)
    return replace(found, names=names, is_converted=True)


def likeliest_change(keys: Sequence[str], known: KnownNames) -> Prefix:
    """Return the change under which the base has most paths, for a search, not to find sites."""
    fits = Fits(keys, known, flattened=False)
    own = Below(((keys[number], number) for number in fits.own), ".")
    counts = {
        change: len(fits.under(change)) + len(own.numbers) - own.count(change.strip)
        for change in sorted({NO_CHANGE, *(known.changes(keys) or ())}, key=str)
    }
    most = max(counts.values())
    best = [change for change, count in counts.items() if count == most]
    return best[0] if len(best) == 1 else NO_CHANGE


class _Renamer:
    def __init__(
        self, wanted: Sequence[Named], known: KnownNames, flattened: bool, scope: str | None
    ) -> None:
        self._wanted, self._known, self._flattened = wanted, known, flattened
        self._mark = "_" if flattened else "."
        self._choice = Choice(wanted, known, flattened, scope)
        self._has_hints = True

    def run(self, *, has_hints: bool = True) -> Renaming:
        """Choose the change and apply it.

        Args:
            has_hints: False if only the names matter.
        """
        self._has_hints = has_hints
        if self._choice.may_stay:
            return self._applied(NO_CHANGE)
        if self._choice.changes is None:
            return self._all(
                _TOO_MANY, "give the adapter's tensors the names of the base's modules", Offers()
            )
        chosen = self._choice.chosen()
        if len(chosen) == 1:
            return self._applied(chosen[0])
        rivals = [] if chosen else self._choice.rivals()
        if len(chosen or rivals) > 1:
            return self._ambiguous(chosen or rivals)
        return self._refused()

    def count(self) -> int:
        """Return the number of parameters that the base has under the names that they get."""
        return sum(name is not None for name in self._placed(self.run(has_hints=False)))

    # --- apply a change

    def _changed(self, key: str, change: Prefix) -> str:
        """Apply a change; a path without the removed prefix stays as it is."""
        return change.apply(key) or key

    def _applied(self, change: Prefix) -> Renaming:
        names: list[str | None] = []
        problems: dict[int, NamingProblem] = {}
        found = self._choice.names(change)
        for number, named in enumerate(self._wanted):
            fitting = found.get(number, [])
            if len(fitting) > 1:
                problems[number] = NamingProblem("ambiguous", f"may be {', '.join(fitting[:_SHOWN])}")
            elif not fitting and self._flattened:
                problems[number] = NOT_FOUND
            if len(fitting) == 1 or self._flattened:
                names.append(fitting[0] if len(fitting) == 1 else None)
            else:
                names.append(self._changed(named.key, change))
        has_doubles = self._refuse_doubles(names, problems)
        count = self._choice.count(change)
        if not has_doubles and count == len(self._choice.deciding):
            return Renaming(names=tuple(names), problems=problems, change=change, doubt=self._doubt())
        offers = self._offers(0 if has_doubles else count)
        text = f"say which of the file's models with {offers.text}" if has_doubles else ""
        text = text or f"{offers.text} takes the part that fits"
        hint = "; ".join(filter(None, (text if offers else "", offers.in_turn)))
        return Renaming(
            names=tuple(names),
            problems=problems,
            change=change,
            hint=hint,
            tells_part=bool(hint),
            reach=offers.placed,
            doubt=self._doubt(),
        )

    def _doubt(self) -> str:
        kind = self._known.other_kind(self._choice.given) if self._choice.given else ""
        own = " and ".join(sorted(self._known.kinds))
        return (
            f", as --component says: it is for a model of the kind {kind}, the base is {own}" if kind else ""
        )

    def _refuse_doubles(self, names: list[str | None], problems: dict[int, NamingProblem]) -> bool:
        """Refuse parameters that become the same one (rule 6); return True if there are any."""
        owners: dict[tuple[str, str], list[int]] = defaultdict(list)
        for number, (name, named) in enumerate(zip(names, self._wanted, strict=True)):
            if name is not None:
                owners[name, named.action].append(number)
        doubles = {place: numbers for place, numbers in owners.items() if len(numbers) > 1}
        for (name, _), numbers in doubles.items():
            for number in numbers:
                others = [_called(self._wanted[other]) for other in numbers if other != number]
                listed = ", ".join(others[:_SHOWN])
                problems[number] = NamingProblem("ambiguous", f"{name} is where {listed} is found as well")
                names[number] = None
        return bool(doubles)

    # --- explain why no change counts

    def _offers(self, least: int = 0) -> Offers:
        """Return the options with which the adapter, or a part of it, gets sites."""
        if not self._has_hints:
            return Offers()
        counts = self._choice.changes or {}
        return offers_of(
            self._wanted,
            self._known,
            sorted(filter(counts.get, counts), key=lambda change: counts[change], reverse=True),
            flattened=self._flattened,
            given=self._choice.given,
            least=least,
            place=self._tried,
        )

    def _tried(self, wanted: Sequence[Named], scope: str | None) -> Sequence[str | None]:
        """Return the base's paths that some of the adapter's parameters get under a scope."""
        if len(wanted) == len(self._wanted):
            again = copy(self)  # The parameters that fit are the same.
            again._choice = copy(self._choice)
            again._choice.belong(scope)
        else:
            again = _Renamer(wanted, self._known, self._flattened, scope)
        # A renaming that is tried for a hint needs no hint of its own.
        return again._placed(again.run(has_hints=False))

    def _placed(self, found: Renaming) -> Sequence[str | None]:
        """Return the names of the parameters that the base has under them."""
        change, fits = found.change, self._choice.fits
        own = set(fits.own)
        if not self._flattened:
            own -= set(fits.below.numbers[fits.below.span(change.strip)])
        known = own.union(fits.under(change))
        return [
            name if n in known and n not in found.problems else None for n, name in enumerate(found.names)
        ]

    def _ambiguous(self, chosen: Sequence[Prefix]) -> Renaming:
        """Return a renaming with the names that several changes give (rule 5)."""
        names: dict[int, set[str]] = defaultdict(set)
        for change in chosen if self._has_hints else ():
            for number, fitting in self._choice.under(change).items():
                names[number].update(fitting)
        strips = Counter(change.strip for change in chosen)
        for number in self._choice.heads.numbers:
            if sum(strips[path] for path in self._paths_above(number)) < len(chosen):
                names[number].update(self._choice.fits.own[number])
        problems = {}
        for number in range(len(self._wanted)):
            fitting = sorted(names[number])
            listed = ", ".join(fitting[:_SHOWN]) + (", …" if len(fitting) > _SHOWN else "")
            problems[number] = NamingProblem("ambiguous", f"may be {listed}") if fitting else NOT_FOUND
        offers = self._offers()
        hint = f"say which with {offers.text}" if offers else ""
        return Renaming(
            names=(None,) * len(self._wanted),
            problems=problems,
            hint=hint,
            tells_part=bool(offers),
            reach=offers.placed,
        )

    def _paths_above(self, number: int) -> list[str]:
        """Return the prefixes that may be removed from a parameter's path, the empty one included."""
        key = self._wanted[number].key
        text = flatten(key) if self._flattened else key
        return ["", *(text[:at] for at, letter in enumerate(text) if letter == self._mark and at)]

    def _refused(self) -> Renaming:
        """Return a renaming with the reason why no change counts, and a hint."""
        if not self._has_hints:
            return self._all(NOT_FOUND, "", Offers())
        offers, count = self._offers(), len(self._choice.deciding)
        part = f"if that is the part that belongs, give {offers.text}" if offers else ""
        part = "; ".join(filter(None, (part, offers.in_turn)))
        if self._choice.is_scope_unknown:
            problem = NamingProblem(
                "not found", f"neither the adapter nor the base has anything under '{self._choice.given}'"
            )
            without = "give this adapter without --component"
            hint = f"give {offers.text}, or {without}" if offers else without
            return self._all(problem, hint, offers, tells_part=True)
        if offers.others and not offers:
            problem = NamingProblem("not found", "what would fit is of another kind of model")
            return self._all(problem, self._of_others(offers), offers)
        counts = self._choice.changes or {}
        most = max(counts.values())
        if not most:
            return self._all(NOT_FOUND, part, offers)
        likeliest = [change for change, fits in counts.items() if fits == most]
        own = [change for change in likeliest if not self._known.other_kind(change.strip)]
        best = [change_text(change) for change in (own or likeliest)[:2]]
        if not offers:
            found = " or ".join(best)
            hint = (
                f"check the base: {most} of {count} parameters would fit with {found}, which is not its "
                "outer name; if they are meant, rename the adapter's tensors"
            )
            return self._all(NamingProblem("not found", "not under its own path"), hint, offers)
        problem = NamingProblem(
            "not found", "not under its own path; under another it may be a different part of the model"
        )
        return self._all(problem, f"{offers.placed} of {count} parameters fit elsewhere: {part}", offers)

    def _of_others(self, offers: Offers) -> str:
        """Return a hint that all parts with sites belong to another kind of model than the base."""
        own = " and ".join(sorted(self._known.kinds)) or "another"
        listed = ", ".join(f"{part} ({kind})" for part, kind in offers.others[:_SHOWN])
        return (
            f"the base is a model of the kind {own}, and what would fit of the adapter is of another: "
            f"{listed}; give the base of that part"
        )

    def _all(self, problem: NamingProblem, hint: str, offers: Offers, tells_part: bool = False) -> Renaming:
        names, problems = (None,) * len(self._wanted), dict.fromkeys(range(len(self._wanted)), problem)
        told = tells_part or bool(offers)
        return Renaming(names=names, problems=problems, hint=hint, tells_part=told, reach=offers.placed)


def _called(named: Named) -> str:
    return f"{named.component}/{named.key}" if named.component else named.key
