"""Tell that a graph never uses a module: no output depends on what reads its weight (`graph.reach`).

The name of a node that nothing reads proves nothing: another product, of other values, may give the output.
Where a weight is packed with others, the module's own columns of the product are what counts
(`graph.columns`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lora_export.graph.columns import MAX_FOLLOWED, Columns, depend_on_columns, largest_rank
from lora_export.graph.onnx_file import GraphFile, shape_of
from lora_export.graph.reach import Reach
from lora_export.plan import Refusal
from lora_export.sites.fit import stored_shape
from lora_export.sites.operand import LEFT, Use
from lora_export.sites.target import ConstantPart, Miss, Site, Target
from lora_export.storage.patch import Placement
from lora_export.untrusted.computed import Budget

# Products of which each row of the weight gives a column, and what adds a bias to them.
_CONVOLUTIONS = frozenset({"Conv", "FusedConv", "ConvInteger", "QLinearConv"})
_COLUMNS = _CONVOLUTIONS | {
    *("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "GemmFastGelu", "Add", "MatMulNBits", "MatMulBnb4"),
    *("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm"),
}


def reach_of(graph: GraphFile, uses: Sequence[Use]) -> Reach:
    """Return the dependencies of the graph's outputs, where an adapter may change weights that are zero."""
    return Reach(graph.graph, {id(use.root) for use in uses})


def is_read(reach: Reach, use: Use) -> bool:
    """Return whether an output depends on a use of a weight."""
    return reach.reads(use.node, use.operand.index)


def is_read_with_bias(reach: Reach, use: Use) -> bool:
    """Return whether an output depends on a use of a weight, or on the bias that may be added to its product.

    The first step of an unrolled recurrent network multiplies zeros: the weight has no effect there, its
    module's bias has.
    """
    return is_read(reach, use) or _reads_zeros(reach, use)


def _reads_zeros(reach: Reach, use: Use) -> bool:
    return use.operand.kind in ("linear", "conv") and reach.sums_zeros(use.node)


def unused_sites(graph: GraphFile, reach: Reach, sites: Sequence[Site]) -> Mapping[int, Miss]:
    """Return identity of a target → why it is lost, where a weight that the sites don't change is zero.

    A module that is called on zeros has a site if others of the adapter change an output: a decoder may start
    from zeros (DETR), and what its weight gives there is zero with any adapter.

    Args:
        graph: The graph.
        reach: Of `reach_of`.
        sites: Sites of the weights of an adapter.
    """
    changed = {id(part.root) for site in sites for part in site.parts}
    as_it_is = reach if reach.zero_changeable <= changed else Reach(graph.graph, changed)
    budget = Budget(MAX_FOLLOWED)
    left = [site for site in sites if not any(_is_used(as_it_is, site.target, p, budget) for p in site.parts)]
    if len(left) < len(sites):
        left = [site for site in left if not any(_reads_zeros(as_it_is, use) for use in _uses(site))]
    found = {}
    for site in left:
        use = _uses(site)[0]
        found[id(site.target)] = unused(site.target, use, _reads_zeros(as_it_is, use))
    return found


def _uses(site: Site) -> list[Use]:
    return [use for part in site.parts for use in part.uses]


def _is_used(reach: Reach, target: Target, part: ConstantPart, budget: Budget) -> bool:
    """Return whether an output depends on what a target changes of one constant."""
    for use in part.uses:
        if is_read(reach, use):
            own = [_columns(target, use, placement) for placement in part.placements]
            if any(columns is None or depend_on_columns(reach, columns, budget) for columns in own):
                return True
    return False


def _columns(target: Target, use: Use, placement: Placement) -> Columns | None:
    """Return the columns of a product that a placement gives; None: all, or not known."""
    if use.node.op_type not in _COLUMNS or use.no_branch == LEFT or target.experts > 1:
        return None
    assert use.root.const_value is not None
    size = stored_shape(target, use)[1 if placement.transposed else 0]
    start = placement.col if placement.transposed else placement.row
    stop = start + placement.rows[1] - placement.rows[0]
    if stop - start >= size:
        return None
    axis = 1 - len(shape_of(use.root.const_value)) if use.node.op_type in _CONVOLUTIONS else -1
    rank = largest_rank(use.node)
    return Columns(use.node.outputs[0], axis, size=size, start=start, stop=stop, rank=rank)


def unused(target: Target, use: Use, on_zeros: bool = False) -> Miss:
    """Return the miss of a target whose weight is read where no output depends on it.

    Args:
        target: The target.
        use: A use of its weight.
        on_zeros: True if what the weight is multiplied with is zero whatever the graph's inputs are.
    """
    node = f"{use.node.op_type} {use.node.name!r}" if use.node.name else use.node.op_type
    why = "multiplies it with zeros" if on_zeros else f"reads {use.root.name!r}"
    reason = f"the graph never uses it: no output depends on {node}, which {why}"
    return Miss(target, Refusal("unused", reason))
