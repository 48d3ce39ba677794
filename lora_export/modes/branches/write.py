"""Write branches into a graph.

Rules:

1. The branch is added before the bias, so that ONNX Runtime's fusions of the bias and later nodes stay as in
   the base, and with them the base's bits. A Gemm gets it through its C, a FusedConv through its Z.
2. A graph whose branches are all zero computes the base's bits: it adds ``+ 0`` and ``· 1``.
3. Names begin with the module's path and ``.lora``; those of the base stay as they were.
4. A branch computes in the dtype of its call; tensors of a module whose calls differ are cast for each dtype.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from lora_export.errors import GraphError
from lora_export.graph.exposed import ExposedModule
from lora_export.graph.nodes import Attributes, NodeWriter, model_names
from lora_export.graph.onnx_file import GraphFile
from lora_export.modes.branches.attach import Attacher, BranchProduct, column
from lora_export.modes.branches.bundles import Bundle, partly_covered
from lora_export.modes.branches.calls import Call, Piece
from lora_export.modes.branches.gate import BankGate
from lora_export.modes.branches.inputs import ir_type

# The first opset in which Split, Squeeze and Unsqueeze take their numbers as inputs.
MIN_OPSET = 13
# The first IR version in which initializers are defaults that a run may override.
MIN_IR_VERSION = 4
_CONV_ATTRIBUTES = ("auto_pad", "dilations", "pads", "strides")


@dataclass(frozen=True, eq=False)
class Tensors:
    """Values that a bundle's branch reads.

    Attributes:
        a: Down-projection.
        b: Up-projection, in the parts of `ExposedModule.b_parts`.
        scale: DoRA's factor ``(out_dim,)``.
        bias: Added to the product ``(out_dim,)``, in a bank ``(n_slots, out_dim)``.
    """

    a: ir.Value
    b: tuple[ir.Value, ...]
    scale: ir.Value | None = None
    bias: ir.Value | None = None


class BranchWriter:
    """Writer of bundles' branches into a graph.

    Args:
        graph: The graph.
        gate: Gate of a bank between the two products.
        gemm: Add a MatMul's result by a Gemm's C instead of an Add, which saves a kernel and a pass over the
            result on a GPU, with more nodes that cost nothing there.

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
        # Nodes may be added before this one, because the tensors are inputs or constants of the graph.
        self._first = next(iter(graph.graph))
        self._cast: dict[tuple[str, ir.DataType], Tensors] = {}
        self._order = {id(node): number for number, node in enumerate(graph.graph.all_nodes())}

    def write(self, bundles: Sequence[Bundle], tensors: Mapping[str, Tensors]) -> list[ir.Value]:
        """Add every bundle's products, then let each call's readers read the sum.

        Args:
            bundles: Bundles to add.
            tensors: Tensors by `ExposedModule.name`.

        Returns:
            The sums.
        """
        partly = partly_covered(bundles)
        added: dict[int, list[BranchProduct]] = defaultdict(list)
        for bundle in bundles:
            for found in self._products(bundle, tensors[bundle.module.name], partly):
                added[id(found.piece.call)].append(found)
        attacher = Attacher(self._write, self._gemm)
        for group in added.values():
            attacher.attach(group[0].piece.call, sorted(group, key=lambda one: one.piece.offset))
        return attacher.sums

    def _products(self, bundle: Bundle, tensors: Tensors, partly: set[int]) -> Iterable[BranchProduct]:
        """Yield a product for each piece; pieces that read the same activation share the first one.

        They don't share it across graphs: one branch of an If can't read the values of the other.
        """
        by_x: dict[tuple[int, int, ir.DataType], list[Piece]] = defaultdict(list)
        for piece in bundle.pieces:
            by_x[id(piece.call.x), id(piece.call.node.graph), piece.call.dtype].append(piece)
        given = tensors
        for (_, _, dtype), pieces in by_x.items():
            tensors = self._typed(bundle.module, given, dtype)
            anchor = min((piece.call.node for piece in pieces), key=lambda node: self._order[id(node)])
            down = self._down(anchor, bundle.module, pieces[0].call, tensors.a)
            whole = sum(stop - start for start, stop in {piece.rows for piece in pieces})
            gaps = whole != bundle.module.out_dim or any(id(piece.call) in partly for piece in pieces)
            if len(pieces) > 1 and not gaps and not bundle.module.cuts:
                yield from self._split(anchor, bundle.module, down=down, pieces=pieces, tensors=tensors)
                continue
            for piece in pieces:
                yield self._one(
                    anchor,
                    bundle.module,
                    down=down,
                    piece=piece,
                    tensors=tensors,
                    partly=id(piece.call) in partly,
                )

    def _typed(self, module: ExposedModule, tensors: Tensors, dtype: ir.DataType) -> Tensors:
        """Return the tensors in the dtype of some of a module's calls (rule 4)."""
        if dtype == ir_type(module):
            return tensors
        key = module.name, dtype
        if key not in self._cast:
            word = dtype.name.lower()

            def cast(value: ir.Value) -> ir.Value:
                name, to = f"{module.name}.lora.{word}", {"to": dtype.value}
                return self._write.add(self._first, "Cast", [value], name, dtype=dtype, attributes=to)

            self._cast[key] = replace(
                tensors,
                a=cast(tensors.a),
                b=tuple(cast(b) for b in tensors.b),
                scale=None if tensors.scale is None else cast(tensors.scale),
                bias=None if tensors.bias is None else cast(tensors.bias),
            )
        return self._cast[key]

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
        if self._gate is None:
            return down
        return self._gate.choose(self._write, anchor, module=module, down=down, x=call.x)

    def _split(
        self, anchor: ir.Node, module: ExposedModule, down: ir.Value, pieces: list[Piece], tensors: Tensors
    ) -> Iterable[BranchProduct]:
        """Return one up-projection cut into the pieces' rows; two calls with one x need no cut."""
        dtype = pieces[0].call.dtype
        up = self._up(anchor, module, down=down, b=tensors.b[0], dtype=dtype)
        up = self._with_bias(
            anchor, module, up=up, bias=tensors.bias, width=module.out_dim, call=pieces[0].call
        )
        ranges = sorted({piece.rows for piece in pieces})
        if ranges == [(0, module.out_dim)]:
            parts, scales = {ranges[0]: up}, {ranges[0]: tensors.scale}
        else:
            sizes = [stop - start for start, stop in ranges]
            names = [f"{module.name}.lora.up.{number}" for number in range(len(ranges))]
            cut = self._write.split(anchor, up, sizes=sizes, names=names, dtype=dtype)
            parts = dict(zip(ranges, cut, strict=True))
            scales = dict.fromkeys(ranges)
            if tensors.scale is not None:
                names = [f"{module.name}.lora.scale.{number}" for number in range(len(ranges))]
                cut = self._write.split(anchor, tensors.scale, sizes=sizes, names=names, dtype=dtype)
                scales = dict(zip(ranges, cut, strict=True))
        for piece in pieces:
            yield BranchProduct(
                piece, self._rescaled(anchor, module, parts[piece.rows], piece), scales[piece.rows]
            )

    def _one(
        self,
        anchor: ir.Node,
        module: ExposedModule,
        down: ir.Value,
        piece: Piece,
        tensors: Tensors,
        partly: bool,
    ) -> BranchProduct:
        """Return the up-projection of one piece; if its call has gaps, in the call's width with B padded."""
        start, stop = piece.rows
        b, scale, bias, dtype = tensors.b[0], tensors.scale, tensors.bias, piece.call.dtype
        front = self._gate.first if self._gate else anchor
        if (start, stop) != (0, module.out_dim):
            if module.cuts:
                b = tensors.b[[first for _, first, _ in module.b_parts].index(start)]
            else:
                b = self._slice(
                    anchor, b, start=start, stop=stop, name=f"{module.name}.lora.rows", dtype=dtype, axis=1
                )
            if scale is not None:
                scale = self._slice(
                    anchor,
                    scale,
                    start=start,
                    stop=stop,
                    name=f"{module.name}.lora.scale",
                    dtype=dtype,
                    axis=0,
                )
            if bias is not None:
                bias = self._slice(
                    front, bias, start=start, stop=stop, name=f"{module.name}.lora.bias", dtype=dtype, axis=-1
                )
        if partly:
            b = self._padded(anchor, module, b, piece, axes=2)
            if bias is not None:
                bias = self._padded(front, module, bias, piece, axes=2 if self._gate else 1)
        up = self._up(anchor, module, down=down, b=b, dtype=dtype)
        width = piece.call.width if partly else stop - start
        up = self._with_bias(anchor, module, up=up, bias=bias, width=width, call=piece.call)
        return BranchProduct(piece, self._rescaled(anchor, module, up, piece), scale)

    def _padded(
        self, anchor: ir.Node, module: ExposedModule, value: ir.Value, piece: Piece, axes: int
    ) -> ir.Value:
        """Pad the last axis with zeros on both sides to the call's width."""
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
            return self._gate.add_bias(
                self._write, anchor, module=module, up=up, bias=bias, width=width, x=call.x
            )
        if module.kind == "conv":
            bias = column(self._write, call, bias, f"{module.name}.lora.bias_column")
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
        """Multiply by the factor that the exporter folded into the weight's rows."""
        if piece.row_scale is None:
            return value
        dtype = piece.call.dtype
        factor = piece.row_scale.astype(dtype.numpy()).reshape(-1, *(1 for _ in module.kernel))
        constant = self._write.constant(anchor, factor, f"{module.name}.lora.folded")
        return self._write.add(anchor, "Mul", [value, constant], f"{module.name}.lora.rescaled", dtype=dtype)
