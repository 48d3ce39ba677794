"""What is to be found in a graph: the parameters that an adapter changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import onnx_ir as ir

from lora_export.adapter import MERGE_ROWS, Adapter, Array, LoraModule, token_rows_problems
from lora_export.errors import AdapterError
from lora_export.formats.reading.whole_copies import reach_of
from lora_export.plan import Proof, Refusal, RefusalKind
from lora_export.sites.naming.names import Named
from lora_export.sites.naming.towers import Kinds
from lora_export.sites.slot import Use
from lora_export.storage.patch import Placement

TargetKind = Literal["linear", "conv", "embedding", "parameter", "vector", "any"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """One parameter that an adapter changes.

    Attributes:
        key: Parameter path, ``model.layers.0.mlp.up_proj.weight``.
        kind: What holds it; ``any`` for a whole matrix that replaces one, whose module is not known.
        shape: Canonical shape (of one expert).
        experts: Number of stacked matrices.
        action: ``merge``, ``replace`` or ``add to bias``.
        tensor_names: The adapter's tensors behind it.
        module: The low-rank change, for ``merge``.
        values: The new values, or for ``add to bias`` the values to add.
        held_turned: Of a module's own matrix: whether the canonical weight is the transpose of what the
            module holds (``x @ W``); None: it is a module's weight as PEFT knows modules.
        for_all_ends: It replaces all that shares the parameter's weight, see `formats.whole_copies`.
    """

    key: str
    kind: TargetKind
    shape: tuple[int, ...]
    action: Literal["merge", "replace", "add to bias"]
    tensor_names: tuple[str, ...]
    experts: int = 1
    module: LoraModule | None = None
    values: Array | None = None
    held_turned: bool | None = None
    for_all_ends: bool = False

    @property
    def path(self) -> str:
        """Module path."""
        return self.key.rpartition(".")[0]

    @property
    def named(self) -> Named:
        """What the renaming of an adapter's parameters has to know of it."""
        if self.module is None or self.action != "merge":
            return Named(self.key, self.action, self.module.component if self.module else None)
        return Named(self.key, self.action, self.module.component, self.module.told_shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """Canonical shape as a matrix."""
        rest = 1
        for size in self.shape[1:]:
            rest *= size
        return self.shape[0], rest


@dataclass(frozen=True, eq=False)
class Stack:
    """The checkpoint's matrices of stacked experts: all at once may be gigabytes.

    Attributes:
        matrix: Returns one expert's, as the module holds it.
    """

    matrix: Callable[[int], Array]


# The checkpoint's values of a target.
Wanted = Array | Stack


class WeightOf(Protocol):
    """Looks up the parameters of one adapter in the base checkpoint.

    Attributes:
        names: For each parameter that it was made for, the checkpoint's path, or None.
    """

    names: tuple[str | None, ...]

    @property
    def is_foreign(self) -> bool:
        """Whether the checkpoint stores none of the parameters, so that the adapter is for another model."""
        ...

    def __call__(self, target: Target) -> Wanted | None:
        """Return the canonical weight, of stacked experts each one's, or None where there is none."""
        ...

    def alike(self, target: Target, dtype: Any) -> tuple[str, list[str]]:
        """Return where a target is stored, and what else has its shape and its values at some places.

        Args:
            target: What to look up; an empty text stands for what is not stored as one tensor.
            dtype: What values are rounded to before they are compared.
        """
        ...

    def copies(self, target: Target, names: Sequence[str], dtype: Any, table: bool) -> tuple[str, list[str]]:
        """Return the model's names of a target, and of its copies among what is `alike`.

        Args:
            target: What was looked up.
            names: What is alike.
            dtype: See `alike`.
            table: The target's rows are looked up; else it is multiplied with.
        """
        ...

    def is_tied(self, target: Target) -> bool:
        """Whether the checkpoint's model ties a parameter to others."""
        ...


class BaseWeights(Protocol):
    """The base checkpoint of a graph.

    Attributes:
        parameters: Names of the stored tensors.
        hints: What would give adapters that were looked up a place in the checkpoint.
    """

    parameters: frozenset[str]
    hints: list[str]

    @property
    def kinds(self) -> Kinds:
        """What kind of model it is, see `towers`."""
        ...

    def for_adapter(self, named: Sequence[Named], flattened: bool, scope: str | None) -> WeightOf:
        """Return what looks up one adapter's parameters, whose names are turned into the checkpoint's."""
        ...

    def settled(self, adapter: Adapter) -> tuple[Adapter, tuple[str, ...]]:
        """Return the adapter with the layout of its experts as this base has it, and notes on that."""
        ...

    def stored(self) -> Iterator[Array]:
        """Yield the values of each tensor whose values can be told."""
        ...

    def stores(self, key: str) -> bool:
        """Whether the checkpoint has a parameter that this path of a graph may be, its outer names aside."""
        ...


def refuse_token_rows(adapter: Adapter) -> None:
    """Raise `AdapterError` for an adapter that replaces single rows: a graph has no place for them."""
    if problems := token_rows_problems(adapter):
        lines = [f"{path}: {problem}" for path, problem in problems]
        raise AdapterError(f"adapter '{adapter.name}' can't go into a graph", MERGE_ROWS, lines)


def targets_of(adapter: Adapter) -> list[Target]:
    """Return what an adapter changes, whole replacements first: a delta comes on top of them.

    Raises:
        AdapterError: It replaces single rows, which no place in a graph is made for.
    """
    refuse_token_rows(adapter)
    targets = [
        Target(
            key=key,
            kind="vector" if values.ndim == 1 else "any",
            shape=values.shape,
            action="replace",
            tensor_names=(adapter.extra_tensors.get(key, key),),
            values=values,
            for_all_ends=reach_of(adapter, key) == "all",
        )
        for key, values in adapter.extras.items()
    ]
    for module in adapter.modules.values():
        targets.append(
            Target(
                key=f"{module.path}.{module.parameter}",
                kind=module.kind,
                shape=_canonical_shape(module),
                action="merge",
                tensor_names=module.weight_tensors,
                experts=module.experts,
                module=module,
            )
        )
        if module.lora_bias is not None:
            bias = module.lora_bias.astype(np.float64) * module.scaling
            targets.append(
                Target(
                    key=f"{module.path}.bias",
                    kind="vector",
                    shape=bias.shape,
                    action="add to bias",
                    tensor_names=module.bias_tensors,
                    module=module,
                    values=bias,
                )
            )
    return targets


def _canonical_shape(module: LoraModule) -> tuple[int, ...]:
    """Shape of the weight; of a grouped convolution lora_A has all input channels, the weight a group's."""
    out_dim, in_dim, *kernel = module.weight_shape
    return out_dim, in_dim // module.groups, *kernel


@dataclass(frozen=True, eq=False)
class Part:
    """A constant that holds (a part of) a target, the uses of it that are the target's, and where it lies."""

    root: ir.Value
    uses: tuple[Use, ...]
    placements: tuple[Placement, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """Where a target lives in a graph.

    Attributes:
        target: What was looked for.
        parts: One for most modules, several where the graph has split a weight or repeats it.
        evidence: What led there, for the plan.
        proof: How sure that is.
        keys: Parameter paths that it has in the graph: several where the graph has split it.
    """

    target: Target
    parts: tuple[Part, ...]
    evidence: str
    proof: Proof = "names"
    keys: tuple[str, ...] = ()

    @property
    def is_quantised(self) -> bool:
        """Whether some of it is stored as codes of a quantiser."""
        return any(use.quantised for part in self.parts for use in part.uses)


@dataclass(frozen=True, eq=False)
class Miss:
    """A target without a place, and why.

    Attributes:
        target: What was looked for.
        refusal: Why it has no place; its hint is what would give the adapter one, where that is known.
        is_foreign: There is a checkpoint, and it stores nothing that the adapter changes.
        tells_part: The hint says which part of the adapter or of the model to name (``--component``).
    """

    target: Target
    refusal: Refusal
    is_foreign: bool = False
    tells_part: bool = False

    @property
    def kind(self) -> RefusalKind:
        """What to do about it hangs on this."""
        return self.refusal.kind

    @property
    def reason(self) -> str:
        """What was seen, and where."""
        return self.refusal.detail
