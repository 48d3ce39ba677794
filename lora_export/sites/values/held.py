"""Read the values that a constant of a graph stands for: its own, or those of a quantiser's codes.

ONNX Runtime's static quantisation stores biases as int32 codes (of Gemm and Conv) or as 8-bit ones (after a
MatMul), each with a DequantizeLinear: the codes are not the bias's values.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.graph.onnx_file import FLOAT_TYPES
from lora_export.plan import Refusal
from lora_export.sites.operand import QUANTIZE, Use
from lora_export.sites.values.code_values import CodesMatch
from lora_export.sites.values.grid import (
    dequantiser,
    held_by_codes,
    is_dequantiser,
    values_and_steps,
    without_identity,
)

# Relative error of a code times its scale in float32.
_ROUNDED = 1e-6


@dataclass(frozen=True, eq=False)
class Held:
    """Parameter as the graph computes with it.

    Attributes:
        values: Floats, in the constant's shape.
        name: Name of the graph's value with these floats: the constant, or the output that dequantises it.
    """

    values: Array
    name: str


def held_of(use: Use) -> Held | Refusal:
    """Return the values that a use's constant stands for, or the reason why its codes can't be read."""
    tensor, name = use.root.const_value, name_of_floats(use)
    assert tensor is not None
    if name is not None and not use.quantised:
        return Held(np.asarray(tensor.numpy()), name)
    node = dequantiser(use)
    values = None if node is None else floats_of(node)
    if name is None or values is None:
        way = ", ".join(other.op_type for other in (*use.chain, use.node))
        reason = (
            f"the graph stores codes of it ({tensor.dtype.name}, read by {way}) whose values can't be told"
        )
        return Refusal("quantised", reason)
    return Held(values, name)


def name_of_floats(use: Use) -> str | None:
    """Return the name of the graph's value that is a use's constant as floats; None if there is none."""
    if not use.quantised:
        return str(use.root.name)
    node = dequantiser(use)
    if node is None or any(other.op_type in QUANTIZE for other in use.chain):
        return None
    return str(node.outputs[0].name)


def compare_vector(use: Use, start: int, wanted: Array) -> CodesMatch | None:
    """Compare the values of a vector's codes with a checkpoint's.

    Args:
        use: A use of the constant.
        start: Position in it at which the checkpoint's vector begins.
        wanted: The checkpoint's values.

    Returns:
        None if the codes can't be read.
    """
    held = held_by_codes(use)
    if held is None:
        return None
    values, step = (array[start : start + len(wanted)] for array in held)
    if values.shape != wanted.shape:
        return None
    other = wanted.astype(np.float64)
    # A code that is the largest of its type may stand for a value beyond it.
    cut = (np.abs(values) >= np.abs(values).max(initial=0)) & (np.abs(other) > np.abs(values))
    within = (np.abs(values - other) <= np.abs(step) + _ROUNDED * np.abs(other)) | cut
    length = float(np.linalg.norm(values) * np.linalg.norm(other))
    # A vector of zeros has no direction.
    cosine = float(values @ other) / length if length else float(not values.any() and not other.any())
    return CodesMatch(bool(within.all()), cosine)


def floats_of(node: ir.Node) -> Array | None:
    """Return the output of a DequantizeLinear in its own dtype; None if it is not constant."""
    scale = node.inputs[1]
    if not is_dequantiser(node) or scale is None or scale.const_value is None:
        return None
    found = values_and_steps(node)
    return None if found is None else found[0].astype(scale.const_value.dtype.numpy())


def floats_by_name(nodes: Iterable[ir.Node]) -> dict[str, ir.Node]:
    """Return name of a value → the DequantizeLinear that turns constant codes into floats.

    Args:
        nodes: Nodes of a graph.

    Returns:
        Nodes by the name of their output, and by that of their codes if no other node reads those.
    """
    found: dict[str, ir.Node] = {}
    for node in nodes:
        codes = without_identity(node.inputs[0]) if node.op_type == "DequantizeLinear" else None
        tensor = codes.const_value if codes is not None else None
        if codes is None or tensor is None or tensor.dtype in FLOAT_TYPES:
            continue
        found[str(node.outputs[0].name)] = node
        if len(codes.uses()) == 1:
            found[str(codes.name)] = node
    return found
