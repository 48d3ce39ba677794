"""Infer shapes that are not in a graph, without writing them into it."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

# onnx computes vectors for shapes (``data_prop``) of any length: a Concat that doubles one forty times fills
# the memory, and so do 20,000 that each lengthen the one before. So all of them together have a limit.
_LONGEST = 1 << 20
_COMPUTED = (ir.DataType.INT64, ir.DataType.INT32)


def shapes_of(model: ir.Model) -> dict[int, ir.Shape]:
    """Return id of each value → its shape, if the graph has it or onnx can infer it.

    The model is not changed: more shapes would change which of the base's nodes ONNX Runtime fuses, and so
    the bits of the base's results.
    """
    values = list(_all_values(model))
    found = {id(value): value.shape for value in values}
    if any(shape is None for shape in found.values()):
        found, count = _inferred(model, values, False)
        if count <= _LONGEST and not any(map(_is_long, found.values())):
            found, _ = _inferred(model, values, True)
    return {key: shape for key, shape in found.items() if shape is not None}


def _is_long(shape: ir.Shape | None) -> bool:
    """Return whether a value is a vector with more elements than onnx should compute."""
    return _length(shape) > _LONGEST


def _length(shape: ir.Shape | None) -> int:
    """Return the number of elements of a vector; 0 if it is unknown, or of another shape."""
    size = shape[0] if shape is not None and len(shape) == 1 else 0
    return size if isinstance(size, int) else 0


def _inferred(
    model: ir.Model, values: list[ir.Value], data_prop: bool
) -> tuple[dict[int, ir.Shape | None], int]:
    """Return the shapes, and the number of elements of all vectors that nodes make of whole numbers."""
    before = [(value, value.shape, value.type) for value in values]
    with _unlogged():
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=data_prop)(model)
    found = {id(value): value.shape for value in values}
    made = [value for value in values if value.dtype in _COMPUTED and value.producer() is not None]
    count = sum(map(_length, (value.shape for value in made)))
    for value, shape, kind in before:
        value.shape, value.type = shape, kind
    return found, count


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
