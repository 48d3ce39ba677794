"""Find which rows of the embeddings that an adapter changes are read by the feeds.

An error in a row that no feed reads shows in no output. In PyTorch the lookups are recorded; if the reference
is a graph, the indices of the candidate's lookups are read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lora_export.adapter import Array
from lora_export.errors import LoraExportError
from lora_export.graph.onnx_file import GraphFile, load_graph
from lora_export.parity.feeds.made import Feed
from lora_export.parity.laws import masks_of
from lora_export.parity.localise.find_modules import ModuleShape, Probe, find_probes
from lora_export.parity.localise.run_inside import run_with_outputs
from lora_export.parity.result import BASE
from lora_export.parity.sides.reference import CheckpointReference
from lora_export.parity.sides.sides import Sides
from lora_export.runtimes.torch.lookups import record_lookups

_RANGES = 3


@dataclass(kw_only=True)
class EmbeddingTable:
    """An embedding that an adapter changes.

    Attributes:
        path: Path of its module.
        read: For each row, True if a feed reads it at a position without padding.
        is_longest: True if the longest input that the model takes was among the feeds.
    """

    path: str
    read: NDArray[np.bool_]
    is_longest: bool = False
    _lookups: int = 0
    _by_ids: int = 0

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.read)

    @property
    def unread(self) -> list[int]:
        """Numbers of the rows that no feed reads."""
        return [int(row) for row in np.flatnonzero(~self.read)]

    @property
    def is_vocabulary(self) -> bool:
        """True if most lookups are by token ids; a position may by chance equal a token id."""
        return 2 * self._by_ids > self._lookups

    def add(self, index: Array, feed: Feed, ids: Collection[str]) -> None:
        """Mark the rows of one lookup as read; ``ids`` are the inputs that hold token ids."""
        self._lookups += 1
        self._by_ids += any(np.array_equal(index, feed.values[name]) for name in ids)
        rows = _unpadded(index, feed).astype(np.int64)
        # Indices out of range come from a wrong probe, and are not counted.
        rows = rows[(rows >= -self.rows) & (rows < self.rows)]
        self.read[rows] = True


@dataclass(kw_only=True)
class Coverage:
    """The tables, with the rows that were read so far.

    Attributes:
        sides: Both sides of the check.
        tables: Path → table.
        unknown: Path of each embedding whose lookups can't be seen → the reason.
    """

    sides: Sides
    tables: dict[str, EmbeddingTable] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    _graph: GraphFile | None = None
    _probes: tuple[Probe, ...] = ()

    @classmethod
    def of(cls, sides: Sides) -> Coverage:
        """Return a coverage with the tables that the adapters of a check change."""
        made, reference = cls(sides=sides), sides.reference
        if isinstance(reference, CheckpointReference):
            for path, owner in reference.model.changed_embeddings.items():
                made.tables[path] = EmbeddingTable(path=path, read=np.zeros(len(owner.get()), np.bool_))
        else:
            made._look_into_the_graph()
        return made

    @contextlib.contextmanager
    def watch(self, feed: Feed) -> Iterator[None]:
        """Record the rows that are read while both sides run on a feed inside the block."""
        reference = self.sides.reference
        if isinstance(reference, CheckpointReference) and self.tables:
            owners, ids = reference.model.changed_embeddings, self._ids
            with record_lookups(owners, lambda path, index: self.tables[path].add(index, feed, ids)):
                yield
            return
        yield
        if self._probes:
            self._count_in_the_graph(feed)

    def notes(self, hint: str) -> list[str]:
        """Return a line for each table with rows that were not read.

        Args:
            hint: Text on how to have more of them read.
        """
        lines = []
        for table in self.tables.values():
            if not (unread := table.unread):
                continue
            how = "no longer input fits the model" if table.is_longest else hint
            lines.append(
                f"{table.rows - len(unread):,} of {table.rows:,} rows of {table.path}, which the adapter "
                f"changes, are read by the inputs; an error in the others ({_ranges(unread)}) does not show "
                f"({how})"
            )
        lines += [
            f"it is not known which rows of {path}, which the adapter changes, the inputs read ({why}); an "
            "error in rows that none reads does not show"
            for path, why in self.unknown.items()
        ]
        return lines

    @property
    def _ids(self) -> list[str]:
        return [port.name for port in self.sides.candidate.about.ports if port.kind == "ids"]

    def _look_into_the_graph(self) -> None:
        shapes = {
            module.path: ModuleShape(module.path, "embedding", module.weight_shape)
            for adapter in self.sides.candidate.adapters.values()
            for module in adapter.modules.values()
            if module.kind == "embedding"
        }
        if not shapes:
            return
        about = self.sides.candidate.about
        if about.is_engine:
            self.unknown = dict.fromkeys(shapes, "the candidate is an engine, the reference not a checkpoint")
            return
        self._graph = load_graph(about.path)
        probes, missing = find_probes(self._graph, list(shapes.values()), lambda _: None)
        self._probes = tuple(probe for probe in probes if probe.x is not None)
        known = {probe.module for probe in self._probes}
        for module, shape in shapes.items():
            if module in known:
                self.tables[module] = EmbeddingTable(path=module, read=np.zeros(shape.shape[0], np.bool_))
            else:
                refusal = missing.get(module)
                self.unknown[module] = refusal.detail if refusal else "its indices are not seen in the graph"

    def _count_in_the_graph(self, feed: Feed) -> None:
        assert self._graph is not None
        candidate = self.sides.candidate
        state = candidate.states(self.sides.blend)[-1] if candidate.switches else BASE
        tensors: Mapping[str, Array] = candidate.lora_inputs(feed.values, (state,) * feed.batch)
        values = {probe.module: probe.x.value for probe in self._probes if probe.x is not None}
        try:
            found = run_with_outputs(
                self._graph, list(values.values()), {**feed.values, **tensors}, candidate.about.provider
            )
        except LoraExportError as error:
            # Only a note is lost, not a verdict.
            self.unknown |= dict.fromkeys(values, error.message)
            self.tables, self._probes = {}, ()
            return
        for module, value in values.items():
            self.tables[module].add(found[str(value.name)], feed, self._ids)


def _unpadded(index: Array, feed: Feed) -> Array:
    """Return the indices of a lookup, flat, at positions where some row of the batch is not padded."""
    masks = [
        mask
        for mask in masks_of(feed)
        if index.ndim in (1, 2)
        and index.shape[-1] == mask.shape[-1]
        and (index.ndim == 1 or index.shape[0] in (1, mask.shape[0]))
    ]
    if not masks:
        return index.reshape(-1)
    valid = np.any([mask != 0 for mask in masks], axis=0)
    if index.ndim == 1 or index.shape[0] != valid.shape[0]:
        valid = valid.any(0)
    chosen: Array = index.reshape(valid.shape)[valid]
    return chosen


def _ranges(rows: Sequence[int]) -> str:
    """Return numbers as a text: ``17–63``, ``0, 3–5 and 12 more``."""
    starts = [row for number, row in enumerate(rows) if not number or rows[number - 1] != row - 1]
    ends = [row for number, row in enumerate(rows) if number + 1 == len(rows) or rows[number + 1] != row + 1]
    shown = list(zip(starts, ends, strict=True))[:_RANGES]
    text = ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in shown)
    left = len(rows) - sum(last - first + 1 for first, last in shown)
    return f"{text} and {left:,} more" if left else text
