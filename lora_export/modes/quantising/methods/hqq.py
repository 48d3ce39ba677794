"""Half-quadratic quantisation: ONNX Runtime's ``HQQWeightOnlyQuantizer``, whose zero points are floats.

It optimises all rows that it is given until their mean error no longer falls, so that a large weight, which
is given in parts, may end a step earlier or later than as a whole.
"""

from __future__ import annotations

import numpy as np

from lora_export.adapter import Array
from lora_export.modes.quantising.codes import BlockCodes, Method, pack
from lora_export.modes.quantising.quantisers import nbits_module


def _quantise(matrix: Array, bits: int, block: int, symmetric: bool) -> BlockCodes:
    import torch

    tool = nbits_module()
    config = tool.HQQWeightOnlyQuantConfig(block_size=block, bits=bits)
    rows = torch.from_numpy(np.ascontiguousarray(matrix.T))
    with torch.no_grad():
        codes, scales, zeros = tool.HQQWeightOnlyQuantizer(config).quantize_internal(
            rows, bits=bits, group_size=block
        )
    count, blocks = scales.shape
    packed = pack(codes.numpy().astype(np.uint8).reshape(count, -1), bits).reshape(count, blocks, -1)
    return BlockCodes(packed, scales.numpy(), zeros.numpy())


HQQ = Method(quantise=_quantise, symmetric=(False,), float_zeros=True, packages=("torch",))
