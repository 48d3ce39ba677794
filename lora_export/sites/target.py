"""Define targets, the parameters that an adapter changes, and their sites in a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import onnx_ir as ir

from lora_export.adapter import MERGE_ROWS, Adapter, Array, LoraModule, token_rows_problems
from lora_export.errors import AdapterError
from lora_export.formats.reading.whole_copies import copy_reach
from lora_export.plan import Proof, Refusal, RefusalKind
from lora_export.sites.naming.names import Named
from lora_export.sites.naming.towers import Kinds
from lora_export.sites.operand import Use
from lora_export.storage.patch import Placement

TargetKind = Literal["linear", "conv", "embedding", "parameter", "vector", "any"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """Parameter that an adapter changes.

    Attributes:
        key: Parameter path, ``model.layers.0.mlp.up_proj.weight``.
        kind: Kind of module that holds it; ``any`` for a whole replaced matrix, whose module is unknown.
        shape: Canonical shape (of one expert).
        experts: Number of stacked matrices.
        action: ``merge``, ``replace`` or ``add to bias``.
        tensor_names: Names of the adapter's tensors for it.
        module: Low-rank change, for ``merge``.
        values: New values, or for ``add to bias`` the values to add.
        held_turned: For a module's own matrix, True if the canonical weight is the transpose of what the
            module holds (``x @ W``); None for the weight of a module as PEFT knows modules.
        for_all_ends: True if it replaces all parameters that share the weight, see `formats.whole_copies`.
        stored_turned: True if ``values`` are the transpose of what the module and the adapter's file hold,
            see `sites.whole`.
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
    stored_turned: bool = False

    @property
    def path(self) -> str:
        """Module path."""
        return self.key.rpartition(".")[0]

    @property
    def named(self) -> Named:
        """The parameter, for the renaming of an adapter's parameters."""
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
class ExpertStack:
    """Matrices of stacked experts in the checkpoint, one at a time: all at once may be gigabytes.

    Attributes:
        matrix: Function that returns one expert's matrix, as the module holds it.
    """

    matrix: Callable[[int], Array]


# A target's values in the checkpoint.
Wanted = Array | ExpertStack


class WeightOf(Protocol):
    """Look-up of one adapter's parameters in the base checkpoint.

    Attributes:
        names: The checkpoint's path for each parameter that it was made for, or None.
    """

    names: tuple[str | None, ...]

    @property
    def is_foreign(self) -> bool:
        """True if the checkpoint stores none of the parameters, so that the adapter is for another model."""
        ...

    def __call__(self, target: Target) -> Wanted | None:
        """Return the canonical weight, for stacked experts each one's, or None if there is none."""
        ...

    def alike(self, target: Target, dtype: Any) -> tuple[str, list[str]]:
        """Return the name of a target's tensor, and those of others with its shape and some equal values.

        Args:
            target: Target to look up; its name is "" if it is not stored as one tensor.
            dtype: Dtype to which values are rounded before they are compared.
        """
        ...

    def copies(self, target: Target, names: Sequence[str], dtype: Any, table: bool) -> tuple[str, list[str]]:
        """Return the model's name of a target, and those of its copies among the tensors from `alike`.

        Args:
            target: Target that was looked up.
            names: Names of the tensors from `alike`.
            dtype: See `alike`.
            table: True if the target's rows are looked up, False if it is multiplied with.
        """
        ...

    def is_tied(self, target: Target) -> bool:
        """Return True if the checkpoint's model ties a parameter to others."""
        ...


class BaseWeights(Protocol):
    """Base checkpoint of a graph.

    Attributes:
        parameters: Names of the stored tensors.
        hints: Hints for adapters that were looked up and have no site in the checkpoint.
    """

    parameters: frozenset[str]
    hints: list[str]

    @property
    def kinds(self) -> Kinds:
        """Kinds of model that it is, see `towers`."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each stored tensor whose values can be read, by name."""
        ...

    def values(self, name: str) -> Array:
        """Return the values of one of the tensors in `shapes`."""
        ...

    def for_adapter(self, named: Sequence[Named], flattened: bool, scope: str | None) -> WeightOf:
        """Return a look-up of one adapter's parameters, with their names turned into the checkpoint's."""
        ...

    def settled(self, adapter: Adapter) -> tuple[Adapter, tuple[str, ...]]:
        """Return the adapter with the layout of this base's experts, and notes on that."""
        ...

    def stored(self) -> Iterator[Array]:
        """Yield the values of each tensor that can be read."""
        ...

    def stores(self, key: str) -> bool:
        """Return True if the checkpoint has a parameter for a graph's path, up to outer names."""
        ...


def refuse_token_rows(adapter: Adapter) -> None:
    """Raise `AdapterError` for an adapter that replaces single rows, which have no site in a graph."""
    if problems := token_rows_problems(adapter):
        lines = [f"{path}: {problem}" for path, problem in problems]
        raise AdapterError(f"adapter '{adapter.name}' can't go into a graph", MERGE_ROWS, lines)


def targets_of(adapter: Adapter) -> list[Target]:
    """Return the targets of an adapter, whole replacements first, because a delta comes on top of them.

    Raises:
        AdapterError: The adapter replaces single rows, which have no site in a graph.
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
            for_all_ends=copy_reach(adapter, key) == "all",
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
    """Return the weight's shape; in grouped convolutions lora_A has all input channels, it a group's."""
    out_dim, in_dim, *kernel = module.weight_shape
    return out_dim, in_dim // module.groups, *kernel


@dataclass(frozen=True, eq=False)
class ConstantPart:
    """Constant that holds a target or a part of it, with the target's uses and placements."""

    root: ir.Value
    uses: tuple[Use, ...]
    placements: tuple[Placement, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """Site of a target in a graph.

    Attributes:
        target: The target.
        parts: One for most modules, several if the graph has split a weight or repeats it.
        evidence: Evidence for the site, for the plan.
        proof: Strength of the evidence.
        keys: Parameter paths that the target has in the graph; several if the graph has split it.
        trained_otherwise: True if trainers compute the module in another way than they merge it.
    """

    target: Target
    parts: tuple[ConstantPart, ...]
    evidence: str
    proof: Proof = "names"
    keys: tuple[str, ...] = ()
    trained_otherwise: bool = False

    @property
    def is_quantised(self) -> bool:
        """True if some of the target is stored as codes of a quantiser."""
        return any(use.quantised for part in self.parts for use in part.uses)


@dataclass(frozen=True, eq=False)
class Miss:
    """Target without a site, with the reason.

    Attributes:
        target: The target.
        refusal: Reason, with a hint on how to give the adapter a site, if one is known.
        is_foreign: True if there is a checkpoint that stores no target of the adapter.
        tells_part: True if the hint names a part of the adapter or of the model to choose (``--component``).
    """

    target: Target
    refusal: Refusal
    is_foreign: bool = False
    tells_part: bool = False

    @property
    def kind(self) -> RefusalKind:
        """Kind of the refusal, on which general hints depend."""
        return self.refusal.kind

    @property
    def reason(self) -> str:
        """Details of the refusal."""
        return self.refusal.detail
