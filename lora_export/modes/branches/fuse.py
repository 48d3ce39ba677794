"""Compute siblings of the base in one product: x·[Wq|Wk|Wv], then Split.

With a pack of LoRA beside it q, k and v take five kernels instead of twelve. Only narrow results are fused,
because Split copies them: for gate and up of a long sequence that costs more than fewer kernels save.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from lora_export.graph.nodes import NodeWriter, model_names
from lora_export.graph.onnx_file import GraphFile, take_over_output
from lora_export.modes.branches.bundles import pack_key, place_in_pack
from lora_export.modes.branches.calls import Branch, Call, Piece
from lora_export.sites.isolate import readers_of

# Widest result that is worth a Split, in widths of the activation.
_WIDEST = 3


def fuse_calls(graph: GraphFile, branches: Sequence[Branch]) -> tuple[list[Branch], list[str]]:
    """Join plain MatMuls that read one activation; return the branches with their new calls, and notes.

    Args:
        graph: The graph.
        branches: Branches that would share a pack.
    """
    groups: dict[object, list[Branch]] = defaultdict(list)
    for branch in branches:
        groups[pack_key(branch)].append(branch)
    write = NodeWriter(model_names(graph.model))
    fused: dict[str, Branch] = {}
    for group in groups.values():
        ordered = sorted(group, key=place_in_pack)
        if _can_fuse(ordered):
            fused.update((branch.path, branch) for branch in _fuse(write, ordered))
    notes = (
        [] if fused else ["no weights of the base could be fused (separate float MatMuls of one activation)"]
    )
    return [fused.get(branch.path, branch) for branch in branches], notes


def _can_fuse(group: Sequence[Branch]) -> bool:
    calls = {id(branch.pieces[0].call): branch.pieces[0].call for branch in group}
    if len(calls) < 2 or len(calls) != len(group):
        return False
    width = sum(call.width for call in calls.values())
    return width <= _WIDEST * group[0].in_dim and all(_is_plain(branch) for branch in group)


def _is_plain(branch: Branch) -> bool:
    """Return True if a call is a MatMul that alone reads a stored ``(in_dim, out_dim)`` float matrix."""
    call = branch.pieces[0].call
    weight = call.node.inputs[1]
    if call.node.op_type != "MatMul" or call.node.domain or weight is None or weight.const_value is None:
        return False
    tensor = weight.const_value
    alone = weight.producer() is None and len(list(readers_of(weight))) == 1
    # x may be a value before a quantiser; then the product reads another one.
    return alone and call.node.inputs[0] is call.x and tensor.dtype == call.dtype and len(tensor.shape) == 2


def _fuse(write: NodeWriter, group: Sequence[Branch]) -> list[Branch]:
    calls = [branch.pieces[0].call for branch in group]
    name = f"{group[0].path.rpartition('.')[0]}.lora.base"
    weight = _joined([call.node.inputs[1] for call in calls], name, calls[0])
    nodes = [call.node for call in calls]
    owner = nodes[0].graph
    assert isinstance(owner, ir.Graph)
    order = {id(node): number for number, node in enumerate(owner)}
    anchor = min(nodes, key=lambda node: order[id(node)])
    product = write.add(anchor, "MatMul", [calls[0].x, weight], name, dtype=calls[0].dtype)
    parts = write.split(
        anchor,
        product,
        sizes=[call.width for call in calls],
        names=[f"{name}.{number}" for number in range(len(calls))],
        dtype=calls[0].dtype,
    )
    for node, part in zip(nodes, parts, strict=True):
        _replace(node, part)
    maker = product.producer()
    assert maker is not None
    call = Call(maker, calls[0].x, sum(old.width for old in calls), calls[0].dtype)
    return _moved(group, call, str(weight.name))


def _joined(weights: Sequence[ir.Value | None], name: str, call: Call) -> ir.Value:
    """Register the matrices side by side; their bytes are made when they are written."""
    tensors = [weight.const_value for weight in weights if weight is not None]
    owner = call.node.graph
    assert isinstance(owner, ir.Graph)

    def join() -> ir.TensorProtocol:
        return ir.tensor(np.concatenate([np.asarray(t.numpy()) for t in tensors if t is not None], axis=1))

    rows = int(tensors[0].shape.numpy()[0]) if tensors[0] is not None else 0
    width = sum(int(tensor.shape.numpy()[1]) for tensor in tensors if tensor is not None)
    shape = ir.Shape([rows, width])
    lazy = ir.LazyTensor(join, dtype=call.dtype, shape=shape, name=f"{name}.weight")
    value = ir.Value(name=lazy.name, shape=shape, type=ir.TensorType(call.dtype), const_value=lazy)
    owner.register_initializer(value)
    return value


def _replace(node: ir.Node, part: ir.Value) -> None:
    """Let the readers of a node's result read the part, under the name that the result had."""
    result, owner = node.outputs[0], node.graph
    assert isinstance(owner, ir.Graph)
    part.shape = result.shape
    if result.is_graph_output():
        take_over_output(result, part)
    else:
        part.name, result.name = result.name, part.name
    ir.convenience.replace_all_uses_with(result, part)
    weight = node.inputs[1]
    owner.remove(node, safe=True)
    if weight is not None and not weight.uses():
        owner.initializers.pop(str(weight.name), None)


def _moved(group: Sequence[Branch], call: Call, weight: str) -> list[Branch]:
    moved, at = [], 0
    for branch in group:
        piece = branch.pieces[0]
        stored = tuple(replace(rows, weight=weight, col=rows.col + at) for rows in branch.stored)
        moved.append(replace(branch, pieces=(Piece(call, piece.rows, at),), stored=stored))
        at += piece.call.width
    return moved
