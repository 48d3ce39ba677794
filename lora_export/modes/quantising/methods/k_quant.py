"""Search the scale and zero point of each block, weighted by size, as llama.cpp's k-quants do.

ONNX Runtime's ``quant_tensor_k_quant_cpu``: some twenty times slower than rounding.
"""

from __future__ import annotations

import numpy as np

from lora_export.adapter import Array
from lora_export.modes.quantising.codes import BlockCodes, Method, pack, padded_rows
from lora_export.modes.quantising.quantisers import nbits_module


def _quantise(matrix: Array, bits: int, block: int, symmetric: bool) -> BlockCodes:
    nbits_module()
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    rows = padded_rows(matrix, block)
    count, blocks = len(rows), rows.shape[1] // block
    with np.errstate(all="ignore"):  # a block of equal values divides by 0, and is not replaced
        codes, scales, zeros = quant_tensor_k_quant_cpu(rows, bits, block)
    packed = pack(codes.astype(np.uint8).reshape(count, -1), bits).reshape(count, blocks, -1)
    points = pack(zeros.astype(np.uint8).reshape(count, blocks), bits)
    return BlockCodes(packed, scales.reshape(count, blocks).astype(matrix.dtype), points)


K_QUANT = Method(quantise=_quantise, symmetric=(False,))
