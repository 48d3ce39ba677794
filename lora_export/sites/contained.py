"""Tell that a graph contains an adapter: the names of an adapter's layers stand beside the weights.

PEFT puts ``lora_A``, ``lora_B`` and ``base_layer`` in a layer's place, so an export of a model whose adapter is
not merged has them in its names. Adding an adapter to such a graph would count it twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx_ir as ir

from lora_export.graph import GraphFile
from lora_export.sites.evidence import folded_names, scope_path

# PEFT's layers, and those of diffusers and kohya; a graph's names have dots or slashes between them.
_LAYER = re.compile(r"(?:^|[./])lora_(?:[ABE]|embedding_[AB]|magnitude_vector|layer|down|up)(?=[./]|$)")
# The wrapped layer: all that is left in a TorchScript export, or where the adapter was merged inside of it. Of
# other models it has a parent's name only where it is a block with layers of its own (DLA's).
_WRAPPED = re.compile(r"[./]base_layer(?:[./][^./]+)?$")
_SHOWN = 4


def adapter_names(graph: GraphFile) -> list[str]:
    """Return some of the names in a graph that only an adapter's layers have, or nothing."""
    found = dict.fromkeys(name for name in _names(graph) if _LAYER.search(name) or _WRAPPED.search(name))
    return list(found)[:_SHOWN]


def _names(graph: GraphFile) -> Iterator[str]:
    for owner in graph.graphs():
        yield from (str(value.name) for value in owner.inputs)
    for value in graph.initializers():
        yield str(value.name)
        yield from folded_names(value)
    for node in graph.graph.all_nodes():
        yield from _node_names(node)


def _node_names(node: ir.Node) -> Iterator[str]:
    yield node.name or ""
    yield scope_path(node) or ""
    yield from (str(output.name) for output in node.outputs)
