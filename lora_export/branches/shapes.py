"""Shapes that a graph does not tell, inferred without writing them into it."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass


def shapes_of(model: ir.Model) -> dict[int, ir.Shape]:
    """Return the id of each value → its shape, where the graph has it or onnx can infer it.

    The model stays as it is: more shapes would change which of the base's nodes ONNX Runtime fuses, and so
    the base's bits.
    """
    values = list(_all_values(model))
    if any(value.shape is None for value in values):
        before = [(value, value.shape, value.type) for value in values]
        ShapeInferencePass(check_type=False, strict_mode=False)(model)
        found = {id(value): value.shape for value in values}
        for value, shape, kind in before:
            value.shape, value.type = shape, kind
    else:
        found = {id(value): value.shape for value in values}
    return {key: shape for key, shape in found.items() if shape is not None}


def _all_values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from graph.inputs
        yield from graph.initializers.values()
    for node in model.graph.all_nodes():
        yield from node.outputs
