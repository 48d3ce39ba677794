"""Read from a graph how many query and key-value heads the attention after a fused weight has."""

from __future__ import annotations

import onnx_ir as ir

_ATTENTION = {"GroupQueryAttention", "MultiHeadAttention", "Attention"}
# Bias, split, rotary embedding and norms of q and k are between the projection and the attention.
_STEPS = 8


def heads_of(node: ir.Node) -> tuple[int, int] | None:
    """Return ``(num_heads, kv_num_heads)`` of the first attention that reads a node's output, or None."""
    front, seen = [node], {id(node)}
    for _ in range(_STEPS):
        following = [usage.node for last in front for output in last.outputs for usage in output.uses()]
        front = []
        for reader in following:
            if reader.op_type in _ATTENTION:
                heads = reader.attributes.get_int("num_heads", reader.attributes.get_int("q_num_heads", 0))
                keys = reader.attributes.get_int("kv_num_heads", heads)
                return (heads, keys) if heads and keys else None
            if id(reader) not in seen:
                seen.add(id(reader))
                front.append(reader)
    return None
