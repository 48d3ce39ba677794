"""Let the readers of a call's result read the result plus its branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx_ir as ir

from lora_export.errors import InternalError
from lora_export.graph.nodes import NodeWriter
from lora_export.graph.onnx_file import take_over_output
from lora_export.modes.branches.calls import Call, Piece
from lora_export.modes.branches.ends import End, ends_of
from lora_export.sites import operator_named


@dataclass(frozen=True, eq=False)
class BranchProduct:
    """Product of a branch, ready to be added.

    Attributes:
        piece: Piece of the module's outputs that it is for.
        value: The product.
        scale: DoRA's factor of the outputs, or None.
    """

    piece: Piece
    value: ir.Value
    scale: ir.Value | None


class Attacher:
    """Writer of sums of calls' results and branches' products.

    Args:
        write: Writer of nodes.
        gemm: See `write.BranchWriter`.

    Attributes:
        sums: The results with their branches.
    """

    def __init__(self, write: NodeWriter, gemm: bool) -> None:
        self._write, self._gemm = write, gemm
        self.sums: list[ir.Value] = []

    def attach(self, call: Call, group: list[BranchProduct]) -> None:
        """Let the readers of a call's result read the result plus the branches."""
        node, name = call.node, self._name(group)
        value = self._combined(call, group, name)
        scale = self._combined_scale(call, group, name)
        ends = ends_of(node.outputs[0], call.dtype, past_bias=scale is None)
        rounded = any(end.value is not node.outputs[0] for end in ends)
        plain = scale is None
        if plain and (node.op_type == "FusedGemm" or (node.op_type == "Gemm" and not rounded)):
            self._through_c(call, value, name)
        elif plain and node.op_type == "FusedConv":
            self._through_z(call, value, name)
        else:
            self._behind(call, value, scale=scale, name=name, ends=ends)

    def _name(self, group: list[BranchProduct]) -> str:
        """Return the beginning of the names: the text before ``.lora`` in the first branch's."""
        return str(group[0].value.name).partition(".lora.")[0]

    def _combined(self, call: Call, group: list[BranchProduct], name: str) -> ir.Value:
        """Return one value of the call's width: pieces side by side, or the sum of padded ones."""
        value, rest = group[0].value, group[1:]
        if not rest:
            return value
        if sum(one.piece.rows[1] - one.piece.rows[0] for one in group) == call.width:
            inputs = [one.value for one in group]
            return self._write.add(
                call.node, "Concat", inputs, f"{name}.lora.joined", dtype=call.dtype, attributes={"axis": -1}
            )
        for one in rest:
            value = self._write.add(
                call.node, "Add", [value, one.value], f"{name}.lora.joined", dtype=call.dtype
            )
        return value

    def _combined_scale(self, call: Call, group: list[BranchProduct], name: str) -> ir.Value | None:
        """Return DoRA's factors in the call's width, with ones where there is no module."""
        if group[0].scale is None:
            return None
        inputs: list[ir.Value] = []
        at = 0
        ends = [(one.piece.offset, one.piece.offset + one.piece.rows[1] - one.piece.rows[0]) for one in group]
        for one, (start, stop) in zip(group, ends, strict=True):
            assert one.scale is not None
            inputs += [*self._ones(call, start - at, name), one.scale]
            at = stop
        inputs += self._ones(call, call.width - at, name)
        if len(inputs) == 1:
            return inputs[0]
        return self._write.add(
            call.node, "Concat", inputs, f"{name}.lora.scales", dtype=call.dtype, attributes={"axis": 0}
        )

    def _ones(self, call: Call, count: int, name: str) -> list[ir.Value]:
        if not count:
            return []
        return [self._write.constant(call.node, np.ones(count, call.dtype.numpy()), f"{name}.lora.ones")]

    def _through_c(self, call: Call, value: ir.Value, name: str) -> None:
        """Add a value through a Gemm's C: rule 1 at no cost, also with an activation fused into the Gemm."""
        node = call.node
        alpha, beta = (node.attributes.get_float(key, 1.0) for key in ("alpha", "beta"))
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        value = self._times(call, value, alpha, f"{name}.lora.alpha")
        if bias is not None:
            bias = self._times(call, bias, beta, f"{name}.lora.beta")
            value = self._write.add(node, "Add", [value, bias], f"{name}.lora.bias", dtype=call.dtype)
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, value)
        node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
        self.sums.append(node.outputs[0])

    def _times(self, call: Call, value: ir.Value, factor: float, name: str) -> ir.Value:
        if factor == 1.0:
            return value
        constant = self._write.constant(call.node, np.array(factor, call.dtype.numpy()), f"{name}.factor")
        return self._write.add(call.node, "Mul", [value, constant], name, dtype=call.dtype)

    def _through_z(self, call: Call, value: ir.Value, name: str) -> None:
        """Add a value through FusedConv's Z, before its activation (ONNX Runtime ``ContribOperators.md``)."""
        node = call.node
        if len(node.inputs) < 4:
            node.resize_inputs(4)
        if node.inputs[3] is not None:
            value = self._write.add(
                node, "Add", [node.inputs[3], value], f"{name}.lora.residual", dtype=call.dtype
            )
        node.replace_input_with(3, value)
        self.sums.append(node.outputs[0])

    def _behind(
        self, call: Call, value: ir.Value, scale: ir.Value | None, name: str, ends: Sequence[End]
    ) -> None:
        """Add nodes after the call: the sum, or with DoRA ``(y + u)·g``, which doesn't scale the bias."""
        node, product = call.node, call.node.outputs[0]
        alone = [end.value for end in ends] == [product]
        value = self._times(call, value, node.attributes.get_float("alpha", 1.0), f"{name}.lora.alpha")
        bias = _bias_behind(call) if scale is None and alone and not product.is_graph_output() else None
        if bias is not None:
            add, index = bias
            total = self._write.add(
                node, "Add", [add.inputs[index], value], f"{name}.lora.bias", dtype=call.dtype
            )
            add.replace_input_with(index, total)
            self.sums.append(add.outputs[0])
            return
        for end in ends:
            last = self._sum(call, value, scale=scale, name=name, product=end.value)
            if scale is not None:
                last = self._scaled(call, last, scale, name)
            for reader in end.readers:
                reader.node.replace_input_with(reader.idx, last)
            if end.is_output:
                take_over_output(end.value, last)
            self.sums.append(last)

    def _sum(
        self, call: Call, value: ir.Value, scale: ir.Value | None, name: str, product: ir.Value
    ) -> ir.Value:
        """Return ``y + d·B``: as an Add of two products, or as a Gemm of d and B with C = y."""
        node, dtype, anchor = call.node, call.dtype, product.producer()
        assert anchor is not None
        up = value.producer()
        alone = up is not None and up.op_type == "MatMul" and not value.uses() and anchor is node
        if not (self._gemm and scale is None and alone and (node.domain, node.op_type) == ("", "MatMul")):
            return self._write.add(
                anchor,
                "Add",
                [product, value],
                f"{name}.lora.sum",
                dtype=dtype,
                after=True,
                shape=product.shape,
            )
        assert up is not None
        (down, b), owner = up.inputs, up.graph
        assert owner is not None
        owner.remove(up, safe=True)
        last = node

        def add(operator: str, inputs: Sequence[ir.Value | None], label: str, **more: Any) -> ir.Value:
            nonlocal last
            made = self._write.add(
                last, operator, inputs, f"{name}.lora.{label}", after=True, **{"dtype": dtype, **more}
            )
            last = cast("ir.Node", made.producer())
            return made

        rows = add("Flatten", [down], "rows", attributes={"axis": -1})
        base = add("Flatten", [product], "base", attributes={"axis": -1})
        total = add("Gemm", [rows, b, base], "up")
        sizes = add("Shape", [product], "shape", dtype=ir.DataType.INT64)
        return add("Reshape", [total, sizes], "sum", shape=_result_shape(call))

    def _scaled(self, call: Call, total: ir.Value, scale: ir.Value, name: str) -> ir.Value:
        """Return ``(y + c + u)·g + (c − c·g)``: the bias c inside y is not scaled; exact for g = 1."""
        node, dtype = call.node, call.dtype
        operator = operator_named(node.op_type)
        convolution = operator is not None and operator.is_convolution
        index = operator.bias if operator else None
        bias = node.inputs[index] if index is not None and len(node.inputs) > index else None
        rest: ir.Value | None = None
        if bias is not None:
            bias = self._times(call, bias, node.attributes.get_float("beta", 1.0), f"{name}.lora.beta")
            times = self._write.add(node, "Mul", [bias, scale], f"{name}.lora.scaled_bias", dtype=dtype)
            rest = self._write.add(node, "Sub", [bias, times], f"{name}.lora.bias", dtype=dtype)
        if convolution:
            scale = column(self._write, call, scale, f"{name}.lora.factors")
            rest = column(self._write, call, rest, f"{name}.lora.biases") if rest is not None else None
        anchor = total.producer()
        assert anchor is not None
        last = self._write.add(
            anchor, "Mul", [total, scale], f"{name}.lora.scaled", dtype=dtype, after=True, shape=total.shape
        )
        if rest is not None:
            anchor = last.producer()
            assert anchor is not None
            last = self._write.add(
                anchor, "Add", [last, rest], f"{name}.lora.biased", dtype=dtype, after=True, shape=total.shape
            )
        return last


def column(write: NodeWriter, call: Call, vector: ir.Value, name: str) -> ir.Value:
    """Reshape ``(out_dim,)`` so that it is along a convolution's channels."""
    shape = np.array([-1, *(1 for _ in range(_rank(call.node.inputs[1]) - 2))], np.int64)
    target = write.constant(call.node, shape, f"{name}.shape")
    return write.add(call.node, "Reshape", [vector, target], name, dtype=call.dtype)


def _rank(kernel: ir.Value | None) -> int:
    """Return the number of axes of a weight, perhaps after nodes without a shape (DequantizeLinear)."""
    while kernel is not None:
        known = kernel.shape if kernel.const_value is None else kernel.const_value.shape
        if known is not None:
            return len(known)
        maker = kernel.producer()
        kernel = maker.inputs[0] if maker is not None else None
    raise InternalError("a convolution's weight comes from a constant")


def _bias_behind(call: Call) -> tuple[ir.Node, int] | None:
    """Return the Add of a bias that ONNX Runtime joins with a MatMul into a Gemm, and the bias's position.

    ONNX Runtime does so for matrices (MatMulAddFusion), and sums the bias first. The branch then goes into
    the bias, so that the Gemm makes the same sums.
    """
    node, shape = call.node, call.x.shape
    usages = list(node.outputs[0].uses())
    if node.op_type != "MatMul" or len(usages) != 1 or usages[0].node.op_type != "Add":
        return None
    add, index = usages[0].node, 1 - usages[0].idx
    if shape is None or len(shape) != 2:
        return None
    bias = add.inputs[index]
    if bias is None or bias.const_value is None or len(bias.const_value.shape) != 1:
        return None
    return add, index


def _result_shape(call: Call) -> ir.Shape | None:
    """Return the shape of a MatMul's result, which ONNX Runtime's fusions need and a Reshape doesn't tell."""
    x, product = call.x.shape, call.node.outputs[0].shape
    if product is not None or x is None:
        return product
    return ir.Shape([*x.dims[:-1], call.width])
