"""Have a graph divide sizes as Python does: ``//`` rounds down, ONNX's Div of integers rounds to zero.

torch.onnx (2.13) writes one for the other. It matters where the dividend may be negative, which sizes are
not, but what torch.export makes of them is: ``(24 - height) // 2`` becomes ``12 + (-height) // 2``.
"""

from __future__ import annotations

import onnx_ir as ir

_NAME = "floordiv"
# Operators through which the sign of a size is followed.
_SUMS = ("Add", "Mul", "Cast", "Identity")


def round_down(model: ir.Model) -> None:
    """Correct the divisions of a graph as torch.onnx writes it, where the dividend may be negative."""
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Div" or not str(node.outputs[0].name).startswith(_NAME):
            continue
        dividend, divisor = node.inputs
        if dividend is None or divisor is None or not _may_be_negative(dividend):
            continue
        _correct(graph, node, dividend, divisor)


def _may_be_negative(value: ir.Value) -> bool:
    """Return whether a size is computed with a subtraction or a negative constant."""
    waiting, seen = [value], set[ir.Value]()
    while waiting:
        one = waiting.pop()
        node = one.producer()
        if one in seen or node is None:
            continue
        seen.add(one)
        if node.op_type in ("Sub", "Neg"):
            return True
        constant = ir.convenience.get_const_tensor(one)
        if constant is not None and (constant.numpy() < 0).any():
            return True
        if node.op_type in _SUMS:
            waiting += [given for given in node.inputs if given is not None]
    return False


def _correct(graph: ir.Graph, node: ir.Node, dividend: ir.Value, divisor: ir.Value) -> None:
    """Subtract one from a quotient that was rounded up: times the divisor, it is above the dividend."""
    quotient = node.outputs[0]
    users = list(quotient.uses())
    made: dict[str, ir.Value] = {}
    nodes = []

    def add(word: str, kind: str, inputs: list[ir.Value], dtype: ir.DataType = ir.DataType.INT64) -> None:
        made[word] = ir.Value(name=f"{quotient.name}_{word}", shape=quotient.shape, type=ir.TensorType(dtype))
        attributes = [ir.AttrInt64("to", dtype)] if kind == "Cast" else []
        nodes.append(ir.Node("", kind, inputs, attributes, outputs=[made[word]], name=f"{node.name}_{word}"))

    add("product", "Mul", [quotient, divisor])
    add("above", "Greater", [made["product"], dividend], dtype=ir.DataType.BOOL)
    add("excess", "Cast", [made["above"]])
    add("down", "Sub", [quotient, made["excess"]])
    graph.insert_after(node, nodes)
    for user, index in users:
        user.replace_input_with(index, made["down"])
