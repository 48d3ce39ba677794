"""Where a module lives in a graph: one file per operator that reads a weight.

Each file has ``slots(node) -> list[Slot]``. Operators without a file can still hold vectors (biases, norms)
and parameters that are found by their own name.
"""

from __future__ import annotations

# (domain, operator) → "module:function", imported when a graph has such a node.
OPERATORS: dict[tuple[str, str], str] = {
    ("", "MatMul"): "lora_export.sites.operators.matmul:slots",
    ("com.microsoft", "FusedMatMul"): "lora_export.sites.operators.matmul:slots",
    ("", "Gemm"): "lora_export.sites.operators.gemm:slots",
    ("com.microsoft", "GemmFastGelu"): "lora_export.sites.operators.gemm:fused_slots",
    ("com.microsoft", "FusedGemm"): "lora_export.sites.operators.gemm:slots",
    ("", "Conv"): "lora_export.sites.operators.conv:slots",
    ("com.microsoft", "FusedConv"): "lora_export.sites.operators.conv:slots",
    ("com.microsoft", "NhwcConv"): "lora_export.sites.operators.conv:refused_slots",
    ("com.microsoft.nchwc", "Conv"): "lora_export.sites.operators.conv:refused_slots",
    ("", "ConvTranspose"): "lora_export.sites.operators.conv:refused_slots",
    ("", "Gather"): "lora_export.sites.operators.gather:slots",
    ("com.microsoft", "Attention"): "lora_export.sites.operators.attention:slots",
    ("com.microsoft", "MatMulNBits"): "lora_export.sites.operators.quantized:slots",
    ("com.microsoft", "GatherBlockQuantized"): "lora_export.sites.operators.quantized:slots",
    ("com.microsoft", "MatMulBnb4"): "lora_export.sites.operators.quantized:slots",
    ("com.microsoft", "DynamicQuantizeMatMul"): "lora_export.sites.operators.quantized:slots",
    ("com.microsoft", "MatMulIntegerToFloat"): "lora_export.sites.operators.quantized:slots",
    ("com.microsoft", "QGemm"): "lora_export.sites.operators.quantized:slots",
    ("com.microsoft", "QAttention"): "lora_export.sites.operators.quantized:slots",
    ("", "MatMulInteger"): "lora_export.sites.operators.quantized:slots",
    ("", "QLinearMatMul"): "lora_export.sites.operators.quantized:slots",
    ("", "QLinearConv"): "lora_export.sites.operators.quantized:slots",
    ("", "ConvInteger"): "lora_export.sites.operators.quantized:slots",
}
