"""Read W0 of a graph with exposed LoRA from where the LoRA record says, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.graph.exposed import StoredRows
from lora_export.graph.onnx_file import FLOAT_TYPES, GraphFile, load_graph
from lora_export.sites.values.held import floats_by_name, floats_of
from lora_export.storage.inputs import FileState, refuse_changed

# Name of an initializer → its values, perhaps memory-mapped; KeyError if the graph has none of this name.
WeightOf = Callable[[str], Array]
# Elements that are compared together: 4 MB in float32.
_BLOCK = 1 << 20


class GraphWeights:
    """Constants of a graph by name, quantised ones as the floats that their codes stand for.

    The file is opened for the first constant that is read.

    Args:
        path: The ONNX file.
        graph: The file's graph, if it is open already.
        opened: Files of the session that the constants are for, as they were when it was opened.
    """

    def __init__(
        self, path: Path, graph: GraphFile | None = None, opened: Collection[FileState] = ()
    ) -> None:
        self._path, self._files = path, opened
        self._graph = graph
        self._constants: dict[str, ir.TensorProtocol] = {}
        self._dequantisers: dict[str, ir.Node] = {}

    def __call__(self, name: str) -> Array:
        """Return a constant's values, memory-mapped where they are external.

        Raises:
            InputChangedError: A file has changed since the session opened it.
            KeyError: The graph lacks the constant, or has codes for it whose values are unknown.
        """
        tensor = self._opened().get(name)
        if tensor is not None and tensor.dtype in FLOAT_TYPES:
            values: Array | None = np.asarray(tensor.numpy())
        else:
            values = floats_of(self._dequantisers[name])
        self._refuse_changed()  # the values are mapped now
        if values is None:
            raise KeyError(name)
        return values

    def names(self) -> Collection[str]:
        """Return the constants' names."""
        return self._opened().keys()

    def _opened(self) -> dict[str, ir.TensorProtocol]:
        if not self._constants:
            self._refuse_changed()
            graph = self._graph or load_graph(self._path)
            self._graph = None
            self._dequantisers = floats_by_name(graph.graph.all_nodes())
            self._constants = dict(_constants(graph))
        return self._constants

    def _refuse_changed(self) -> None:
        refuse_changed(self._files, "since the session was opened", "open another session")


def _constants(graph: GraphFile) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Yield the constants of the main graph and of subgraphs, Constant nodes included."""
    nodes = (node for node in graph.graph.all_nodes() if node.op_type == "Constant")
    for value in (*graph.initializers(), *(node.outputs[0] for node in nodes)):
        if value.const_value is not None:
            yield str(value.name), value.const_value


def stored_blocks(
    stored: Sequence[StoredRows], cols: int, weight_of: WeightOf
) -> Iterator[tuple[int, Array]]:
    """Yield (first row, rows of the canonical matrix ``(height, cols)``), in the stored dtype.

    Raises:
        ValueError: The graph's constant isn't as large as the LoRA record says.
    """
    height = max(1, _BLOCK // cols)
    for part in stored:
        values = weight_of(part.weight)
        matrix = values.reshape(values.shape[0], -1)
        start, stop = part.rows
        for row in range(start, stop, height):
            count, skip = min(height, stop - row), row - start
            if part.transposed:
                view = matrix[part.row : part.row + cols, part.col + skip : part.col + skip + count].T
            else:
                view = matrix[part.row + skip : part.row + skip + count, part.col : part.col + cols]
            if view.shape != (count, cols):
                raise ValueError(f"{part.weight} {values.shape} has no rows {start}–{stop} of {cols} columns")
            yield row, view


def read_stored(stored: Sequence[StoredRows], shape: tuple[int, int], weight_of: WeightOf) -> Array:
    """Return a canonical matrix in float64; rows that are not stored are NaN."""
    values = np.full(shape, np.nan)
    for row, block in stored_blocks(stored, shape[1], weight_of):
        values[row : row + len(block)] = block
    return values


def holds(values: Array, stored: Sequence[StoredRows], name: str, weight_of: WeightOf) -> bool:
    """Return True if the graph's weight equals the values, rounded to its dtype.

    Args:
        values: A whole canonical parameter.
        stored: Its stored rows by the LoRA record.
        name: Its path: the name to look for if the LoRA record doesn't name the parameter.
        weight_of: The graph's constants.
    """
    try:
        if not stored:
            return _same(values, weight_of(name))
        matrix = values.reshape(values.shape[0], -1)
        seen = 0
        for row, block in stored_blocks(stored, matrix.shape[1], weight_of):
            seen += len(block)
            if not _same(matrix[row : row + len(block)], block):
                return False
        return seen == len(matrix)
    except (KeyError, ValueError):
        # The graph has no weight of that name, or one of another size.
        return False


def has_constant(name: str, weight_of: WeightOf) -> bool:
    """Return True if the graph has a constant of this name."""
    try:
        weight_of(name)
    except KeyError:
        return False
    return True


def _same(values: Array, stored: Array) -> bool:
    with np.errstate(over="ignore"):
        return values.shape == stored.shape and bool(np.array_equal(values.astype(stored.dtype), stored))
