"""Estimate the memory of a compiled graph's intermediate values from the graph and their largest sizes.

The rules were derived from the kernels that TensorRT-RTX 1.7 lists when it builds (verbosity ``DETAILED``)
and the activation memory that it states, which does not depend on the GPU.

1. A product (MatMul, Gemm, Conv) is a kernel of its own: what it reads and writes lies in memory. Everything
   else between two products becomes one kernel, and values inside a kernel take no memory.
2. A value that one kernel makes and one behind a product reads (a residual) also lies in memory, until the
   last kernel that reads it.
3. Attention in 16 bits is one kernel from q·kᵀ to ·v: scores take no memory. In float32 they do.
4. Inputs and outputs of the graph are the caller's memory. But an output that a product makes is copied from
   memory of the engine's own if it has an odd number of columns (it is padded), or if the compiler works in
   the order [sequence, batch]. It does so when there is more than one of each, and only the output projection
   reads an attention's merged heads; a LoRA branch beside that projection stops it.
5. Each product has `WORKSPACE_BYTES` to add partial sums in, and products that nothing orders may run at
   once, each with its own. Products of one activation with several constants become one.

Not covered: copies that the compiler makes to pad or to reorder (the estimate is up to a fifth too low); its
fusions of a product with the bias after it, and that products which may run at once often don't (the estimate
is up to 4 times too high for small models, where workspaces are nearly all of it).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from lora_export.engines.memory.largest import Sized
from lora_export.graph.onnx_file import GraphFile

# Bytes per running product, whatever its shape; measured with graphs of one MatMul.
WORKSPACE_BYTES = 8_192_000

_PRODUCTS = frozenset(
    {
        *("MatMul", "Gemm", "Einsum", "MatMulInteger", "QLinearMatMul", "Attention"),
        *("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "DeformConv"),
    }
)
# Kernels of their own other than products.
_OWN_KERNELS = frozenset({"LSTM", "GRU", "RNN", "TopK", "NonZero", "NonMaxSuppression", "Loop", "Scan", "If"})
# Operators whose output is the same memory with another shape.
_RENAMES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})
_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Activations:
    """Memory of the intermediate values of a graph.

    Attributes:
        bytes: Peak in bytes, workspaces included.
        unknown: Names of values in memory whose size is unknown; they are not in ``bytes``.
    """

    bytes: int
    unknown: tuple[str, ...]


def peak_activations(graph: GraphFile, values: Mapping[str, Sized]) -> Activations:
    """Return the peak memory of a graph's intermediate values.

    Args:
        graph: The graph.
        values: Sizes of the values that its nodes compute, by name.
    """
    kernels = _Kernels(graph, values)
    lives = list(kernels.lives())
    unknown = tuple(sorted({life.name for life in lives if life.bytes is None}))
    return Activations(_peak(lives) + WORKSPACE_BYTES * kernels.workspaces(), unknown)


# The node that makes a value with its inputs, or the nodes that read it with their outputs.
_Step = Callable[[ir.Value], Iterator[tuple[ir.Node, Iterable[ir.Value | None]]]]


def _backwards(value: ir.Value) -> Iterator[tuple[ir.Node, Iterable[ir.Value | None]]]:
    maker = value.producer()
    if maker is not None:
        yield maker, maker.inputs


def _forwards(value: ir.Value) -> Iterator[tuple[ir.Node, Iterable[ir.Value | None]]]:
    for reader in value.consumers():
        yield reader, reader.outputs


def _is_kernel(node: ir.Node) -> bool:
    return node.op_type in _PRODUCTS or node.op_type in _OWN_KERNELS


def _memory(value: ir.Value) -> ir.Value:
    """Return the value whose memory this one shares."""
    maker = value.producer()
    while maker is not None and maker.op_type in _RENAMES and (renamed := maker.inputs[0]) is not None:
        value, maker = renamed, renamed.producer()
    return value


def _only_read_by_product(node: ir.Node) -> bool:
    """Return whether a node's output goes, in whatever order or shape, to one product and nowhere else."""
    while len(readers := list(node.outputs[0].consumers())) == 1:
        node = readers[0]
        if node.op_type in _PRODUCTS:
            return True
        if node.op_type not in _RENAMES and node.op_type != "Transpose":
            return False
    return False


@dataclass(frozen=True)
class _Attention:
    """One attention.

    Attributes:
        scores: Values from the product that makes the scores to the product that reads them.
        readers: The products that read them.
        fused: True if it is one kernel.
    """

    scores: frozenset[ir.Value]
    readers: tuple[ir.Node, ...]
    fused: bool


@dataclass(frozen=True)
class _Life:
    """The positions of the node that makes a value and of the last one that reads it."""

    name: str
    bytes: int | None
    start: int
    end: int


def _peak(lives: Iterable[_Life]) -> int:
    changes: dict[int, int] = defaultdict(int)
    for life in lives:
        changes[life.start] += life.bytes or 0
        changes[life.end + 1] -= life.bytes or 0
    now = most = 0
    for position in sorted(changes):
        now += changes[position]
        most = max(most, now)
    return most


class _Kernels:
    """A graph as the kernels that the compiler makes from it.

    A node's level is the number of products on the longest path to it: nodes of one level can be in one
    kernel.
    """

    def __init__(self, graph: GraphFile, values: Mapping[str, Sized]) -> None:
        self._nodes = list(graph.model.graph.all_nodes())
        self._position = {node: number for number, node in enumerate(self._nodes)}
        self._values = values
        # A value that only renames an output is written where the output is.
        self._outputs = {_memory(value): value for value in graph.graph.outputs}
        self._outputs |= {value: value for value in graph.graph.outputs}
        self._constants = self._find_constants(graph)
        self._levels = self._find_levels()
        self._attentions = [found for node in self._nodes if (found := self._attention(node)) is not None]
        self._inside = {value for found in self._attentions if found.fused for value in found.scores}

    # --- constants and levels ---

    def _find_constants(self, graph: GraphFile) -> set[ir.Value]:
        """Return weights and values computed from them alone, which the compiler computes once."""
        constants = set(graph.initializers())
        for node in self._nodes:
            inputs = [value for value in node.inputs if value is not None]
            if node.op_type == "Constant" or (inputs and constants.issuperset(inputs)):
                constants.update(node.outputs)
        return constants

    def _find_levels(self) -> dict[ir.Node, int]:
        levels: dict[ir.Node, int] = {}
        for node in self._nodes:
            makers = [value.producer() for value in self._varying(node)]
            levels[node] = max(
                (levels.get(maker, 0) + _is_kernel(maker) for maker in makers if maker is not None), default=0
            )
        return levels

    def _varying(self, node: ir.Node) -> list[ir.Value]:
        return [value for value in node.inputs if value is not None and value not in self._constants]

    def _sized(self, value: ir.Value) -> Sized | None:
        return self._values.get(str(value.name))

    # --- attention ---

    def _attention(self, softmax: ir.Node) -> _Attention | None:
        """Return the attention that a softmax is in: products before and after it, one shape in between."""
        if softmax.op_type != "Softmax" or softmax.inputs[0] is None:
            return None
        before, makers = self._of_one_shape(softmax.inputs[0], _backwards)
        after, readers = self._of_one_shape(softmax.outputs[0], _forwards)
        if not makers or not readers:
            return None
        scores = [self._sized(value) for maker in makers for value in maker.outputs]
        half = all(sized is not None and sized.dtype in _HALF for sized in scores)
        return _Attention(frozenset(before | after), tuple(readers), half)

    def _of_one_shape(self, start: ir.Value, step: _Step) -> tuple[set[ir.Value], list[ir.Node]]:
        """Follow values of one shape from a value on; return them and the products at the end."""
        wanted = self._sized(start)
        seen, waiting, products = {start}, [start], []
        while waiting and wanted is not None:
            for node, values in step(waiting.pop()):
                if node.op_type in _PRODUCTS:
                    products.append(node)
                    continue
                for value in values:
                    sized = None if value is None else self._sized(value)
                    if value is not None and value not in seen and sized and sized.shape == wanted.shape:
                        seen.add(value)
                        waiting.append(value)
        return seen, products

    def _moves_order(self) -> bool:
        """Return whether only one product reads the merged heads of an attention (rule 4)."""
        return any(_only_read_by_product(node) for found in self._attentions for node in found.readers)

    # --- memory ---

    def lives(self) -> Iterator[_Life]:
        """Yield the lifetime of each piece of memory."""
        stored = self._find_stored()
        ends = self._find_ends(stored)
        groups: dict[ir.Value, list[ir.Value]] = defaultdict(list)
        for value in stored:
            groups[_memory(value)].append(value)
        for memory, names in groups.items():
            of_caller = memory.producer() is None or (memory in self._outputs and memory not in names)
            if memory in self._constants or of_caller:
                continue
            sizes = [sized.bytes for value in names if (sized := self._sized(value)) is not None]
            starts = [self._position[maker] for value in names if (maker := value.producer()) is not None]
            yield _Life(
                str(memory.name), max(sizes, default=None), min(starts), max(ends[value] for value in names)
            )

    def _find_stored(self) -> list[ir.Value]:
        """Return the values that lie in the engine's memory (rules 1 to 4)."""
        order_moves = self._moves_order()
        return [
            value
            for node in self._nodes
            for value in node.outputs
            if value.name and value not in self._constants and self._is_stored(value, node, order_moves)
        ]

    def _is_stored(self, value: ir.Value, maker: ir.Node, order_moves: bool) -> bool:
        if value in self._outputs:
            return maker.op_type in _PRODUCTS and self._is_copied(self._outputs[value], order_moves)
        if value in self._inside:
            return False
        level = self._levels[maker]
        return _is_kernel(maker) or any(
            _is_kernel(reader) or self._levels[reader] > level for reader in value.consumers()
        )

    def _is_copied(self, value: ir.Value, order_moves: bool) -> bool:
        sized = self._sized(value)
        if sized is None or not sized.shape:
            return False
        rows = [size for size in sized.shape[:-1] if size > 1]
        return sized.shape[-1] % 2 == 1 or (order_moves and len(rows) > 1)

    def _find_ends(self, stored: Iterable[ir.Value]) -> dict[ir.Value, int]:
        """Return the position of the last kernel that reads each value; a kernel ends where it stores one."""
        kept = set(stored)
        ends: dict[ir.Value, int] = {}
        for node in reversed(self._nodes):
            for value in node.outputs:
                last = self._position[node]
                for reader in value.consumers():
                    passed = (ends.get(made, last) for made in reader.outputs if made not in kept)
                    last = max(last, self._position[reader], *passed)
                ends[value] = len(self._nodes) if value in self._outputs and value in kept else last
        return ends

    # --- workspaces ---

    def workspaces(self) -> int:
        """Return how many products may run at once (rule 5)."""
        latest = self._find_latest()
        spans: dict[tuple[object, ...], tuple[ir.Value, int, int]] = {}
        for node in self._nodes:
            inputs = self._varying(node)
            if node.op_type not in _PRODUCTS or not inputs:
                continue
            memory, level = _memory(inputs[0]), self._levels[node]
            # Products of one activation with constants are one; a product of two activations counts alone.
            key = (memory, level) if len(inputs) == 1 else (node,)
            _, _, last = spans.get(key, (memory, level, latest[node]))
            spans[key] = (memory, level, min(last, latest[node]))
        running: dict[int, set[ir.Value]] = defaultdict(set)
        for memory, first, last in spans.values():
            for level in range(first, max(first, last) + 1):
                running[level].add(memory)
        return max((len(memories) for memories in running.values()), default=0)

    def _find_latest(self) -> dict[ir.Node, int]:
        """Return the last level at which each node can run without delaying another one."""
        top = max(self._levels.values(), default=0)
        latest: dict[ir.Node, int] = {}
        for node in reversed(self._nodes):
            readers = [latest.get(reader, top) for value in node.outputs for reader in value.consumers()]
            latest[node] = min(readers, default=top + _is_kernel(node)) - _is_kernel(node)
        return latest
