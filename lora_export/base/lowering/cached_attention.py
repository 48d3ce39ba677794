"""Write attention over a key-value cache as ONNX Runtime's ``GroupQueryAttention``.

It takes queries, keys and values as the projections make them, ``[batch, sequence, heads · size]``, puts the
new ones into the cache itself, and reads of the mask how many tokens a row has:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md. Rules, without which an attention
stays as it was captured:

1. Keys and values are the cache's output: its input, and the new ones behind it.
2. The mask is causal (`causal_mask`); that of a layer with a window is not.
3. All heads have one size, a multiple of 8 up to 256: CUDA has kernels for these.
4. The output has one use, which puts the heads behind the tokens.

Rotary embeddings of queries and keys go into it where `rotary_tables` has tables for them; its positions are
then counted, and ``position_ids`` are not read.

A row's tokens are its first ones for the operator, and it writes each new one behind them: in the cache of a
row that is padded on the right, the padding is overwritten.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from lora_export.base.lowering.causal_mask import is_causal
from lora_export.base.lowering.replacing import CONTRIB, add_node, add_value, constant_of
from lora_export.base.lowering.rotary_tables import RotaryTables
from lora_export.graph.captured import Captured

_HEADS_FIRST = [0, 2, 1, 3]
_STEP, _LARGEST = 8, 256
_OPTIONS = frozenset({"scale", "softcap"})
_MASK = "attention_mask"
_Dims = list[int | str | None]


@dataclass(frozen=True, kw_only=True)
class _Cached:
    """An attention for which the rules hold, but perhaps that of the mask.

    Attributes:
        node: The node.
        mask: Its mask.
        past: Inputs of the cache: keys and values, ``[batch, kv_heads, past_sequence, size]``.
        new: New keys and values, ``[batch, kv_heads, sequence, size]``.
        output: Output with the heads behind the tokens, ``[batch, sequence, heads, size]``.
    """

    node: ir.Node
    mask: ir.Value
    past: tuple[ir.Value, ir.Value]
    new: tuple[ir.Value, ir.Value]
    output: ir.Value


def group_queries(model: ir.Model, captured: Captured) -> tuple[int, int]:
    """Write attention over the cache as GroupQueryAttention.

    Args:
        model: The graph.
        captured: Its record.

    Returns:
        How many were written, and how many attentions stay as they were captured.
    """
    nodes = [node for node in model.graph if node.op_type == "Attention" and not node.domain]
    cached = [one for node in nodes if (one := _cached(node)) is not None]
    causal = {mask: is_causal(model, mask, captured) for mask in {one.mask: None for one in cached}}
    found = [one for one in cached if causal[one.mask]]
    if found:
        counts, tables = _counts(model.graph), RotaryTables(model, captured)
        for one in found:
            _write(model.graph, one, counts, tables)
    return len(found), len(nodes) - len(found)


def _cached(node: ir.Node) -> _Cached | None:
    """Return an attention with its cache; None if rule 1, 3 or 4 does not hold."""
    inputs = [value for value in node.inputs if value is not None]
    if len(inputs) != 4 or len(node.inputs) != 4 or not set(node.attributes) <= _OPTIONS:
        return None
    query, keys, values, mask = inputs
    key, value = _behind_a_past(keys), _behind_a_past(values)
    turned = _only_user(node.outputs[0], "Transpose")
    if key is None or value is None or turned is None or _perm(turned) != _HEADS_FIRST:
        return None
    shapes = [_heads_of(one) for one in (query, key[1], value[1])]
    sizes = {None if shape is None else shape[1] for shape in shapes}
    size = sizes.pop()
    if sizes or size is None or size % _STEP or size > _LARGEST:
        return None
    return _Cached(
        node=node, mask=mask, past=(key[0], value[0]), new=(key[1], value[1]), output=turned.outputs[0]
    )


def _behind_a_past(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """Return the cache's input and the new part, if a value is the cache's output and read once (rule 1)."""
    node = value.producer()
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2:
        return None
    past, new = node.inputs
    if past is None or new is None or node.attributes.get_int("axis", 0) not in (-2, 2):
        return None
    is_cache = past.is_graph_input() and value.is_graph_output() and len(_dims(past)) == 4
    return (past, new) if is_cache and len(value.uses()) == 1 else None


def _only_user(value: ir.Value, operator: str) -> ir.Node | None:
    users = value.consumers()
    if len(value.uses()) != 1 or value.is_graph_output() or users[0].op_type != operator:
        return None
    return users[0]


def _counts(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    """Return the number of each row's tokens less one, int32 ``[batch]``, and the mask's length, int32."""
    mask = next(value for value in graph.inputs if value.name == _MASK)
    first, name = graph[0], f"{_MASK}.lowered"
    axis = constant_of(graph, [1], f"{name}.axis")

    def add(operator: str, inputs: list[ir.Value], word: str, **attributes: int) -> ir.Value:
        is_last = operator == "Cast"
        shape = ir.Shape([1] if word in ("total", "length") else _dims(mask)[:1])
        return add_value(
            ir.node(operator, inputs, attributes, name=f"{name}.{word}"),
            first,
            f"{name}.{word}",
            shape=shape,
            dtype=ir.DataType.INT32 if is_last else ir.DataType.INT64,
        )

    tokens = add("ReduceSum", [mask, axis], "tokens", keepdims=0)
    last = add("Sub", [tokens, axis], "last")
    total = add("Shape", [mask], "total", start=1, end=2)
    int32 = int(ir.DataType.INT32)
    return add("Cast", [last], "seqlens_k", to=int32), add("Cast", [total], "length", to=int32)


def _write(graph: ir.Graph, found: _Cached, counts: tuple[ir.Value, ir.Value], tables: RotaryTables) -> None:
    query, keys, values = found.node.inputs[:3]
    assert query is not None
    heads, kv_heads = _heads_of(query), _heads_of(found.new[0])
    assert heads is not None
    assert kv_heads is not None
    options = {"num_heads": heads[0], "kv_num_heads": kv_heads[0]}
    given, angles = [query, *found.new], tuple[ir.Value, ...]()
    turned, beside = _rotary(query), _rotary(found.new[0])
    if turned is not None and beside is not None and (angles := tables.of(turned, beside) or ()):
        given[:2] = [value for node in (turned, beside) if (value := node.inputs[0]) is not None]
        interleaved = turned.attributes.get_int("interleaved", 0)
        options |= {"do_rotary": 1, "rotary_interleaved": interleaved}
    made = ir.node(
        "GroupQueryAttention",
        [*(_flat(graph, value, found.node) for value in given), *found.past, *counts, *angles],
        {**found.node.attributes, **options},
        domain=CONTRIB,
        num_outputs=3,
        name=found.node.name,
        metadata_props=found.node.metadata_props,
    )
    joining = _only_user(found.output, "Reshape")
    joined = None if joining is None else joining.outputs[0]
    shape = _joined_shape(query, heads)
    if joined is not None and joined.shape == shape:
        add_node(made, found.node, [joined, keys, values])
        return
    joined = ir.val(f"{found.output.name}.joined", found.output.dtype, shape)
    add_node(made, found.node, [joined, keys, values])
    sizes = constant_of(graph, [0, 0, *heads], f"lowered.heads_{heads[0]}x{heads[1]}")
    split = ir.node("Reshape", [made.outputs[0], sizes], name=f"{found.node.name}.split")
    add_node(split, found.node, [found.output])


def _flat(graph: ir.Graph, value: ir.Value, before: ir.Node) -> ir.Value:
    """Return ``[batch, heads, sequence, size]`` as ``[batch, sequence, heads · size]``.

    A rotary embedding turns each head by itself, and is made to read the heads as they are joined.
    """
    heads, node, dtype = _heads_of(value), value.producer(), value.dtype
    assert heads is not None
    assert dtype is not None
    shape = _joined_shape(value, heads)
    if (rotary := _rotary(value)) is not None:
        x, cosine, sine = rotary.inputs
        assert x is not None
        turned = ir.node(
            "RotaryEmbedding",
            [_flat(graph, x, before), cosine, sine],
            {**rotary.attributes, "num_heads": heads[0]},
            name=rotary.name,
            metadata_props=rotary.metadata_props,
        )
        return add_value(turned, before, f"{value.name}.joined", shape=shape, dtype=dtype)
    if node is not None and node.op_type == "Transpose" and _perm(node) == _HEADS_FIRST:
        last = node.inputs[0]
    else:
        turn = ir.node("Transpose", [value], {"perm": _HEADS_FIRST}, name=f"{value.name}.turned")
        turned_shape = ir.Shape([_dims(value)[axis] for axis in _HEADS_FIRST])
        last = add_value(turn, before, f"{value.name}.turned", shape=turned_shape, dtype=dtype)
    assert last is not None
    split = last.producer()
    source = split.inputs[0] if split is not None and split.op_type == "Reshape" else None
    if source is not None and source.shape == shape:
        return source
    width = heads[0] * heads[1]
    sizes = constant_of(graph, [0, 0, width], f"lowered.joined_heads_{width}")
    join = ir.node("Reshape", [last, sizes], name=f"{value.name}.joined")
    return add_value(join, before, f"{value.name}.joined", shape=shape, dtype=dtype)


def _rotary(value: ir.Value) -> ir.Node | None:
    """Return the rotary embedding whose output a value is, without positions of its own."""
    node = value.producer()
    is_one = node is not None and node.op_type == "RotaryEmbedding" and not node.domain
    return node if is_one and node is not None and len(node.inputs) == 3 else None


def _perm(node: ir.Node) -> list[int]:
    return list(node.attributes.get_ints("perm", []))


def _heads_of(value: ir.Value) -> tuple[int, int] | None:
    """Return number and size of heads ``[batch, heads, sequence, size]``; None if an axis is unknown."""
    dims = _dims(value)
    heads, size = (dims[1], dims[3]) if len(dims) == 4 and None not in dims else (None, None)
    return (heads, size) if isinstance(heads, int) and isinstance(size, int) else None


def _joined_shape(value: ir.Value, heads: tuple[int, int]) -> ir.Shape:
    batch, _, sequence, _ = _dims(value)
    return ir.Shape([batch, sequence, heads[0] * heads[1]])


def _dims(value: ir.Value) -> _Dims:
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]
