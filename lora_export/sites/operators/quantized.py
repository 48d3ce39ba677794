"""Describe operators with quantised weights: no merge goes into them; those with floats can get a branch."""

from __future__ import annotations

import onnx_ir as ir

from lora_export.sites.operand import Operand, OperandKind, Operator

# Position of the weight among the inputs, if it is not 1.
_WEIGHT_INDEX = {"QLinearMatMul": 3, "QLinearConv": 3, "QGemm": 3, "GatherBlockQuantized": 0}
# Operators whose activations and result are floats, and whose attributes N and K give the weight's shape.
_PACKED = {"MatMulNBits", "MatMulBnb4"}
# Operators with an integer matrix (in_dim, out_dim); the activation is quantised inside or just before.
_DYNAMIC = {"DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat"}
# Positions of scales, zero points and orders of codes: they define the values of codes of a weight or of an
# activation and are not parameters (ONNX ``Operators.md``, ONNX Runtime ``docs/ContribOperators.md``).
SCALES: dict[str, frozenset[int]] = {
    "MatMulNBits": frozenset({2, 3, 4}),
    "MatMulBnb4": frozenset({2}),
    "GatherBlockQuantized": frozenset({2, 3}),
    "DynamicQuantizeMatMul": frozenset({2, 3}),
    "MatMulInteger": frozenset({2, 3}),
    "MatMulIntegerToFloat": frozenset({2, 3, 4, 5}),
    "ConvInteger": frozenset({2, 3}),
    "QLinearMatMul": frozenset({1, 2, 4, 5, 6, 7}),
    "QLinearConv": frozenset({1, 2, 4, 5, 6, 7}),
    "QGemm": frozenset({1, 2, 4, 5, 7, 8}),
    "QAttention": frozenset({3, 4, 6, 7}),
    "QMoE": frozenset({3, 6, 9, *range(11, 14), *range(15, 21)}),
}


def operands(node: ir.Node) -> list[Operand]:
    """Return the quantised weight."""
    kind: OperandKind = (
        "embedding" if node.op_type.startswith("Gather") else "conv" if "Conv" in node.op_type else "linear"
    )
    refusal = f"quantised weight ({node.op_type})"
    shape = (node.attributes.get_int("N", 0), node.attributes.get_int("K", 0))
    if node.op_type in _PACKED and all(shape):
        return [Operand(index=1, kind=kind, refusal=refusal, shape=shape)]
    if node.op_type in _DYNAMIC:
        return [Operand(index=1, kind=kind, transposed=True, refusal=refusal)]
    no_branch = f"{node.op_type}: no branch is known for it"
    index = _WEIGHT_INDEX.get(node.op_type, 1)
    return [Operand(index=index, kind=kind, transposed=True, refusal=refusal, no_branch=no_branch)]


def _none(node: ir.Node) -> list[Operand]:
    """Return no operands, because the operator's experts are not followed."""
    return []


MATMUL_NBITS = Operator(operands=operands, bias=5, code_inputs=SCALES["MatMulNBits"])
MATMUL_BNB4 = Operator(operands=operands, code_inputs=SCALES["MatMulBnb4"])
GATHER_BLOCKS = Operator(operands=operands, code_inputs=SCALES["GatherBlockQuantized"])
DYNAMIC_MATMUL = Operator(
    operands=operands, bias=4, code_inputs=SCALES["DynamicQuantizeMatMul"], weight_scale=2, weight_zero=3
)
MATMUL_INTEGER = Operator(
    operands=operands, code_inputs=SCALES["MatMulInteger"], takes_codes=True, weight_zero=3
)
INTEGER_TO_FLOAT = Operator(
    operands=operands,
    bias=6,
    code_inputs=SCALES["MatMulIntegerToFloat"],
    takes_codes=True,
    weight_scale=3,
    weight_zero=5,
)
CONV_INTEGER = Operator(operands=operands, code_inputs=SCALES["ConvInteger"])
QLINEAR_MATMUL = Operator(operands=operands, code_inputs=SCALES["QLinearMatMul"])
QLINEAR_CONV = Operator(operands=operands, code_inputs=SCALES["QLinearConv"])
QGEMM = Operator(operands=operands, code_inputs=SCALES["QGemm"])
QATTENTION = Operator(operands=operands, code_inputs=SCALES["QAttention"])
QMOE = Operator(operands=_none, code_inputs=SCALES["QMoE"])
