"""Round to the nearest code: the C++ kernel behind ONNX Runtime's ``DefaultWeightOnlyQuantizer``."""

from __future__ import annotations

from lora_export.adapter import Array
from lora_export.modes.quantising.codes import BlockCodes, Method
from lora_export.modes.quantising.quantisers import nbits_module


def _quantise(matrix: Array, bits: int, block: int, symmetric: bool) -> BlockCodes:
    tool = nbits_module()
    config = tool.DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=symmetric, bits=bits)
    packed, scales, zeros = tool.DefaultWeightOnlyQuantizer(config).qbits_block_quant(matrix)
    return BlockCodes(packed, scales, None if symmetric else zeros)


RTN = Method(quantise=_quantise, symmetric=(True, False))
