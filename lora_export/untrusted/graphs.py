"""Check that a stranger's graph has the properties that all its readers rely on.

1. A constant has an element type, sizes that are not negative, and as many values as its shape needs; it has
   no more axes or elements than an array can have.
2. A node has the inputs and outputs that its operator needs, and attributes of the operator's types. Outside
   of functions, no attribute refers to a function's, and element types are ONNX's.
3. No more than 64 nodes that only move, cast or round a value follow each other: whoever looks for a
   constant, or for an activation, walks back through them from each node that reads it.
4. Functions do not call themselves, and the graph does not become too large with them inlined, nor do too
   many of its nodes get one name: twenty functions that each call the next one twice are a million nodes.

ONNX Runtime refuses such graphs as well (https://github.com/onnx/onnx ``onnx/checker.cc``); here each problem
is named before anything is computed from the graph. Values in other files are checked by their reader.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import onnx_ir as ir

from lora_export.untrusted.shown import shown

MAX_NODES = 2_000_000
# Nodes of inlined functions for each node of the file, and beyond: a small file must not need much memory.
_TIMES, _BEYOND = 64, 20_000
# onnx_ir numbers what has one name from 1 on for each of them: limit of the squares of how many have one.
_MAX_ALIKE = 1 << 27
# Exporters and quantisers leave ten at most.
_MAX_MOVES = 64
_MOVES = frozenset(
    {
        *("Identity", "Cast", "CastLike", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze"),
        *("QuantizeLinear", "DequantizeLinear", "DequantizeLinearBlock"),
        *("TRT_FP8QuantizeLinear", "TRT_FP8DequantizeLinear"),
    }
)
# Limits of numpy's arrays (NPY_MAXDIMS) and of counting elements, which also apply if one size is 0.
_MAX_AXES, _MAX_ELEMENTS = 64, 2**63 - 1
# Attributes that hold an element type.
_TYPES = ("to", "dtype", "output_dtype")
_NAME = 120
# Attributes that we read of ONNX Runtime's own operators, for which the onnx package has no schemas.
_KINDS = {
    **dict.fromkeys(
        (
            *(
                "K",
                "N",
                "bits",
                "block_size",
                "accuracy_level",
                "weight_prepacked",
                "num_heads",
                "q_num_heads",
            ),
            *("kv_num_heads", "transA", "transB", "transBatchA", "transBatchB", "to", "output_dtype", "axis"),
            *("group", "start", "end", "keepdims", "batch_dims"),
        ),
        "INT",
    ),
    **dict.fromkeys(("alpha", "beta"), "FLOAT"),
    **dict.fromkeys(("body", "then_branch", "else_branch"), "GRAPH"),
    "perm": "INTS",
}
# How many inputs we read at least of operators for which the onnx package has no schemas.
_INPUTS = {
    **dict.fromkeys(("BiasGelu", "CastLike", "FastGelu", "Gelu", "QuickGelu", "RotaryEmbedding"), 1),
    **dict.fromkeys(("Attention", "DequantizeLinear", "FusedConv", "FusedGemm", "FusedMatMul"), 2),
    **dict.fromkeys(("GemmFastGelu", "NhwcConv", "QuantizeLinear", "SimplifiedLayerNormalization"), 2),
    **dict.fromkeys(("DynamicQuantizeMatMul", "GatherBlockQuantized", "MatMulBnb4", "MatMulNBits"), 3),
    **dict.fromkeys(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), 3),
    "MatMulIntegerToFloat": 4,
}


def graph_problems(model: ir.Model) -> Iterator[str]:
    """Yield the problems of a model outside of its functions (rules 1 to 3)."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield from _tensor_problems(value.const_value, shown(value.name, _NAME))
    for node in model.graph.all_nodes():
        version = model.opset_imports.get(node.domain, 0)
        yield from _node_problems(node, version)
    yield from _long_ways(model)


def _long_ways(model: ir.Model) -> Iterator[str]:
    """Apply rule 3; report where each way becomes too long."""
    moves: dict[int, int] = {}
    for node in model.graph.all_nodes():
        if node.op_type not in _MOVES:
            continue
        before = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        moves[id(node)] = length = 1 + moves.get(id(before), 0)
        if length == _MAX_MOVES + 1:
            yield (
                f"more than {_MAX_MOVES} nodes that only move, cast or round values follow each other, up to "
                f"{_name_of(node)} ({shown(node.op_type, _NAME)})"
            )


def function_problems(model: ir.Model) -> list[str]:
    """Return the problems of inlining functions (rule 4)."""
    counts: dict[Any, int] = {}
    problems: list[str] = []

    def count(nodes: Any, calling: tuple[Any, ...]) -> int:
        total = 0
        for node in nodes:
            name = node.op_identifier()
            total += 1 if name not in model.functions else body(name, calling)
            if total > MAX_NODES or problems:
                return total
        return total

    def body(name: Any, calling: tuple[Any, ...]) -> int:
        if name in calling or len(calling) > 100:
            problems.append(
                f"the function {shown(name[1], _NAME)} calls itself, or calls are nested too deeply"
            )
            return 0
        if name not in counts:
            counts[name] = count(model.functions[name].all_nodes(), (*calling, name))
        return counts[name]

    total = count(model.graph.all_nodes(), ())
    functions = model.functions.values()
    own = sum(1 for _ in model.graph.all_nodes()) + sum(1 for one in functions for _ in one.all_nodes())
    if total > MAX_NODES:
        problems.append(f"with its functions inlined it has more than {MAX_NODES} nodes")
    elif total > _TIMES * own + _BEYOND:
        problems.append(f"with its functions inlined it has {total} nodes, for {own} in the file")
    elif not problems and _alike(model, list(counts)) > _MAX_ALIKE:
        problems.append("with its functions inlined too many nodes have one name")
    return problems


def _alike(model: ir.Model, functions: Sequence[Any]) -> int:
    """Return the sum over names of the square of how many nodes or results have each once inlined.

    Args:
        model: The model.
        functions: Functions that are called, each behind those that it calls.
    """
    calls: Counter[Any] = Counter(node.op_identifier() for node in model.graph.all_nodes())
    alike: Counter[tuple[str, str]] = Counter()
    for name in reversed(functions):
        for node in model.functions[name].all_nodes():
            calls[node.op_identifier()] += calls[name]
            alike["node", node.name or ""] += calls[name]
            alike.update({("value", value.name or ""): calls[name] for value in node.outputs})
    return sum(count * count for count in alike.values())


_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
# Which field has the values of a type, of those that int32_data has not (``onnx.proto``, TensorProto).
_FIELD = {
    **dict.fromkeys((ir.DataType.FLOAT, ir.DataType.COMPLEX64), "float_data"),
    **dict.fromkeys((ir.DataType.DOUBLE, ir.DataType.COMPLEX128), "double_data"),
    **dict.fromkeys((ir.DataType.UINT32, ir.DataType.UINT64), "uint64_data"),
    ir.DataType.INT64: "int64_data",
}


def _tensor_problems(tensor: ir.TensorProtocol, name: str) -> Iterator[str]:
    try:
        dtype = tensor.dtype
        is_text = dtype == ir.DataType.STRING
        bits = 0 if is_text else dtype.bitwidth
    except (TypeError, ValueError) as error:
        yield f"{name}: its element type is not one of ONNX's ({shown(error, _NAME)})"
        return
    sizes = [int(size) for size in tensor.shape.numpy()]
    if len(sizes) > _MAX_AXES:
        yield f"{name}: {len(sizes)} axes, wanted at most {_MAX_AXES}"
    elif math.prod(size for size in sizes if size > 0) > _MAX_ELEMENTS:
        yield f"{name}: shape {shown(sizes, _NAME)}, wanted at most {_MAX_ELEMENTS} elements"
    elif any(size < 0 for size in sizes):
        yield f"{name}: shape {sizes}, wanted sizes of 0 or more"
    elif isinstance(tensor, ir.ExternalTensor) and is_text:
        yield f"{name}: strings can't be in another file"
    elif isinstance(tensor, ir.serde.TensorProtoTensor) and not is_text:
        held, needed = _held_bytes(tensor.raw, dtype, bits), math.ceil(math.prod(sizes) * bits / 8)
        if held != needed:
            yield f"{name}: holds {held} bytes, but its shape {sizes} of {dtype.name} needs {needed}"


def _held_bytes(proto: Any, dtype: ir.DataType, bits: int) -> int:
    """Return the bytes of values of a tensor in the graph's own file (``onnx.proto``, TensorProto)."""
    if proto.HasField("raw_data"):
        return len(proto.raw_data)
    field = _FIELD.get(dtype, "int32_data")
    others = [name for name in _FIELDS if name != field and len(getattr(proto, name))]
    count = 0 if others else len(getattr(proto, field))
    if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        return count * bits // 16
    # For types below a byte, one number holds the values of a whole byte.
    return count if bits < 8 else count * bits // 8


def _node_problems(node: ir.Node, version: int) -> Iterator[str]:
    for problem in _broken(node, _schema(node.domain, node.op_type, version)):
        yield f"{_name_of(node)} ({shown(node.op_type, _NAME)}): {problem}"


def _name_of(node: ir.Node) -> str:
    return f"node '{shown(node.name, _NAME)}'" if node.name else "a node"


def _broken(node: ir.Node, schema: _Schema | None) -> Iterator[str]:
    kinds = _KINDS | (schema.kinds if schema else {})
    for attribute in node.attributes.values():
        kind = kinds.get(attribute.name)
        if attribute.type == ir.AttributeType.UNDEFINED:
            yield f"the attribute {shown(attribute.name, _NAME)} has no type"
        elif attribute.is_ref():
            name = shown(attribute.name, _NAME)
            yield f"the attribute {name} refers to a function's attribute, outside of functions"
        elif kind and attribute.type.name != kind:
            name = shown(attribute.name, _NAME)
            yield f"the attribute {name} is of type {attribute.type.name}, wanted {kind}"
        elif kind == "INT" and attribute.name in _TYPES and not _is_type(attribute.value):
            yield f"the attribute {attribute.name} is {attribute.value}, wanted an element type of ONNX"
        elif attribute.type == ir.AttributeType.TENSOR:
            yield from _tensor_problems(attribute.value, shown(attribute.name, _NAME))
    yield from _broken_branches(node)
    if schema is None:
        is_ours = node.domain in ("", "ai.onnx", "com.microsoft")
        if is_ours and len(node.inputs) < (least := _INPUTS.get(node.op_type, 0)):
            yield f"{len(node.inputs)} inputs, wanted at least {least}"
        return
    if len(node.outputs) < schema.outputs:
        yield f"{len(node.outputs)} outputs, wanted at least {schema.outputs}"
    given = [value is not None for value in node.inputs]
    if missing := [i for i in schema.inputs if i >= len(given) or not given[i]]:
        yield f"no input {', '.join(map(str, missing))}, which the operator needs"
    if absent := [name for name in schema.required if name not in node.attributes]:
        yield f"no attribute {', '.join(absent)}, which the operator needs"


def _broken_branches(node: ir.Node) -> Iterator[str]:
    for name in ("then_branch", "else_branch"):
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.type == ir.AttributeType.GRAPH:
            count = len(attribute.as_graph().outputs)
            if count != len(node.outputs):
                yield f"{name} has {count} outputs, wanted {len(node.outputs)}"


def _is_type(number: int) -> bool:
    try:
        return ir.DataType(number) is not None
    except ValueError:
        return False


class _Schema:
    """Inputs, outputs and attributes that a version of an operator needs."""

    def __init__(self, schema: Any) -> None:
        from onnx.defs import OpSchema

        self.kinds = {name: attribute.type.name for name, attribute in schema.attributes.items()}
        self.required = [name for name, attribute in schema.attributes.items() if attribute.required]
        single = OpSchema.FormalParameterOption.Single
        self.inputs = [i for i, one in enumerate(schema.inputs) if one.option == single]
        self.outputs = sum(one.option == single for one in schema.outputs)


@lru_cache(maxsize=4096)
def _schema(domain: str, op_type: str, version: int) -> _Schema | None:
    from onnx import defs

    # An operator that the onnx package does not know at this version is read as the newest one that it knows.
    for known in (version, 0):
        try:
            found = defs.get_schema(op_type, known, domain) if known > 0 else defs.get_schema(op_type, domain)
            return _Schema(found)
        except Exception:  # onnx raises its own
            continue
    return None
