"""Find the sizes of a graph's values when its inputs are as large as a profile allows.

Most shapes are in the graph, as names and expressions that the inputs give sizes to. onnx infers the rest
from inputs of these sizes. Older exporters compute shapes in the graph (Shape, Gather, Range …) in ways that
onnx does not follow: values that are constant for these sizes are folded, and onnx infers again. Weights are
not read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.engines.record import Profile
from lora_export.graph.expressions import evaluate
from lora_export.graph.onnx_file import GraphFile, initializer_of, shape_of
from lora_export.untrusted.computed import elements

if TYPE_CHECKING:
    import onnx

Shape = tuple[int, ...]

_INDEX_NAMES = """
Shape Gather Unsqueeze Squeeze Concat Slice Range Reshape Identity Cast
Add Sub Mul Div Mod Min Max Neg Equal Where ConstantOfShape Constant
"""
# Operators that exporters compute shapes with.
_INDEX_OPERATORS = frozenset(_INDEX_NAMES.split())
# Above this size onnx must not propagate values: it would make arrays of them.
_MAX_PROPAGATED = 1 << 20
_COMPUTED = (ir.DataType.INT64, ir.DataType.INT32)
# A shape has a few elements, and a chain of such operators is a few layers of inference deep.
_MAX_ELEMENTS, _MAX_ROUNDS = 64, 8
# Limit of elements that one node may make from such constants (a Gather of all from all).
_MAX_COMPUTED = _MAX_ELEMENTS**2


@dataclass(frozen=True)
class Sized:
    """Type and largest shape of a value."""

    dtype: ir.DataType
    shape: Shape

    @property
    def bytes(self) -> int:
        """Size of its elements in bytes; 4-bit types are packed."""
        return math.ceil(math.prod(self.shape) * self.dtype.bitwidth / 8)


def input_shapes(graph: GraphFile, profile: Profile) -> dict[str, Shape]:
    """Return each input's largest shape; constants, and inputs of unknown size, are left out."""
    found = {}
    for value in graph.graph.inputs:
        name = str(value.name)
        if name in profile.shapes:
            found[name] = tuple(profile.shapes[name][2])
        elif value.const_value is None and (shape := _evaluated(value.shape, {})) is not None:
            found[name] = shape
    return found


def dimensions(graph: GraphFile, inputs: Mapping[str, Shape]) -> dict[str, int]:
    """Return the size of each dimension that the inputs name, given their shapes."""
    sizes: dict[str, int] = {}
    for value in graph.graph.inputs:
        for dim, size in zip(value.shape or (), inputs.get(str(value.name), ()), strict=False):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                sizes[dim.value] = max(size, sizes.get(dim.value, 0))
    return sizes


def largest_values(
    graph: GraphFile, inputs: Mapping[str, Shape], dims: Mapping[str, int]
) -> dict[str, Sized]:
    """Return the sizes of the graph's inputs and of its nodes' outputs, by name; unknown ones are missing.

    Args:
        graph: The graph; it is not changed.
        inputs: Shapes of its inputs.
        dims: Size of each named dimension.
    """
    known: dict[str, Sized] = {}
    for value in graph.graph.inputs:
        name = str(value.name)
        if value.dtype is not None and name in inputs:
            known[name] = Sized(value.dtype, inputs[name])
    for value in _made(graph.model):
        shape = _evaluated(value.shape, dims)
        if value.dtype is not None and shape is not None:
            known[str(value.name)] = Sized(value.dtype, shape)
    if any(value.name not in known for value in _made(graph.model)):
        return _inferred(graph.model, known)
    return known


def _made(model: ir.Model) -> Iterator[ir.Value]:
    """Yield the nodes' outputs; one without a name is absent."""
    for node in model.graph.all_nodes():
        yield from (value for value in node.outputs if value.name)


def _evaluated(shape: ir.Shape | None, dims: Mapping[str, int]) -> Shape | None:
    if shape is None:
        return None
    sizes = [dim if isinstance(dim, int) else evaluate(str(dim.value), dims) for dim in shape]
    known = [size for size in sizes if size is not None and size >= 0]
    return tuple(known) if len(known) == len(sizes) else None


# --- shapes that are not in the graph ------------------------------------------------------------------


def _inferred(model: ir.Model, known: Mapping[str, Sized]) -> dict[str, Sized]:
    """Return the known sizes and those that onnx infers from them."""
    copy = _without_weights(model)
    folded: dict[str, Sized] = {}
    found: dict[str, Sized] = {}
    for _ in range(_MAX_ROUNDS):
        _set(copy, found | dict(known))
        found |= _infer(copy)
        missing = any(value.name not in found for value in _made(copy))
        if not missing or not _fold_indices(copy, folded):
            break
    return found | folded | dict(known)


def _without_weights(model: ir.Model) -> ir.Model:
    """Return a copy with large constants as inputs: onnx serialises the model that it works on."""
    copy = model.clone()
    for node in copy.graph.all_nodes():
        # Exporters keep their traces here, most of what would be serialised.
        node.metadata_props.clear()
    for value in list(copy.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or _small(value) is not None:
            continue
        value.type, value.shape, value.const_value = (
            ir.TensorType(tensor.dtype),
            ir.Shape(shape_of(tensor)),
            None,
        )
        copy.graph.initializers.pop(str(value.name))
        if not value.is_graph_input():
            copy.graph.inputs.append(value)
    return copy


def _set(model: ir.Model, known: Mapping[str, Sized]) -> None:
    """Set the known types and shapes in a model, and remove all other shapes: a wrong one stops onnx."""
    for value in (*model.graph.inputs, *_made(model)):
        sized = known.get(str(value.name))
        if sized is not None:
            value.type, value.shape = ir.TensorType(sized.dtype), ir.Shape(sized.shape)
        elif value.producer() is not None:
            value.shape = None


def _infer(model: ir.Model) -> dict[str, Sized]:
    found = _inferred_by_onnx(model, False)
    vectors = [sized.shape[0] for sized in found.values() if len(sized.shape) == 1]
    shapes = (value.shape or () for value in model.graph.inputs)
    sizes = [size for shape in shapes for size in shape if isinstance(size, int)]
    made = [sized.shape[0] for sized in found.values() if len(sized.shape) == 1 and sized.dtype in _COMPUTED]
    # onnx's propagation of values would fill the memory, by one vector or by all that nodes make.
    if max((*vectors, *sizes, sum(made)), default=0) > _MAX_PROPAGATED:
        return found
    return _inferred_by_onnx(model, True)


def _inferred_by_onnx(model: ir.Model, data_prop: bool) -> dict[str, Sized]:
    # onnx_ir's pass makes the same call, but prints a traceback if onnx finds two shapes for one value.
    from onnx import shape_inference

    try:
        inferred = shape_inference.infer_shapes(ir.to_proto(model), data_prop=data_prop)
    except shape_inference.InferenceError:
        return {}
    found = {}
    for value in _told(inferred.graph):
        kind = value.type.tensor_type
        sizes = [dim.dim_value for dim in kind.shape.dim if dim.HasField("dim_value")]
        if kind.elem_type and kind.HasField("shape") and len(sizes) == len(kind.shape.dim):
            found[value.name] = Sized(ir.DataType(kind.elem_type), tuple(sizes))
    return found


def _told(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto]:
    """Yield onnx's value infos of a graph and of the graphs in it."""
    yield from (*graph.value_info, *graph.output)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _told(attribute.g)


def _fold_indices(model: ir.Model, folded: dict[str, Sized]) -> bool:
    """Turn values that are computed from shapes alone into constants; return whether there were any.

    Args:
        model: The model, which is changed.
        folded: Folded values, which are added to.
    """
    before = len(folded)
    for node in list(model.graph):
        output = node.outputs[0]
        if node.op_type not in _INDEX_OPERATORS or node.domain:
            continue
        if output.const_value is not None or output.name in folded:
            continue
        array = _index(node, model.opset_imports.get("", 1))
        if array is None:
            continue
        folded[str(output.name)] = sized = Sized(ir.DataType.from_numpy(array.dtype), array.shape)
        output.type, output.shape = ir.TensorType(sized.dtype), ir.Shape(sized.shape)
        if array.size <= _MAX_ELEMENTS:
            output.const_value = ir.tensor(array, name=output.name)
            initializer_of(output)
    return len(folded) > before


def _index(node: ir.Node, opset: int) -> Array | None:
    """Return the value of a node whose inputs are small constants or known shapes; else None."""
    if node.op_type == "Shape":
        shape = _evaluated(node.inputs[0].shape, {}) if node.inputs[0] is not None else None
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
        return None if shape is None else np.array(shape[start:end], np.int64)
    inputs = [None if value is None else _small(value) for value in node.inputs]
    if any(value is not None and array is None for value, array in zip(node.inputs, inputs, strict=True)):
        return None
    proto = ir.to_proto(node)
    try:
        count = elements(proto, inputs)
        if count <= _MAX_COMPUTED:
            return _run(proto, inputs, opset)
        # Positions of a whole sequence: a shape needs only their number.
        return (
            np.broadcast_to(inputs[0], (count,))
            if node.op_type == "Range" and inputs[0] is not None
            else None
        )
    except Exception:  # onnx and numpy raise many kinds; a value that can't be computed stays unknown
        return None


def _small(value: ir.Value) -> Array | None:
    tensor = value.const_value
    # Weights may be in other files; the constants that shapes are computed from never are.
    if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.size > _MAX_ELEMENTS:
        return None
    array: Array = tensor.numpy()
    return array


def _run(node: onnx.NodeProto, inputs: Sequence[Array | None], opset: int) -> Array | None:
    # onnx_ir can't evaluate nodes.
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    known = {name: array for name, array in zip(node.input, inputs, strict=True) if array is not None}
    ports = [
        helper.make_tensor_value_info(name, ir.DataType.from_numpy(array.dtype), array.shape)
        for name, array in known.items()
    ]
    graph = helper.make_graph([node], "index", ports, [helper.make_empty_tensor_value_info(node.output[0])])
    results = ReferenceEvaluator(graph, opsets={"": opset}).run(None, known)
    return np.asarray(results[0]) if isinstance(results, list) else None
