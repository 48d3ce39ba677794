"""Fit targets into stored tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.graph.onnx_file import matrix_shape, shape_of, stored_matrix
from lora_export.plan import Refusal
from lora_export.sites import operator_named
from lora_export.sites.operand import DEQUANTIZE, LEFT, Use
from lora_export.sites.target import ConstantPart, Miss, Site, Target
from lora_export.storage.patch import Placement

# Remedy that changes a weight for all of its uses.
BOTH_WAYS = (
    "merge the adapter into the checkpoint (lora-export merge) and export the result: that changes the "
    "weight in both orientations"
)
_ATTENTION = {"GroupQueryAttention", "MultiHeadAttention", "Attention"}
# Bias, split, rotary embedding and norms of q and k are between a fused projection and the attention.
_STEPS = 8


def accepts(target: Target, use: Use) -> bool:
    """Return True if a use is of the kind that the target's module has."""
    assert use.root.const_value is not None
    rank, kind = len(use.root.const_value.shape), use.operand.kind
    if target.stored_turned and kind not in ("linear", "conv"):
        # A table of rows that are looked up is never stored turned.
        return False
    if pointwise(target, use):
        return True
    if target.kind == "vector":
        return rank == 1 and kind in ("vector", "other")
    if target.kind == "parameter" and target.experts > 1:
        return (rank == 3 and kind != "vector") or (rank == 2 and kind == "linear")
    if target.kind == "parameter":
        # The forms in which a matrix is a module's weight are tried one by one (`matrices.forms_of`).
        return rank == len(target.shape) and kind == "other"
    if target.kind == "any":
        # Packed codes of a matrix may have any rank.
        rank = rank if use.operand.shape is None else len(use.operand.shape)
        return rank == len(target.shape) and kind in ("linear", "conv", "embedding", "other")
    return kind == target.kind


def pointwise(target: Target, use: Use) -> bool:
    """Return True if target and use are a Linear and a 1×1 convolution, the two forms of one module.

    Tools write a Linear as a convolution (for NPUs) or the reverse, or give a kernel another axis.
    """
    assert use.root.const_value is not None
    if target.kind not in ("linear", "conv", "any") or use.operand.kind not in ("linear", "conv"):
        return False
    shape = shape_of(use.root.const_value)
    as_it_is = target.kind == use.operand.kind and len(shape) == len(target.shape)
    if as_it_is or use.operand.shape is not None or (use.operand.kind == "linear" and len(shape) != 2):
        return False
    groups = use.node.attributes.get_int("group", 1)
    if target.module is not None:
        groups *= target.module.groups
    return (
        groups == 1 and len(target.shape) > 1 and all(size == 1 for size in (*shape[2:], *target.shape[2:]))
    )


def stored_shape(target: Target, use: Use) -> tuple[int, int]:
    """Return the shape of the stored tensor as a matrix; for a packed one, the shape that it stands for."""
    assert use.root.const_value is not None
    if use.operand.shape is not None:
        return use.operand.shape
    return matrix_shape(shape_of(use.root.const_value), stacked=target.experts > 1)


def place(target: Target, use: Use, part: tuple[int, int] | None = None) -> tuple[Placement, ...] | Refusal:
    """Return the target's placements in the use's constant, or a refusal with the reason why it doesn't fit.

    Args:
        target: The parameter.
        use: A use of the constant.
        part: ``(position, count)`` of the target inside a fused weight.
    """
    assert use.root.const_value is not None
    if target.kind == "parameter" and target.experts > 1:
        return _place_experts(target, shape_of(use.root.const_value))
    rows, cols = target.matrix
    shape = shape_of(use.root.const_value)
    if len(target.shape) > 2 and shape != target.shape and not pointwise(target, use):
        return Refusal("shape", f"the graph's weight is {shape}, the adapter's {target.shape}")
    if (
        use.operand.kind == "linear"
        and use.operand.shape is None
        and len(shape) > 2
        and not pointwise(target, use)
    ):
        return Refusal(
            "operator", f"the graph's weight is {shape}, a stack of matrices for {use.node.op_type}"
        )
    stored = stored_shape(target, use)
    transposed = use.transposed and target.kind != "vector"
    height, width = (stored[1], stored[0]) if transposed else stored
    if width != cols or (height != rows and part is None):
        return Refusal("shape", f"the graph's weight is {(height, width)}, the adapter's {target.matrix}")
    offset = 0 if part is None else _fused_offset(height, rows, *part, heads_of(use.node))
    if offset is None:
        reason = f"the graph's fused weight has {height} rows, which {rows} rows at {part} do not fit"
        return Refusal("shape", reason)
    return (placement_at(offset, (0, rows), transposed),)


def without_operands(target: Target, uses: list[Use], part: tuple[int, int] | None) -> list[Use]:
    """Return uses without those on the left of a product that don't fit, if others are left."""
    left = [use for use in uses if use.no_branch == LEFT and isinstance(place(target, use, part), Refusal)]
    return [use for use in uses if use not in left] or uses


def placement_at(offset: int, rows: tuple[int, int], transposed: bool) -> Placement:
    """Return the placement of canonical ``rows`` that start at ``offset`` along the stored output axis."""
    return Placement(
        rows=rows, row=0 if transposed else offset, col=offset if transposed else 0, transposed=transposed
    )


def _fused_offset(
    height: int, rows: int, position: int, count: int, heads: tuple[int, int] | None
) -> int | None:
    """Return the first row of a part: halves are equal, as are k and v of q, k, v (grouped-query attention).

    Args:
        height: Number of rows of the fused weight.
        rows: Number of rows of the part.
        position: Position of the part.
        count: Number of parts.
        heads: Numbers of query heads and key-value heads, if the graph has them; else q has as many as k, or
            a multiple.
    """
    if count == 2:
        return position * rows if height == 2 * rows else None
    keys, odd = divmod(height - rows, 2) if position == 0 else (rows, 0)
    queries = height - 2 * keys
    if odd or keys <= 0 or queries <= 0 or queries % keys:
        return None
    if heads is not None and queries * heads[1] != keys * heads[0]:
        return None
    return (0, queries, queries + keys)[position]


def fused_rows(height: int, count: int, heads: tuple[int, int] | None) -> list[int] | None:
    """Return the number of rows of each part of a fused weight, or None if the graph doesn't tell."""
    if count == 2:
        return [height // 2] * 2 if height % 2 == 0 else None
    if heads is None:
        return None
    size, odd = divmod(height, heads[0] + 2 * heads[1])
    return None if odd else [heads[0] * size, heads[1] * size, heads[1] * size]


def _place_experts(target: Target, shape: tuple[int, ...]) -> tuple[Placement, ...] | Refusal:
    """Return the placements of stacked experts, which exporters store as they are or transposed, by shape.

    Square ones are taken as the module holds them, which values have to confirm (`verify.check_content`).
    """
    rows, cols = target.shape
    direct, swapped = (target.experts, rows, cols), (target.experts, cols, rows)
    if shape not in (direct, swapped):
        return Refusal("shape", f"the graph's weight is {shape}, the adapter's {direct} or {swapped}")
    return expert_placements(target, shape != direct)


def expert_placements(target: Target, transposed: bool) -> tuple[Placement, ...]:
    """Return each expert's placement in a stacked constant, whose first two axes are its rows."""
    rows, cols = target.shape
    height = cols if transposed else rows
    return tuple(
        Placement(rows=(0, rows), row=expert * height, transposed=transposed, expert=expert)
        for expert in range(target.experts)
    )


def place_split(target: Target, groups: list[list[Use]], evidence: str) -> Site | Miss:
    """Fit a module that the exporter split along its rows into several weights, or experts into their own."""
    parts, start = [], 0
    rows, cols = target.matrix
    each = len(groups) // target.experts
    for number, uses in enumerate(groups):
        expert, first = divmod(number, each)
        if not first:
            start = 0
        roots = {id(use.root) for use in uses}
        stored = stored_shape(target, uses[0])
        transposed = uses[0].transposed and target.kind != "vector"
        height, width = (stored[1], stored[0]) if transposed else stored
        if len(roots) > 1 or width != cols:
            return Miss(
                target, Refusal("shape", f"shapes differ: a part of the split weight is {(height, width)}")
            )
        placement = placement_at(0, (start, start + height), transposed)
        parts.append(ConstantPart(uses[0].root, tuple(uses), (replace(placement, expert=expert),)))
        start += height
        if first == each - 1 and start != rows:
            return Miss(
                target,
                Refusal("shape", f"shapes differ: the split weight has {start} rows, the adapter {rows}"),
            )
    return Site(target=target, parts=tuple(parts), evidence=evidence)


def site_of(target: Target, fits: list[tuple[Use, tuple[Placement, ...]]], evidence: str) -> Site | Miss:
    """Return the site if there is one constant, or several with the same bytes (rule 3 of `resolve`)."""
    roots: dict[int, list[tuple[Use, tuple[Placement, ...]]]] = {}
    for use, placed in fits:
        roots.setdefault(id(use.root), []).append((use, placed))
    parts = tuple(
        ConstantPart(group[0][0].root, tuple(use for use, _ in group), group[0][1])
        for group in roots.values()
    )
    if any(use.transposed != group[0][0].transposed for group in roots.values() for use, _ in group):
        return Miss(
            target, Refusal("ambiguous", "ambiguous: its weight is read in both orientations", BOTH_WAYS)
        )
    if not _same_values(parts):
        where = ", ".join(str(part.root.name) for part in parts[:4])
        found = (
            f"{len(parts)} weights have its name and shape" if len(parts) > 1 else "its codes have two scales"
        )
        return Miss(target, Refusal("ambiguous", f"ambiguous: {found} ({where})"))
    return Site(target=target, parts=parts, evidence=evidence)


def _same_values(parts: Sequence[ConstantPart]) -> bool:
    """Return True if constants have the same bytes and, if those are codes, their uses the same scales."""
    first = parts[0].root.const_value
    assert first is not None
    for part in parts[1:]:
        assert part.root.const_value is not None
        if not np.array_equal(stored_matrix(first), stored_matrix(part.root.const_value)):
            return False
    one, *others = [_scales(use) for part in parts for use in part.uses]
    return all(np.array_equal(mine, theirs) for other in others for mine, theirs in zip_longest(one, other))


def _scales(use: Use) -> list[Array]:
    """Return the constant scales and zero points of a weight's codes."""
    values = [value for node in use.chain if node.op_type in DEQUANTIZE for value in node.inputs[1:]]
    operator = operator_named(use.node.op_type)
    positions = operator.code_inputs if operator else frozenset()
    values += [value for index, value in enumerate(use.node.inputs) if index in positions]
    return [
        np.asarray(value.const_value.numpy())
        for value in values
        if value is not None and value.const_value is not None
    ]


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
