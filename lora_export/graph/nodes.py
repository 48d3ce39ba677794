"""Add nodes to a graph, named after the module that they serve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Array

Attributes = Mapping[str, Any]


class NodeWriter:
    """Add nodes and constants to the graph that an anchor node is in.

    Args:
        names: Names that the model has already; new ones are added to the set.
    """

    def __init__(self, names: set[str]) -> None:
        self._names = names

    def add(
        self,
        anchor: ir.Node,
        operator: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        dtype: ir.DataType,
        attributes: Attributes | None = None,
        after: bool = False,
        shape: ir.Shape | None = None,
    ) -> ir.Value:
        """Add one node before (or ``after``) the anchor; return its first output.

        Args:
            anchor: A node of the graph.
            operator: Operator of the default domain.
            inputs: Inputs of the node.
            name: Name of the output and, with the operator, of the node; numbered if it is taken.
            dtype: Type of the output.
            attributes: Attributes of the node.
            after: Add it after the anchor instead of before it.
            shape: Shape of the output, if it is known.
        """
        name = self.free(name)
        output = ir.Value(
            name=name, shape=shape.copy() if shape is not None else None, type=ir.TensorType(dtype)
        )
        node = ir.node(
            operator, list(inputs), attributes=attributes or {}, outputs=[output], name=f"{name}.{operator}"
        )
        if after:
            anchor.append(node)
        else:
            anchor.prepend(node)
        return output

    def split(
        self, anchor: ir.Node, value: ir.Value, sizes: Sequence[int], names: Sequence[str], dtype: ir.DataType
    ) -> list[ir.Value]:
        """Split a value along its last axis."""
        outputs = [ir.Value(name=self.free(name), shape=None, type=ir.TensorType(dtype)) for name in names]
        lengths = self.constant(anchor, np.array(sizes, np.int64), f"{outputs[0].name}.sizes")
        anchor.prepend(
            ir.node("Split", [value, lengths], {"axis": -1}, outputs=outputs, name=f"{outputs[0].name}.Split")
        )
        return outputs

    def constant(self, anchor: ir.Node, values: Array, name: str) -> ir.Value:
        """Register a small initializer in the anchor's graph."""
        graph = anchor.graph
        assert isinstance(graph, ir.Graph)
        tensor = ir.tensor(values, name=self.free(name))
        value = ir.Value(
            name=tensor.name,
            shape=ir.Shape(values.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        graph.register_initializer(value)
        return value

    def free(self, name: str) -> str:
        """Return ``name``, numbered if the model has it already, and mark it as taken."""
        number, free = 1, name
        while free in self._names:
            number += 1
            free = f"{name}.{number}"
        self._names.add(free)
        return free


def model_names(model: ir.Model) -> set[str]:
    """Return every name of a value or node."""
    names: set[str] = set()
    for graph in (model.graph, *model.graph.subgraphs()):
        names.update(str(value.name) for value in (*graph.inputs, *graph.initializers.values()))
    for node in model.graph.all_nodes():
        names.update(str(output.name) for output in node.outputs)
        names.add(node.name or "")
    return names
