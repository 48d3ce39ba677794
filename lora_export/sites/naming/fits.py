"""Find an adapter's parameters that a base has under each change of prefix, without trying each on each.

A base whose modules all have prefixes of their own has as many changes as modules. So a change is not tried
on each parameter, but on those below the prefix that is removed, or on those that the base has below the
prefix that is added, whichever are fewer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property

from lora_export.formats.schemes.known import flatten
from lora_export.sites.naming.known_names import EXPERTS, KnownNames
from lora_export.sites.naming.names import Prefix, common_form, per_expert, variants


class Below:
    """Numbered paths, which can be looked up by the paths above them.

    Args:
        paths: Paths with their numbers.
        mark: Separator of components: a dot or, flattened, an underscore.
    """

    def __init__(self, paths: Iterable[tuple[str, int]], mark: str) -> None:
        ordered = sorted(paths)
        self._paths, self._mark = [path for path, _ in ordered], mark
        self.numbers = [number for _, number in ordered]

    def span(self, path: str) -> slice:
        """Return the slice of `numbers` that are below a path; all are below the empty path."""
        if not path:
            return slice(0, len(self.numbers))
        ends = path + self._mark, path + chr(ord(self._mark) + 1)
        return slice(*(bisect_left(self._paths, end) for end in ends))

    def count(self, path: str) -> int:
        """Return the number of paths below a path."""
        span = self.span(path)
        return int(span.stop - span.start)


class Fits:
    """Comparison of an adapter's parameters with a base's.

    Args:
        keys: The adapter's paths; numbered in this order.
        known: The base's paths.
        flattened: True if the adapter's paths have underscores for dots.

    Attributes:
        below: The adapter's paths with their numbers, by the paths above them.
    """

    def __init__(self, keys: Sequence[str], known: KnownNames, flattened: bool) -> None:
        self._keys, self._known, self._flattened = keys, known, flattened
        texts = map(flatten, keys) if flattened else keys
        self.below = Below(((text, number) for number, text in enumerate(texts)), "_" if flattened else ".")
        self._found: dict[Prefix, dict[int, list[str]]] = {}

    @cached_property
    def own(self) -> dict[int, list[str]]:
        """Parameters that the base has under their own paths, with the base's paths for them."""
        return self.under(Prefix())

    def under(self, change: Prefix) -> dict[int, list[str]]:
        """Return the parameters below the removed prefix that the base has then, with its paths for them."""
        if change not in self._found:
            span = self.below.span(change.strip)
            few = self._known.count_below(change.add, self._flattened)
            numbers = self.below.numbers[span] if span.stop - span.start <= few else self._likely(change)
            named = ((number, self._names(self._keys[number], change)) for number in numbers)
            self._found[change] = {number: names for number, names in named if names}
        return self._found[change]

    def _names(self, key: str, change: Prefix) -> list[str]:
        if self._flattened:
            return self._known.unflatten(key, change)
        name = change.apply(key)
        return [name] if name is not None and self._known.has(name) else []

    def _likely(self, change: Prefix) -> set[int]:
        """Return the parameters below the removed prefix that the base may have below the added one."""
        tails = self._known.tails_below(change.add, self._flattened)
        if self._flattened:
            front = f"{change.strip}_" if change.strip else ""
            return {number for tail in tails for number in self._by_form.get(front + flatten(tail), ())}
        front = f"{common_form(change.strip)}." if change.strip else ""
        numbers = {number for tail in tails for number in self._by_form.get(front + tail, ())}
        # For a parameter without a module, the added prefix is the module.
        return numbers.union(self._by_parent.get(change.strip, ()))

    @cached_property
    def _by_form(self) -> dict[str, list[int]]:
        """Names under which a base may have a parameter, as `common_form` writes them → its number."""
        found: dict[str, list[int]] = defaultdict(list)
        for number, key in enumerate(self._keys):
            if self._flattened:
                found[flatten(key)].append(number)
                continue
            named = (*variants(key), *per_expert(key, EXPERTS))
            for form in {common_form(name) for variant in named for name in variant.keys}:
                found[form].append(number)
        return found

    @cached_property
    def _by_parent(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = defaultdict(list)
        for number, key in enumerate(self._keys):
            found[key.rpartition(".")[0]].append(number)
        return found
