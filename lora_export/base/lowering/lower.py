"""Apply the rules of a runtime to a captured graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from lora_export.base.lowering import Runtime
from lora_export.base.lowering.cached_attention import group_queries
from lora_export.base.lowering.packed_projections import pack_projections
from lora_export.base.lowering.replacing import CONTRIB
from lora_export.base.lowering.skip_norms import add_in_norms
from lora_export.graph.captured import Captured
from lora_export.progress import tell_stage


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A lowered graph.

    Attributes:
        captured: Its record.
        packed: Constant that was made → those of the graph that it is made from, one below the other.
    """

    captured: Captured
    packed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def lower_graph(model: ir.Model, captured: Captured, runtime: Runtime, *, pack: bool = False) -> Lowered:
    """Write a graph in the operators of a runtime.

    Args:
        model: A graph that was captured with ``fused``; weights may lack values.
        captured: Its record.
        runtime: The runtime.
        pack: Compute queries, keys and values in one product.
    """
    from onnx_ir.passes import common

    if runtime == "portable":
        return Lowered(captured=captured)
    grouped, kept = group_queries(model, captured) if captured.kv_cache else (0, 0)
    norms = add_in_norms(model)
    # Uses by nodes that are left over would hide what is read once.
    common.RemoveUnusedNodesPass()(model)
    packed = pack_projections(model) if pack else {}
    common.RemoveUnusedNodesPass()(model)
    if grouped or norms:
        model.opset_imports[CONTRIB] = 1
        # A norm that stands where its sum stood may be before what its weight is computed with.
        model.graph.sort()
    said = f"lowered to {runtime}: {grouped} GroupQueryAttention, {norms} norms with the sum that they read"
    if kept and captured.kv_cache:
        said += f"; {kept} attentions stay, because their mask or cache is of another kind"
    tell_stage(said)
    return Lowered(captured=replace(captured, padding="right") if grouped else captured, packed=packed)
