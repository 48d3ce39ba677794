"""Check the types of numbers that an engine can have, and the GPUs that have them.

Measured with TensorRT-RTX 1.7.1 (`tests/engines/test_admit.py` builds each row again). It compiles for all
targets together, so that no engine can be built if one GPU lacks a type.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from lora_export.engines.backend import Compiler
from lora_export.engines.prepare.problem import BuildProblem, of_nodes, of_places
from lora_export.graph.onnx_file import GraphFile
from lora_export.sites.node_text import node_text

Capability = tuple[int, int]
_T = ir.DataType
# Least compute capability.
NEEDS: dict[ir.DataType, Capability] = {
    _T.BFLOAT16: (8, 0),
    _T.INT4: (8, 0),
    _T.FLOAT8E4M3FN: (8, 9),
    _T.FLOAT4E2M1: (10, 0),
}
TAKEN = frozenset(
    {
        *(_T.FLOAT, _T.FLOAT16, _T.DOUBLE, _T.INT8, _T.UINT8, _T.INT32, _T.INT64, _T.BOOL, _T.UNDEFINED),
        *NEEDS,
    }
)
# Types that exist between QuantizeLinear and DequantizeLinear and as constants, not as inputs or from Cast.
_WEIGHTS_ONLY = frozenset({_T.INT4, _T.FLOAT8E4M3FN, _T.FLOAT4E2M1})
_DTYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")
_PRODUCTS = frozenset({"MatMul", "Gemm", "MatMulNBits"})


def capability(text: str) -> Capability:
    """Return ``8.9`` as two numbers."""
    major, _, minor = text.partition(".")
    return int(major), int(minor or 0)


def dtype_problems(
    graph: GraphFile, capabilities: Sequence[str], compiler: Compiler
) -> Iterator[BuildProblem]:
    """Yield the inputs, constants and nodes whose type the compiler or one of the GPUs lacks."""
    places = _places(graph)
    for dtype, found in places.items():
        if dtype not in TAKEN:
            reason = f"{compiler.title} has no {dtype.name.lower()}"
            yield from of_places(_texts(found), reason, _hint(dtype))
        elif lacking := lacks(dtype, capabilities):
            yield from of_places(_texts(found), lacking, _hint(dtype))
    yield from _exposed_weights(graph, compiler)
    yield from _float32_products(graph, capabilities, compiler)


def lacks(dtype: ir.DataType, capabilities: Sequence[str]) -> str:
    """Return a sentence on the targets that lack a type; "" if all have it."""
    least = NEEDS.get(dtype)
    if least is None:
        return ""
    older = [text for text in capabilities if capability(text) < least]
    if not older:
        return ""
    needed = ".".join(map(str, least))
    return f"{dtype.name.lower()} needs compute capability {needed}, but a target has {', '.join(older)}"


def _hint(dtype: ir.DataType) -> str:
    if dtype not in TAKEN:
        return "quantise symmetrically with int4" if dtype is _T.UINT4 else "export it with another type"
    if dtype is _T.BFLOAT16:
        return "make the graph in float16, or omit older GPUs from the targets"
    return "omit older GPUs from the targets, or build for them from another graph"


def dtype_notes(graph: GraphFile) -> Iterator[str]:
    """Yield notes on changes that the compiler makes by itself: float64 becomes float32."""
    places = _places(graph).get(_T.DOUBLE, [])
    ports = [
        str(value.name) for value in (*graph.graph.inputs, *graph.graph.outputs) if value.dtype is _T.DOUBLE
    ]
    if places:
        takes = f"; the engine takes and gives float32 for {', '.join(ports)}" if ports else ""
        yield f"float64 is computed in float32, because TensorRT has no float64 ({len(places)} places){takes}"


def _places(graph: GraphFile) -> dict[ir.DataType, list[str | ir.Node]]:
    """Return type → the inputs, constants and nodes of the graph that have it."""
    found: dict[ir.DataType, list[str | ir.Node]] = defaultdict(list)
    for value in graph.graph.inputs:
        dtype = value.dtype
        if isinstance(value.type, (ir.SequenceType, ir.OptionalType)):
            dtype = None
        if dtype is not None and not value.is_initializer():
            found[dtype].append(f"input {value.name!r}")
    for value in graph.initializers():
        assert value.const_value is not None
        found[value.const_value.dtype].append(f"constant {value.name!r}")
    for node in graph.model.graph.all_nodes():
        for dtype in dict.fromkeys(_types_of(node)):
            found[dtype].append(node)
    return dict(found)


def _texts(places: Sequence[str | ir.Node]) -> list[str]:
    return [place if isinstance(place, str) else node_text(place) for place in places]


def _types_of(node: ir.Node) -> Iterator[ir.DataType]:
    # In other domains, these attributes may mean something else.
    for name in _DTYPE_ATTRIBUTES if node.domain in ("", "ai.onnx") else ():
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.type == ir.AttributeType.INT and not attribute.is_ref():
            yield ir.DataType(attribute.as_int())
    for output in node.outputs:
        dtype = output.const_value.dtype if output.const_value is not None else output.dtype
        if dtype is not None:
            yield dtype


def _exposed_weights(graph: GraphFile, compiler: Compiler) -> Iterator[BuildProblem]:
    """Yield inputs and casts with types that only weights can have, and inputs that are not tensors."""
    hint = "export it with another type"
    for value in graph.graph.inputs:
        if isinstance(value.type, (ir.SequenceType, ir.OptionalType)):
            reason = f"{compiler.title} takes only tensors"
            yield from of_places([f"input {value.name!r}"], reason, "export a graph whose inputs are tensors")
        elif value.dtype in _WEIGHTS_ONLY and not value.is_initializer():
            reason = f"{compiler.title} has {value.dtype.name.lower()} for weights, not for inputs"
            yield from of_places([f"input {value.name!r}"], reason, hint)
    casts: dict[ir.DataType, list[ir.Node]] = defaultdict(list)
    for node in graph.model.graph.all_nodes():
        if (
            node.op_type == "Cast"
            and (dtype := ir.DataType(node.attributes.get_int("to", 0))) in _WEIGHTS_ONLY
        ):
            casts[dtype].append(node)
    for dtype, nodes in casts.items():
        reason = f"{compiler.title} makes {dtype.name.lower()} by QuantizeLinear, not by Cast"
        yield from of_nodes(nodes, reason, hint)


def _float32_products(
    graph: GraphFile, capabilities: Sequence[str], compiler: Compiler
) -> Iterator[BuildProblem]:
    """Yield float32 products where the compiler has none for one of the GPUs."""
    lacking = sorted(compiler.no_float32_products.intersection(capabilities))
    if not lacking:
        return
    nodes = [
        node
        for node in graph.model.graph.all_nodes()
        if node.op_type in _PRODUCTS
        and any(v is not None and v.dtype in (_T.FLOAT, _T.DOUBLE) for v in (*node.inputs, *node.outputs))
    ]
    names = ", ".join(lacking)
    reason = f"{compiler.title} can't multiply float32 matrices on compute capability {names}"
    yield from of_nodes(nodes, reason, f"make the graph in float16, or omit GPUs of {names} from the targets")
