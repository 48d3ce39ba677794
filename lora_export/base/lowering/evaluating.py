"""Compute values of a graph that depend on the sizes and positions of its inputs alone: masks, angles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from lora_export.base.capture.export import first_line

if TYPE_CHECKING:
    import onnxruntime as ort


_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class CannotCompute(Exception):
    """A value depends on weights, or ONNX Runtime can't compute it on the CPU."""


def opened_for(model: ir.Model, values: Sequence[ir.Value]) -> ort.InferenceSession:
    """Return a session that computes values of a graph, floats as float32; it reads the inputs it needs.

    Args:
        model: The graph.
        values: Values in it.

    Raises:
        CannotCompute: A value can't be computed alone.
    """
    import onnxruntime

    graph = ir.convenience.extract(model.graph, list(model.graph.inputs), list(values))
    if any(value.const_value is None for value in graph.initializers.values()):
        raise CannotCompute("weights are needed")
    for value in list(graph.inputs):
        if value.uses():
            # Of a cache only the number of tokens counts: its heads may be small, and bfloat16 can't be fed.
            value.shape = ir.Shape([None] * len(value.shape or ()))
            if value.dtype in _HALVES:
                value.type = ir.TensorType(ir.DataType.FLOAT)
        else:
            graph.inputs.remove(value)
    for place, value in enumerate(graph.outputs):
        if value.dtype in _HALVES:
            cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
            cast.outputs[0].name, cast.outputs[0].type = (
                f"{value.name}.exact",
                ir.TensorType(ir.DataType.FLOAT),
            )
            graph.append(cast)
            graph.outputs[place] = cast.outputs[0]
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    content = ir.to_proto(ir.Model(graph, ir_version=model.ir_version)).SerializeToString()
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises classes of its own
        raise CannotCompute(first_line(error)) from error
