"""Check the protobuf of a stranger's ONNX file for content that readers read differently, or not at all.

1. Nothing has two meanings: two initializers, outputs, attributes, functions or metadata entries with one
   name. ONNX Runtime takes the first of them, onnx_ir the last.
2. Nothing exists that onnx_ir ignores: sparse tensors, constants without a name.
3. Values that a node reads exist: in its graph, or in one around it; for a function, in that alone. No value
   is computed from itself.
4. All texts are UTF-8: protobuf returns others as bytes, which no reader takes for names.
5. No function has the name of an operator: a runtime computes the operator instead of the function.
6. Places in other files are plain digits: ``1_0`` is ten to Python and one to ONNX Runtime.

All of it is checked before onnx_ir makes a graph from the file, in one pass, without reading values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from lora_export.untrusted.numbers import whole_number
from lora_export.untrusted.shown import shown

if TYPE_CHECKING:
    import onnx

_NAME = 120
# Texts that are named: a graph in another encoding has thousands.
_MOST = 100
_TEXTS_OF_A_TENSOR = ("name", "doc_string", "external_data", "metadata_props")
_ONNX = ("", "ai.onnx")
# Domains of ONNX's and ONNX Runtime's own operators, except ``com.microsoft``: functions there define what an
# operator does, and the operator counts (`lora_export.graph.read_model`).
_RUNTIMES = ("ai.onnx", "com.microsoft.", "com.ms.", "org.pytorch.aten")


def proto_problems(proto: onnx.ModelProto) -> Iterator[str]:
    """Yield the problems of a model, by the rules above."""
    if problems := list(islice(_not_utf8(proto), _MOST)):
        yield from problems  # the comparison of names needs texts
        return
    yield from _entries(proto.metadata_props, "the metadata")
    opsets = [(_domain(entry.domain), entry.version) for entry in proto.opset_import]
    yield from _twice_unlike(opsets, "the versions of the operators", "domain")
    functions = [(function.domain, function.name, function.overload) for function in proto.functions]
    yield from (f"two functions are called {_text(name[1])}" for name in _twice(functions))
    yield from _graph(proto.graph, [])
    for function in proto.functions:
        yield from _function(function)


def _not_utf8(proto: onnx.ModelProto) -> Iterator[str]:
    """Yield the fields whose text protobuf could not decode; rule 4."""
    left: list[Any] = [proto]
    while left:
        message = left.pop()
        for field, value in _fields(message):
            if isinstance(value, str):
                continue  # as most are: descriptors are slow to ask
            kind = field.type
            if kind == field.TYPE_MESSAGE:
                left.extend([value] if hasattr(value, "ListFields") else value)
            elif kind == field.TYPE_STRING:
                texts = [value] if isinstance(value, bytes) else value
                where = field.full_name.removeprefix("onnx.")
                yield from (
                    f"{where}: {text[:_NAME]!r} is not UTF-8" for text in texts if isinstance(text, bytes)
                )


def _fields(message: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the fields of a message that are set; of a tensor not its values, which may be gigabytes."""
    if message.DESCRIPTOR.name != "TensorProto":
        yield from message.ListFields()
        return
    for field in message.DESCRIPTOR.fields:
        if field.name in _TEXTS_OF_A_TENSOR and (value := getattr(message, field.name)):
            yield field, value


def _function(function: onnx.FunctionProto) -> Iterator[str]:
    where = f"the function {_text(function.name)}"
    known = _is_known(function.domain, function.name)
    if known or function.domain in _ONNX or function.domain.startswith(_RUNTIMES):
        domain = _text(function.domain or "ai.onnx")
        yield f"{where} has the name of an operator ({domain}), which a runtime computes in its place"
    yield from _entries(function.metadata_props, where)
    yield from (f"two inputs of {where} are called {_text(name)}" for name in _twice(function.input))
    yield from _nodes(function.node, set(function.input), [], where)


def _is_known(domain: str, name: str) -> bool:
    from onnx import defs

    return bool(defs.has(name, "" if domain in _ONNX else domain))


def _graph(graph: onnx.GraphProto, around: list[set[str]]) -> Iterator[str]:
    where = "the graph" if not around else f"the subgraph {_text(graph.name)}"
    for sparse in graph.sparse_initializer:
        yield f"{_text(sparse.values.name)}: a sparse tensor, which is not supported; store it as a dense one"
    for tensor in graph.initializer:
        yield from _tensor(tensor)
        if not tensor.name:
            yield f"an initializer of {where} has no name"
    inputs = [value.name for value in graph.input]
    constants = [tensor.name for tensor in graph.initializer]
    for names, kind in (
        (inputs, "inputs"),
        (constants, "initializers"),
        ([value.name for value in graph.output], "outputs"),
    ):
        yield from (f"two {kind} of {where} are called {_text(name)}" for name in _twice(names))
    yield from _entries(graph.metadata_props, where)
    constants += [sparse.values.name for sparse in graph.sparse_initializer]
    yield from _nodes(graph.node, {*inputs, *constants}, around, where)
    # Not what a graph around it has: ONNX Runtime wants an Identity between.
    known = {name for node in graph.node for name in node.output}.union(inputs, constants)
    for value in graph.output:
        if value.name not in known:
            yield f"{_text(value.name)}: an output of {where}, but no node computes it"


def _nodes(
    nodes: Iterable[onnx.NodeProto], given: set[str], around: list[set[str]], where: str
) -> Iterator[str]:
    """Yield the problems of the nodes of one graph or function.

    Args:
        nodes: Nodes of the graph.
        given: Names of its inputs and constants.
        around: Names in each graph around it.
        where: The graph, for messages.
    """
    nodes = list(nodes)
    made = [name for node in nodes for name in node.output if name]
    yield from (
        f"{_text(name)}: computed by two nodes of {where}, or also one of its inputs or constants"
        for name in _twice([*given, *made])
    )
    inside = given.union(made)
    scopes = [*around, inside]
    reads: list[set[str]] = []
    for node in nodes:
        yield from _node(node)
        names = {name for name in node.input if name}
        for graph in _subgraphs(node):
            yield from _graph(graph, scopes)
            names |= _read_outside(graph)
        yield from (
            f"{_text(name)}: read by a node of {where} ({_text(node.op_type)}), but no node computes it"
            for name in sorted(names)
            if not any(name in scope for scope in scopes)
        )
        reads.append(names)
    if cycle := _in_cycle(nodes, reads, given):
        yield f"{_text(cycle)}: computed from itself, in {where}"


def _node(node: onnx.NodeProto) -> Iterator[str]:
    where = f"the node {_text(node.name or node.op_type)}"
    names = [attribute.name for attribute in node.attribute]
    yield from (f"two attributes of {where} are called {_text(name)}" for name in _twice(names))
    yield from _entries(node.metadata_props, where)
    for attribute in node.attribute:
        if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
            yield f"{where}: a sparse tensor, which is not supported; store it as a dense one"
        for tensor in (attribute.t, *attribute.tensors) if attribute.HasField("t") else attribute.tensors:
            yield from _tensor(tensor)


def _tensor(tensor: onnx.TensorProto) -> Iterator[str]:
    where = f"the external data of {_text(tensor.name)}"
    yield from _entries(tensor.external_data, where)
    for entry in tensor.external_data:
        if entry.key in ("offset", "length") and whole_number(entry.value) is None:  # rule 6
            yield f"{where}: the {entry.key} is {_text(entry.value)}, wanted a number in digits"
    yield from _entries(tensor.metadata_props, _text(tensor.name))


def _entries(entries: Iterable[Any], where: str) -> Iterator[str]:
    yield from _twice_unlike([(entry.key, entry.value) for entry in entries], where, "entry")


def _twice_unlike(pairs: Collection[tuple[str, Any]], where: str, kind: str) -> Iterator[str]:
    """Yield the keys that have two different values; a key with one value twice has one meaning."""
    first: dict[str, Any] = {}
    for key, value in pairs:
        if first.setdefault(key, value) != value:
            yield f"{where}: the {kind} {_text(key)} occurs twice, with two values"


def _twice(names: Iterable[Any]) -> list[Any]:
    return [name for name, count in Counter(names).items() if count > 1]


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _read_outside(graph: onnx.GraphProto) -> set[str]:
    """Return the names that a subgraph reads from the graphs around it."""
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    own.update(name for node in graph.node for name in node.output)
    read = {value.name for value in graph.output if value.name}
    for node in graph.node:
        read.update(name for name in node.input if name)
        for inner in _subgraphs(node):
            read |= _read_outside(inner)
    return read - own


def _in_cycle(nodes: list[onnx.NodeProto], reads: list[set[str]], given: set[str]) -> str:
    """Return a value that depends on itself, or ""."""
    maker = {name: number for number, node in enumerate(nodes) for name in node.output if name not in given}
    readers: list[list[int]] = [[] for _ in nodes]
    waiting = []
    for number, names in enumerate(reads):
        makers = {maker[name] for name in names if name in maker}
        for one in makers:
            readers[one].append(number)
        waiting.append(len(makers))
    ready = [number for number, count in enumerate(waiting) if not count]
    while ready:
        for reader in readers[ready.pop()]:
            waiting[reader] -= 1
            if not waiting[reader]:
                ready.append(reader)
    left = [number for number, count in enumerate(waiting) if count]
    return next((name for number in left for name in nodes[number].output), "")


def _domain(name: str) -> str:
    return "" if name in _ONNX else name


def _text(name: str) -> str:
    return f"'{shown(name, _NAME)}'"
