"""Write branches into a graph.

Rules:

1. The branch is added before the bias, so that ONNX Runtime's fusions of bias and what follows stay as in the
   base, and the base's bits with them. A Gemm gets it through its C, a FusedConv through its Z.
2. A graph whose branches are all zero computes the base's bits: what is added is ``+ 0`` and ``· 1``.
3. Names begin with the module's path and ``.lora``; those of the base stay as they were.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx_ir as ir

from lora_export.branches.bundles import Bundle, partly_covered
from lora_export.branches.calls import Call, Piece
from lora_export.branches.gate import BankGate
from lora_export.branches.nodes import Attributes, NodeWriter, model_names
from lora_export.errors import GraphError
from lora_export.exposed import ExposedModule
from lora_export.graph import GraphFile, take_over_output

# Split, Squeeze and Unsqueeze take their numbers as inputs from here on.
MIN_OPSET = 13
# From here on initializers are defaults that a run may override.
MIN_IR_VERSION = 4
_CONV_ATTRIBUTES = ("auto_pad", "dilations", "pads", "strides")
# Position of the bias among the inputs of operators that add one.
_BIAS_INDEX = {"Gemm": 2, "Conv": 2, "MatMulNBits": 5, "DynamicQuantizeMatMul": 4, "MatMulIntegerToFloat": 6}


@dataclass(frozen=True, eq=False)
class Tensors:
    """The values that a bundle's branch reads.

    Attributes:
        a: Down-projection.
        b: Up-projection, in the parts that `ExposedModule.b_parts` says.
        scale: DoRA's factor ``(out_dim,)``.
        bias: Added to the product ``(out_dim,)``, in a bank ``(n_slots, out_dim)``.
    """

    a: ir.Value
    b: tuple[ir.Value, ...]
    scale: ir.Value | None = None
    bias: ir.Value | None = None


@dataclass(frozen=True, eq=False)
class _Added:
    piece: Piece
    value: ir.Value
    scale: ir.Value | None


class BranchWriter:
    """Adds the branches of bundles to a graph.

    Args:
        graph: The graph.
        gate: What a bank does between the two products.
        gemm: Add a MatMul's result by a Gemm's C instead of an Add: a kernel and a pass over the result less
            on a GPU, more nodes that cost nothing there.

    Raises:
        GraphError: The graph's opset or IR version is too old.
    """

    def __init__(self, graph: GraphFile, gate: BankGate | None = None, *, gemm: bool = False) -> None:
        version = graph.model.opset_imports.get("", 0)
        if version < MIN_OPSET:
            raise GraphError(
                f"{graph.path} has opset {version}; branches need {MIN_OPSET} or later",
                "export it again with a newer opset, or convert it with onnx.version_converter",
            )
        if graph.model.ir_version < MIN_IR_VERSION:
            raise GraphError(
                f"{graph.path} has IR version {graph.model.ir_version}, in which no initializer can be "
                f"overridden; branches need {MIN_IR_VERSION} or later",
                "export it again with a newer exporter",
            )
        self._write = NodeWriter(model_names(graph.model))
        self._gate = gate
        self._gemm = gemm
        self._order = {id(node): number for number, node in enumerate(graph.graph.all_nodes())}

    def write(self, bundles: Sequence[Bundle], tensors: Mapping[str, Tensors]) -> None:
        """Add every bundle's products, then let each call's readers read the sum.

        Args:
            bundles: What to add.
            tensors: By `ExposedModule.name`.
        """
        partly = partly_covered(bundles)
        added: dict[int, list[_Added]] = defaultdict(list)
        for bundle in bundles:
            for found in self._products(bundle, tensors[bundle.module.name], partly):
                added[id(found.piece.call)].append(found)
        for group in added.values():
            self._attach(group[0].piece.call, sorted(group, key=lambda one: one.piece.offset))

    def _products(self, bundle: Bundle, tensors: Tensors, partly: set[int]) -> Iterable[_Added]:
        """Yield a product for each piece; pieces that read the same activation share the first one.

        But not across graphs: what one branch of an If computes, the other can't read.
        """
        by_x: dict[tuple[int, int], list[Piece]] = defaultdict(list)
        for piece in bundle.pieces:
            by_x[id(piece.call.x), id(piece.call.node.graph)].append(piece)
        for pieces in by_x.values():
            anchor = min((piece.call.node for piece in pieces), key=lambda node: self._order[id(node)])
            down = self._down(anchor, bundle.module, pieces[0].call, tensors.a)
            whole = sum(stop - start for start, stop in {piece.rows for piece in pieces})
            gaps = whole != bundle.module.out_dim or any(id(piece.call) in partly for piece in pieces)
            if len(pieces) > 1 and not gaps and not bundle.module.cuts:
                yield from self._split(anchor, bundle.module, down, pieces, tensors)
                continue
            for piece in pieces:
                yield self._one(anchor, bundle.module, down, piece, tensors, id(piece.call) in partly)

    def _down(self, anchor: ir.Node, module: ExposedModule, call: Call, a: ir.Value) -> ir.Value:
        name, dtype = f"{module.name}.lora.down", call.dtype
        if module.kind == "embedding":
            down = self._write.add(anchor, "Gather", [a, call.x], name, dtype=dtype)
        elif module.kind == "conv":
            attributes = {
                key: value.value for key, value in call.node.attributes.items() if key in _CONV_ATTRIBUTES
            }
            down = self._write.add(anchor, "Conv", [call.x, a], name, dtype=dtype, attributes=attributes)
        else:
            down = self._write.add(anchor, "MatMul", [call.x, a], name, dtype=dtype)
        return self._gate.choose(self._write, anchor, module, down, call.x) if self._gate else down

    def _split(
        self, anchor: ir.Node, module: ExposedModule, down: ir.Value, pieces: list[Piece], tensors: Tensors
    ) -> Iterable[_Added]:
        """One up-projection, cut into the pieces' rows; a module called twice with one x needs no cut."""
        dtype = pieces[0].call.dtype
        up = self._up(anchor, module, down, tensors.b[0], dtype)
        up = self._with_bias(anchor, module, up, tensors.bias, module.out_dim, pieces[0].call)
        ranges = sorted({piece.rows for piece in pieces})
        if ranges == [(0, module.out_dim)]:
            parts, scales = {ranges[0]: up}, {ranges[0]: tensors.scale}
        else:
            sizes = [stop - start for start, stop in ranges]
            names = [f"{module.name}.lora.up.{number}" for number in range(len(ranges))]
            parts = dict(zip(ranges, self._write.split(anchor, up, sizes, names, dtype), strict=True))
            scales = dict.fromkeys(ranges)
            if tensors.scale is not None:
                names = [f"{module.name}.lora.scale.{number}" for number in range(len(ranges))]
                cut = self._write.split(anchor, tensors.scale, sizes, names, dtype)
                scales = dict(zip(ranges, cut, strict=True))
        for piece in pieces:
            yield _Added(piece, self._rescaled(anchor, module, parts[piece.rows], piece), scales[piece.rows])

    def _one(
        self,
        anchor: ir.Node,
        module: ExposedModule,
        down: ir.Value,
        piece: Piece,
        tensors: Tensors,
        partly: bool,
    ) -> _Added:
        """The up-projection of one piece; where its call has gaps, in the call's width, with B padded."""
        start, stop = piece.rows
        b, scale, bias, dtype = tensors.b[0], tensors.scale, tensors.bias, piece.call.dtype
        front = self._gate.first if self._gate else anchor
        if (start, stop) != (0, module.out_dim):
            if module.cuts:
                b = tensors.b[[first for _, first, _ in module.b_parts].index(start)]
            else:
                b = self._slice(anchor, b, start, stop, f"{module.name}.lora.rows", dtype, axis=1)
            if scale is not None:
                scale = self._slice(anchor, scale, start, stop, f"{module.name}.lora.scale", dtype, axis=0)
            if bias is not None:
                bias = self._slice(front, bias, start, stop, f"{module.name}.lora.bias", dtype, axis=-1)
        if partly:
            b = self._padded(anchor, module, b, piece, axes=2)
            if bias is not None:
                bias = self._padded(front, module, bias, piece, axes=2 if self._gate else 1)
        up = self._up(anchor, module, down, b, dtype)
        width = piece.call.width if partly else stop - start
        up = self._with_bias(anchor, module, up, bias, width, piece.call)
        return _Added(piece, self._rescaled(anchor, module, up, piece), scale)

    def _padded(
        self, anchor: ir.Node, module: ExposedModule, value: ir.Value, piece: Piece, axes: int
    ) -> ir.Value:
        """Put zeros before and behind along the last axis, up to the call's width."""
        before, (start, stop) = piece.offset, piece.rows
        zeros = [0] * (axes - 1)
        pads = np.array([*zeros, before, *zeros, piece.call.width - before - (stop - start)], np.int64)
        sizes = self._write.constant(anchor, pads, f"{module.name}.lora.pads")
        name = f"{module.name}.lora.padded"
        return self._write.add(anchor, "Pad", [value, sizes], name, dtype=piece.call.dtype)

    def _with_bias(
        self,
        anchor: ir.Node,
        module: ExposedModule,
        up: ir.Value,
        bias: ir.Value | None,
        width: int,
        call: Call,
    ) -> ir.Value:
        if bias is None:
            return up
        if self._gate:
            return self._gate.add_bias(self._write, anchor, module, up, bias, width, call.x)
        if module.kind == "conv":
            bias = self._column(call, bias, f"{module.name}.lora.bias_column")
        return self._write.add(anchor, "Add", [up, bias], f"{module.name}.lora.bias", dtype=call.dtype)

    def _slice(
        self,
        anchor: ir.Node,
        value: ir.Value,
        start: int,
        stop: int,
        name: str,
        dtype: ir.DataType,
        axis: int,
    ) -> ir.Value:
        bounds = [
            self._write.constant(anchor, np.array([number], np.int64), f"{name}.{word}")
            for word, number in (("start", start), ("stop", stop), ("axis", axis))
        ]
        return self._write.add(anchor, "Slice", [value, *bounds], name, dtype=dtype)

    def _up(
        self, anchor: ir.Node, module: ExposedModule, down: ir.Value, b: ir.Value, dtype: ir.DataType
    ) -> ir.Value:
        operator = "Conv" if module.kind == "conv" else "MatMul"
        attributes: Attributes = {"group": module.groups} if module.groups > 1 else {}
        return self._write.add(
            anchor, operator, [down, b], f"{module.name}.lora.up", dtype=dtype, attributes=attributes
        )

    def _rescaled(self, anchor: ir.Node, module: ExposedModule, value: ir.Value, piece: Piece) -> ir.Value:
        """Multiply by what the exporter folded into the weight's rows."""
        if piece.row_scale is None:
            return value
        dtype = piece.call.dtype
        factor = piece.row_scale.astype(dtype.numpy()).reshape(-1, *(1 for _ in module.kernel))
        constant = self._write.constant(anchor, factor, f"{module.name}.lora.folded")
        return self._write.add(anchor, "Mul", [value, constant], f"{module.name}.lora.rescaled", dtype=dtype)

    # --- the sum ------------------------------------------------------------------------------------

    def _attach(self, call: Call, group: list[_Added]) -> None:
        """Let the readers of a call's result read the result plus the branches."""
        node, name = call.node, self._name(group)
        value = self._combined(call, group, name)
        scale = self._combined_scale(call, group, name)
        if scale is None and node.op_type in ("Gemm", "FusedGemm"):
            self._through_c(call, value, name)
        elif scale is None and node.op_type == "FusedConv":
            self._through_z(call, value, name)
        else:
            self._behind(call, value, scale, name)

    def _name(self, group: list[_Added]) -> str:
        """Beginning of the names: what stands before ``.lora`` in the first branch's."""
        return str(group[0].value.name).partition(".lora.")[0]

    def _combined(self, call: Call, group: list[_Added], name: str) -> ir.Value:
        """One value of the call's width: pieces side by side, or padded ones added up."""
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

    def _combined_scale(self, call: Call, group: list[_Added], name: str) -> ir.Value | None:
        """DoRA's factors in the call's width, ones where no module is."""
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
        """A Gemm adds C itself: rule 1 at no cost, also where an activation is fused into it."""
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

    def _times(self, call: Call, value: ir.Value, factor: float, name: str) -> ir.Value:
        if factor == 1.0:
            return value
        constant = self._write.constant(call.node, np.array(factor, call.dtype.numpy()), f"{name}.factor")
        return self._write.add(call.node, "Mul", [value, constant], name, dtype=call.dtype)

    def _through_z(self, call: Call, value: ir.Value, name: str) -> None:
        """FusedConv adds Z before its activation (ONNX Runtime ``ContribOperators.md``)."""
        node = call.node
        if len(node.inputs) < 4:
            node.resize_inputs(4)
        if node.inputs[3] is not None:
            value = self._write.add(
                node, "Add", [node.inputs[3], value], f"{name}.lora.residual", dtype=call.dtype
            )
        node.replace_input_with(3, value)

    def _behind(self, call: Call, value: ir.Value, scale: ir.Value | None, name: str) -> None:
        """Add nodes behind the call: the sum, with DoRA ``(y + u)·g``, from which its bias is left out."""
        node, product = call.node, call.node.outputs[0]
        readers, was_output = list(product.uses()), product.is_graph_output()
        value = self._times(call, value, node.attributes.get_float("alpha", 1.0), f"{name}.lora.alpha")
        bias = _bias_behind(call) if scale is None and not was_output else None
        if bias is not None:
            add, index = bias
            total = self._write.add(
                node, "Add", [add.inputs[index], value], f"{name}.lora.bias", dtype=call.dtype
            )
            add.replace_input_with(index, total)
            return
        last = self._sum(call, value, scale, name)
        if scale is not None:
            last = self._scaled(call, last, scale, name)
        for reader in readers:
            reader.node.replace_input_with(reader.idx, last)
        if was_output:
            take_over_output(product, last)

    def _sum(self, call: Call, value: ir.Value, scale: ir.Value | None, name: str) -> ir.Value:
        """``y + d·B``: as an Add of two products, or as a Gemm of d and B with C = y."""
        node, product, dtype = call.node, call.node.outputs[0], call.dtype
        up = value.producer()
        alone = up is not None and up.op_type == "MatMul" and not value.uses()
        if not (self._gemm and scale is None and alone and (node.domain, node.op_type) == ("", "MatMul")):
            return self._write.add(
                node,
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
        """``(y + c + u)·g + (c − c·g)``: the bias c inside y is not scaled; exact for g = 1."""
        node, dtype = call.node, call.dtype
        convolution = node.op_type in ("Conv", "FusedConv")
        index = _BIAS_INDEX.get(node.op_type, len(node.inputs))
        bias = node.inputs[index] if len(node.inputs) > index else None
        rest: ir.Value | None = None
        if bias is not None:
            bias = self._times(call, bias, node.attributes.get_float("beta", 1.0), f"{name}.lora.beta")
            times = self._write.add(node, "Mul", [bias, scale], f"{name}.lora.scaled_bias", dtype=dtype)
            rest = self._write.add(node, "Sub", [bias, times], f"{name}.lora.bias", dtype=dtype)
        if convolution:
            scale = self._column(call, scale, f"{name}.lora.factors")
            rest = self._column(call, rest, f"{name}.lora.biases") if rest is not None else None
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

    def _column(self, call: Call, vector: ir.Value, name: str) -> ir.Value:
        """Shape ``(out_dim,)`` so that it lies along a convolution's channels."""
        kernel = call.node.inputs[1]
        assert kernel is not None
        assert kernel.shape is not None
        shape = np.array([-1, *(1 for _ in range(len(kernel.shape) - 2))], np.int64)
        target = self._write.constant(call.node, shape, f"{name}.shape")
        return self._write.add(call.node, "Reshape", [vector, target], name, dtype=call.dtype)


def _bias_behind(call: Call) -> tuple[ir.Node, int] | None:
    """The Add of a bias that ONNX Runtime makes a Gemm of together with a MatMul, and the bias's position.

    It does so for matrices (MatMulAddFusion), and sums the bias first. The branch then goes into the bias, so
    that a Gemm is made of the same sums.
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
    """Shape of a MatMul's result: what a Reshape to it would not tell ONNX Runtime, whose fusions ask."""
    x, product = call.x.shape, call.node.outputs[0].shape
    if product is not None or x is None:
        return product
    return ir.Shape([*x.dims[:-1], call.width])
