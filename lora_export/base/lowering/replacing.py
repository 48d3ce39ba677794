"""Put nodes into a graph in the place of others: names, types and the modules that they are of stay."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

CONTRIB = "com.microsoft"


def add_node(made: ir.Node, before: ir.Node, like: Sequence[ir.Value | None]) -> ir.Node:
    """Insert a node that computes what others did.

    Args:
        made: The node, not yet in a graph.
        before: The node that it is inserted before.
        like: For each output the value whose place it takes, under its name; None for one that nobody reads.
    """
    assert before.graph is not None
    before.graph.insert_before(before, made)
    for value, old in zip(made.outputs, like, strict=True):
        if old is None:
            value.name = ""
            continue
        value.shape, value.type, value.name = old.shape, old.type, old.name
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        old.name = f"{old.name}.replaced"
    return made


def add_value(made: ir.Node, before: ir.Node, name: str, *, shape: ir.Shape, dtype: ir.DataType) -> ir.Value:
    """Insert a node with one output that is new; return the output."""
    assert before.graph is not None
    before.graph.insert_before(before, made)
    value = made.outputs[0]
    value.name, value.shape, value.type = name, shape, ir.TensorType(dtype)
    return value


def constant_of(graph: ir.Graph, numbers: Sequence[int], name: str) -> ir.Value:
    """Return a constant of int64 numbers, made if the graph has none of that name."""
    if name not in graph.initializers:
        graph.register_initializer(
            ir.val(name, const_value=ir.tensor(np.array(numbers, np.int64), name=name))
        )
    return graph.initializers[name]
