"""Look up the canonical weights of targets in a base checkpoint, for comparison with a graph's values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Adapter, Array
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.names import Names, StoredPart
from lora_export.base.checkpoint.quantised import Quantised, find_quantised
from lora_export.base.ties.equal_values import EqualValues
from lora_export.base.ties.ties import Tie, Ties, find_ties
from lora_export.errors import CheckpointError, OutputError
from lora_export.graph.data_identity import DataTensor
from lora_export.graph.onnx_file import GraphFile, shape_of
from lora_export.sites.experts import is_turned, settle_layout
from lora_export.sites.naming.names import Named
from lora_export.sites.naming.towers import Kinds
from lora_export.sites.target import ExpertStack, Target, Wanted


class CheckpointWeights:
    """Weights of a checkpoint, for targets of a graph.

    Args:
        checkpoint: The folder that the graph was exported from.

    Attributes:
        parameters: Names of the stored tensors.
        hints: Hints for adapters that were looked up and have no site in the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._names = Names(checkpoint)
        self._quantised = find_quantised(checkpoint)
        self._equal = EqualValues(self._quantised)
        self.parameters = frozenset(checkpoint.tensors)
        self.hints: list[str] = []

    @property
    def quantised_as(self) -> str:
        """Format of its quantised weights; "" if there are none."""
        scaled = {one.codes.code for one in self._quantised.scaled.values()}
        return ", ".join(sorted({*scaled, *self._quantised.closed.values()}))

    @property
    def kinds(self) -> Kinds:
        """Kinds of model that it is."""
        return self._names.kinds

    def for_adapter(self, named: Sequence[Named], flattened: bool, scope: str | None) -> AdapterWeights:
        """Return a look-up of one adapter's parameters.

        Args:
            named: All of its parameters: one change of names holds for the whole adapter.
            flattened: True if their paths have underscores for dots.
            scope: Part that belongs, as the user names it.
        """
        change = self._names.rename(named, flattened, scope)
        self.hints += [change.hint] if change.hint else []
        return AdapterWeights(
            self._names,
            self._quantised,
            named=named,
            names=change.names,
            equal=self._equal,
            ties_of=lambda: self._ties,
        )

    @cached_property
    def _ties(self) -> Ties:
        return find_ties(self._checkpoint)

    def settled(self, adapter: Adapter) -> tuple[Adapter, tuple[str, ...]]:
        """Return the adapter with the layout of this base's experts, and notes on that."""
        return settle_layout(adapter, self._names.held)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each stored tensor whose values can be read, by name."""
        tensors = self._checkpoint.tensors.items()
        return {name: tensor.shape for name, tensor in tensors if not self._quantised.refusal(name)}

    def values(self, name: str) -> Array:
        """Return the values of one of the tensors in `shapes`."""
        return self._quantised.values(name)

    def stored(self) -> Iterator[Array]:
        """Yield the values of each tensor that can be read."""
        return map(self.values, self.shapes)

    def stores(self, key: str) -> bool:
        """Return True if the checkpoint has a parameter for a graph's path, up to outer names."""
        return any(
            key == name or key.endswith(f".{name}") or name.endswith(f".{key}") for name in self._names
        )


class AdapterWeights:
    """Look-up of one adapter's targets; call it with a target.

    Args:
        table: The checkpoint's names.
        quantised: The checkpoint's values, including those that codes stand for.
        named: The adapter's parameters.
        names: The checkpoint's path for each of them, or None.
        equal: The checkpoint's parameters of equal values.
        ties_of: Function that finds the ties of the checkpoint's model; called only if needed.

    Attributes:
        names: The checkpoint's path for each parameter, or None.
    """

    def __init__(
        self,
        table: Names,
        quantised: Quantised,
        named: Sequence[Named],
        names: tuple[str | None, ...],
        equal: EqualValues,
        ties_of: Callable[[], Ties],
    ) -> None:
        self._table, self._quantised, self.names, self._equal = table, quantised, names, equal
        self._ties_of = ties_of
        self._by_named = dict(zip(named, names, strict=True))

    @property
    def is_foreign(self) -> bool:
        """True if the checkpoint stores none of the parameters, so that the adapter is for another model."""
        return not any(name and self._stores(name) for name in self.names)

    def _stores(self, name: str) -> bool:
        return bool(self._table.parts(name) or self._quantised.packed_at(name))

    def __call__(self, target: Target) -> Wanted | None:
        """Return values in the target's canonical shape, for stacked experts each one's, or None.

        Codes with scales are returned as the values that they stand for.

        None if the checkpoint doesn't store it (a tied head), or in another shape. Conv1D's ``(in_dim,
        out_dim)`` is returned transposed; a square one can't be told from Linear's by its shape, so that a
        comparison has to try both orientations. A module's own parameter is returned as the module holds it.

        Raises:
            CheckpointError: The weight is quantised in a way that is not understood.
        """
        name = self._by_named.get(target.named)
        parts = self._table.parts(name) if name else ()
        packed = None if parts else self._quantised.packed_at(name or target.key)
        if packed:
            folder = self._quantised.checkpoint.folder
            raise CheckpointError(
                f"{folder}: {target.key} is {packed.detail}: its values can't be compared",
                "give the unquantised folder with --checkpoint, or --no-checkpoint (checkpoint=False)",
            )
        if not parts:
            return None
        if target.experts > 1:
            return self._experts(target, parts)
        if len(parts) != 1 or parts[0].piece != (0, 1) or parts[0].expert is not None:
            return None
        values = self._quantised.values(parts[0].tensor)
        values = values.T if parts[0].transposed != target.stored_turned else values
        if target.kind == "parameter" and values.ndim == 3 and len(values) == 1:
            values = values[0]
        if values.shape == target.shape:
            return values
        if len(values) == target.shape[0] and values.size == np.prod(target.shape[:2]) == np.prod(
            target.shape
        ):
            # A Linear and a 1×1 convolution.
            same = values.shape[1:2] == target.shape[1:2]
            if same and values.ndim != len(target.shape):
                return values.reshape(target.shape)
        if target.kind in ("linear", "any") and values.ndim == 2 and values.shape == target.shape[::-1]:
            return values.T
        return None

    def alike(self, target: Target, dtype: Any) -> tuple[str, list[str]]:
        """Return the name of a target's tensor, and those of others with its shape and some equal values."""
        tensor = self._tensor(target)
        return tensor, self._equal.alike(tensor, dtype) if tensor else []

    def copies(self, target: Target, names: Sequence[str], dtype: Any, table: bool) -> tuple[str, list[str]]:
        """Return the model's name of a target, and those of its copies among the tensors from `alike`."""
        return self._equal.copies(self._tensor(target), names, dtype, table)

    def _tensor(self, target: Target) -> str:
        """Return the one tensor that holds a target, or an empty text."""
        name = self._by_named.get(target.named)
        parts = self._table.parts(name) if name else ()
        whole = len(parts) == 1 and parts[0].piece == (0, 1) and parts[0].expert is None
        return parts[0].tensor if whole and not self._quantised.refusal(parts[0].tensor) else ""

    def is_tied(self, target: Target) -> bool:
        """Return True if the checkpoint's model ties a parameter to others."""
        ties, name = self._ties_of(), self._by_named.get(target.named) or target.key
        parts = self._table.parts(name)
        tie = ties.of(parts[0].tensor) if parts else next(iter(ties.absent(name) or ()), None)
        return isinstance(tie, Tie) and len(tie.tensors) > 1

    def _experts(self, target: Target, parts: Sequence[StoredPart]) -> ExpertStack | None:
        """Return each expert's matrix, joined if it is stored in pieces."""
        if len(parts) == 1 and parts[0].expert is None:
            return self._stacked(target, parts[0])
        pieces: dict[int | None, list[str]] = {}
        for part in sorted(parts, key=lambda part: part.piece):
            pieces.setdefault(part.expert, []).append(part.tensor)
        if set(pieces) != set(range(target.experts)) or any(
            len(tensors) != parts[0].piece[1] for tensors in pieces.values()
        ):
            return None
        return ExpertStack(
            lambda expert: np.concatenate([self._quantised.values(name) for name in pieces[expert]])
        )

    def _stacked(self, target: Target, part: StoredPart) -> ExpertStack | None:
        """Return the matrices of one tensor that holds all experts."""
        shape = self._quantised.checkpoint.tensors[part.tensor].shape
        if len(shape) != 3 or shape[0] != target.experts:
            return None
        held = self._table.held(target.key)
        turned = part.transposed or (held is not None and is_turned(shape, held.shape))
        # Codes are dequantised as a whole; a mapped file is opened again, so that read pages can be released.
        whole = self._quantised.values(part.tensor) if part.tensor in self._quantised.scaled else None

        def matrix(expert: int) -> Array:
            values: Array = (self._quantised.values(part.tensor) if whole is None else whole)[expert]
            return values.T if turned else values

        return ExpertStack(matrix)


def link_weights(graph: GraphFile, checkpoint: Checkpoint) -> set[Path]:
    """Let each constant that the checkpoint stores byte for byte refer to the ``.safetensors`` file.

    ONNX external data may be at any offset of any file in the model's folder, also inside a checkpoint.

    Returns:
        The checkpoint files that are referred to.

    Raises:
        OutputError: No constant is stored there in this dtype and orientation.
    """
    files: set[Path] = set()
    for value in graph.initializers():
        tensor, stored = value.const_value, checkpoint.tensors.get(str(value.name))
        if tensor is None or stored is None or stored.shape != shape_of(tensor):
            continue
        values = checkpoint.read(stored.name)
        if values.dtype == tensor.dtype.numpy() and np.array_equal(values, tensor.numpy()):
            held = ir.ExternalTensor(
                stored.file.name,
                stored.offset,
                stored.length,
                tensor.dtype,
                shape=ir.Shape(stored.shape),
                name=str(value.name),
            )
            value.const_value = DataTensor(held, stored.file)
            files.add(stored.file)
    if not files:
        raise OutputError(
            f"no weight of the graph can stay in {checkpoint.folder}, whose dtype is another",
            "give the checkpoint's --dtype, or omit --share-base",
        )
    return files
