"""Give a module back the bias of zeros that an exporter dropped, so that an adapter can set it.

onnxscript's optimiser removes a bias whose values are all zero, for example that of every new classifier
head, which ``modules_to_save`` then trains.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from lora_export.graph.onnx_file import FLOAT_TYPES, take_over_output
from lora_export.sites import operator_of
from lora_export.sites.fit import placement_at
from lora_export.sites.operand import ROUNDED_OR_MOVED, Operand, Use, constant_behind
from lora_export.sites.target import ConstantPart, ExpertStack, Miss, Site, Target, WeightOf

_ADDED = "added: the exporter dropped a bias of zeros"


def restore_biases(
    sites: Sequence[Site], misses: Sequence[Miss], weight_of: WeightOf | None
) -> tuple[list[Site], list[Miss]]:
    """Add a missing bias of zeros if the module's weight is found; return sites and misses.

    The weight's operator has to compute this module alone, unscaled, with no vector added to its result; and
    the bias in the checkpoint, if one is given, has to be zero.
    """
    weights = {site.target.key: site for site in sites}
    added: list[Site] = []
    remaining: list[Miss] = []
    for miss in misses:
        target = miss.target
        weight = weights.get(f"{target.path}.weight")
        is_bias = target.kind == "vector" and target.key.endswith(".bias")
        lost = is_bias and miss.kind in ("not found", "nameless")
        stored = weight_of(target) if lost and weight_of else None
        assert not isinstance(stored, ExpertStack)
        again = _restored(weight, target) if lost and weight is not None else None
        if again is not None:
            added.append(again)
        elif (
            lost and weight is not None and _can_add(weight, target) and (stored is None or not stored.any())
        ):
            added.append(_add(weight, target))
        else:
            remaining.append(miss)
    return [*sites, *added], remaining


def _restored(weight: Site, target: Target) -> Site | None:
    """Return the site of a bias that was added for an earlier adapter or merge."""
    uses = []
    for node in (use.node for part in weight.parts for use in part.uses):
        readers = [node, *(usage.node for usage in node.outputs[0].uses() if usage.node.op_type == "Add")]
        for reader in readers:
            for index, value in enumerate(reader.inputs):
                if value is not None and value.name == _name(target):
                    uses.append(
                        Use(
                            node=reader,
                            operand=Operand(index=index, kind="vector", parameter="bias"),
                            root=value,
                            chain=(),
                            transposed=False,
                        )
                    )
    if not uses:
        return None
    part = ConstantPart(uses[0].root, tuple(uses), (placement_at(0, (0, target.shape[0]), False),))
    return Site(target=target, parts=(part,), evidence=_ADDED, proof="added")


def _name(target: Target) -> str:
    return f"{target.path}.lora_merged.bias"


def _can_add(weight: Site, target: Target) -> bool:
    if len(weight.parts) != 1 or weight.target.matrix[0] != target.shape[0]:
        return False
    (part,) = weight.parts
    # If rows are rescaled, a norm was folded in, and its factor would apply to the bias as well.
    whole = all(p.row == p.col == 0 and p.row_scale is None for p in part.placements)
    whole = whole and part.uses[0].operand_type in FLOAT_TYPES
    return whole and all(_is_bare(use.node) for use in part.uses) and _rows(part) == target.shape[0]


def _rows(part: ConstantPart) -> int:
    tensor = part.root.const_value
    assert tensor is not None
    return int(tensor.shape.numpy()[1 if part.placements[0].transposed else 0])


def _is_bare(node: ir.Node) -> bool:
    """Return True if a node computes ``x @ W`` and nothing else: no bias, no factor."""
    operator = operator_of(node.domain, node.op_type)
    # ONNX Runtime's own operators compute more.
    if operator is None or node.domain or not (operator.is_product or operator.bias is not None):
        return False
    index = operator.bias
    has_bias = index is not None and len(node.inputs) > index and node.inputs[index] is not None
    alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    return not has_bias and alpha == beta == 1.0 and not _gets_a_vector(node)


def _gets_a_vector(node: ir.Node) -> bool:
    """Return True if a reader of the product, rounded or cast, also reads a vector, which may be the bias."""
    others = (constant_behind(value) for reader in _readers(node.outputs[0]) for value in reader.inputs)
    tensors = [other.const_value for other in others if other is not None]
    return any(tensor is not None and len(tensor.shape) == 1 for tensor in tensors)


def _readers(product: ir.Value) -> Iterator[ir.Node]:
    """Yield the nodes that compute with a product, after nodes that round or cast it."""
    for usage in product.uses():
        if usage.node.op_type in ROUNDED_OR_MOVED:
            yield from _readers(usage.node.outputs[0])
        else:
            yield usage.node


def _add(weight: Site, target: Target) -> Site:
    (part,) = weight.parts
    # The constant may hold codes, or be cast on its way.
    dtype = part.uses[0].operand_type
    assert dtype is not None
    zeros = ir.tensor(np.zeros(target.shape, dtype.numpy()), name=_name(target))
    bias = ir.Value(
        name=zeros.name, shape=ir.Shape(target.shape), type=ir.TensorType(dtype), const_value=zeros
    )
    nodes = {id(use.node): use.node for use in part.uses}.values()
    owner = next(iter(nodes)).graph
    assert isinstance(owner, ir.Graph)
    owner.register_initializer(bias)
    uses = tuple(_wire(node, bias) for node in nodes)
    rows = (0, target.shape[0])
    return Site(
        target=target,
        parts=(ConstantPart(bias, uses, (placement_at(0, rows, False),)),),
        evidence=_ADDED,
        proof="added",
    )


def _wire(node: ir.Node, bias: ir.Value) -> Use:
    """Let a node read the bias; after a MatMul, which has no input for one, let an Add read it."""
    operator = operator_of(node.domain, node.op_type)
    index = operator.bias if operator else None
    if index is not None:
        if len(node.inputs) <= index:
            node.resize_inputs(index + 1)
        node.replace_input_with(index, bias)
        return Use(
            node=node,
            operand=Operand(index=index, kind="vector", parameter="bias"),
            root=bias,
            chain=(),
            transposed=False,
        )
    product = node.outputs[0]
    total = ir.Value(name=f"{bias.name}.sum", shape=product.shape, type=product.type)
    readers = list(product.uses())
    add = ir.Node("", "Add", [product, bias], outputs=[total], name=f"{bias.name}.node")
    node.append(add)
    for reader in readers:
        reader.node.replace_input_with(reader.idx, total)
    if product.is_graph_output():
        take_over_output(product, total)
    return Use(
        node=add,
        operand=Operand(index=1, kind="vector", parameter="bias"),
        root=bias,
        chain=(),
        transposed=False,
    )
