"""Read feeds from the user's ``.npz`` or ``.safetensors`` file, and check them against the inputs.

A file holds one feed under the inputs' own names, or several under ``<label>/<input>``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lora_export.adapter import Array
from lora_export.errors import BackendError
from lora_export.graph.captured import PAST_SEQUENCE, SEQUENCE, TOTAL_SEQUENCE, Captured
from lora_export.parity.feeds.array_files import SUFFIXES, read_arrays
from lora_export.parity.feeds.feed import Feed, InputPort, is_float, shared_inputs, sizes_by_role
from lora_export.untrusted.places import is_file, is_folder

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def read_feeds(
    path: Path, ports: Sequence[InputPort], captured: Captured | None = None, vocab_size: int | None = None
) -> list[Feed]:
    """Read feeds.

    Args:
        path: The file.
        ports: The graph's inputs without LoRA's.
        captured: The graph's metadata on its model, if any: vocabulary and largest sizes.
        vocab_size: Number of token ids; it overrides the metadata, and these the graph's table.

    Returns:
        One feed with the file's name, or one for each label, in the file's order.

    Raises:
        BackendError: The file can't be read, or does not fit the inputs; all problems are listed.
    """
    tensors = _tensors(path)
    names = [port.name for port in ports]
    feeds, problems = _by_label(path, tensors, names)
    for label, values in feeds.items():
        checker = _Checker(ports, captured, vocab_size)
        where = f"{label}: " if len(feeds) > 1 else ""
        problems += [f"{where}{problem}" for problem in checker.problems(values)]
    if problems:
        taken = "; ".join(f"{port.name} {port.text}" for port in ports)
        raise BackendError(f"the feeds in {path} don't fit the graph", f"it takes: {taken}", problems)
    shared = shared_inputs(ports)
    return [
        Feed(label, {name: np.array(values[name]) for name in names}, shared)
        for label, values in feeds.items()
    ]


def _tensors(path: Path) -> dict[str, Array]:
    if not is_file(path):
        text = f"{path} is a folder" if is_folder(path) else f"no file at {path}"
        raise BackendError(text, "give an .npz or .safetensors file with the inputs' values")
    if path.suffix not in SUFFIXES:
        raise BackendError(
            f"{path} is neither .npz nor .safetensors", "save the inputs with numpy.savez(file, **inputs)"
        )
    tensors = read_arrays(path)
    if not tensors:
        raise BackendError(f"{path} is empty: nothing would be checked", "put the inputs' values in it")
    return tensors


def _by_label(
    path: Path, tensors: Mapping[str, Array], names: Sequence[str]
) -> tuple[dict[str, dict[str, Array]], list[str]]:
    """Return label → input → values, and a problem for each name that has no label."""
    if any(key in names for key in tensors) or not any("/" in key for key in tensors):
        return {path.stem: dict(tensors)}, []
    feeds: dict[str, dict[str, Array]] = {}
    problems = []
    # An input's name may contain a slash: the longest name that fits is meant.
    ordered = sorted(names, key=len, reverse=True)
    for key, values in tensors.items():
        found = next((name for name in ordered if key.endswith(f"/{name}")), None)
        label, _, name = key.rpartition("/") if found is None else (key[: -len(found) - 1], "", found)
        if label:
            feeds.setdefault(label, {})[name] = values
        else:
            problems.append(f"{key}: not <label>/<input>, as the others are")
    return feeds, problems


class _Checker:
    """Check one feed."""

    def __init__(self, ports: Sequence[InputPort], captured: Captured | None, vocab_size: int | None) -> None:
        self._ports = {port.name: port for port in ports}
        self._axes = sizes_by_role(ports)
        self._largest = captured.largest if captured else {}
        self._vocab_size = vocab_size or (captured.vocab_size if captured else None)

    def problems(self, values: dict[str, Array]) -> list[str]:
        """Return a line for each problem; bfloat16 values of an .npz get their dtype back."""
        problems = [f"{name}: not an input of the graph" for name in values if name not in self._ports]
        problems += [
            f"{name}: missing, {port.text}" for name, port in self._ports.items() if name not in values
        ]
        fitting = {}
        for name, port in self._ports.items():
            if name not in values:
                continue
            if port.dtype == "bfloat16" and values[name].dtype == np.dtype("V2"):
                values[name] = values[name].view(_BFLOAT16)  # .npz can't express this dtype
            found = _port_problem(port, values[name])
            problems += found
            if not found:
                fitting[name] = values[name]
        problems += self._size_problems(fitting)
        for name, array in fitting.items():
            problems += self._value_problems(self._ports[name], array)
        return problems

    def _size_problems(self, values: Mapping[str, Array]) -> list[str]:
        symbols: dict[str, tuple[int, str]] = {}
        roles: dict[str, tuple[int, str]] = {}
        problems = []
        for port, axis, role in self._axes:
            if port.name not in values:
                continue
            size, dim = values[port.name].shape[axis], port.dims[axis]
            if isinstance(dim, str):
                other, where = symbols.setdefault(dim, (size, port.name))
                if other != size:
                    problems.append(f"{port.name}: '{dim}' is {size}, in {where} it is {other}")
            if role is not None:
                roles.setdefault(role, (size, port.name))
                if size > self._largest.get(role, size):
                    problems.append(f"{port.name}: {size} tokens, the model takes {self._largest[role]}")
            if size == 0 and role != PAST_SEQUENCE:
                problems.append(f"{port.name}: shape {list(values[port.name].shape)} holds no values")
        total, past, new = (roles.get(role) for role in (TOTAL_SEQUENCE, PAST_SEQUENCE, SEQUENCE))
        if total and past and new and total[0] != past[0] + new[0]:
            known = f"{past[0]} past ones in {past[1]} and {new[0]} new ones in {new[1]}"
            problems.append(f"{total[1]}: {total[0]} tokens, but {known}")
        return problems

    def _value_problems(self, port: InputPort, values: Array) -> list[str]:
        if is_float(port.dtype):
            count = int((~np.isfinite(values)).sum())
            return [f"{port.name}: {count} of {values.size} values are NaN or infinite"] if count else []
        if port.kind in ("ids", "types", "positions") and values.size:
            rows = (self._vocab_size or port.rows) if port.kind == "ids" else port.rows
            low, high = int(values.min()), int(values.max())
            if low < 0 or (rows is not None and high >= rows):
                upper = f" to {rows - 1}" if rows is not None else " or more"
                return [f"{port.name}: values from {low} to {high}, wanted 0{upper}"]
        if port.kind == "mask" and values.size:
            return _mask_problems(port.name, values)
        return []


def _port_problem(port: InputPort, values: Array) -> list[str]:
    problems = []
    if values.dtype.name != port.dtype:
        problems.append(
            f"{port.name}: {values.dtype.name}, wanted {port.dtype} (values.astype({port.dtype!r}))"
        )
    fixed = zip(port.dims, values.shape, strict=False)
    if len(values.shape) != len(port.dims) or any(isinstance(d, int) and d != size for d, size in fixed):
        problems.append(f"{port.name}: shape {list(values.shape)}, wanted {port.text}")
    return problems


def _mask_problems(name: str, values: Any) -> list[str]:
    problems = []
    if not np.isin(values, (0, 1)).all():
        problems.append(f"{name}: values other than 0 and 1")
    empty = np.flatnonzero(~(values != 0).any(1))
    if len(empty):
        problems.append(f"{name}: no token in row {', '.join(map(str, empty))}")
    return problems
