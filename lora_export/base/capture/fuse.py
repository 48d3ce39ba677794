"""Write RMS norms and rotary embeddings as one node of ONNX each (opset 23), where the nodes are one.

https://onnx.ai/onnx/operators/onnx__RMSNormalization.html,
https://onnx.ai/onnx/operators/onnx__RotaryEmbedding.html. Rules:

1. RMS norm: ``w * x * Reciprocal(Sqrt(ReduceMean(x²) + eps))`` over the last axis, w a weight of that size
   (or one more, as Gemma's). Between two Casts it is computed in the inner type, which the operator has a
   name for.
2. Rotary embedding: ``x * cos + concat(-x2, x1) * sin`` of the halves x1, x2 of x's last axis, where cos and
   sin have two equal halves: those of an angle that is joined with itself. The operator reads one half.

What matches in part stays as it was traced.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
# Steps between an angle's cosine and its product: a cast, a factor of all, an axis for the heads.
_STEPS = 4


def fuse_nodes(model: ir.Model) -> dict[str, int]:
    """Fuse what the rules take; return the number of nodes of each operator that were made."""
    from onnx_ir.passes import common

    graph = model.graph
    made = {"RMSNormalization": 0, "RotaryEmbedding": 0}
    halves: dict[tuple[ir.Value, int], ir.Value] = {}
    for node in list(graph):
        new = None
        if node.op_type == "Mul":
            new = _norm(node)
        elif node.op_type == "Add":
            new = _rotary(node, halves)
        if new is None:
            continue
        new.metadata_props.update(node.metadata_props)
        old, value = node.outputs[0], new.outputs[0]
        value.shape, value.type = old.shape, old.type
        graph.insert_before(node, new)
        name = old.name
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        value.name = name
        made[new.op_type] += 1
    common.RemoveUnusedNodesPass()(model)
    return made


def _norm(last: ir.Node) -> ir.Node | None:
    """Return the norm that a product with its weight ends; None if it ends none (rule 1)."""
    for scale, normal in (last.inputs, last.inputs[::-1]):
        if scale is None or normal is None or not is_constant(scale):
            continue
        inner, outer = _without_cast(normal)
        core = inner.producer()
        if core is None or core.op_type != "Mul":
            continue
        for x, inverse in (core.inputs, core.inputs[::-1]):
            epsilon = None if x is None or inverse is None else _epsilon(x, inverse)
            if x is None or epsilon is None:
                continue
            source, _ = _without_cast(x)
            given = source if outer is not None else x
            if not _is_norm(given, x, last.outputs[0], scale=scale):
                continue
            return ir.node(
                "RMSNormalization",
                [given, scale],
                {"axis": -1, "epsilon": epsilon, "stash_type": int(x.dtype or ir.DataType.FLOAT)},
            )
    return None


def is_constant(value: ir.Value | None) -> bool:
    """Return whether a value is a weight, or computed from weights and constants alone."""
    if value is None or value.is_initializer():
        return True
    node = value.producer()
    return node is not None and all(map(is_constant, node.inputs))


def _is_norm(given: ir.Value, x: ir.Value, out: ir.Value, scale: ir.Value) -> bool:
    """Return whether types and sizes are those of the operator, computed in the type of ``x``."""
    size = _last(x)
    same = given.dtype == out.dtype == scale.dtype and given.dtype in _FLOATS
    return same and x.dtype == ir.DataType.FLOAT and size is not None and tuple(scale.shape or ()) == (size,)


def _epsilon(x: ir.Value, inverse: ir.Value) -> float | None:
    """Return the epsilon of ``Reciprocal(Sqrt(ReduceMean(x²) + epsilon))``; None if it is something else."""
    root = _input_of(inverse, "Reciprocal")
    total = None if root is None else _input_of(root, "Sqrt")
    added = None if total is None else total.producer()
    if added is None or added.op_type != "Add":
        return None
    for mean, epsilon in (added.inputs, added.inputs[::-1]):
        number = _numbers(epsilon)
        if mean is None or number is None or number.size != 1:
            continue
        reduced = mean.producer()
        if (
            reduced is None
            or reduced.op_type != "ReduceMean"
            or not reduced.attributes.get_int("keepdims", 1)
        ):
            continue
        rank, axes = len(x.shape or ()), _numbers(reduced.inputs[1] if len(reduced.inputs) > 1 else None)
        square = reduced.inputs[0].producer() if reduced.inputs[0] is not None else None
        if axes is not None and axes.tolist() in ([-1], [rank - 1]) and square and _is_square(square, x):
            return float(number.reshape(-1)[0])
    return None


def _is_square(node: ir.Node, x: ir.Value) -> bool:
    if node.op_type == "Mul":
        return node.inputs[0] is x and node.inputs[1] is x
    power = _numbers(node.inputs[1]) if node.op_type == "Pow" else None
    return (
        node.inputs[0] is x and power is not None and power.size == 1 and float(power.reshape(-1)[0]) == 2.0
    )


def _rotary(last: ir.Node, halves: dict[tuple[ir.Value, int], ir.Value]) -> ir.Node | None:
    """Return the rotary embedding that a sum ends; None if it ends none (rule 2)."""
    for plain, turned in (last.inputs, last.inputs[::-1]):
        one, other = (_product(value) for value in (plain, turned))
        if one is None or other is None:
            continue
        for x, cosine in (one, one[::-1]):
            for joined, sine in (other, other[::-1]):
                half = _half_turned(joined, x)
                if half is None:
                    continue
                tables = _angles(cosine, "Cos"), _angles(sine, "Sin")
                if tables[0] is None or tables[1] is None or tables[0][1] is not tables[1][1]:
                    continue
                caches = [table[0] for table in tables if table is not None]
                if not all(_fits(cache, x, half) for cache in caches):
                    continue
                read = [_first_half(cache, half, last, halves) for cache in caches]
                return ir.node("RotaryEmbedding", [x, *read])
    return None


def _product(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Mul" or node.inputs[0] is None or node.inputs[1] is None:
        return None
    return node.inputs[0], node.inputs[1]


def _half_turned(joined: ir.Value, x: ir.Value) -> int | None:
    """Return the size of a half of x, if the value is ``concat(-x2, x1)``; else None."""
    node, rank, size = joined.producer(), len(x.shape or ()), _last(x)
    if node is None or node.op_type != "Concat" or rank != 4 or size is None or size % 2:
        return None
    if node.attributes.get_int("axis", 0) not in (-1, rank - 1) or len(node.inputs) != 2:
        return None
    first, second = node.inputs
    negated = None if first is None else _input_of(first, "Neg")
    half = size // 2
    if negated is None or second is None:
        return None
    is_turned = _is_slice(negated, x, half, size) and _is_slice(second, x, 0, half)
    return half if is_turned else None


def _is_slice(value: ir.Value, x: ir.Value, begin: int, end: int) -> bool:
    """Return whether a value is ``x[..., begin:end]``."""
    node = value.producer()
    if node is None or node.op_type != "Slice" or node.inputs[0] is not x:
        return False
    given = [_numbers(one) for one in node.inputs[1:]]
    if len(given) < 3 or any(one is None or one.size != 1 for one in given):
        return False
    starts, ends, axes, *steps = (int(one.reshape(-1)[0]) for one in given if one is not None)
    size, rank = _last(x), len(x.shape or ())
    is_last = axes in (-1, rank - 1) and (not steps or steps == [1])
    return is_last and starts == begin and (ends == end or (end == size and ends >= end))


def _angles(value: ir.Value, operator: str) -> tuple[ir.Value, ir.Value] | None:
    """Return the table ``[batch, sequence, size]`` of cosines or sines, and half of its angle."""
    node, table = value.producer(), None
    for _ in range(_STEPS):
        if node is None or not node.inputs or node.inputs[0] is None:
            return None
        if node.op_type == operator:
            joined = node.inputs[0].producer()
            is_twice = (
                joined is not None
                and joined.op_type == "Concat"
                and len(joined.inputs) == 2
                and joined.inputs[0] is joined.inputs[1]
                and joined.attributes.get_int("axis", 0) in (-1, 2)
            )
            half = joined.inputs[0] if joined is not None and is_twice else None
            return None if table is None or half is None else (table, half)
        if node.op_type == "Unsqueeze" and table is None:
            axes = _numbers(node.inputs[1])
            if axes is None or axes.tolist() != [1]:
                return None
            table = node.inputs[0]
        elif node.op_type == "Mul":
            factor = _numbers(node.inputs[1])
            if factor is None or factor.size != 1:
                return None
        elif node.op_type != "Cast":
            return None
        node = node.inputs[0].producer()
    return None


def _fits(table: ir.Value, x: ir.Value, half: int) -> bool:
    """Return whether a table has x's batch and size: the operator repeats nothing."""
    given, wanted = table.shape, x.shape
    if given is None or wanted is None or len(given) != 3 or table.dtype != x.dtype:
        return False
    return given[0] == wanted[0] and given[1] == wanted[2] and given[2] == 2 * half


def _first_half(
    table: ir.Value, half: int, before: ir.Node, halves: dict[tuple[ir.Value, int], ir.Value]
) -> ir.Value:
    """Return ``table[..., :half]``; all layers read one."""
    if (table, half) not in halves:
        graph, name = before.graph, f"{table.name}.half"
        assert graph is not None
        numbers = {}
        for what, number in (("start", 0), ("end", half), ("axis", 2)):
            constant = ir.val(f"{name}.{what}", const_value=ir.tensor(np.array([number], np.int64)))
            graph.register_initializer(constant)
            numbers[what] = constant
        node = ir.node("Slice", [table, *numbers.values()])
        node.outputs[0].name, node.outputs[0].type = name, table.type
        assert table.shape is not None
        node.outputs[0].shape = ir.Shape([*list(table.shape)[:2], half])
        producer = table.producer()
        assert producer is not None
        graph.insert_after(producer, node)
        halves[table, half] = node.outputs[0]
    return halves[table, half]


def _input_of(value: ir.Value, operator: str) -> ir.Value | None:
    node = value.producer()
    return node.inputs[0] if node is not None and node.op_type == operator else None


def _without_cast(value: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """Return the value before a Cast, and the one after it; None if there is none."""
    before = _input_of(value, "Cast")
    return (value, None) if before is None else (before, value)


def _last(value: ir.Value) -> int | None:
    size = list(value.shape)[-1] if value.shape else None
    return size if isinstance(size, int) else None


def _numbers(value: ir.Value | None) -> np.ndarray | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.size > 8 else tensor.numpy()
