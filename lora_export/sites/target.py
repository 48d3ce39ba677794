"""What is to be found in a graph: the parameters that an adapter changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Adapter, Array, LoraModule
from lora_export.patch import Placement
from lora_export.sites.slot import Use

TargetKind = Literal["linear", "conv", "embedding", "parameter", "vector", "any"]


@dataclass(frozen=True, eq=False)
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

    @property
    def path(self) -> str:
        """Module path."""
        return self.key.rpartition(".")[0]

    @property
    def matrix(self) -> tuple[int, int]:
        """Canonical shape as a matrix."""
        rest = 1
        for size in self.shape[1:]:
            rest *= size
        return self.shape[0], rest


# Canonical weight of a parameter path in the base checkpoint, or None where the checkpoint has none.
# Of stacked experts it is the first and the last.
WeightOf = Callable[[Target], Array | None]


def targets_of(adapter: Adapter) -> list[Target]:
    """Return what an adapter changes, whole replacements first: a delta comes on top of them."""
    targets = [
        Target(
            key,
            "vector" if values.ndim == 1 else "any",
            values.shape,
            "replace",
            (adapter.extra_tensors.get(key, key),),
            values=values,
        )
        for key, values in adapter.extras.items()
    ]
    for module in adapter.modules.values():
        bias_names = tuple(name for name in module.tensor_names if name.endswith("bias"))
        names = tuple(name for name in module.tensor_names if name not in bias_names)
        targets.append(
            Target(
                f"{module.path}.{module.parameter}",
                module.kind,
                _canonical_shape(module),
                "merge",
                names,
                module.experts,
                module,
            )
        )
        if module.lora_bias is not None:
            bias = module.lora_bias.astype(np.float64) * module.scaling
            targets.append(
                Target(
                    f"{module.path}.bias", "vector", bias.shape, "add to bias", bias_names, 1, module, bias
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


@dataclass(frozen=True, eq=False)
class Site:
    """Where a target lives in a graph.

    Attributes:
        target: What was looked for.
        parts: One for most modules, several where the graph has split a weight or repeats it.
        evidence: What led there, for the plan.
    """

    target: Target
    parts: tuple[Part, ...]
    evidence: str


@dataclass(frozen=True, eq=False)
class Miss:
    """A target without a place, and why."""

    target: Target
    reason: str
