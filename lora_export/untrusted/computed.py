"""Compute values of a stranger's nodes, with a limit that is checked before they are computed.

An Expand of one number to 10¹² takes forty bytes of a file, and so does a Max that reads one constant a
thousand times. onnx's reference implementation computes any node; here only operators run whose work follows
from their inputs, and all work for one result, and for all results of a file, has a limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

Values = NDArray[Any]
# Limit of elements of all intermediate values for one result, and of all constants.
MAX_ELEMENTS = 1 << 20
# Limit of all work for one file, in elements, and what running one node costs however small its values are.
MAX_WORK, NODE_WORK = 1 << 24, 1 << 7
_STRING = 8

# Operators whose result is as large as the inputs broadcast together; they combine it with each input.
_BROADCAST = """
Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean
Min Mod Mul Or Pow PRelu Sub Sum Where Xor
"""
# Operators whose results are each not larger than the largest input.
_NOT_LARGER = """
Abs Acos ArgMax ArgMin Asin Atan BitwiseNot Cast CastLike Ceil Celu Clip Compress Cos Cosh CumSum Det
Dropout Elu Erf Exp EyeLike Flatten Floor GatherElements HardSigmoid HardSwish Hardmax Identity IsInf IsNaN
LeakyRelu Log LogSoftmax Neg Not Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax
ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape ReverseSequence Round ScatterElements
ScatterND Selu Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign Sqrt Squeeze Tan Tanh
ThresholdedRelu TopK Transpose Trilu Unique Unsqueeze
"""


class UncomputedError(Exception):
    """Error for a value that can't be computed, or is too large."""


class Budget:
    """Work that may still be done for one file.

    Attributes:
        left: Elements that may still be read or made.
    """

    def __init__(self, most: int = MAX_WORK) -> None:
        self.left = most

    def spend(self, work: int) -> None:
        """Take work from the budget, before it is done.

        Raises:
            UncomputedError: There is not as much left.
        """
        self.left -= work
        if self.left < 0:
            raise UncomputedError("the file's nodes compute more than is computed of one file")


def computed(graph: onnx.GraphProto, version: int, budget: Budget | None = None) -> Values:
    """Return the first output of a graph without inputs.

    Args:
        graph: Graph with its nodes and constants.
        version: Opset.
        budget: Work that is left for the file that the graph is from; None if the graph is all of it.

    Raises:
        UncomputedError: The output can't be computed, or takes too much work.
    """
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    budget = budget or Budget()
    constants = sum(math.prod(tensor.dims) for tensor in graph.initializer)
    budget.spend(constants + NODE_WORK * len(graph.node))
    left = MAX_ELEMENTS - constants
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)])
    try:
        evaluator = ReferenceEvaluator(model)
        values: dict[str, Any] = {"": None, **evaluator.rt_inits_}
        for node in evaluator.rt_nodes_:
            inputs = [values[name] for name in node.input]
            work = elements(node.onnx_node, inputs)
            left -= work
            if left < 0:
                raise UncomputedError(f"more than {MAX_ELEMENTS} elements")
            budget.spend(work)
            values.update(zip(node.output, node.run(*inputs), strict=False))
        return np.asarray(values[graph.output[0].name])
    except UncomputedError:
        raise
    except Exception as error:  # onnx raises many kinds; a value that it can't compute stays unknown
        raise UncomputedError(str(error)) from error


def elements(node: onnx.NodeProto, inputs: Sequence[Values | None]) -> int:
    """Return the work of a node: the largest number of elements of a result, for each time one is made.

    A Max of a hundred inputs makes a result of each two.

    Args:
        node: Any node.
        inputs: Values of its inputs; None for an absent one.

    Raises:
        UncomputedError: The number is unknown.
    """
    attributes = {attribute.name: attribute for attribute in node.attribute}
    rule = _RULES.get(node.op_type)
    is_text = node.op_type == "Cast" and "to" in attributes and attributes["to"].i == _STRING
    if rule is None or node.domain not in ("", "ai.onnx") or is_text:
        raise UncomputedError(node.op_type)
    work = rule([np.asarray(0) if value is None else value for value in inputs], attributes)
    return work + len(node.input) + len(node.output)


def _largest(inputs: Sequence[Values], _attributes: Mapping[str, Any]) -> int:
    return max(map(_room, inputs), default=0) + 1


def _room(value: Values) -> int:
    """Return how many elements are left at most where axes go: of ``[0, n]`` the sum over the first has n."""
    return math.prod(max(size, 1) for size in value.shape)


def _broadcast(inputs: Sequence[Values], _attributes: Mapping[str, Any]) -> int:
    # numpy broadcasts no more than some tens of shapes at once.
    shape: tuple[int, ...] = ()
    for value in inputs:
        shape = np.broadcast_shapes(shape, value.shape)
    return math.prod(shape) * len(inputs)


def _ranked(inputs: Sequence[Values], _attributes: Mapping[str, Any]) -> int:
    """Return the limit for Shape and NonZero: a number for each axis of each element."""
    return (inputs[0].ndim + 1) * (inputs[0].size + 1)


def _concat(inputs: Sequence[Values], _attributes: Mapping[str, Any]) -> int:
    return sum(value.size for value in inputs)


def _constant(_inputs: Sequence[Values], attributes: Mapping[str, Any]) -> int:
    """Return the number of elements of a Constant whose values are in the file."""
    for name, attribute in attributes.items():
        if name == "value":
            return math.prod(attribute.t.dims)
        if name in ("value_int", "value_float", "value_ints", "value_floats"):
            return len(attribute.ints) + len(attribute.floats) + 1
    raise UncomputedError("Constant")


def _sized(inputs: Sequence[Values], _attributes: Mapping[str, Any]) -> int:
    return math.prod(_sizes(inputs[0]))


def _expand(inputs: Sequence[Values], _attributes: Mapping[str, Any]) -> int:
    return math.prod(np.broadcast_shapes(inputs[0].shape, tuple(_sizes(inputs[1]))))


def _tile(inputs: Sequence[Values], _attributes: Mapping[str, Any]) -> int:
    return inputs[0].size * math.prod(_sizes(inputs[1]))


def range_length(inputs: Sequence[Values], _attributes: Mapping[str, Any] | None = None) -> int:
    """Return the number of elements that a Range makes of its start, limit and step."""
    start, limit, step = (float(value.reshape(())) for value in inputs)
    return max(math.ceil((limit - start) / step), 0)


def _pad(inputs: Sequence[Values], attributes: Mapping[str, Any]) -> int:
    if "pads" in attributes or len(inputs) > 3:
        raise UncomputedError("Pad of another form")
    shape, added = inputs[0].shape, [abs(size) for size in _sizes(inputs[1])]
    before, after = added[: len(shape)], added[len(shape) :]
    return math.prod(map(sum, zip(shape, before, after, strict=True)))


def _one_hot(inputs: Sequence[Values], _attributes: Mapping[str, Any]) -> int:
    return inputs[0].size * max(_sizes(inputs[1]))


def _gather(inputs: Sequence[Values], _attributes: Mapping[str, Any]) -> int:
    """Return the limit for Gather and GatherND: for each index, all of the data along the other axes."""
    data, indices = inputs
    return indices.size * (_room(data) // max(min(data.shape, default=1), 1))


def _product(inputs: Sequence[Values], _attributes: Mapping[str, Any]) -> int:
    one, two = inputs
    left = one.shape if one.ndim > 1 else (1, *one.shape)
    right = two.shape if two.ndim > 1 else (*two.shape, 1)
    # Each element of the result is a sum over the axis that the product is over.
    return math.prod((*np.broadcast_shapes(left[:-2], right[:-2]), left[-2], right[-1], max(right[-2], 1)))


def _sizes(value: Values) -> list[int]:
    return [int(size) for size in value.reshape(-1)]


_RULES: dict[str, Callable[[Sequence[Values], Mapping[str, Any]], int]] = {
    **dict.fromkeys(_BROADCAST.split(), _broadcast),
    **dict.fromkeys(_NOT_LARGER.split(), _largest),
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _sized,
    "Expand": _expand,
    "Gather": _gather,
    "GatherND": _gather,
    "MatMul": _product,
    "NonZero": _ranked,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Range": range_length,
    "Shape": _ranked,
    "Split": _largest,
    "Tile": _tile,
}
