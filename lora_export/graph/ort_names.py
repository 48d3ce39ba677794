"""Rename constants whose names ONNX Runtime's optimiser would use again.

The optimiser names the shapes and splits that it makes as if they were nodes
(``Graph::GenerateUniqueNodeName``), or, when it joins several Reshapes, after the first of them
(``<node>_new_shape``, ``reshape_fusion.cc``), and doesn't check whether a constant has that name. In a graph
that it has saved, constants have these names: if it finds another place to fuse, the graph can't be loaded
any more ("Attempt to replace the existing tensor"). Seen with onnxruntime 1.32. Everything else that it adds
gets a free name.
"""

from __future__ import annotations

import re

import onnx_ir as ir

from lora_export.graph.onnx_file import GraphFile

# MatMulAddFusion's shapes, GatherToSplitFusion's and GatherToSliceFusion's operands, ReshapeFusion's shapes;
# from the second of a kind on, the name is numbered.
_GIVEN_AGAIN = re.compile(
    r"(gemm_(input|output)_shape|splits|starts|ends|axes|steps)(_token_\d+)?|.*(_new_shape|_token_\d+)"
)


def free_names(graph: GraphFile) -> None:
    """Rename a graph's integer constants whose names ONNX Runtime may use; inputs and outputs stay."""
    found = []
    for owner in graph.graphs():
        inputs = {id(value) for value in owner.inputs}
        found += [
            value
            for value in owner.initializers.values()
            if value.dtype == ir.DataType.INT64 and _GIVEN_AGAIN.fullmatch(str(value.name))
            if id(value) not in inputs and not value.is_graph_output()
        ]
    if not found:
        return
    taken = {str(value.name) for value in graph.initializers()}
    taken |= {str(output.name) for node in graph.graph.all_nodes() for output in node.outputs}
    numbers = dict[str, int]()
    for value in found:
        # Graphs within graphs may all have the same name: the search goes on where it ended.
        number = numbers.get(str(value.name), 1)
        while (name := f"{value.name}.{number}") in taken:
            number += 1
        taken.add(name)
        numbers[str(value.name)] = number
        value.name = name
