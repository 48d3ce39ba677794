"""Spread changes over parameters that share a weight, and tell which of them have to be parted.

A trained adapter changes the modules that its file names, and no other that shares a weight with them. PEFT
writes both ends if it trained them as one (``ensure_weight_tying``), except for

- single token rows of the model's input embedding, which stand for everything that is tied to it
  (``other.set_additional_trainable_modules``, PEFT 0.21), also where that follows another one (Marian);
- mlx-lm's embeddings, whose change is that of the one weight, in a file that has none for the head; and
- copies of no module of their own, which it loads into the one weight (`formats.reading.whole_copies`).

Each adapter of a blend is judged by itself. In the end, parameters whose changes are equal are still one
weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_export.adapter import Array
from lora_export.base.ties.ties import BESIDE, Tie
from lora_export.formats.reading.whole_copies import Reach
from lora_export.plan import Refusal
from lora_export.storage.patch import Patch

_UNTIED = "give the base that the adapter was trained on, which has a weight for each of them"
MakePatch = Callable[[type[Any]], Patch]


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorChange:
    """Patch of one stored tensor, computed when it is written.

    Attributes:
        make: Function that computes it in float32 or float64.
        row: The plan's row that it belongs to.
        adapter: Number of its adapter in the blend.
        is_tied: True if by its adapter both ends were trained as one, so that they have to be equal.
        reach: ``all`` if it stands for everything that shares the weight, unless the adapter has another
            change for that.
        is_copy: True for a whole copy, to which all other changes of its adapter are added.
    """

    make: MakePatch
    row: int
    adapter: int
    is_tied: bool = False
    reach: Reach = "one"
    is_copy: bool = False

    @property
    def is_for_all(self) -> bool:
        """True if it isn't a copy and stands for the whole tie: single token rows, mlx-lm's embedding."""
        return self.reach == "all" and not self.is_copy

    @property
    def order(self) -> tuple[int, int]:
        """Position among its adapter's changes: PEFT puts rows over a copy, and LoRA on both."""
        return self.adapter, 0 if self.is_copy else 1 if self.is_for_all else 2


@dataclass
class Spread:
    """Changes of a tie's parameters, with those that stand for several of them.

    Attributes:
        changes: Tensor → its changes, for all tensors of the tie and those held apart.
        copies: Whole copies that were spread: ``(adapter, from, to)``.
        refusal: Reason if changes contradict each other, else None.
    """

    changes: dict[str, list[TensorChange]]
    copies: list[tuple[int, str, str]] = field(default_factory=list)
    refusal: Refusal | None = None


def spread(tie: Tie, changes: Mapping[str, Sequence[TensorChange]]) -> Spread:
    """Give every parameter of a tie the changes that stand for all of them.

    Args:
        tie: The parameters.
        changes: Tensor → its changes, in the order of the blend.
    """
    first = tie.input_tensor or next(iter(tie.tensors.values()))
    others = [*(name for name in tie.tensors.values() if name != first), *tie.apart]
    found = {tensor: list(changes.get(tensor, ())) for tensor in (first, *others)}
    result = Spread(dict(found))
    for adapter in sorted({change.adapter for given in found.values() for change in given}):
        own = {name: [c for c in given if c.adapter == adapter] for name, given in found.items()}
        _spread_copy(tie, own, adapter, result)
        shared = [change for change in own[first] if change.is_for_all]
        for tensor in others if own[first] else ():
            trained = [change for change in own[tensor] if not (change.is_copy and change.reach == "all")]
            if any(change.is_tied for change in trained):
                one, two = (_of(adapter, result.changes[name]) for name in (tensor, first))
                if not alike(one, two):
                    reason = (
                        f"trained with ensure_weight_tying, and yet {' and '.join(found)} change differently"
                    )
                    result.refusal = Refusal("tied", reason, BESIDE)
            elif shared and not any(map(replaces, trained)):
                # LoRA on both of them comes from a model without the tie.
                _add(result, tensor, [one for one in shared if not trained or replaces(one)])
    return result


def _spread_copy(tie: Tie, own: Mapping[str, Sequence[TensorChange]], adapter: int, result: Spread) -> None:
    """Give one adapter's copy of the shared weight to the parameters that have no copy of their own."""
    names = list(tie.tensors.values())
    copies = {name: change for name in names for change in own[name] if change.is_copy}
    without = [name for name in names if name not in copies]
    loaded = {name: change for name, change in copies.items() if change.reach == "all"}
    if without and any(change.reach == "unknown" for change in copies.values()):
        reason = (
            f"{' and '.join(names)} share one weight, and no config says whether the file's copy was trained "
            "for one of them alone (modules_to_save) or is of that weight"
        )
        result.refusal = Refusal("tied", reason, "put the adapter's adapter_config.json beside its file")
    for name, change in list(loaded.items())[:1]:
        if not all(alike([change], [other]) for other in loaded.values()):
            reason = (
                f"{' and '.join(loaded)} share one weight in this base, and the adapter has a copy with "
                "other values for each: PEFT would load the last over the others"
            )
            result.refusal = Refusal("tied", reason, _UNTIED)
        for tensor in without:
            _add(result, tensor, [change])
            result.copies.append((adapter, name, tensor))


def _add(result: Spread, tensor: str, changes: Sequence[TensorChange]) -> None:
    result.changes[tensor] = sorted([*changes, *result.changes[tensor]], key=lambda change: change.order)


def _of(adapter: int, changes: Sequence[TensorChange]) -> list[TensorChange]:
    return [change for change in changes if change.adapter == adapter]


def replaces(change: TensorChange) -> bool:
    """Return True if a change puts values in place of others."""
    return change.make(np.float32).values is not None


def alike(one: Sequence[TensorChange], two: Sequence[TensorChange]) -> bool:
    """Return True if two tensors of equal values are equal after these changes as well."""
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
