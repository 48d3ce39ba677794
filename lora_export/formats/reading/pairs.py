"""Build `LoraModule`s from loose tensors: collect the parts of each module, then check them all.

Every format names its tensors in its own way; the rules for a valid pair are the same, and are here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from lora_export.adapter import Adapter, Array, Kind, LoraModule
from lora_export.errors import AdapterError
from lora_export.formats.reading.scope import unknown_component
from lora_export.formats.reading.source import AdapterSource, ReadOptions
from lora_export.formats.reading.tensors import value_problems
from lora_export.untrusted.archives import too_much
from lora_export.untrusted.fields import nearest_float

MAX_LISTED = 40
# No scaling is as large, or one by it as small: in float32 the change would be infinite, or none at all.
ABSURD = 1e15


@dataclass(kw_only=True)
class Parts:
    """The tensors found for one module, and the file's facts on it."""

    path: str
    component: str | None = None
    kind: Kind | None = None
    parameter: str = "weight"
    tensors: dict[str, Array] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)  # part → name of its (first) tensor
    alpha: float | None = None
    rank: int | None = None

    @property
    def rows(self) -> int | None:
        """Rows of ``lora_A``, the rank of a plain pair; None without one."""
        lora_a = self.tensors.get("lora_a")
        return None if lora_a is None or not lora_a.ndim else int(lora_a.shape[0])

    @property
    def label(self) -> str:
        """Name of the module in messages."""
        path = f"{self.component}/{self.path}" if self.component else self.path
        return path if self.parameter == "weight" else f"{path}.{self.parameter}"


class PartsTable:
    """All modules of a file, in its order.

    Attributes:
        problems: A line for each problem so far.
        aside: Names of tensors that are ignored on purpose.
    """

    def __init__(self) -> None:
        self.rows: dict[tuple[str | None, str], Parts] = {}
        self.problems: list[str] = []
        self.aside: list[str] = []

    def add(self, path: str, part: str, name: str, values: Array, component: str | None = None) -> Parts:
        """Add the tensor ``name`` as ``part`` (``lora_a``, ``lora_b``, …) of the module ``path``."""
        row = self.rows.setdefault((component, path), Parts(path=path, component=component))
        if part in row.tensors:
            self.problems.append(f"{row.label}: {part} exists twice, as {row.origins[part]} and as {name}")
        row.tensors[part] = values
        row.origins.setdefault(part, name)
        row.names.append(name)
        return row

    def unknown(self, names: Sequence[str], why: str) -> None:
        """Add a problem for each tensor that no rule of the format accounts for."""
        self.problems.extend(f"{name}: {why}" for name in names)


class Room:
    """Limit of the memory for a file's blocks and stacks that are laid out in full, with zeros in between.

    Args:
        tensors: The file's tensors as they are stored.
    """

    def __init__(self, tensors: Mapping[str, Array]) -> None:
        self._left = too_much(sum(values.nbytes for values in tensors.values()))

    def take(self, stored: Array, times: int, label: str, problems: list[str]) -> bool:
        """Return whether a tensor may be laid out at this many times its size; add a problem if not."""
        wanted = stored.nbytes * times
        if wanted > self._left:
            problems.append(
                f"{label} {stored.shape}, laid out in full, takes {wanted} bytes: {times} times its stored "
                f"size, but only {self._left} more bytes are allowed for the file"
            )
            return False
        self._left -= wanted
        return True


def single_number(values: Array) -> float:
    """Return the one value of a tensor such as kohya's ``alpha``; NaN if it does not hold exactly one."""
    return float(values.astype("float64").reshape(-1)[0]) if values.size == 1 else math.nan


def build_module(parts: Parts, alpha: float | None, rslora: bool, problems: list[str]) -> LoraModule | None:
    """Check one module's parts and make the module; None if there are problems, which are added.

    Args:
        parts: The module's tensors; ``parts.rank`` is the config's or user's, and is compared with them.
        alpha: Numerator of the scaling; None if a problem about it has already been added.
        rslora: Divide alpha by √rank instead of rank.
        problems: List to add problems to.
    """
    before = len(problems)
    lora_a, lora_b = parts.tensors.get("lora_a"), parts.tensors.get("lora_b")
    if lora_a is None or lora_b is None:
        missing = " and ".join(n for n, v in (("lora_A", lora_a), ("lora_B", lora_b)) if v is None)
        problems.append(f"{parts.label}: {missing} is missing (found: {', '.join(parts.names)})")
        return None
    problems += value_problems((f"{parts.label} {part}", values) for part, values in parts.tensors.items())
    kind, rank, experts, groups = _measure(parts, lora_a, lora_b, problems)
    for part in ("magnitude", "lora_bias"):
        values = parts.tensors.get(part)
        if values is not None and values.size != lora_b.shape[0]:
            problems.append(f"{parts.label}: {part} {values.shape}, wanted {lora_b.shape[0]} values")
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        problems.append(f"{parts.label}: alpha is {alpha:g}, wanted a number above 0")
    elif alpha is not None and not 1 / ABSURD < alpha < ABSURD:
        problems.append(
            f"{parts.label}: alpha is {alpha:g}, wanted a number between {1 / ABSURD:g} and {ABSURD:g}"
        )
    if alpha is None or len(problems) > before:
        return None
    magnitude, bias = parts.tensors.get("magnitude"), parts.tensors.get("lora_bias")
    return LoraModule(
        path=parts.path,
        kind=kind,
        lora_a=lora_a,
        lora_b=lora_b,
        alpha=float(alpha),
        rank=rank,
        rslora=rslora,
        magnitude=None if magnitude is None else magnitude.reshape(-1),
        lora_bias=None if bias is None else bias.reshape(-1),
        parameter=parts.parameter,
        experts=experts,
        groups=groups,
        component=parts.component,
        tensor_names=tuple(parts.names),
    )


def _measure(parts: Parts, lora_a: Array, lora_b: Array, problems: list[str]) -> tuple[Kind, int, int, int]:
    """Return kind, rank, experts and groups by the shapes, after comparing them with the stated rank.

    A grouped convolution's ``lora_B`` is ``(out, rank / groups, 1, …)``; stacked experts have ``rank`` rows
    of ``lora_A`` each (PEFT ``tuners/lora/layer.py``, ``_ConvNd`` and ``ParamWrapper``).
    """
    kind: Kind = parts.kind or ("conv" if lora_a.ndim > 2 else "linear")
    shapes = f"lora_A {lora_a.shape}, lora_B {lora_b.shape}"
    if lora_a.ndim < 2 or lora_a.ndim != lora_b.ndim:
        problems.append(f"{parts.label}: {shapes}; wanted two matrices, or two convolution kernels")
        return kind, 0, 1, 1
    experts, groups = 1, 1
    rank = seen = lora_a.shape[0]
    if kind == "parameter" and parts.rank and parts.rank > 0 and seen % parts.rank == 0:
        rank, experts = parts.rank, seen // parts.rank
    if kind == "conv" and lora_b.shape[1] and seen % lora_b.shape[1] == 0:
        groups = seen // lora_b.shape[1]
    if lora_b.shape[1] * groups != seen or any(n != 1 for n in lora_b.shape[2:]):
        problems.append(_shape_problem(parts, lora_a, lora_b))
    elif parts.rank is not None and rank != parts.rank:
        problems.append(f"{parts.label}: rank {parts.rank} is stated, but {shapes} have rank {rank}")
    return kind, rank, experts, groups


def _shape_problem(parts: Parts, lora_a: Array, lora_b: Array) -> str:
    text = f"{parts.label}: lora_A {lora_a.shape} and lora_B {lora_b.shape} have no common rank"
    if lora_a.ndim == 2 and lora_a.shape[1] == lora_b.shape[0]:
        return f"{text}; transposed? wanted lora_A (rank, in_dim), lora_B (out_dim, rank)"
    return f"{text}; wanted lora_A (rank, …), lora_B (…, rank)"


def check_options(options: ReadOptions) -> None:
    """Refuse invalid options, all at once.

    Raises:
        AdapterError: alpha or rank is not a number above 0.
    """
    given = {"alpha": options.alpha, "rank": options.rank}
    numbers: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    problems = [
        f"{name}: {value!r}, wanted a number above 0"
        for name, value in numbers.items()
        if isinstance(value, bool) or not isinstance(value, Real)
    ] or [
        f"{name}: {nearest_float(value):g}, wanted a number above 0"
        for name, value in numbers.items()
        if not (math.isfinite(nearest_float(value)) and value > 0)
    ]
    if problems:
        raise AdapterError(
            "the options are not a valid scaling", "give the values used in training", problems
        )


def raise_problems(source: AdapterSource, problems: Sequence[str], hint: str) -> None:
    """Raise one `AdapterError` with all problems, if there are any."""
    if not problems:
        return
    unique = list(dict.fromkeys(problems))
    listed = unique[:MAX_LISTED]
    if len(unique) > MAX_LISTED:
        listed.append(f"… and {len(unique) - MAX_LISTED} more")
    count = "1 problem" if len(unique) == 1 else f"{len(unique)} problems"
    raise AdapterError(f"adapter '{source.name}' has {count} ({source.file})", hint, listed)


def select_component(source: AdapterSource, table: PartsTable, component: str | None) -> tuple[str, ...]:
    """Keep only the rows of ``component``, and return a note on the ignored ones.

    In a file for one model, ``component`` may be a submodel's path, which `scope.part_of` handles.

    Raises:
        AdapterError: The file is for several models, but not for this one.
    """
    if component is None:
        return ()
    known = {key[0] for key in table.rows}
    name = component.partition(":")[0]
    if name not in known and len(known) < 2:
        return ()
    if name not in known:
        raise unknown_component(source.name, name, known)
    aside = [key for key in table.rows if key[0] != name]
    for key in aside:
        table.aside += table.rows.pop(key).names
    return (f"{len(aside)} modules of other components were ignored",) if aside else ()


def adapter_of(
    source: AdapterSource,
    format: str,
    table: PartsTable,
    modules: Mapping[str, LoraModule],
    config: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> Adapter:
    """Make an adapter with the fields that all formats share; `dataclasses.replace` sets the rest.

    Args:
        source: The file.
        format: Key of the format that read it.
        table: The file's tensors, sorted.
        modules: Modules made from the table.
        config: The format's own configuration.
        notes: Notes after the source's own ones.
    """
    aside = frozenset(table.aside)
    return Adapter(
        name=source.name,
        source=str(source.path),
        format=format,
        modules=modules,
        config=config,
        # All names of the file, not of the modules: a plan can then be checked for lost tensors.
        tensor_names=tuple(name for name in source.tensors if name not in aside),
        sha256=source.sha256,
        notes=(*source.notes, *notes),
    )
