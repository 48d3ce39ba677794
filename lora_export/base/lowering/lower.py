"""Apply the rules of a runtime to a captured graph."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from lora_export.base.lowering import Runtime
from lora_export.base.lowering.cached_attention import group_queries
from lora_export.base.lowering.replacing import CONTRIB
from lora_export.base.lowering.skip_norms import add_in_norms
from lora_export.graph.captured import Captured
from lora_export.progress import tell_stage


def lower_graph(model: ir.Model, captured: Captured, runtime: Runtime) -> Captured:
    """Write a graph in the operators of a runtime.

    Args:
        model: A graph that was captured with ``fused``; weights may lack values.
        captured: Its record.
        runtime: The runtime.

    Returns:
        The record of the graph that was made.
    """
    from onnx_ir.passes import common

    if runtime == "portable":
        return captured
    grouped, kept = group_queries(model, captured) if captured.kv_cache else (0, 0)
    norms = add_in_norms(model)
    if grouped or norms:
        model.opset_imports[CONTRIB] = 1
        common.RemoveUnusedNodesPass()(model)
        # A norm that stands where its sum stood may be before what its weight is computed with.
        model.graph.sort()
    said = f"lowered to {runtime}: {grouped} GroupQueryAttention, {norms} norms with the sum that they read"
    if kept and captured.kv_cache:
        said += f"; {kept} attentions stay, because their mask or cache is of another kind"
    tell_stage(said)
    return replace(captured, padding="right") if grouped else captured
