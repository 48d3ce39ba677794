"""Manage the slots of a bank: their adapters, a request's weights, and slots replaced while runs go on.

A run takes one `BankState` and keeps it. Changing a slot makes a new state with new tensors, so that a run in
flight sees the bank as it was when it started.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Generic

import numpy as np

from lora_export.adapter import Adapter, Array
from lora_export.binding.bind import clear_slot, slot_blocks
from lora_export.binding.cast import dtype_of
from lora_export.binding.pack import Rectangle
from lora_export.errors import AdapterError, GraphError
from lora_export.graph.exposed import WEIGHTS_INPUT
from lora_export.runtimes.adapter_cache import did_you_mean, unknown_adapter
from lora_export.runtimes.feeds import Feeds
from lora_export.runtimes.model import Model, R
from lora_export.storage.inputs import refuse_changed_inputs, same_inputs
from lora_export.untrusted.fields import nearest_float
from lora_export.untrusted.shown import limited

# A request's entry for one row: an adapter, None, or several adapters with their weights.
Row = str | None | Mapping[str, float]
Rows = Sequence[Row] | Array
# Largest number of modules that are listed.
_SHOWN = 5
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class BankState(Generic[R]):
    """The bank as one run sees it.

    Attributes:
        slots: Adapter name → number of its slot.
        resident: The bank's tensors; those that no load has changed are the graph's own.
    """

    slots: Mapping[str, int]
    resident: R


class BankSlots(Generic[R]):
    """The slots of one session's bank.

    Attributes:
        state: The bank as a run that starts now sees it.
    """

    def __init__(self, model: Model[R]) -> None:
        self._model = model
        self._record = model.record
        self._writing = threading.Lock()
        self._host: dict[str, Array] = {}
        # Plain inputs have no default: such a bank is empty until adapters are loaded.
        filled = [slot for slot in self._record.slots if slot.adapter and not self._plain]
        if filled and model.unused:
            raise GraphError(
                f"{model.path}: no output depends on {len(model.unused)} modules of the bank's adapters "
                f"(of {len(self._record.modules)})",
                "a tool has changed the graph since it was written; make it again with bank-onnx",
                limited(sorted(model.unused), most=_SHOWN),
            )
        numbers = {slot.name: number for number, slot in enumerate(self._record.slots)}
        self.state = BankState(
            {slot.name: numbers[slot.name] for slot in filled},
            model.put(self._tensors() if self._plain else {}),
        )

    @property
    def _plain(self) -> bool:
        return any(port.required for port in self._model.lora.values())

    def names(self) -> list[str]:
        """Return the names that a run may ask for, by slot."""
        slots = self.state.slots
        return sorted(slots, key=lambda name: slots[name])

    def on_device(self) -> list[str]:
        """Return the names of the adapters on the device: all of them."""
        return self.names()

    @contextmanager
    def use(self, feeds: Feeds, adapter: str | None, adapters: Rows | None) -> Iterator[tuple[R, Feeds]]:
        """Give a run the bank as it is now, and the weights of its rows.

        Raises:
            AdapterError: The rows' adapters can't be used, or the request has one adapter for all.
        """
        if adapter is not None:
            raise AdapterError(
                f"{self._model.path.name} is a bank: it takes one adapter for each row",
                f"give adapters=[{adapter!r}, …] instead of adapter=",
            )
        state = self.state
        batch = dict(feeds)[self._record.batch_input]
        shape = batch.shape() if callable(batch.shape) else batch.shape  # an OrtValue's is a method
        weights = self.weights(state, adapters, shape[0] if len(shape) else 0)
        yield state.resident, [*feeds, (WEIGHTS_INPUT, weights)]

    def weights(self, state: BankState[R], rows: Rows | None, batch: int) -> Array:
        """Return the input ``lora.adapter_weights`` ``(batch, n_slots)``.

        Args:
            state: The bank as the run sees it.
            rows: One entry for each row of the batch, or the array itself; None: all rows use the base.
            batch: Number of rows of the request.

        Raises:
            AdapterError: Another number of rows, unknown adapters, or weights that are not finite numbers.
        """
        n_slots = len(self._record.slots)
        if rows is None:
            return np.zeros((batch, n_slots), np.float32)
        if isinstance(rows, np.ndarray):
            return _checked_array(rows, batch, n_slots)
        if isinstance(rows, str) or not isinstance(rows, Sequence):
            raise AdapterError(
                f"adapters is a {type(rows).__name__}, wanted a list with one entry for each row",
                f"for all {batch} rows: adapters=[…] * {batch}",
            )
        if len(rows) != batch:
            raise AdapterError(
                f"adapters has {len(rows)} entries, '{self._record.batch_input}' has {batch} rows",
                "give one entry for each row: a name, None, or a dict of names and weights",
            )
        weights, problems = np.zeros((batch, n_slots), np.float32), []
        for number, row in enumerate(rows):
            found = _fill_row(weights[number], row, state.slots)
            problems += [f"row {number}: {problem}" for problem in found]
        if problems:
            names = ", ".join(state.slots) or "no adapters yet; load_adapter loads one"
            raise AdapterError(
                f"adapters can't be used with {self._model.path.name}",
                f"{did_you_mean(_unknown(rows, state.slots), state.slots)}it has: {names}",
                problems,
            )
        return weights

    def load(
        self,
        name: str,
        read: Callable[[], Adapter],
        slot: str | None = None,
        *,
        allow_unmatched: bool = False,
        any_base: bool = False,
        replace: bool = False,
    ) -> tuple[str, ...]:
        """Put an adapter into a slot; return what the user should know.

        Args:
            name: The adapter's name in requests.
            read: Function that reads it.
            slot: Name of the slot in the LoRA record; by default the slot of the adapter's name, or a free
                one.
            allow_unmatched: Leave out modules that have no site.
            any_base: Load an adapter that was trained on, or converted for, another base.
            replace: Take the place of the adapter that is there.

        Raises:
            AdapterError: The bank's tensors are constants, the slot is unknown or taken, or none is free.
            SiteError: Something of the adapter has no place, or the slot's rank is too small.
            InputChangedError: The graph, whose tensors the other slots are, is not the file that was opened.
        """
        self._check_replaceable()
        with same_inputs():
            adapter = read()
            with self._writing:
                number = self._choose(name, slot, replace)
                where = str(self._model.path)
                bound = slot_blocks(
                    adapter,
                    self._record,
                    number,
                    where=where,
                    weight_of=self._model.weight_of,
                    allow_unmatched=allow_unmatched,
                    any_base=any_base,
                    unused=self._model.unused,
                    own_base=True,
                )
                kept = {known: at for known, at in self.state.slots.items() if at != number}
                refuse_changed_inputs()
                self._write(bound.blocks, {**kept, name: number})
        return bound.notes

    def unload(self, name: str) -> None:
        """Empty an adapter's slot.

        Raises:
            AdapterError: The bank's tensors are constants, or no adapter has this name.
        """
        self._check_replaceable()
        with self._writing:
            kept = dict(self.state.slots)
            if not isinstance(name, str) or name not in kept:
                raise unknown_adapter(name, list(kept))
            self._write(clear_slot(self._record, kept.pop(name)), kept)

    def _check_replaceable(self) -> None:
        if self._record.resident != "inputs":
            raise AdapterError(
                f"the adapters of {self._model.path.name} are constants: none can be loaded or unloaded",
                "make the bank with bank-onnx --resident inputs",
            )

    def _choose(self, name: str, slot: str | None, replace: bool) -> int:
        names = [known.name for known in self._record.slots]
        taken = {number: known for known, number in self.state.slots.items()}
        if slot is not None and slot not in names:
            raise AdapterError(f"the bank has no slot '{slot}'", f"it has: {', '.join(names)}")
        own = self.state.slots.get(name)
        if own is not None and slot is not None and names[own] != slot:
            raise AdapterError(
                f"adapter '{name}' is in slot '{names[own]}'", f"unload_adapter('{name}') first"
            )
        if own is None and slot is None and (name not in names or names.index(name) in taken):
            free = [number for number in range(len(names)) if number not in taken]
            if not free:
                listed = [f"slot '{names[number]}': adapter '{known}'" for number, known in taken.items()]
                raise AdapterError(
                    f"the bank has no free slot for '{name}'",
                    "unload_adapter one, or give slot=… and replace=True",
                    listed,
                )
            return free[0]
        number = own if own is not None else names.index(slot if slot is not None else name)
        if number in taken and not replace:
            raise AdapterError(
                f"slot '{names[number]}' holds adapter '{taken[number]}' already", "give replace=True"
            )
        return number

    def _write(self, blocks: Sequence[Rectangle], slots: Mapping[str, int]) -> None:
        host = self._tensors()
        changed: dict[str, Array] = {}
        for block in blocks:
            if block.tensor not in changed:
                changed[block.tensor] = host[block.tensor].copy()
            changed[block.tensor][block.index] = block.values
        resident = self._model.put(changed, self.state.resident)
        host.update(changed)
        self.state = BankState(slots, resident)

    def _tensors(self) -> dict[str, Array]:
        """Return the bank's tensors in the host's memory; before any load those of the file, or zeros."""
        if not self._host and self._model.lora:
            self._host = self._empty() if self._plain else self._defaults()
        return self._host

    def _empty(self) -> dict[str, Array]:
        tensors: dict[str, Array] = {}
        for module in self._record.modules:
            rank = sum(sum(member.ranks) for member in module.members)
            tensors[module.lora_a] = np.zeros(module.a_shape(rank), dtype_of(module.dtype))
            tensors[module.lora_b] = np.zeros(module.b_shape(rank), dtype_of(module.dtype))
            if module.bias:
                shape = len(self._record.slots), module.out_dim
                tensors[module.lora_bias] = np.zeros(shape, dtype_of(module.dtype))
        return tensors

    def _defaults(self) -> dict[str, Array]:
        weight_of = self._model.weight_of
        return {name: np.array(weight_of(name)) for name in self._model.lora}


def _checked_array(rows: Array, batch: int, n_slots: int) -> Array:
    problems = []
    if rows.shape != (batch, n_slots):
        problems.append(f"shape {rows.shape}, wanted {(batch, n_slots)}: a row each, a column for each slot")
    if rows.dtype.kind not in "fiu":
        problems.append(f"{rows.dtype}, wanted float32")
    else:
        with np.errstate(over="ignore"):
            rows = rows.astype(np.float32)
        if not np.isfinite(rows).all():
            problems.append("values that are NaN, infinite or too large for float32")
    if problems:
        raise AdapterError("the array of adapter weights can't be used", "give finite weights", problems)
    return rows


def _unknown(rows: Sequence[Row], slots: Mapping[str, int]) -> Iterator[str]:
    """Yield the names in a request that belong to no adapter."""
    for row in rows:
        named = [row] if isinstance(row, str) else row if isinstance(row, Mapping) else []
        yield from (str(name) for name in named if name not in slots)


def _fill_row(weights: Array, row: object, slots: Mapping[str, int]) -> list[str]:
    """Set one row's weights, and return its problems."""
    if row is None:
        return []
    if isinstance(row, str):
        row = {row: 1.0}
    if not isinstance(row, Mapping):
        return [f"{type(row).__name__}, wanted a name, None, or a dict of names and weights"]
    problems = []
    for name, weight in row.items():
        near = nearest_float(weight) if isinstance(weight, Real) else math.nan
        if name not in slots:
            problems.append(f"no adapter {name!r}")
        elif not abs(near) <= _LARGEST:
            # An integer may be too long to be printed.
            text = repr(near if isinstance(weight, int) else weight)
            problems.append(f"{name}: weight {text}, wanted a finite number that float32 can hold")
        else:
            weights[slots[name]] = near
    return problems
