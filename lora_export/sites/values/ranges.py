"""Find ranges that were fixed when a graph was quantised: a QuantizeLinear cuts off values beyond its range.

Static quantisation and quantisation-aware training write the scale as a constant, measured without adapters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from lora_export.sites.operand import QUANTIZE

# Quantisers drop a Relu or Clip whose work the range does; its name stays on the quantised value.
_ACTIVATION = re.compile(r"relu|clip|hardtanh", re.IGNORECASE)
# Operators whose result begins at 0 without a dropped activation.
_WITHOUT_SIGN = {"Relu", "Clip", "Sigmoid", "HardSigmoid", "Softmax", "Softplus", "Abs", "Exp", "Sqrt"}
_UNSIGNED_BYTE = ir.DataType.UINT8
_SHOWN = 3


def is_fixed(node: ir.Node) -> bool:
    """Return True if a node quantises with a scale and a zero point that don't depend on its input."""
    return node.op_type in QUANTIZE and all(
        value is None or value.const_value is not None for value in node.inputs[1:]
    )


def code_type(node: ir.Node) -> ir.DataType:
    """Return the type of a QuantizeLinear's result (ONNX ``Operators.md``)."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is not None and zero.dtype is not None:
        return zero.dtype
    if node.op_type.startswith("TRT_FP8"):
        return ir.DataType.FLOAT8E4M3FN
    return ir.DataType(node.attributes.get_int("output_dtype", 0) or int(_UNSIGNED_BYTE))


def code_range(dtype: ir.DataType) -> tuple[float, float]:
    """Return the least and the greatest value of a quantised type."""
    numpy = dtype.numpy()
    if np.issubdtype(numpy, np.integer):
        integers = np.iinfo(numpy)
        return float(integers.min), float(integers.max)
    try:
        small = ml_dtypes.iinfo(numpy)
    except ValueError:
        floats = ml_dtypes.finfo(numpy)
        return float(floats.min), float(floats.max)
    return float(small.min), float(small.max)


def may_hold_activation(node: ir.Node) -> bool:
    """Return True if a quantiser's range may replace a dropped Relu or Clip: it begins or ends at 0.

    A value that is added after such a range would not pass the activation.
    """
    source = node.inputs[0]
    name = str(source.name).rpartition("/")[2] if source is not None else ""
    maker = source.producer() if source is not None else None
    if maker is not None and maker.op_type in _WITHOUT_SIGN:
        return False
    if _ACTIVATION.search(name):
        return True
    dtype = code_type(node)
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    point = 0.0 if zero is None or zero.const_value is None else np.asarray(zero.const_value.numpy())
    return bool(np.any(np.isin(np.asarray(point, np.float64), code_range(dtype))))


def cut_off(values: Sequence[ir.Value]) -> list[str]:
    """Return a warning if quantisers with fixed ranges may cut off an adapter's effect; else an empty list.

    Args:
        values: The first values that differ with an adapter.
    """
    found = [node for node in _reached(values) if is_fixed(node)]
    if not found:
        return []
    first = [node for value in values for node, _ in value.uses() if is_fixed(node)] or found
    shown = "; ".join(f"{_called(node)}{_range_text(node)}" for node in first[:_SHOWN])
    more = ", …" if len(first) > _SHOWN else ""
    return [
        f"the graph is statically quantised: {len(found)} QuantizeLinear nodes behind the changed modules "
        "have ranges that were calibrated without the adapter, and cut off what it moves beyond them "
        f"({shown}{more}). Measure it: lora-export parity. If too much is lost, calibrate with the adapter: "
        "quantise the merged graph, or the float swap graph with the adapter fed"
    ]


def _called(node: ir.Node) -> str:
    source = node.inputs[0]
    return repr(node.name or (source.name if source is not None else ""))


def _range_text(node: ir.Node) -> str:
    """Return the range of a scale for all values; "" for several scales."""
    scale = node.inputs[1].const_value if node.inputs[1] is not None else None
    if scale is None or scale.size != 1:
        return ""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    point = (
        0.0
        if zero is None or zero.const_value is None
        else float(np.asarray(zero.const_value.numpy()).item())
    )
    step = float(np.asarray(scale.numpy()).item())
    low, high = (step * (code - point) for code in code_range(code_type(node)))
    return f" [{low:.3g}, {high:.3g}]"


def _reached(values: Iterable[ir.Value]) -> Iterator[ir.Node]:
    front, seen = list(values), set[int]()
    while front:
        for usage in front.pop().uses():
            if id(usage.node) not in seen:
                seen.add(id(usage.node))
                yield usage.node
                front.extend(usage.node.outputs)
