"""Hold the plan for a checkpoint: its changed tensors and their patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lora_export.base.checkpoint.quantised import Quantised
from lora_export.base.ties.copies import Copied
from lora_export.base.ties.tied_changes import MakePatch
from lora_export.plan import Plan, Refusal


class NoSite(Exception):
    """Exception for a parameter without a site; it is caught in `find_sites` and written into the plan.

    Attributes:
        refusal: Reason, with a hint on the base if one helps.
    """

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.detail)
        self.refusal = refusal


@dataclass(frozen=True)
class AddedTensor:
    """Tensor that the output has and the base lacks: a head that was tied.

    Attributes:
        name: Name of the tensor.
        source: The stored tensor that it starts from.
    """

    name: str
    source: str


@dataclass(kw_only=True)
class CheckpointPlan:
    """Plan for a checkpoint.

    Attributes:
        quantised: The base's quantised weights.
        plan: Rows and notes on each parameter.
        changes: Name of a stored or added tensor → its patches, in the order given, made on demand.
        stacked: Names of tensors whose first two axes are rows (stacked experts).
        added: Heads that were tied and become tensors of their own.
        untied: True if the config ties head and embedding, and the output's config must not.
        absent: Parameters without a site because the base has no such name.
        resized: Name of a stored or added tensor → its new shape, with rows for new tokens.
        vocabulary: Numbers of tokens of the base and of the output; None if they are equal.
        hints: Hints on the base for parameters without a site.
        copied: Whole copies that adapters put in, and changes that are added beside them.
    """

    quantised: Quantised
    plan: Plan = field(default_factory=Plan)
    changes: dict[str, list[MakePatch]] = field(default_factory=dict)
    stacked: set[str] = field(default_factory=set)
    added: list[AddedTensor] = field(default_factory=list)
    untied: bool = False
    absent: list[str] = field(default_factory=list)
    resized: dict[str, tuple[int, ...]] = field(default_factory=dict)
    vocabulary: tuple[int, int] | None = None
    hints: tuple[str, ...] = ()
    copied: Sequence[Copied] = ()


def view_of(shape: tuple[int, ...], stacked: bool) -> tuple[int, int]:
    """Return a shape as a matrix: the first axis is the rows, with stacked experts the first two.

    A vector or a scalar is one row.
    """
    size = int(np.prod(shape, dtype=np.int64))
    if len(shape) < 2:
        return 1, size
    rows = shape[0] * shape[1] if stacked else shape[0]
    return rows, size // rows if rows else 0
