"""Tell that a graph never uses a module: no output depends on what reads its weight (`graph.reach`).

The name of a node that nothing reads proves nothing: another product, of other values, may give the output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lora_export.graph.onnx_file import GraphFile
from lora_export.graph.reach import Reach
from lora_export.plan import Refusal
from lora_export.sites.slot import Use
from lora_export.sites.target import Miss, Site, Target


def reach_of(graph: GraphFile, uses: Sequence[Use]) -> Reach:
    """Return what the graph's outputs depend on, where an adapter may change weights that are zero."""
    return Reach(graph.graph, {id(use.root) for use in uses})


def is_read(reach: Reach, use: Use) -> bool:
    """Whether an output depends on a use of a weight."""
    return reach.reads(use.node, use.slot.index)


def unused_sites(graph: GraphFile, reach: Reach, sites: Sequence[Site]) -> Mapping[int, Miss]:
    """Return identity of a target → why it is lost, where a weight that the sites don't change is zero.

    Args:
        graph: The graph.
        reach: Of `reach_of`.
        sites: Where the weights of an adapter were found.
    """
    changed = {id(part.root) for site in sites for part in site.parts}
    if reach.zero_changeable <= changed:
        return {}
    as_it_is = Reach(graph.graph, changed)
    lost = {}
    for site in sites:
        uses = [use for part in site.parts for use in part.uses]
        if not any(is_read(as_it_is, use) for use in uses):
            lost[id(site.target)] = unused(site.target, uses[0])
    return lost


def unused(target: Target, use: Use) -> Miss:
    """Return the miss of a target whose weight is read where no output depends on it."""
    node = f"{use.node.op_type} {use.node.name!r}" if use.node.name else use.node.op_type
    reason = f"the graph never uses it: no output depends on {node}, which reads {use.root.name!r}"
    return Miss(target, Refusal("unused", reason))
