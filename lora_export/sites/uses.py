"""Find every weight of a graph and its way into an operator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from lora_export.errors import GraphError
from lora_export.graph.onnx_file import FLOAT_TYPES, GraphFile, shape_of
from lora_export.sites import operator_named, operator_of
from lora_export.sites.operand import (
    DEQUANTIZE,
    NORMS,
    PASSED,
    QUANTIZE,
    SHAPE_ONLY,
    SKIP_NORMS,
    WEIGHTS,
    Operand,
    Use,
)
from lora_export.sites.values.ranges import is_fixed
from lora_export.untrusted.shown import shown

# Other operators that a vector may feed, so that biases and norms (modules_to_save, bias="all") have a site.
_BODIES = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
# Outputs, inputs, and at least one axis of the kernel.
_CONV_AXES = 3
_OF_MATRICES = ("Gemm", "FusedGemm", "GemmFastGelu")
_VECTOR_PARAMETERS = {"Add": "bias", "Mul": "weight"}


def find_uses(graph: GraphFile) -> list[Use]:
    """Return every use of a constant as a weight, in graph order.

    The use of a quantised weight, or one through a Transpose of more than a matrix, has a ``refusal``.
    Another node that changes the values (Reshape, Mul …) is the reader itself, an ``other`` use.
    """
    return [use for node in graph.graph.all_nodes() for use in _uses_of(node)]


def in_bodies(uses: Iterable[Use], graph: ir.Graph) -> bool:
    """Return True if some readers of weights are in a Loop, Scan or If of a graph, or are one themselves."""
    return any(use.node.graph is not graph or has_body(use.node) for use in uses)


def has_body(node: ir.Node) -> bool:
    """Return True if a node computes graphs of its own."""
    return any(one.type in _BODIES for one in node.attributes.values())


def _uses_of(node: ir.Node) -> Iterator[Use]:
    operator, named = operator_of(node.domain, node.op_type), operator_named(node.op_type)
    operands = operator.operands(node) if operator else []
    # Scales and zero points are a part of their weight, not weights of their own.
    taken = {operand.index for operand in operands} | (named.code_inputs if named else frozenset())
    for operand in [*operands, *_vector_operands(node, taken)]:
        value = node.inputs[operand.index] if operand.index < len(node.inputs) else None
        if value is not None and (use := _trace(node, operand, value)) is not None:
            yield use


def _is_dequantised(value: ir.Value) -> bool:
    """Return whether a node turns codes into values: ONNX Runtime looks rows up in a table of codes."""
    return any(node.op_type in DEQUANTIZE for node, index in value.uses() if index == 0)


def _vector_operands(node: ir.Node, taken: set[int]) -> Iterator[Operand]:
    for index in range(len(node.inputs)):
        if index in taken:
            continue
        if node.op_type in _VECTOR_PARAMETERS:
            yield Operand(index=index, kind="vector", parameter=_VECTOR_PARAMETERS[node.op_type])
        elif node.op_type in NORMS and index in (1, 2):
            yield Operand(index=index, kind="vector", parameter="weight" if index == 1 else "bias")
        elif node.op_type in SKIP_NORMS and index in (2, 3):
            yield Operand(index=index, kind="vector", parameter="weight" if index == 2 else "bias")
        elif node.op_type not in PASSED | SHAPE_ONLY | DEQUANTIZE | QUANTIZE:
            yield Operand(index=index, kind="other", parameter="")


def _trace(node: ir.Node, operand: Operand, value: ir.Value) -> Use | None:
    """Walk from an operand back to the constant that it comes from; return None if there is none."""
    chain: list[ir.Node] = []
    refusal, quantised = operand.refusal, operand.shape is not None
    codes = bool(operand.refusal)
    while (maker := value.producer()) is not None:
        source = maker.inputs[0] if maker.inputs else None
        if maker.op_type == "Constant" or source is None:
            break
        if maker.op_type in DEQUANTIZE:
            codes = True
        elif maker.op_type in QUANTIZE and codes:
            # The graph rounds the weight; the stored one is a float.
            codes = False
            if not is_fixed(maker):
                refusal = refusal or f"{maker.op_type} whose scale the graph computes"
        elif maker.op_type not in PASSED:
            return None
        chain.insert(0, maker)
        value = source
    if value.const_value is None:
        return None
    shape, dtype = shape_of(value.const_value), value.const_value.dtype
    packed = operand.shape is not None
    _check_axes(node, operand, value, len(shape))
    if (operand.kind in WEIGHTS and len(shape) < 2 and not packed) or not shape:
        return None
    no_branch = operand.no_branch
    dequantised = next((node.op_type for node in chain if node.op_type in DEQUANTIZE), None)
    if dequantised and (codes or dtype not in FLOAT_TYPES):
        refusal, quantised = refusal or f"quantised weight ({dequantised})", True
    quantised = quantised or dtype not in FLOAT_TYPES
    if dtype not in FLOAT_TYPES and not refusal:
        is_looked_up = operand.kind == "embedding" and (chain or _is_dequantised(node.outputs[0]))
        if operand.kind not in ("linear", "conv") and not is_looked_up:
            return None
        refusal = f"quantised weight ({node.op_type} of {dtype.name})"
        no_branch = f"{node.op_type} of {dtype.name} values: no branch is known for it"
    transposed, wrong = _orientation(operand, chain, len(shape))
    wrong = wrong or _truncation(chain, dtype)
    return Use(
        node=node,
        operand=operand,
        root=value,
        chain=tuple(chain),
        transposed=transposed,
        refusal=refusal or wrong,
        no_branch=no_branch or wrong,
        quantised=quantised,
    )


def _check_axes(node: ir.Node, operand: Operand, root: ir.Value, axes: int) -> None:
    """Raise `GraphError` if an operator can't read a weight of so many axes, as ONNX Runtime does."""
    if operand.kind == "conv" and axes < _CONV_AXES:
        wanted = f"{_CONV_AXES} or more"
    elif node.op_type in _OF_MATRICES and operand.kind in WEIGHTS and axes != 2:
        wanted = "2"
    else:
        return
    raise GraphError(
        f"the node '{shown(node.name)}' ({node.op_type}) reads a weight of {axes} axes "
        f"({shown(root.name)}), wanted {wanted}",
        "export the model again: ONNX Runtime can't run this graph",
    )


def _truncation(chain: list[ir.Node], dtype: ir.DataType) -> str:
    """Return the problem of a Cast that makes a weight of floats whole numbers."""
    if dtype in FLOAT_TYPES:
        for node in chain:
            to = ir.DataType(node.attributes.get_int("to", dtype)) if node.op_type == "Cast" else dtype
            if to not in FLOAT_TYPES:
                return f"the graph makes the weight whole numbers (Cast to {to.name})"
    return ""


def _orientation(operand: Operand, chain: list[ir.Node], rank: int) -> tuple[bool, str]:
    """Return True if the constant is the canonical weight's transpose, and the problem of its Transposes."""
    transposed, wrong = operand.transposed, ""
    for node in chain:
        if node.op_type != "Transpose":
            continue
        straight = list(range(rank))
        permutation = list(node.attributes.get_ints("perm", ())) or straight[::-1]
        if permutation == straight:
            continue
        if operand.kind != "conv" and permutation == [*straight[:-2], rank - 1, rank - 2]:
            transposed = not transposed
        else:
            wrong = f"the weight passes a Transpose with perm {permutation}"
    return transposed, wrong
