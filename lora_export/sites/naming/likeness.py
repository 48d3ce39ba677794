"""Tell a different naming from a different architecture by the shapes of the matrices.

An adapter of which no name is known may still be for the base: then the base has matrices of all its shapes,
at least as many of each.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

_SHOWN = 4
Shape = tuple[int, ...]


def counterparts(wanted: Mapping[str, Shape], base: Mapping[str, Shape]) -> list[tuple[str, str]]:
    """Return examples of an adapter's names with the base's that they may mean; none if the model is another.

    Args:
        wanted: Parameter path of the adapter → shape of the weight.
        base: Name in the base → shape as it is stored.
    """
    there: dict[Shape, list[str]] = defaultdict(list)
    for name, shape in base.items():
        there[matrix_of(shape)].append(name)
    shapes = Counter(map(matrix_of, wanted.values()))
    if not shapes or any(len(there[shape]) < count for shape, count in shapes.items()):
        return []
    taken: set[str] = set()
    found = []
    for name, shape in list(wanted.items())[:_SHOWN]:
        free = [other for other in there[matrix_of(shape)] if other not in taken]
        best = max(free, key=lambda other: _similarity(name, other))
        taken.add(best)
        found.append((name, best))
    return found


def matrix_of(shape: Shape) -> Shape:
    """Return a shape in an order that doesn't depend on the orientation, without 1×1 kernels."""
    return tuple(sorted(size for size in shape if size != 1))


def _similarity(one: str, other: str) -> tuple[int, float]:
    """Return a key for the likeness of names; equal indices count most: layer 3's match is in layer 3."""
    same = sum((Counter(_indices(one)) & Counter(_indices(other))).values())
    return same, difflib.SequenceMatcher(None, one, other).ratio()


def _indices(name: str) -> Iterable[str]:
    return re.findall(r"(?<![a-z0-9])\d+", name)


def side_by_side(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Return the examples of `counterparts` as lines."""
    return [f"the adapter has {one}, the base may mean it by {other}" for one, other in pairs]
