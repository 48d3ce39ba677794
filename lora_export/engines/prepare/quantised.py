"""Refuse QuantizeLinear and DequantizeLinear that are not symmetric and signed, as TensorRT needs them.

The parser reads uint8 as int8, with only a warning in its log. QuantizeLinear with the zero point 0, or
without one (which means uint8 in ONNX), then cuts at 127 and keeps negative numbers: it builds, but is wrong.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from lora_export.engines.backend import Compiler
from lora_export.engines.prepare.problem import BuildProblem, of_nodes
from lora_export.graph.onnx_file import GraphFile

_T = ir.DataType
_OPERATORS = ("QuantizeLinear", "DequantizeLinear")
# Types that an engine may have elsewhere, but not as codes of DequantizeLinear.
_NOT_CODES = frozenset({_T.UINT8, _T.INT32})
_SYMMETRIC = "quantise symmetrically with int8: zero point 0, activations too"
_BIAS = "keep biases in float (onnxruntime's quantize_static: extra_options={'QuantizeBias': False})"


def quantisation_problems(graph: GraphFile, compiler: Compiler) -> Iterator[BuildProblem]:
    """Yield the nodes that quantise or dequantise in a way that TensorRT can't do, or would misread."""
    found: dict[tuple[str, str], list[ir.Node]] = defaultdict(list)
    for node in graph.model.graph.all_nodes():
        if node.op_type in _OPERATORS and (problem := _problem(node, compiler.title)):
            found[problem].append(node)
    for (reason, hint), nodes in found.items():
        yield from of_nodes(nodes, reason, hint)


def _problem(node: ir.Node, title: str) -> tuple[str, str] | None:
    """Return the reason and the hint for a node that can't be built, or None."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    dtype = _codes(node, zero)
    if dtype is _T.INT32:
        return f"{title} can't dequantise int32", _BIAS
    if dtype is _T.UINT8:
        return f"quantised as uint8, which {title} would read as int8", _SYMMETRIC
    if zero is None:
        return None
    if zero.const_value is None:
        return f"its zero point is computed, but {title} needs a constant", _SYMMETRIC
    values = np.asarray(zero.const_value.numpy())
    if np.any(values.astype(np.float32) != 0):
        return (
            f"asymmetric (its zero point is not 0), but {title} quantises symmetrically",
            _SYMMETRIC,
        )
    return None


def _codes(node: ir.Node, zero: ir.Value | None) -> ir.DataType | None:
    """Return the type of the quantised numbers if it is one that `_problem` refuses, else None."""
    if zero is not None:
        dtype = zero.const_value.dtype if zero.const_value is not None else zero.dtype
    elif node.op_type == "QuantizeLinear":
        dtype = ir.DataType(node.attributes.get_int("output_dtype", _T.UINT8.value))
        dtype = _T.UINT8 if dtype is _T.UNDEFINED else dtype
    else:
        codes = node.inputs[0]
        assert codes is not None
        dtype = codes.const_value.dtype if codes.const_value is not None else codes.dtype
    return dtype if dtype in _NOT_CODES else None
