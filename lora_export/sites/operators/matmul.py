"""Describe MatMul and com.microsoft.FusedMatMul: ``y = x @ W``, so the operand is ``(in_dim, out_dim)``.

FusedMatMul (ONNX Runtime ``ContribOperators.md``) adds transA/transB, and a factor alpha on the product,
which a merge into W leaves as it is.
"""

from __future__ import annotations

import onnx_ir as ir

from lora_export.sites.operand import LEFT, Operand, Operator


def operands(node: ir.Node) -> list[Operand]:
    """Return both operands, because an exporter may also write ``W @ x`` with the weight on the left."""
    trans_b = node.attributes.get_int("transB", 0)
    trans_a = node.attributes.get_int("transA", 0)
    refusal = ""
    if node.attributes.get_int("transBatchA", 0) or node.attributes.get_int("transBatchB", 0):
        refusal = "FusedMatMul with transBatchA/transBatchB is not understood"
    return [
        Operand(index=1, kind="linear", transposed=not trans_b, refusal=refusal, no_branch=refusal),
        Operand(index=0, kind="linear", transposed=bool(trans_a), refusal=refusal, no_branch=refusal or LEFT),
    ]


MATMUL = Operator(operands=operands, weight=1, is_product=True)
