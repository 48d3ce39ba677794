"""Infer shapes that are not in a graph, without writing them into it."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

# onnx computes vectors for shapes (``data_prop``) of any length: a Concat that doubles one forty times fills
# the memory.
_LONGEST = 1 << 20


def shapes_of(model: ir.Model) -> dict[int, ir.Shape]:
    """Return id of each value → its shape, if the graph has it or onnx can infer it.

    The model is not changed: more shapes would change which of the base's nodes ONNX Runtime fuses, and so
    the bits of the base's results.
    """
    values = list(_all_values(model))
    found = {id(value): value.shape for value in values}
    if any(shape is None for shape in found.values()):
        found = _inferred(model, values, False)
        if not any(map(_is_long, found.values())):
            found = _inferred(model, values, True)
    return {key: shape for key, shape in found.items() if shape is not None}


def _is_long(shape: ir.Shape | None) -> bool:
    """Return whether a value is a vector with more elements than onnx should compute."""
    return shape is not None and len(shape) == 1 and isinstance(shape[0], int) and shape[0] > _LONGEST


def _inferred(model: ir.Model, values: list[ir.Value], data_prop: bool) -> dict[int, ir.Shape | None]:
    before = [(value, value.shape, value.type) for value in values]
    with _unlogged():
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=data_prop)(model)
    found = {id(value): value.shape for value in values}
    for value, shape, kind in before:
        value.shape, value.type = shape, kind
    return found


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Keep quiet, in this thread, where onnx can't infer shapes: those that a graph has are left."""
    logger, thread = logging.getLogger(ShapeInferencePass.__module__), threading.get_ident()

    def is_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger.addFilter(is_others)
    try:
        yield
    finally:
        logger.removeFilter(is_others)


def _all_values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from graph.inputs
        yield from graph.initializers.values()
    for node in model.graph.all_nodes():
        yield from node.outputs
