"""Let a weight's readers read its codes: MatMulNBits for MatMul and Gemm, GatherBlockQuantized for Gather.

A node keeps its name, its metadata and the names of its outputs, and the codes keep the weight's metadata, so
that modules are found in the quantised graph by the same evidence as before.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lora_export.graph.nodes import model_names
from lora_export.graph.onnx_file import GraphFile, drop_dead
from lora_export.graph.read_model import ORT_DOMAIN
from lora_export.modes.quantising.choice import QuantiseChoice
from lora_export.modes.quantising.find import Product
from lora_export.modes.quantising.weight import CodedWeight
from lora_export.sites.operand import Use


class Rewriter:
    """Replace readers of weights; names stay unique.

    Args:
        graph: The graph, which is changed.
        choice: The user's choice.
    """

    def __init__(self, graph: GraphFile, choice: QuantiseChoice) -> None:
        self._graph, self._choice = graph, choice
        self._names = model_names(graph.model)

    def replace(self, weight: CodedWeight) -> str:
        """Replace every reader of a weight; return the name of its codes."""
        product = weight.product
        codes = self._registered(weight)
        for use in product.uses:
            made = (
                self._gather(use, codes)
                if product.kind == "embedding"
                else self._product(use, product, codes)
            )
            made.metadata_props.update(use.node.metadata_props)
            _drop_chain(use)
        _drop_constant(product.root)
        return str(codes[0].name)

    def finish(self) -> None:
        """Remove weights that nothing reads any more, and state the domain of the new operators."""
        drop_dead(self._graph)
        self._graph.model.opset_imports.setdefault(ORT_DOMAIN, 1)

    def _registered(self, weight: CodedWeight) -> list[ir.Value]:
        """Register codes, scales and zero points where the weight is; return the values."""
        root = weight.product.root
        owner = root.graph if root.producer() is None else root.producer().graph  # type: ignore[union-attr]
        assert isinstance(owner, ir.Graph)
        stem = str(root.name)
        names = {
            "codes": self._free(f"{stem}_Q{self._choice.bits}"),
            "scales": self._free(f"{stem}_scales"),
            "zeros": self._free(f"{stem}_zero_points"),
        }
        values = []
        for tensor in weight.tensors(names).values():
            value = ir.Value(
                name=tensor.name,
                shape=tensor.shape,  # type: ignore[arg-type]
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
            owner.register_initializer(value)
            values.append(value)
        values[0].metadata_props.update(root.metadata_props)
        return values

    def _free(self, name: str) -> str:
        number, free = 1, name
        while free in self._names:
            number += 1
            free = f"{name}.{number}"
        self._names.add(free)
        return free

    def _product(self, use: Use, product: Product, codes: Sequence[ir.Value]) -> ir.Node:
        """Replace a product; a Gemm's bias is added apart, as not every provider's MatMulNBits takes one."""
        choice, node = self._choice, use.node
        attributes = {
            "K": product.columns,
            "N": product.rows,
            "bits": choice.bits,
            "block_size": choice.block_size,
        }
        if choice.accuracy_level:
            attributes["accuracy_level"] = choice.accuracy_level
        made = ir.node("MatMulNBits", [node.inputs[0], *codes], attributes, domain=ORT_DOMAIN, name=node.name)
        bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
        if bias is None:
            self._put_in_place(node, [made])
            return made
        result = node.outputs[0]
        made.outputs[0].name = self._free(f"{result.name}_without_bias")
        made.outputs[0].type, made.outputs[0].shape = result.type, result.shape
        total = ir.node("Add", [made.outputs[0], bias], name=self._free(f"{node.name}_bias"))
        total.metadata_props.update(node.metadata_props)
        self._put_in_place(node, [made, total])
        return made

    def _gather(self, use: Use, codes: Sequence[ir.Value]) -> ir.Node:
        choice, node = self._choice, use.node
        attributes = {
            "bits": choice.bits,
            "block_size": choice.block_size,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        made = ir.node(
            "GatherBlockQuantized",
            [codes[0], node.inputs[1], *codes[1:]],
            attributes,
            domain=ORT_DOMAIN,
            name=node.name,
        )
        self._put_in_place(node, [made])
        return made

    @staticmethod
    def _put_in_place(node: ir.Node, made: Sequence[ir.Node]) -> None:
        """Put nodes in place of one; the last one's output gets its output's name, type and shape."""
        owner = node.graph
        assert isinstance(owner, ir.Graph)
        old, new = node.outputs[0], made[-1].outputs[0]
        new.metadata_props.update(old.metadata_props)
        ir.convenience.replace_nodes_and_values(
            owner, node, old_nodes=[node], new_nodes=made, old_values=[old], new_values=[new]
        )


def _drop_constant(root: ir.Value) -> None:
    """Remove a Constant node that nothing reads any more; `finish` removes initializers."""
    maker = root.producer()
    if maker is not None and maker.graph is not None and not root.uses() and not root.is_graph_output():
        maker.graph.remove(maker, safe=True)


def _drop_chain(use: Use) -> None:
    """Remove the Transposes and Casts of a weight that nothing reads any more."""
    for node in reversed(use.chain):
        owner = node.graph
        if owner is None or any(value.uses() or value.is_graph_output() for value in node.outputs):
            return
        owner.remove(node, safe=True)
