"""Find parameters of a base that hold equal values and are not one: copies of a network, cloned heads.

Names of one parameter are not such: tied ones, those that transformers loads into the same parameter, and
those that it doesn't load at all.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from lora_export.adapter import Array
from lora_export.base.checkpoint.meta_model import LoadedNames, build_model
from lora_export.base.checkpoint.quantised import Quantised
from lora_export.base.ties.ties import is_head, is_table
from lora_export.storage.safetensors import DTYPES

# Number of values from each of these positions by which tensors are compared first.
_LENGTH, _STARTS = 32, (1 / 3, 2 / 3)
# Number of values that are compared at a time.
_BLOCK = 1 << 20


class EqualValues:
    """Finder of equal parameters in a checkpoint.

    Args:
        quantised: The checkpoint's values, including those that codes stand for.
    """

    def __init__(self, quantised: Quantised) -> None:
        self._quantised, self._checkpoint = quantised, quantised.checkpoint
        self._shapes: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for name, tensor in self._checkpoint.tensors.items():
            if len(tensor.shape) > 1 and tensor.length and tensor.code in DTYPES:
                self._shapes[tensor.shape].append(name)
        # Shape and dtype → each tensor's name → names of those with its values at some positions.
        self._groups: dict[tuple[Any, ...], dict[str, list[str]]] = {}

    def alike(self, tensor: str, dtype: Any) -> list[str]:
        """Return the other matrices of the same shape that have the same values at some positions.

        Args:
            tensor: A stored tensor.
            dtype: Dtype to which values are rounded before they are compared.
        """
        shape = self._checkpoint.tensors[tensor].shape
        names, key = self._shapes.get(shape, []), (shape, np.dtype(dtype))
        if len(names) < 2 or tensor not in names:
            return []
        if key not in self._groups:
            self._groups[key] = self._grouped(names, dtype)
        return [name for name in self._groups[key][tensor] if name != tensor]

    def _grouped(self, names: Sequence[str], dtype: Any) -> dict[str, list[str]]:
        """Return for each tensor those with its values, or for codes its codes, at some positions."""
        groups: dict[bytes, list[str]] = defaultdict(list)
        with contextlib.ExitStack() as stack:
            files = {self._checkpoint.tensors[name].file for name in names}
            opened = {file: stack.enter_context(file.open("rb")) for file in files}
            for name in names:
                tensor = self._checkpoint.tensors[name]
                stored = np.dtype(DTYPES[tensor.code])
                # Reading a few bytes of each tensor costs less than a view for each tensor of a file.
                count = tensor.length // stored.itemsize
                runs = []
                for share in _STARTS:
                    opened[tensor.file].seek(tensor.offset + int(count * share) * stored.itemsize)
                    length = min(_LENGTH, count - int(count * share))
                    runs.append(np.frombuffer(opened[tensor.file].read(length * stored.itemsize), stored))
                with np.errstate(over="ignore", invalid="ignore"):
                    # Zeros of either sign are equal.
                    values = np.concatenate(runs).astype(np.float32).astype(dtype) + np.zeros(1, dtype)
                groups[values.tobytes()].append(name)
        return {name: group for group in groups.values() for name in group}

    def copies(self, tensor: str, names: Sequence[str], dtype: Any, table: bool) -> tuple[str, list[str]]:
        """Return the model's name of a tensor, and those of its copies that are parameters of their own.

        Args:
            tensor: A stored tensor.
            names: Other tensors, from `alike`.
            dtype: See `alike`.
            table: True if rows of the tensor are looked up, False if it is multiplied with.
        """
        # A look-up and a product are not copies: a head may be tied to a table by code of the model's own.
        others = [name for name in names if not (is_head(name) if table else is_table(name))]
        own, loaded = self._loaded(tensor, others)
        kept = [name for stored, name in loaded if self._are_equal(tensor, stored, dtype)]
        return own, kept if kept and not self._is_constant(tensor) else []

    def _loaded(self, tensor: str, others: Sequence[str]) -> tuple[str, list[tuple[str, str]]]:
        """Return the model's name of a tensor, and (stored, model's name) of parameters of their own."""
        found = [(name, name) for name in others]
        if not others or self._model is None:
            return tensor, found
        renaming, owners = self._model
        names = {name: renaming.loaded(name)[0] for name in (tensor, *others)}
        own = names[tensor]
        if own not in owners:
            # The checkpoint is for another model than its config says.
            return tensor, found
        told = [(name, names[name]) for name in others]
        return own, [pair for pair in told if pair[1] in owners and owners[pair[1]] != owners[own]]

    @cached_property
    def _model(self) -> tuple[LoadedNames, dict[str, int]] | None:
        """Names that transformers gives when it loads, and its parameters with a number for shared ones."""
        if "model_type" not in self._checkpoint.config:
            return None
        try:
            model = build_model(self._checkpoint)
            return LoadedNames(model), _owners(model)
        except Exception:  # no transformers, or a model that it doesn't know
            return None

    def _are_equal(self, one: str, other: str, dtype: Any) -> bool:
        with np.errstate(over="ignore", invalid="ignore"):
            return all(
                bool((a.astype(dtype) == b.astype(dtype)).all())
                for a, b in zip(self._blocks(one), self._blocks(other), strict=True)
            )

    def _is_constant(self, tensor: str) -> bool:
        values = self._quantised.values(tensor)
        first = values.reshape(-1)[0]
        return all(bool((block == first).all()) for block in self._blocks(tensor))

    def _blocks(self, tensor: str) -> Iterator[Array]:
        values = self._quantised.values(tensor).reshape(-1)
        return (values[start : start + _BLOCK] for start in range(0, values.size, _BLOCK))


def _owners(model: Any) -> dict[str, int]:
    """Return each parameter of a model with a number that is equal for parameters that are one."""
    owners = {name: id(value) for name, value in model.named_parameters(remove_duplicate=False)}
    follows = model.get_expanded_tied_weights_keys(all_submodels=True)
    # No chain of ties is longer than the table.
    for _ in follows:
        owners |= {name: owners[first] for name, first in follows.items() if first in owners}
    return owners
