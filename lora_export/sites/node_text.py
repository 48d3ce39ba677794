"""Describe a node in messages: its name, its operator, and the module of the model that it computes."""

from __future__ import annotations

import re

import onnx_ir as ir

from lora_export.graph.onnx_file import GraphFile
from lora_export.sites.naming.evidence import node_path, scope_path, weight_path

# Names of nodes that swap-onnx and bank-onnx add: `model.layers.0.self_attn.q_proj.lora.down.MatMul`.
_OURS = re.compile(r"^(.+?)\.lora(?:_\w+)?\.")
_WEIGHT = ".weight"


def module_of(node: ir.Node) -> str | None:
    """Return the path of the module that a node belongs to, or None if the graph doesn't tell."""
    if ours := _OURS.match(node.name or ""):
        return ours.group(1)
    return scope_path(node) or node_path(node) or _module_of_weight(node)


def _module_of_weight(node: ir.Node) -> str | None:
    for value in node.inputs:
        if value is None or value.const_value is None:
            continue
        path = weight_path(value.name or "")
        if path.endswith(_WEIGHT):
            return path.removesuffix(_WEIGHT)
    return None


def node_text(node: ir.Node) -> str:
    """Return ``node 'NAME' (Operator), module PATH``, without unknown parts."""
    known = f"node {node.name!r}" if node.name else f"the node that makes {node.outputs[0].name!r}"
    operator = f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
    module = module_of(node)
    return f"{known} ({operator})" + (f", module {module}" if module else "")


def find_node(graph: GraphFile, name: str) -> ir.Node | None:
    """Return the node of this name, of the main graph or a subgraph."""
    if not name:
        return None
    return next((node for node in graph.model.graph.all_nodes() if node.name == name), None)
