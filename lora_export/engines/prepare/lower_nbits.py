"""Write ONNX Runtime's MatMulNBits as DequantizeLinear and MatMul, which TensorRT has. Nothing is rounded.

Only symmetric weights can be written: TensorRT dequantises without zero points. Another kernel computes the
product: ONNX Runtime may round the activations to 8 bits (``accuracy_level`` 4), an engine does not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.engines.prepare.dtypes import lacks
from lora_export.engines.prepare.nbits_weight import OPERATOR, NbitsWeight, read_nbits
from lora_export.engines.prepare.opset import opset_of, raise_opset
from lora_export.engines.prepare.problem import BuildProblem, of_nodes
from lora_export.graph.nodes import NodeWriter, model_names
from lora_export.graph.onnx_file import GraphFile, shape_of
from lora_export.plan import Refusal
from lora_export.sites.node_text import module_of

_CONTRIB = "com.microsoft"
# DequantizeLinear has blocks and 4-bit codes since this opset.
_OPSET = 21
# The new weights lie inside the protobuf, which holds at most 2 GB.
LIMIT_BYTES = 1_500_000_000
# From this level on ONNX Runtime rounds activations to 8 bits.
_ROUNDED = 4


def nbits_problems(graph: GraphFile, capabilities: Sequence[str]) -> Iterator[BuildProblem]:
    """Yield the MatMulNBits that can't be lowered, each with its reason."""
    found: dict[tuple[str, str], list[ir.Node]] = defaultdict(list)
    total = 0
    seen: set[tuple[int, int]] = set()
    for node in _nodes(graph):
        weight = read_nbits(node)
        if isinstance(weight, Refusal):
            found[weight.detail, weight.hint].append(node)
            continue
        total += 0 if weight.constants() in seen else weight.nbytes
        seen.add(weight.constants())
        if lacking := lacks(weight.code_dtype, capabilities):
            found[lacking, "omit older GPUs from the targets, or use 8 bits"].append(node)
    for (reason, hint), nodes in found.items():
        yield from of_nodes(nodes, reason, hint)
    if total > LIMIT_BYTES:
        yield BuildProblem(
            f"{OPERATOR}: its weights take {total} bytes for DequantizeLinear, a graph holds {LIMIT_BYTES}",
            "quantise again with DequantizeLinear in place of MatMulNBits",
        )


def lower_nbits(graph: GraphFile) -> tuple[list[str], list[BuildProblem]]:
    """Replace every MatMulNBits after `nbits_problems` has found no problem; return notes and problems."""
    if not any(True for _ in _nodes(graph)):
        return [], []
    before = opset_of(graph.model)
    if problem := raise_opset(graph, _OPSET):
        return [], [BuildProblem(problem, f"export with opset {_OPSET} or newer")]
    notes = [f"opset {before} was raised to {_OPSET}"] if before < _OPSET else []
    writer = _Lowering(graph)
    weights = [writer.lower(node) for node in list(_nodes(graph))]
    for bits in sorted({weight.bits for weight in weights}):
        count = sum(weight.bits == bits for weight in weights)
        notes.append(f"{count} {OPERATOR} of {bits} bits are DequantizeLinear (int{bits}) and MatMul now")
    rounded = sum(weight.accuracy_level >= _ROUNDED for weight in weights)
    if rounded:
        notes.append(
            f"{rounded} of them let ONNX Runtime round activations to 8 bits (accuracy_level {_ROUNDED}); "
            "the engine keeps them, so its results are closer to the float model's"
        )
    return notes, []


def _nodes(graph: GraphFile) -> Iterator[ir.Node]:
    for node in graph.model.graph.all_nodes():
        if node.op_type == OPERATOR and node.domain == _CONTRIB:
            yield node


class _Lowering:
    """Replace nodes; a weight that several of them share is made once."""

    def __init__(self, graph: GraphFile) -> None:
        self._write = NodeWriter(model_names(graph.model))
        self._made: dict[tuple[int, tuple[int, int], int], ir.Value] = {}

    def lower(self, node: ir.Node) -> NbitsWeight:
        """Replace one node."""
        weight = read_nbits(node)
        owner = node.graph
        assert isinstance(weight, NbitsWeight)
        assert isinstance(owner, ir.Graph)
        label = module_of(node) or node.name or str(node.outputs[0].name)
        product = ir.node("MatMul", [node.inputs[0], self._dequantised(weight, label)], name=node.name)
        new = [product]
        if weight.bias is not None:
            product.name = self._write.free(f"{label}.lora_export.product")
            product.outputs[0].name = product.name
            new.append(ir.node("Add", [product.outputs[0], weight.bias], name=node.name))
        result = new[-1].outputs[0]
        result.type, result.shape = node.outputs[0].type, node.outputs[0].shape
        product.outputs[0].dtype = weight.dtype
        for made in new:
            made.metadata_props.update(node.metadata_props)
        constants = [value for value in node.inputs[1:] if value is not None]
        ir.convenience.replace_nodes_and_values(
            owner, node, old_nodes=[node], new_nodes=new, old_values=[node.outputs[0]], new_values=[result]
        )
        _drop_unused(constants)
        return weight

    def _dequantised(self, weight: NbitsWeight, label: str) -> ir.Value:
        """Return the weight ``(K, N)``."""
        node = weight.node
        key = id(node.graph), weight.constants(), weight.block
        if key in self._made:
            return self._made[key]
        codes, scales, signs = weight.codes(), weight.scales(), weight.signs()
        if signs is not None:
            scales = np.where(signs == 0, signs.dtype.type(1), np.abs(scales))
        shape = (weight.padded, weight.n)
        name = self._write.free(f"{label}.lora_export.weight_int{weight.bits}")
        tensor = (
            ir.PackedTensor(codes, ir.DataType.INT4, shape=shape, name=name)
            if weight.bits == 4
            else ir.tensor(codes, name=name)
        )
        value = self._write.add(
            node,
            "DequantizeLinear",
            [_register(node, tensor), self._write.constant(node, scales, f"{label}.lora_export.scales")],
            f"{label}.lora_export.weight",
            dtype=weight.dtype,
            attributes={"axis": 0, "block_size": weight.block},
            shape=ir.Shape(shape),
        )
        if signs is not None:
            value = self._with_signs(weight, value, signs, label)
        if weight.padded != weight.k:
            value = self._without_padding(weight, value, label)
        self._made[key] = value
        return value

    def _with_signs(self, weight: NbitsWeight, value: ir.Value, signs: Array, label: str) -> ir.Value:
        """Multiply each block by its scale's sign (0 for a block of zeros)."""
        node, dtype = weight.node, weight.dtype
        blocks, rows = (weight.blocks, weight.block, weight.n), (weight.padded, weight.n)
        name = f"{label}.lora_export.storage.blocks"
        shapes = [
            self._write.constant(node, np.array(dims, np.int64), f"{name}_shape") for dims in (blocks, rows)
        ]
        apart = self._write.add(
            node, "Reshape", [value, shapes[0]], name, dtype=dtype, shape=ir.Shape(blocks)
        )
        sign = self._write.constant(node, signs[:, None], f"{name}_sign")
        signed = self._write.add(
            node, "Mul", [apart, sign], f"{name}_signed", dtype=dtype, shape=ir.Shape(blocks)
        )
        return self._write.add(
            node, "Reshape", [signed, shapes[1]], f"{name}_joined", dtype=dtype, shape=ir.Shape(rows)
        )

    def _without_padding(self, weight: NbitsWeight, value: ir.Value, label: str) -> ir.Value:
        bounds = [
            self._write.constant(weight.node, np.array([number], np.int64), f"{label}.lora_export.{name}")
            for name, number in (("start", 0), ("end", weight.k), ("axis", 0))
        ]
        return self._write.add(
            weight.node,
            "Slice",
            [value, *bounds],
            f"{label}.lora_export.unpadded",
            dtype=weight.dtype,
            shape=ir.Shape([weight.k, weight.n]),
        )


def _register(node: ir.Node, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=tensor.name,
        shape=ir.Shape(shape_of(tensor)),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    graph.register_initializer(value)
    return value


def _drop_unused(values: Sequence[ir.Value]) -> None:
    """Remove constants that nothing reads any more: the compiler would still get them."""
    for value in values:
        if value.uses() or value.is_graph_output() or value.is_graph_input():
            continue
        maker = value.producer()
        if maker is None and value.graph is not None and value.is_initializer():
            value.graph.initializers.pop(str(value.name), None)
        elif maker is not None and maker.op_type == "Constant" and maker.graph is not None:
            maker.graph.remove(maker, safe=True)
