"""Load, check and save ONNX graphs with `onnx_ir`, and find the bytes of their constants.

External data is never read here: a constant is a `ConstantSource`, a byte range of a file, until its values
are needed. A graph may refer (see https://onnx.ai/onnx/repo-docs/ExternalData.html) to a file in the model's
own folder or below it, but not by an absolute path, through ``..``, or through a link out of the folder.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.errors import GraphError
from lora_export.graph.data_identity import (
    DataTensor,
    external_tensors,
    layout_hash,
    place_problem,
    refuse_changed_data,
)
from lora_export.graph.read_model import inlined, read_model
from lora_export.graph.scale_shapes import scale_problems
from lora_export.storage.inputs import note_inputs
from lora_export.storage.sums import seal
from lora_export.untrusted.places import is_file, is_folder
from lora_export.untrusted.shown import limited

# Limit of named tensors whose data is missing: usually it is all tensors of a file.
_SHOWN = 5
# Types that a merge can compute in. Everything else (int8, uint4, float8 …) is a quantised weight.
FLOAT_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


@dataclass(frozen=True, eq=False)
class ConstantSource:
    """The place of a constant's bytes: ``length`` bytes at ``offset`` of ``path``, or ``data`` in memory.

    It is neither if they are made when the constant is written (`ir.LazyTensor`).
    """

    length: int
    path: Path | None = None
    offset: int = 0
    data: bytes | None = None


@dataclass(eq=False)
class GraphFile:
    """An ONNX model and the folder that its external data is relative to."""

    model: ir.Model
    path: Path

    @property
    def graph(self) -> ir.Graph:
        """The main graph."""
        return self.model.graph

    def graphs(self) -> Iterator[ir.Graph]:
        """Yield the main graph and every subgraph (If, Loop, Scan)."""
        yield self.model.graph
        yield from self.model.graph.subgraphs()

    def initializers(self) -> Iterator[ir.Value]:
        """Yield every initializer that has values, of the main graph and of subgraphs."""
        for graph in self.graphs():
            for value in graph.initializers.values():
                if value.const_value is not None:
                    yield value

    def data_files(self) -> set[Path]:
        """Return the files other than the graph's own that hold its constants' values."""
        tensors = (value.const_value for value in self.initializers())
        return {Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}


def load_graph(path: str | os.PathLike[str], *, portable: bool = False) -> GraphFile:
    """Read an ONNX file without its external data, and check that the external data belongs to it.

    Functions are inlined, so that every node is in a graph, except those that define one of ONNX Runtime's
    own operators: ONNX Runtime runs the operator, whose results differ in bits from the function's.

    Args:
        path: The file.
        portable: Inline those as well, for other runtimes.

    Raises:
        GraphError: The file is not an ONNX file, or is empty; its external data is missing, short, outside
            of the folder, or not the data that a graph of ours was written with; or scales don't fit the
            weights that they quantise.
    """
    file = Path(path)
    if is_folder(file):
        raise GraphError(
            f"{file} is a folder, not an ONNX file",
            "give the .onnx in it; for a checkpoint: lora-export capture-onnx FOLDER -o base.onnx",
        )
    if not is_file(file):
        raise GraphError(f"no ONNX file at {file}", "check the path")
    note_inputs([file])
    model = inlined(read_model(file), file, portable=portable)
    model.metadata_props.pop(seal.KEY, None)  # the seal of this file, not of files made from the graph
    graph = GraphFile(model, file)
    _read_constants(model)
    problems = [problem for value in graph.initializers() for problem in _external_problems(value, file)]
    if not problems:
        note_inputs(graph.data_files())
    problems += _attribute_problems(model)
    if problems:
        raise GraphError(
            f"{file} has {len(problems)} tensors whose external data can't be read",
            "put the data files of this .onnx beside it, at the same relative paths as before",
            limited(problems, most=_SHOWN),
        )
    if problems := list(scale_problems(model)):
        raise GraphError(
            f"{file} has {len(problems)} scales or zero points that don't fit what they quantise",
            "no runtime takes the graph: quantise it again",
            limited(problems, most=_SHOWN),
        )
    refuse_changed_data(model.metadata_props, file, lambda: layout_hash(external_tensors(model)))
    for value in graph.initializers():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = DataTensor(value.const_value, Path(value.const_value.path))
    return graph


def _read_constants(model: ir.Model) -> None:
    """Set the values of Constant nodes' outputs; those in other files become initializers."""
    for node in list(model.graph.all_nodes()):
        if node.op_type != "Constant" or (tensor := _constant_tensor(node)) is None:
            continue
        node.outputs[0].const_value = tensor
        if isinstance(tensor, ir.ExternalTensor):
            initializer_of(node.outputs[0])


def initializer_of(value: ir.Value) -> ir.Value:
    """Turn a Constant node's output into an initializer of the same name; return an initializer unchanged."""
    maker = value.producer()
    if maker is None:
        return value
    graph, tensor = maker.graph, value.const_value
    assert isinstance(graph, ir.Graph)
    assert tensor is not None
    name, outputs = value.name, value.is_graph_output()
    new = ir.Value(name=name, shape=value.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    ir.convenience.replace_all_uses_with(value, new, replace_graph_outputs=outputs)
    graph.remove(maker, safe=False)
    graph.register_initializer(new)
    return new


def take_over_output(product: ir.Value, total: ir.Value) -> None:
    """Make ``total`` the graph's output in place of ``product``, under the output's name."""
    node = product.producer()
    assert node is not None
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    product.name, total.name = total.name, product.name
    graph.outputs[list(graph.outputs).index(product)] = total


def _constant_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    attribute = node.attributes.get("value")
    return attribute.as_tensor() if attribute is not None and not attribute.is_ref() else None


def _attribute_problems(model: ir.Model) -> Iterator[str]:
    """Yield attributes with tensors in other files: these aren't read, but an output would refer to them."""
    owners: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for node in (node for owner in owners for node in owner.all_nodes()):
        for attribute in node.attributes.values():
            if attribute.is_ref() or attribute.type not in (
                ir.AttributeType.TENSOR,
                ir.AttributeType.TENSORS,
            ):
                continue
            held = attribute.value if attribute.type == ir.AttributeType.TENSORS else [attribute.value]
            if any(isinstance(tensor, ir.ExternalTensor) for tensor in held):
                yield f"attribute {attribute.name!r} of node {node.name!r} ({node.op_type}): external data"


def _external_problems(value: ir.Value, file: Path) -> Iterator[str]:
    tensor = value.const_value
    if not isinstance(tensor, ir.ExternalTensor):
        return
    location = str(tensor.location)
    if problem := place_problem(file, location):
        yield f"{value.name}: {problem}"
        return
    path = Path(tensor.path)
    if not is_file(path):
        yield f"{value.name}: external data file {location!r} does not exist"
        return
    needed, offset = byte_size(tensor), tensor.offset or 0
    length = needed if tensor.length is None else tensor.length
    size = path.stat().st_size
    if length != needed:
        yield f"{value.name}: states {length} bytes, but its shape {tuple(tensor.shape)} needs {needed}"
    elif offset + length > size:
        yield f"{value.name}: bytes {offset}–{offset + length} of {location!r}, which has {size}"


def byte_size(tensor: ir.TensorProtocol) -> int:
    """Return the bytes of a dense tensor of this dtype and shape in ONNX (4-bit types packed in pairs)."""
    return math.ceil(math.prod(int(d) for d in tensor.shape.numpy()) * tensor.dtype.bitwidth / 8)


def source_of(tensor: ir.TensorProtocol) -> ConstantSource:
    """Return the place of a tensor's bytes (little-endian, as ONNX stores raw data)."""
    if isinstance(tensor, ir.ExternalTensor):
        return ConstantSource(byte_size(tensor), Path(tensor.path), tensor.offset or 0)
    if isinstance(tensor, ir.LazyTensor):
        return ConstantSource(byte_size(tensor))
    data = tensor.tobytes()
    return ConstantSource(len(data), data=data)


def stored_matrix(tensor: ir.TensorProtocol) -> Array:
    """Return a (memory-mapped) view of a tensor as a matrix, see `matrix_shape`."""
    values: Array = np.asarray(tensor.numpy())
    return values.reshape(matrix_shape(values.shape))


def release(value: ir.Value) -> None:
    """Release the memory of a constant's pages that were read; views of it stay valid.

    Pages of a mapped file count as this process's memory until then: comparing all weights of a model would
    take the model's size.
    """
    tensor = value.const_value
    if isinstance(tensor, ir.ExternalTensor) and tensor.raw is not None and hasattr(mmap, "MADV_DONTNEED"):
        tensor.raw.madvise(mmap.MADV_DONTNEED)


def matrix_shape(shape: tuple[int, ...], stacked: bool = False) -> tuple[int, int]:
    """Return the shape of a stored tensor viewed as a matrix.

    The first axis is the rows and the rest the columns; a vector is one column; ``stacked`` matrices
    (experts) have the first two axes as rows.
    """
    if stacked and len(shape) == 3:
        return shape[0] * shape[1], shape[2]
    if not shape:
        return 1, 1
    return shape[0], math.prod(shape[1:])


def shape_of(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """Return the static shape of a tensor as plain integers."""
    return tuple(int(d) for d in tensor.shape.numpy())


def drop_dead(graph: GraphFile) -> None:
    """Remove constants that nothing reads any more because copies replace them."""
    for owner in graph.graphs():
        inputs = {id(value) for value in owner.inputs}
        for name, value in list(owner.initializers.items()):
            if not value.uses() and not value.is_graph_output() and id(value) not in inputs:
                owner.initializers.pop(name)


def save_graph(model: ir.Model, path: Path) -> None:
    """Write the protobuf, sealed; external tensors are written as references.

    Raises:
        GraphError: The protobuf would exceed 2 GB.
    """
    seal.write_onnx(path, proto_bytes(model))


def proto_bytes(model: ir.Model) -> bytes:
    """Return the bytes that `save_graph` writes before the seal.

    Raises:
        GraphError: The protobuf would exceed 2 GB.
    """
    proto = ir.to_proto(model)
    if proto.ByteSize() >= 2**31 - len(seal.ONNX_ENTRY):
        raise GraphError(
            f"the graph without its external data is {proto.ByteSize()} bytes; protobuf's limit is 2 GB",
            "save the base with external data first (onnx_ir.save(..., external_data=...))",
        )
    # Deterministic: map fields (metadata) are in key order, so that equal inputs give equal bytes.
    data: bytes = proto.SerializeToString(deterministic=True)
    return data
