"""Changes of parameters that share a weight: which of them stay one, and which have to be parted.

A trained adapter changes the module that it was put on, and no other that shares its weight; except one
that was trained with ``ensure_weight_tying``, whose change of the input embedding is a change of all. What
another adapter of a blend does is its own affair. In the end, parameters whose changes are equal are still
one weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_export.adapter import Array
from lora_export.base.ties import Tie
from lora_export.patch import Patch

MakePatch = Callable[[type[Any]], Patch]


@dataclass(frozen=True, eq=False)
class Change:
    """A patch of one stored tensor, made when it is written.

    Attributes:
        make: Makes it in float32 or float64.
        row: The plan's row that it belongs to.
        adapter: Which of the blend's adapters it comes from.
        for_all: It was trained as a change of everything that shares the weight.
    """

    make: MakePatch
    row: int
    adapter: int
    for_all: bool = False


def spread(tie: Tie, changes: Mapping[str, Sequence[Change]]) -> tuple[dict[str, list[Change]], list[int]]:
    """Give every parameter of a tie the changes that were trained for all of them.

    Args:
        tie: The parameters.
        changes: Tensor → its changes, in the order of the blend.

    Returns:
        Tensor → its changes, for all of the tie's; and the rows of those that contradict what their adapter
        says of being trained for all.
    """
    first, *others = tie.tensors.values()
    found = {tensor: list(changes.get(tensor, ())) for tensor in tie.tensors.values()}
    wrong: list[int] = []
    for adapter in sorted({change.adapter for change in found[first] if change.for_all}):
        common = [change for change in found[first] if change.adapter == adapter]
        for tensor in others:
            own = [change for change in found[tensor] if change.adapter == adapter]
            if own and not alike(own, common):
                wrong += [change.row for change in own]
            rest = [change for change in found[tensor] if change.adapter != adapter]
            found[tensor] = sorted([*rest, *common], key=lambda change: change.adapter)
    return found, wrong


def alike(one: Sequence[Change], two: Sequence[Change]) -> bool:
    """Whether two tensors of equal values are equal after these changes as well."""
    if len(one) != len(two):
        return False
    pairs = zip(one, two, strict=True)
    return all(a is b or _equal(a.make(np.float32), b.make(np.float32)) for a, b in pairs)


def _equal(one: Patch, two: Patch) -> bool:
    place = [(p.row, p.col, p.height, p.width) for p in (one, two)]
    axes = [p.magnitude_axis for p in (one, two) if p.magnitude is not None]
    arrays: list[tuple[Array | None, Array | None]] = [
        (one.left, two.left),
        (one.right, two.right),
        (one.magnitude, two.magnitude),
        (one.values, two.values),
    ]
    return place[0] == place[1] and len(set(axes)) < 2 and all(
        a is b or (a is not None and b is not None and np.array_equal(a, b)) for a, b in arrays
    )
