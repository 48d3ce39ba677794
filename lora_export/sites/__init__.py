"""Find the sites of modules in a graph: one file per operator that reads a weight.

Each file has a record of all facts of its operator (`sites.operand.Operator`). Operators without a file can
still hold vectors (biases, norms) and parameters that are found by their own name.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_export.sites.operand import Operator

# (domain, operator) → "module:record", imported when a graph has such a node.
OPERATORS: dict[tuple[str, str], str] = {
    ("", "MatMul"): "lora_export.sites.operators.matmul:MATMUL",
    ("com.microsoft", "FusedMatMul"): "lora_export.sites.operators.matmul:MATMUL",
    ("", "Gemm"): "lora_export.sites.operators.gemm:GEMM",
    ("com.microsoft", "GemmFastGelu"): "lora_export.sites.operators.gemm:GEMM_FAST_GELU",
    ("com.microsoft", "FusedGemm"): "lora_export.sites.operators.gemm:FUSED_GEMM",
    ("", "Conv"): "lora_export.sites.operators.conv:CONV",
    ("com.microsoft", "FusedConv"): "lora_export.sites.operators.conv:FUSED_CONV",
    ("com.microsoft", "NhwcConv"): "lora_export.sites.operators.conv:OTHER_LAYOUT",
    ("com.microsoft.nchwc", "Conv"): "lora_export.sites.operators.conv:OTHER_LAYOUT",
    ("", "ConvTranspose"): "lora_export.sites.operators.conv:OTHER_LAYOUT",
    ("", "Gather"): "lora_export.sites.operators.gather:GATHER",
    ("com.microsoft", "Attention"): "lora_export.sites.operators.attention:ATTENTION",
    ("com.microsoft", "MatMulNBits"): "lora_export.sites.operators.quantized:MATMUL_NBITS",
    ("com.microsoft", "GatherBlockQuantized"): "lora_export.sites.operators.quantized:GATHER_BLOCKS",
    ("com.microsoft", "MatMulBnb4"): "lora_export.sites.operators.quantized:MATMUL_BNB4",
    ("com.microsoft", "DynamicQuantizeMatMul"): "lora_export.sites.operators.quantized:DYNAMIC_MATMUL",
    ("com.microsoft", "MatMulIntegerToFloat"): "lora_export.sites.operators.quantized:INTEGER_TO_FLOAT",
    ("com.microsoft", "QGemm"): "lora_export.sites.operators.quantized:QGEMM",
    ("com.microsoft", "QAttention"): "lora_export.sites.operators.quantized:QATTENTION",
    ("com.microsoft", "QMoE"): "lora_export.sites.operators.quantized:QMOE",
    ("", "MatMulInteger"): "lora_export.sites.operators.quantized:MATMUL_INTEGER",
    ("", "QLinearMatMul"): "lora_export.sites.operators.quantized:QLINEAR_MATMUL",
    ("", "QLinearConv"): "lora_export.sites.operators.quantized:QLINEAR_CONV",
    ("", "ConvInteger"): "lora_export.sites.operators.quantized:CONV_INTEGER",
}


@cache
def operator_of(domain: str, op_type: str) -> Operator | None:
    """Return the facts of an operator; None if it reads no weight that we know."""
    target = OPERATORS.get((domain, op_type))
    if target is None:
        return None
    module, _, name = target.partition(":")
    found: Operator = getattr(import_module(module), name)
    return found


@cache
def operator_named(op_type: str) -> Operator | None:
    """Return the facts of an operator of this name, whatever domain a tool has put it in."""
    domains = [domain for domain, name in OPERATORS if name == op_type]
    return operator_of(domains[0], op_type) if domains else None
