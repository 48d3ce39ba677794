"""Compute queries, keys and values of an attention in one product: their weights are one constant.

The constant is named ``qkv_proj``, as builders of graphs name it, so that an adapter of ``q_proj`` finds its
rows (`lora_export.sites.naming.names`). Rules, without which the three products stay:

1. They are MatMul of one value with transposed weights ``q_proj``, ``k_proj`` and ``v_proj`` of one module,
   which nothing else reads, all with biases or none, and go into GroupQueryAttention as they are.
2. The weights have one dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lora_export.base.lowering.replacing import CONTRIB

_LEAVES, _PACKED = ("q_proj", "k_proj", "v_proj"), "qkv_proj"


@dataclass(frozen=True, kw_only=True)
class _Projection:
    """A product with a weight.

    Attributes:
        source: Value that is multiplied.
        weight: The weight, ``[out, in]``.
        bias: The bias, ``[out]``; None without one.
        product: The MatMul.
    """

    source: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    product: ir.Node


def pack_projections(model: ir.Model) -> dict[str, tuple[str, ...]]:
    """Pack the products of each attention; return packed constant → the constants that it is made from."""
    packed: dict[str, tuple[str, ...]] = {}
    for node in list(model.graph):
        if node.op_type == "GroupQueryAttention" and node.domain == CONTRIB:
            found = [_projection(value) for value in node.inputs[:3]]
            projections = [one for one in found if one is not None]
            if len(projections) == len(_LEAVES) and _belong_together(projections):
                packed |= _pack(model.graph, node, projections)
    return packed


def _projection(value: ir.Value | None) -> _Projection | None:
    node = None if value is None or len(value.uses()) != 1 else value.producer()
    bias = None
    if node is not None and node.op_type == "Add":
        sides = [one for one in node.inputs if one is not None]
        bias = next((one for one in sides if one.is_initializer()), None)
        inner = next((one for one in sides if one is not bias), None)
        node = None if bias is None or inner is None or len(inner.uses()) != 1 else inner.producer()
    if node is None or node.op_type != "MatMul" or node.inputs[1] is None or node.inputs[0] is None:
        return None
    turned = node.inputs[1].producer()
    weight = None if turned is None or turned.op_type != "Transpose" else turned.inputs[0]
    if weight is None or not weight.is_initializer() or len(weight.shape or ()) != 2:
        return None
    alone = all(len(one.uses()) == 1 for one in (node.inputs[1], weight, bias) if one is not None)
    return _Projection(source=node.inputs[0], weight=weight, bias=bias, product=node) if alone else None


def _belong_together(projections: Sequence[_Projection]) -> bool:
    first, *others = projections
    stem = _stem(first)
    return (
        all(one.source is first.source for one in others)
        and len({one.weight.dtype for one in projections}) == 1
        and len({one.bias is None for one in projections}) == 1
        and [one.weight.name for one in projections] == [f"{stem}{leaf}.weight" for leaf in _LEAVES]
        and [one.bias.name for one in projections if one.bias is not None]
        == [f"{stem}{leaf}.bias" for leaf in _LEAVES if first.bias is not None]
    )


def _stem(projection: _Projection) -> str:
    return str(projection.weight.name).removesuffix(f"{_LEAVES[0]}.weight")


def _pack(graph: ir.Graph, node: ir.Node, projections: Sequence[_Projection]) -> dict[str, tuple[str, ...]]:
    first = projections[0]
    module, dtype = f"{_stem(first)}{_PACKED}", first.weight.dtype
    weight = _joined(graph, [one.weight for one in projections], f"{module}.weight")
    made = {str(weight.name): tuple(str(one.weight.name) for one in projections)}
    scopes = {key: text.replace(_LEAVES[0], _PACKED) for key, text in first.product.metadata_props.items()}
    turned = ir.node("Transpose", [weight], {"perm": [1, 0]}, metadata_props=scopes)
    product = ir.node("MatMul", [first.source, turned.outputs[0]], metadata_props=scopes)
    nodes = [turned, product]
    biases = [one.bias for one in projections if one.bias is not None]
    if biases:
        bias = _joined(graph, biases, f"{module}.bias")
        made[str(bias.name)] = tuple(str(one.name) for one in biases)
        nodes.append(ir.node("Add", [product.outputs[0], bias], metadata_props=scopes))
    assert node.inputs[0] is not None
    assert node.inputs[0].shape is not None
    assert weight.shape is not None
    rows, columns = weight.shape
    for one, word in zip(nodes, ("turned", "product", "sum"), strict=False):
        one.name = one.outputs[0].name = f"{module}.{word}"
        one.outputs[0].type = ir.TensorType(dtype or ir.DataType.FLOAT)
        one.outputs[0].shape = ir.Shape([*node.inputs[0].shape[:2], rows])
    turned.outputs[0].shape = ir.Shape([columns, rows])
    graph.insert_before(node, nodes)
    node.replace_input_with(0, nodes[-1].outputs[0])
    node.replace_input_with(1, None)
    node.replace_input_with(2, None)
    return made


def _joined(graph: ir.Graph, values: Sequence[ir.Value], name: str) -> ir.Value:
    """Return the constant that holds the rows of others, without values if these have none."""
    dtype, shapes = values[0].dtype, [value.shape.numpy() for value in values if value.shape is not None]
    assert dtype is not None
    shape = ir.Shape([sum(one[0] for one in shapes), *shapes[0][1:]])
    tensors = [value.const_value for value in values]

    def rows() -> ir.TensorProtocol:
        given = [tensor.numpy() for tensor in tensors if tensor is not None]
        return ir.Tensor(np.concatenate(given), dtype=dtype, name=name)

    known = None if None in tensors else ir.LazyTensor(rows, dtype=dtype, shape=shape, name=name)
    made = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=known)
    graph.initializers[name] = made
    return made
