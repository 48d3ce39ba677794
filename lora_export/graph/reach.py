"""Tell which nodes of a graph its outputs depend on: a change of the others would change nothing.

An output does not depend on

1. a node whose results no output is computed from, also through If, Loop and Scan: of a subgraph only the
   outputs that are asked for count, and of an If whose condition is a constant the branch that is taken;
2. what only a shape is read of; and
3. a factor of a product that is zero whatever the inputs are: another factor is a constant of zeros, or was
   computed from such constants in a way that keeps them zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set

import numpy as np
import onnx_ir as ir

from lora_export.graph.onnx_file import release

_DEFAULT, _CONTRIB = ("", "ai.onnx"), "com.microsoft"
# Zero where one of the inputs is.
_PRODUCTS = frozenset({"Mul", "MatMul", "FusedMatMul", "Einsum"})
# A product of the first two inputs, to which the third is added.
_WITH_ADDEND = frozenset({"Gemm", "Conv", "ConvTranspose"})
# Zero where all inputs are.
_SUMS = frozenset({"Add", "Sub", "Sum", "Concat", "Max", "Min", "Mean"})
# Zero where the first input is: it is moved, repeated, summed, or mapped by what maps 0 to 0.
_KEEPING = frozenset(
    {
        *("Identity", "Cast", "CastLike", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice"),
        *(
            "Split",
            "Expand",
            "Tile",
            "Gather",
            "GatherElements",
            "GatherND",
            "Trilu",
            "Dropout",
            "Div",
            "Neg",
        ),
        *("Neg", "Abs", "Relu", "LeakyRelu", "Elu", "Selu", "Gelu", "Tanh", "Sin", "Erf", "Sqrt", "Sign"),
        *("Round", "Floor", "Ceil", "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "CumSum"),
    }
)
# The second input is a factor of what the first gives.
_NORMS = frozenset(
    {
        *("LayerNormalization", "GroupNormalization", "InstanceNormalization", "BatchNormalization"),
        *("RMSNormalization", "SimplifiedLayerNormalization"),
    }
)
# Operator → inputs of which only the shape or the type is read.
_UNREAD = {
    "Shape": (0,),
    "Size": (0,),
    "CastLike": (1,),
    "EyeLike": (0,),
    "RandomNormalLike": (0,),
    "RandomUniformLike": (0,),
}
# Number of nodes between a LoRA tensor and its product, and of their results that are followed.
_MOVES = 8
# Values that are compared at once.
_CHUNK = 1 << 20


class Reach:
    """The nodes and values of a graph on which its outputs depend.

    Args:
        graph: The main graph, its functions inlined.
        changeable: Identities of constants that may get other values: they are not taken for zero.

    Attributes:
        zero_changeable: Identities of those that are factors of a product, and zero.
    """

    def __init__(self, graph: ir.Graph, changeable: Set[int] = frozenset()) -> None:
        self.zero_changeable: set[int] = set()
        self._changeable = changeable
        # Constant, and whether it is zero (or true) throughout → whether it is.
        self._known: dict[tuple[int, bool], bool] = {}
        self._zero: set[int] = set()
        # Input of a subgraph → what it is.
        self._given: dict[int, list[ir.Value | None]] = {}
        self._followed: set[int] = set()
        self._nodes: set[int] = set()
        self._left: dict[int, frozenset[int]] = {}
        self._find_zeros(graph)
        self._follow(graph.outputs)

    def reads(self, node: ir.Node, index: int) -> bool:
        """Return whether an output depends on an input of a node."""
        return id(node) in self._nodes and index not in self._left.get(id(node), ())

    def depends_on(self, value: ir.Value) -> bool:
        """Return whether an output depends on a value."""
        return id(value) in self._followed

    def sums_zeros(self, node: ir.Node) -> bool:
        """Return whether an output depends on a sum of a product that is zero by its input, and more.

        If it does, it would depend on a bias that is added to this product.
        """
        if node.domain not in _DEFAULT or not node.inputs or not self._is_zero(node.inputs[0]):
            return False
        if node.op_type in _WITH_ADDEND and id(node) in self._nodes:
            return True
        return node.op_type in _PRODUCTS | _WITH_ADDEND and self._is_zero_read(node.outputs[0])

    def multiplies_zeros(self, value: ir.Value) -> bool:
        """Return whether a value, perhaps moved, is a factor of zeros that an output depends on with more."""
        front = [value]
        for _ in range(_MOVES):
            made = [output for one in front for node, _ in one.uses() for output in node.outputs]
            if any(id(output) in self._zero and self._is_zero_read(output) for output in made):
                return True
            front = [output for output in made if id(output) not in self._zero][:_MOVES]
        return False

    def _is_zero_read(self, value: ir.Value) -> bool:
        """Return whether an output depends on a node that reads these zeros, or what is zero by them."""
        pending, seen = [value], {id(value)}
        while pending:
            value = pending.pop()
            if value.is_graph_output() or any(self.reads(node, index) for node, index in value.uses()):
                return True
            for node, _ in value.uses():
                zeros = [one for one in node.outputs if id(one) in self._zero and id(one) not in seen]
                seen.update(id(one) for one in zeros)
                pending += zeros
        return False

    def _find_zeros(self, graph: ir.Graph) -> None:
        for node in graph:
            graphs = list(_subgraphs(node))
            for inner in graphs:
                self._find_zeros(inner)
            if graphs:
                self._note_inputs(node)
            if self._gives_zero(node):
                # A Dropout's second result is its mask.
                outputs = node.outputs[:1] if node.op_type == "Dropout" else node.outputs
                self._zero.update(id(output) for output in outputs)

    def _note_inputs(self, node: ir.Node) -> None:
        body, inputs = _body(node), node.inputs
        if node.op_type == "Loop" and body is not None:
            for index, value in enumerate(body.inputs):
                # The number of the iteration, the condition, then what is carried.
                own = [] if not index else [inputs[index], body.outputs[index - 1]]
                self._given[id(value)] = own
        elif node.op_type == "Scan" and body is not None:
            states = _states(node)
            for index, value in enumerate(body.inputs):
                again = [body.outputs[index]] if index < states else []
                self._given[id(value)] = [inputs[index], *again]

    def _gives_zero(self, node: ir.Node) -> bool:
        """Rule 3."""
        inputs, op_type = node.inputs, node.op_type
        if node.domain not in _DEFAULT and (node.domain, op_type) != (_CONTRIB, "FusedMatMul"):
            return False
        if op_type in _PRODUCTS:
            return any(self._is_zero(value) for value in inputs)
        if op_type in _WITH_ADDEND:
            return self._is_product_zero(node) and (len(inputs) < 3 or self._is_absent(node, 2))
        if op_type == "Sub" and inputs[0] is not None and inputs[0] is inputs[1]:
            return True
        if op_type in _SUMS:
            return all(self._is_zero(value) for value in inputs)
        if op_type in _KEEPING:
            return self._is_zero(inputs[0])
        if op_type == "Where":
            return all(self._is_zero(inputs[index]) for index in {1, 2} - self._unread(node))
        if op_type == "If":
            return len(node.outputs) == 1 and all(
                self._is_zero(branch.outputs[0]) for branch in self._taken(node)
            )
        if op_type == "ConstantOfShape":
            filled = node.attributes.get("value")
            return filled is None or not np.any(filled.as_tensor().numpy())
        if op_type == "Constant" and node.outputs[0].const_value is None:
            plain = [node.attributes.get(name) for name in ("value_float", "value_int")]
            plain += [node.attributes.get(name) for name in ("value_floats", "value_ints")]
            return any(attribute is not None and not np.any(attribute.value) for attribute in plain)
        return False

    def _is_zero(self, value: ir.Value | None) -> bool:
        if value is None:
            return False
        if id(value) in self._zero:
            return True
        is_zero = self._has_only(value, nonzero=False)
        if is_zero and id(value) in self._changeable:
            self.zero_changeable.add(id(value))
            return False
        return is_zero

    def _has_only(self, value: ir.Value, *, nonzero: bool) -> bool:
        if value.const_value is None or value.is_graph_input():
            return False
        key = id(value), nonzero
        if key not in self._known:
            self._known[key] = _has_only(value, nonzero=nonzero)
        return self._known[key]

    def _is_product_zero(self, node: ir.Node) -> bool:
        is_zero = any(self._is_zero(value) for value in node.inputs[:2])
        return is_zero or node.attributes.get_float("alpha", 1.0) == 0

    def _is_absent(self, node: ir.Node, index: int) -> bool:
        """Return whether an addend is missing, zero, or times zero."""
        value = node.inputs[index]
        return value is None or self._is_zero(value) or node.attributes.get_float("beta", 1.0) == 0

    def _is_true(self, value: ir.Value | None) -> bool:
        return value is not None and self._has_only(value, nonzero=True)

    def _taken(self, node: ir.Node) -> list[ir.Graph]:
        """Return the branches of an If that may be run."""
        skipped = "then_branch" if self._is_zero(node.inputs[0]) else ""
        skipped = "else_branch" if self._is_true(node.inputs[0]) else skipped
        branches = (node.attributes.get(name) for name in ("then_branch", "else_branch") if name != skipped)
        return [branch.as_graph() for branch in branches if branch is not None]

    def _unread(self, node: ir.Node) -> frozenset[int]:
        """Return the inputs of a node that its results do not depend on."""
        op_type = node.op_type
        if node.domain not in _DEFAULT:
            return frozenset()
        if op_type in _UNREAD:
            return frozenset(_UNREAD[op_type])
        if op_type == "Where":
            if self._is_zero(node.inputs[0]):
                return frozenset({1})
            return frozenset({2} if self._is_true(node.inputs[0]) else ())
        if op_type in _WITH_ADDEND:
            left = {0, 1} if self._is_product_zero(node) else set()
            return frozenset(left | ({2} if len(node.inputs) > 2 and self._is_absent(node, 2) else set()))
        if op_type in _NORMS and len(node.outputs) == 1 and self._is_zero(node.inputs[1]):
            return frozenset({0})
        return frozenset()

    def _follow(self, outputs: Iterable[ir.Value]) -> None:
        """Walk from the outputs to all that they are computed from, each node once."""
        pending: list[ir.Value | None] = list(outputs)
        while pending:
            value = pending.pop()
            if value is None or id(value) in self._followed or id(value) in self._zero:
                continue
            self._followed.add(id(value))
            node = value.producer()
            if node is None:
                pending += self._given.get(id(value), ())
                continue
            if id(node) not in self._nodes:
                self._nodes.add(id(node))
                pending += self._inputs(node)
            pending += self._inner(node, value)

    def _inputs(self, node: ir.Node) -> list[ir.Value | None]:
        """Return what all results of a node depend on."""
        if (body := _body(node)) is not None:
            return [*node.inputs[:2], body.outputs[0]] if node.op_type == "Loop" else []
        left = self._left[id(node)] = self._unread(node)
        found = [value for index, value in enumerate(node.inputs) if index not in left]
        if node.op_type != "If":
            found += [value for graph in _subgraphs(node) for value in graph.outputs]
        return found

    def _inner(self, node: ir.Node, value: ir.Value) -> list[ir.Value | None]:
        """Return what one result of an If, Loop or Scan depends on."""
        index, body = value.index(), _body(node)
        assert index is not None
        if node.op_type == "If" and node.domain in _DEFAULT:
            return [branch.outputs[index] for branch in self._taken(node)]
        if body is None:
            return []
        if node.op_type == "Loop":
            carried = len(node.inputs) - 2
            first = [node.inputs[index + 2]] if index < carried else []
            never = any(self._is_zero(value) for value in node.inputs[:2])
            return first if never else [*first, body.outputs[index + 1]]
        first = [node.inputs[index]] if index < _states(node) else []
        return [*first, body.outputs[index]]


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _body(node: ir.Node) -> ir.Graph | None:
    """Return the body of a Loop or Scan whose inputs and outputs are as ONNX has them; else None."""
    attribute = node.attributes.get("body")
    if node.domain not in _DEFAULT or node.op_type not in ("Loop", "Scan") or attribute is None:
        return None
    body = attribute.as_graph()
    if node.op_type == "Loop":
        fits = len(body.inputs) == len(node.inputs) and len(body.outputs) == len(node.outputs) + 1
        return body if fits and len(body.outputs) >= len(body.inputs) - 1 else None
    fits = len(body.inputs) == len(node.inputs) and len(body.outputs) == len(node.outputs)
    return body if fits and 0 <= _states(node) <= len(body.outputs) else None


def _states(node: ir.Node) -> int:
    return len(node.inputs) - node.attributes.get_int("num_scan_inputs", 0)


def _has_only(value: ir.Value, *, nonzero: bool) -> bool:
    """Return whether all of a constant's values are zero, or with ``nonzero`` none is."""
    assert value.const_value is not None
    if value.const_value.dtype == ir.DataType.STRING:
        return False
    flat = np.asarray(value.const_value.numpy()).reshape(-1)
    # The first number decides for almost every weight: no more of the file is read.
    starts = (0, *range(1, flat.size, _CHUNK))
    parts = (flat[start : start + _CHUNK] if start else flat[:1] for start in starts)
    found = all(bool(part.all() if nonzero else not part.any()) for part in parts)
    release(value)
    return found
