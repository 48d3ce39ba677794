"""Follow the rows of the batch from the inputs of a graph, node by node, through each value.

Rules:

1. An input whose first axis is the batch's has its rows along it; constants and sizes are the same for all.
   In another input with several axes of the batch's size, no axis is believed (`BatchRows.either`).
2. A node's result is the same for all rows if its inputs are, whatever it computes.
3. After an operator without a rule, the rows are unknown: then nothing is concluded, neither that a site is
   right nor that it is wrong.
4. Nodes that join two values along the batch, or flatten (sequence, batch), put something else outside of the
   rows: a bank that takes them for outermost would give rows another row's adapter.
5. Nodes that take rows apart (a slice of the batch), take them by index (`picks`) or multiply them by a
   matrix may put them into another order: no value after them has the batch's rows again, put back or not.
6. A sum over the batch is the same for all rows; combined with rows it leaves them where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from lora_export.modes.branches.batch.index import rows_reshaped
from lora_export.modes.branches.batch.picks import ALONG, PICKS
from lora_export.modes.branches.batch.rows import SAME, Rows, from_front, moved_by, name_of, summed_by
from lora_export.modes.branches.batch.sizes import BATCH, OTHER, TIMES, Size, numbers_of, reshaped, sizes_of

_UNARY = {
    *("Abs", "BatchNormalization", "BiasGelu", "Cast", "Ceil", "Celu", "Clip", "Cos", "DequantizeLinear"),
    *("Dropout", "DynamicQuantizeLinear", "Elu", "Erf", "Exp", "FastGelu", "Floor", "Gelu", "IsInf", "IsNaN"),
    *("GroupNormalization", "HardSigmoid", "HardSwish", "Identity", "InstanceNormalization", "LeakyRelu"),
    *("LayerNormalization", "Log", "LpNormalization", "Mish", "Neg", "Not", "QuantizeLinear", "QuickGelu"),
    *("RMSNormalization", "Reciprocal", "Relu", "RotaryEmbedding", "Round", "Selu", "SequenceAt", "Sigmoid"),
    *("Sign", "SimplifiedLayerNormalization", "Sin", "Softplus", "Softsign", "Sqrt", "Tanh", "Trilu"),
}
# Operators that keep rows apart along another axis than the batch's.
_SCORES = {"Softmax", "LogSoftmax", "Hardmax", "TopK", "CumSum"}
# Operators whose result depends only on sizes and dtypes.
_SIZES = {"Shape", "Size", "Constant", "ConstantOfShape", "EyeLike", "SequenceLength"}
_ELEMENTWISE = {
    *("Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min"),
    *("Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor", "SkipLayerNormalization"),
    "SkipSimplifiedLayerNormalization",
}
# Operators that by their definition read the batch as the first axis.
_IMAGES = {
    *("Conv", "ConvTranspose", "FusedConv", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"),
    *("DepthToSpace", "SpaceToDepth", "EmbedLayerNormalization"),
    *("Attention", "MultiHeadAttention", "GroupQueryAttention"),
}
_PRODUCTS = {
    *("DynamicQuantizeMatMul", "FusedMatMul", "MatMul", "MatMulBnb4", "MatMulInteger"),
    *("MatMulIntegerToFloat", "MatMulNBits"),
}
_DOMAINS = ("", "ai.onnx", "com.microsoft")


class BatchRows:
    """Positions of the batch's rows in a graph, with the nodes that it has when this is made.

    Args:
        graph: The graph.
        shapes: Id of a value → its shape, if known.
        batch: Size of the batch: a number or a symbol.
        batch_input: The input whose first axis is the batch.
    """

    def __init__(
        self, graph: ir.Graph, shapes: Mapping[int, ir.Shape], batch: object, batch_input: ir.Value
    ) -> None:
        self._shapes, self._batch = shapes, batch
        self._rows: dict[int, Rows | None] = {}
        self._unknown: dict[int, str] = {}
        self._either: dict[int, str] = {}
        for value in graph.inputs:
            self._rows[id(value)] = Rows(axis=0) if value is batch_input else self._entry(value)
            if self._rows[id(value)] is None and self._axes_of_batch(value) > 1:
                self._either[id(value)] = str(value.name)
        self._run(graph)

    def _entry(self, value: ir.Value) -> Rows | None:
        """Apply rule 1 to another input; its rows are unknown if its first axis has another name, or none."""
        dims = list(value.shape) if value.shape is not None else [ir.SymbolicDim(None)]
        if isinstance(self._batch, int):
            # Another axis of that size may be the batch's, or a length.
            found = Rows(axis=0) if dims and dims[0] == self._batch else SAME
            several = self._batch > 1 and self._batch in dims[found == Rows(axis=0) :]
            return None if several else found
        named = [axis for axis, size in enumerate(dims) if str(size) == str(self._batch) and _is_named(size)]
        if len(named) == 1:
            return Rows(axis=named[0])
        return SAME if not named and all(isinstance(size, int) for size in dims[:1]) else None

    def _axes_of_batch(self, value: ir.Value) -> int:
        """Return the number of axes of an input with the batch's size, or its name."""
        return sum(size == self._batch and not _is_nameless(size) for size in value.shape or ())

    def either(self, value: ir.Value) -> str:
        """Return the input with several axes of the batch's size, if a value is computed from that alone.

        Then no node tells which of them is the batch. Other values give an empty text.
        """
        return self._either.get(id(value), "")

    def of(self, value: ir.Value | None) -> Rows | None:
        """Return the position of the rows; None if it is unknown."""
        if value is None or value.const_value is not None:
            return SAME
        return self._rows.get(id(value))

    @property
    def batch(self) -> object:
        """Size of the batch: a number or a symbol."""
        return self._batch

    def unknown(self, value: ir.Value) -> str:
        """Return the node, or the input, after which rows are not followed."""
        return self._unknown.get(id(value), f"input {value.name}")

    def rank(self, value: ir.Value | None) -> int | None:
        """Return the number of a value's axes, or None if it is unknown."""
        if value is None:
            return None
        shape = self._shapes.get(id(value))
        if shape is None and value.const_value is not None:
            return len(value.const_value.shape)
        return None if shape is None else len(shape)

    def size(self, value: ir.Value, axis: int) -> Size:
        """Return the size of an axis in relation to the batch."""
        rows, shape = self.of(value), self._shapes.get(id(value))
        axis = axis + len(shape) if axis < 0 and shape is not None else axis
        first = shape[axis] if shape is not None and 0 <= axis < len(shape) else None
        if isinstance(first, int):
            return first
        if first is not None and first.value is not None and isinstance(self._batch, ir.SymbolicDim):
            factors = str(first.value).replace(" ", "").split("*")
            if str(self._batch.value) in factors:
                return BATCH if len(factors) == 1 else TIMES
        if rows is None or rows.moved or axis < 0:
            return None
        if rows.axis == axis:
            return BATCH if rows.alone else TIMES
        return OTHER

    def _run(self, graph: ir.Graph) -> None:
        for node in graph:
            bodies = [a.value for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
            for body in bodies:
                self._run(body)
            rows = self._node(node, bodies)
            either = "" if rows is not None or bodies else self._from_either(node)
            if rows is not None and rows.axis is not None:
                rows = self._doubted(node, rows)
            for number, output in enumerate(node.outputs):
                # Scale and zero point are those of the whole batch.
                whole = number and node.op_type == "DynamicQuantizeLinear" and rows is not None
                self._rows[id(output)] = summed_by(node) if whole and rows != SAME else rows
                if either:
                    self._either[id(output)] = either
                if rows is None:
                    before = (self._unknown.get(id(value)) for value in node.inputs)
                    self._unknown[id(output)] = next(filter(None, before), name_of(node))

    def _from_either(self, node: ir.Node) -> str:
        """Return the input of `either` that a node reads, if nothing else of what it reads has rows."""
        read = [value for value in node.inputs if value is not None and self.of(value) != SAME]
        found = [self.either(value) for value in read]
        return found[0] if found and all(found) else ""

    def _doubted(self, node: ir.Node, rows: Rows) -> Rows:
        """Add a doubt if an unknown value is combined with rows, or the doubt of a value that is."""
        read = [(value, self.of(value)) for value in node.inputs if value is not None]
        doubts = (self.unknown(value) if known is None else known.doubt for value, known in read)
        return replace(rows, doubt=next(filter(None, doubts), ""))

    def _node(self, node: ir.Node, bodies: Sequence[ir.Graph]) -> Rows | None:
        if node.op_type in _SIZES:
            return SAME
        if node.op_type == "CastLike":
            return self.of(node.inputs[0])
        inputs = [_certain(self.of(value)) for value in node.inputs]
        found = {_certain(self.of(value)) for body in bodies for value in body.outputs}
        moved = next((rows for rows in [*inputs, *found] if rows is not None and rows.moved), None)
        if moved is not None:
            return moved
        if bodies:
            return found.pop() if node.op_type == "If" and len(found) == 1 else None
        if all(rows is not None and rows.axis is None for rows in inputs):
            return next((rows for rows in inputs if rows is not None and rows.summed), SAME)
        if node.domain not in _DOMAINS:
            return None
        return self._rule(node, [SAME if rows is not None and rows.summed else rows for rows in inputs])

    def _rule(self, node: ir.Node, inputs: list[Rows | None]) -> Rows | None:
        operator, first = node.op_type, inputs[0]
        if operator in _ELEMENTWISE:
            return self._aligned(zip(node.inputs, inputs, strict=True), self.rank(node.outputs[0]))
        if operator in _PRODUCTS:
            return self._product(node, inputs)
        rules: dict[str, Callable[[ir.Node, Rows], Rows | None]] = {
            "Transpose": self._transposed, "Reshape": self._reshaped, "Flatten": self._flattened,
            "Unsqueeze": self._unsqueezed, "Squeeze": self._squeezed, "Expand": self._expanded,
            "Gemm": self._gemm, "FusedGemm": self._gemm,
        }  # fmt: skip
        if operator == "Concat":
            return self._joined(node, inputs)
        if operator in PICKS:
            return PICKS[operator](self, node, inputs)
        if first is None or first == SAME:
            return None
        if operator in _UNARY:
            return first
        if operator in ALONG:
            return ALONG[operator](self, node, first)
        if operator in _SCORES:
            return self._scored(node, first)
        if operator in _IMAGES:
            return first if first.axis == 0 else None
        if operator.startswith("Reduce") or operator in ("ArgMax", "ArgMin"):
            return self._reduced(node, first)
        return rules[operator](node, first) if operator in rules else None

    # --- axes stay where they are, or move ------------------------------------------------------------

    def _aligned(self, pairs: Iterable[tuple[ir.Value | None, Rows | None]], rank: int | None) -> Rows | None:
        """Return the rows of values that are broadcast, which aligns the last axes."""
        pairs = list(pairs)
        carriers = [(value, rows) for value, rows in pairs if rows is not None and rows != SAME]
        ranks = [self.rank(value) for value, _ in pairs if value is not None]
        if not carriers:
            return None
        if rank is None and None not in ranks:
            rank = max(r for r in ranks if r is not None)
        found: set[Rows] = set()
        for value, rows in carriers:
            own = self.rank(value)
            if own is None or rank is None:
                # A value that is added to it can't have more axes: it is a vector or similar.
                others = [self.rank(other) for other, _ in pairs if other is not value]
                small = all(other is not None and other < 2 for other in others)
                if not (small or len(carriers) == len(pairs)):
                    return None
                found.add(rows)
                continue
            assert rows.axis is not None
            found.add(replace(rows, axis=rows.axis + rank - own))
        places = {rows.axis for rows in found}
        if len(places) != 1:
            return None
        outside = all(rows.outermost for rows in found)
        if not outside and any(rows.outermost and not rows.alone for rows in found):
            return None
        return Rows(axis=places.pop(), outermost=outside, alone=all(rows.alone for rows in found))

    def _transposed(self, node: ir.Node, rows: Rows) -> Rows | None:
        rank = self.rank(node.inputs[0])
        perm = list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else None
        if perm is None and rank is not None:
            perm = list(reversed(range(rank)))
        return replace(rows, axis=perm.index(rows.axis)) if perm and rows.axis in perm else None

    def _unsqueezed(self, node: ir.Node, rows: Rows) -> Rows | None:
        axes, rank = self._axes(node), self.rank(node.inputs[0])
        if axes is None or (rank is None and min(axes, default=0) < 0):
            return None
        assert rows.axis is not None
        added = {axis + (rank or 0) + len(axes) if axis < 0 else axis for axis in axes}
        kept = [axis for axis in range(rows.axis + len(axes) + 1) if axis not in added]
        return replace(rows, axis=kept[rows.axis])

    def _squeezed(self, node: ir.Node, rows: Rows) -> Rows | None:
        axes = self._axes(node)
        gone = None if axes is None else [self._from_front(axis, node.inputs[0]) for axis in axes]
        assert rows.axis is not None
        if gone is None or None in gone or rows.axis in gone:
            return None
        return replace(rows, axis=rows.axis - sum(axis is not None and axis < rows.axis for axis in gone))

    def _scored(self, node: ir.Node, rows: Rows) -> Rows | None:
        """Return the rows of probabilities, maxima, running sums; along the batch they mix rows (rule 5)."""
        axes = [node.attributes.get_int("axis", -1)] if node.op_type != "CumSum" else self._axes(node)
        axis = self._from_front(axes[0], node.inputs[0]) if axes else None
        return None if axis is None else moved_by(node) if axis == rows.axis else rows

    def _reduced(self, node: ir.Node, rows: Rows) -> Rows | None:
        axes = self._axes(node)
        if axes is None and node.op_type.startswith("Arg"):
            axes = [node.attributes.get_int("axis", 0)]
        named = "axes" in node.attributes or (len(node.inputs) > 1 and node.inputs[1] is not None)
        if not axes and not named:
            return rows if node.attributes.get_int("noop_with_empty_axes", 0) else summed_by(node)
        gone = [self._from_front(axis, node.inputs[0]) for axis in axes or ()]
        assert rows.axis is not None
        if rows.axis in gone:
            return summed_by(node)
        if not gone or None in gone:
            return None
        if node.attributes.get_int("keepdims", 1):
            return rows
        return replace(rows, axis=rows.axis - sum(axis is not None and axis < rows.axis for axis in gone))

    def _expanded(self, node: ir.Node, rows: Rows) -> Rows | None:
        before, after = self.rank(node.inputs[0]), self.rank(node.outputs[0])
        if after is None:
            sizes = sizes_of(node.inputs[1], self.size)
            after = None if sizes is None or before is None else max(len(sizes), before)
        if before is None or after is None or rows.axis is None:
            return None
        return replace(rows, axis=rows.axis + after - before)

    # --- products -------------------------------------------------------------------------------------

    def _product(self, node: ir.Node, inputs: list[Rows | None]) -> Rows | None:
        """Return a product's rows: front axes are aligned, the first's rows and the second's columns stay."""
        left, right = node.inputs[0], node.inputs[1]
        first, second, rank, other = inputs[0], inputs[1], self.rank(left), self.rank(right)
        turned = [node.attributes.get_int(f"trans{name}", 0) for name in ("A", "B", "BatchA", "BatchB")]
        if first is None or second is None or any(turned[2:]):
            return None
        if turned[0] or turned[1]:
            if rank is None or other is None:
                return None
            first = _turned(first, rank) if turned[0] else first
            second = _turned(second, other) if turned[1] else second
        # A packed weight is a matrix, whatever axes its codes have.
        other = 2 if second == SAME and node.op_type not in ("FusedMatMul", "MatMul") else other
        if second == SAME and (rank is None or other is None):
            return first if other in (1, 2) else None
        if rank is None or other is None:
            return None
        if first.axis == rank - 1 or second.axis == max(other - 2, 0):
            # Rule 5: the result is a sum over rows; with a permutation's matrix it is another row.
            return moved_by(node)
        if second == SAME:
            return replace(first, axis=(first.axis or 0) + max(other - rank, 0))
        pair: list[tuple[ir.Value | None, Rows | None]] = [(left, first), (right, second)]
        return self._aligned([one for one in pair if one[1] != SAME], max(rank, other))

    def _gemm(self, node: ir.Node, rows: Rows) -> Rows | None:
        plain = rows.axis == 0 and not node.attributes.get_int("transA", 0)
        return rows if plain and self.of(node.inputs[1]) == SAME else None

    # --- what puts something outside of the rows ------------------------------------------------------

    def _joined(self, node: ir.Node, inputs: list[Rows | None]) -> Rows | None:
        if len(inputs) == 1:
            return inputs[0]
        carriers = {rows for rows in inputs if rows != SAME}
        axis = self._from_front(node.attributes["axis"].as_int(), node.outputs[0])
        if axis is None or None in carriers or len({rows.axis for rows in carriers if rows}) != 1:
            return None
        (place,) = {rows.axis for rows in carriers if rows}
        if place != axis:
            return next(iter(carriers)) if len(carriers) == 1 else None
        # Rule 4: rows come after each other, so that each is there several times, or after something else.
        several = sum(rows != SAME for rows in inputs) > 1
        return Rows(axis=axis, outermost=False, alone=False) if several else moved_by(node)

    def _flattened(self, node: ir.Node, rows: Rows) -> Rows | None:
        axis = self._from_front(node.attributes.get_int("axis", 1), node.inputs[0])
        if axis is None or rows.axis is None:
            return None
        begin = 0 if rows.axis < axis else axis
        return Rows(axis=int(begin > 0), outermost=rows.outermost and rows.axis == begin, alone=False)

    def _reshaped(self, node: ir.Node, rows: Rows) -> Rows | None:
        source, target = node.inputs[0], node.inputs[1]
        assert source is not None
        assert rows.axis is not None
        count = self.rank(node.outputs[0])
        inferred = None if count is None else [self.size(node.outputs[0], axis) for axis in range(count)]
        sizes = sizes_of(target, self.size) or inferred
        if sizes is None:
            return rows_reshaped(self, node, rows)
        sizes = [self.size(source, axis) if size == 0 else size for axis, size in enumerate(sizes)]
        if inferred is not None and len(inferred) == len(sizes):
            pairs = zip(sizes, inferred, strict=True)
            sizes = [known if size in (-1, None) and known is not None else size for size, known in pairs]
        before = [self.size(source, axis) for axis in range(rows.axis)]
        batch = self._batch if isinstance(self._batch, int) else None
        found = reshaped(before, rows.outermost, sizes, batch)
        known = None if found is None else Rows(axis=found[0], outermost=found[1], alone=found[2])
        if known is not None and known.alone:
            return known
        # If an axis is left open, numbers tell whether the rows are alone along it.
        return rows_reshaped(self, node, rows) or known

    def _axes(self, node: ir.Node) -> list[int] | None:
        if len(node.inputs) > 1:
            return numbers_of(node.inputs[1])
        return list(node.attributes["axes"].as_ints()) if "axes" in node.attributes else None

    def _from_front(self, axis: int, value: ir.Value | None) -> int | None:
        return from_front(self, axis, value)


def _turned(rows: Rows, rank: int) -> Rows:
    """Return the position of rows after the last two axes are exchanged."""
    if rows.axis is None or rows.axis < rank - 2:
        return rows
    return replace(rows, axis=2 * rank - 3 - rows.axis)


def _certain(rows: Rows | None) -> Rows | None:
    return replace(rows, doubt="") if rows is not None and rows.doubt else rows


def _is_named(size: int | ir.SymbolicDim) -> bool:
    return isinstance(size, ir.SymbolicDim) and size.value is not None


def _is_nameless(size: int | ir.SymbolicDim) -> bool:
    return isinstance(size, ir.SymbolicDim) and size.value is None
