"""The plan for a checkpoint: which of its tensors change, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lora_export.base.checkpoint.quantised import Quantised
from lora_export.base.ties.copies import Copied
from lora_export.base.ties.tied_changes import MakePatch
from lora_export.plan import Plan


@dataclass(frozen=True)
class Added:
    """A tensor that the output has and the base has not: a head that was tied.

    Attributes:
        name: Its name.
        source: The stored tensor that it starts from.
    """

    name: str
    source: str


@dataclass(kw_only=True)
class Placed:
    """The plan for a checkpoint.

    Attributes:
        quantised: The base's quantised weights.
        plan: What happens to each parameter.
        changes: Name of a stored or added tensor → its patches, in the order given, made on demand.
        stacked: Names of tensors whose first two axes are rows (stacked experts).
        added: Heads that are no longer tied.
        untied: The config says that head and embedding are tied, and the output's has to say no.
        absent: Parameters without a place because the base has no such name.
        resized: Name of a stored or added tensor → its new shape, with rows for new tokens.
        vocabulary: How many tokens the base has, and the output.
        hints: What to do to the base for parameters without a place.
        copied: Whole copies that adapters put in, and what is added beside them.
    """

    quantised: Quantised
    plan: Plan = field(default_factory=Plan)
    changes: dict[str, list[MakePatch]] = field(default_factory=dict)
    stacked: set[str] = field(default_factory=set)
    added: list[Added] = field(default_factory=list)
    untied: bool = False
    absent: list[str] = field(default_factory=list)
    resized: dict[str, tuple[int, ...]] = field(default_factory=dict)
    vocabulary: tuple[int, int] | None = None
    hints: tuple[str, ...] = ()
    copied: Sequence[Copied] = ()


def view_of(shape: tuple[int, ...], stacked: bool) -> tuple[int, int]:
    """Return a shape as a matrix: the first axis are the rows, of stacked experts the first two.

    A vector or a scalar is one row.
    """
    size = int(np.prod(shape, dtype=np.int64))
    if len(shape) < 2:
        return 1, size
    rows = shape[0] * shape[1] if stacked else shape[0]
    return rows, size // rows if rows else 0
