"""Changes of parameters that share a weight: which of them stay one, and which have to be parted.

A trained adapter changes the modules that its file names, and no other that shares a weight with them. PEFT
writes both ends where it trained them as one (``ensure_weight_tying``), except for single token rows, which
stand for everything that is tied to the embedding (``other.set_additional_trainable_modules``, PEFT 0.21).
What another adapter of a blend does is its own affair. In the end, parameters whose changes are equal are
still one weight.
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
        is_tied: Its adapter says that both ends were trained as one: they have to be equal.
        for_all: It stands for everything that shares the weight, unless the adapter has another for that.
    """

    make: MakePatch
    row: int
    adapter: int
    is_tied: bool = False
    for_all: bool = False


def spread(tie: Tie, changes: Mapping[str, Sequence[Change]]) -> tuple[dict[str, list[Change]], bool]:
    """Give every parameter of a tie the changes that stand for all of them.

    Args:
        tie: The parameters.
        changes: Tensor → its changes, in the order of the blend.

    Returns:
        Tensor → its changes, for all of the tie's and those held apart; and whether some contradict what
        their adapter says of being trained as one.
    """
    first, *others = tie.tensors.values()
    others += tie.apart
    found = {tensor: list(changes.get(tensor, ())) for tensor in (first, *others)}
    wrong = False
    for adapter in sorted({change.adapter for change in found[first]}):
        common = [change for change in found[first] if change.adapter == adapter]
        rows = [change for change in common if change.for_all]
        for tensor in others:
            own = [change for change in found[tensor] if change.adapter == adapter]
            if any(change.is_tied for change in own):
                wrong = wrong or not alike(own, common)
            elif rows and not any(_replaces(change) for change in own):
                # PEFT puts the trained rows below the head's own LoRA.
                found[tensor] = sorted([*rows, *found[tensor]], key=lambda change: change.adapter)
    return found, wrong


def _replaces(change: Change) -> bool:
    return change.make(np.float32).values is not None


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
    return (
        place[0] == place[1]
        and len(set(axes)) < 2
        and all(a is b or (a is not None and b is not None and np.array_equal(a, b)) for a, b in arrays)
    )
