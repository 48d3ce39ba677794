"""What a node with a weight computes: the activation a branch reads, the width and type of its result."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from lora_export.adapter import Array, LoraModule
from lora_export.exposed import ExposedKind, StoredRows
from lora_export.sites.fit import stored_shape
from lora_export.sites.slot import DEQUANTIZE, Use
from lora_export.sites.target import Part, Site, Target

_TRANSPOSING = ("transA", "transBatchA")


@dataclass(frozen=True, eq=False)
class Call:
    """A node that computes one or several modules' products.

    Attributes:
        node: The operator.
        x: The activation; for an embedding the indices.
        width: Outputs of the node, along its last axis (a convolution's second).
        dtype: Type of activation and result.
    """

    node: ir.Node
    x: ir.Value
    width: int
    dtype: ir.DataType


@dataclass(frozen=True, eq=False)
class Piece:
    """Some of a module's outputs in the result of a call.

    Attributes:
        call: The call.
        rows: Range of the module's outputs.
        offset: Where it begins in the call's result.
        row_scale: Factor per output in ``rows`` that an exporter folded into the weight.
    """

    call: Call
    rows: tuple[int, int]
    offset: int = 0
    row_scale: Array | None = None


@dataclass(frozen=True, eq=False)
class Branch:
    """A module that gets a branch.

    Attributes:
        path: Module path; the beginning of every name that is added.
        kind: What the module is.
        in_dim: Inputs: features, channels, or the rows of an embedding.
        out_dim: Outputs.
        pieces: Where its outputs are computed: one, or more where its weight is split or it is called again.
        kernel: Of a convolution.
        groups: Of the convolution that B is.
        lora: The factors of the adapter that asked for it, if one did.
        stored: Where its weight lies; empty where that is no help (quantised, rescaled).
    """

    path: str
    kind: ExposedKind
    in_dim: int
    out_dim: int
    pieces: tuple[Piece, ...]
    kernel: tuple[int, ...] = ()
    groups: int = 1
    lora: LoraModule | None = None
    stored: tuple[StoredRows, ...] = ()

    @property
    def rank(self) -> int:
        """Of the adapter that asked for it, 0 if none did."""
        return self.lora.rank if self.lora else 0


def branch_of(site: Site, calls: dict[int, Call]) -> Branch | str:
    """Return the branch beside a site, or why there can be none.

    Args:
        site: Where the module's weight is.
        calls: Node → its call; several modules share the call of a fused weight.
    """
    target = site.target
    if target.kind not in ("linear", "conv", "embedding"):
        return f"a {target.kind} has no product that a branch could be added to; merge it instead"
    pieces: list[Piece] = []
    for part in site.parts:
        placement = part.placements[0]
        offset = placement.col if placement.transposed else placement.row
        rows = (0, target.shape[1]) if target.kind == "embedding" else placement.rows
        for use in part.uses:
            if id(use.node) not in calls:
                call = _call_of(target, use)
                if isinstance(call, str):
                    return call
                calls[id(use.node)] = call
            pieces.append(Piece(calls[id(use.node)], rows, offset, placement.row_scale))
    out_dim, in_dim = target.shape[:2] if target.kind != "embedding" else target.shape[:2][::-1]
    module = target.module
    return Branch(
        target.path,
        target.kind,
        in_dim,
        out_dim,
        tuple(pieces),
        tuple(target.shape[2:]),
        module.groups if module else 1,
        module,
        _stored(site.parts),
    )


def _stored(parts: tuple[Part, ...]) -> tuple[StoredRows, ...]:
    """Where W0 lies; the same rows in a second constant (an exporter repeats shared weights) are left out."""
    found: dict[tuple[int, int], StoredRows] = {}
    for part in parts:
        (placement,) = part.placements
        if placement.row_scale is not None or any(use.quantised for use in part.uses):
            return ()
        rows = StoredRows(
            str(part.root.name), placement.rows, placement.row, placement.col, placement.transposed
        )
        found.setdefault(placement.rows, rows)
    return tuple(found.values())


def _call_of(target: Target, use: Use) -> Call | str:
    node = use.node
    if any(node.attributes.get_int(name, 0) for name in _TRANSPOSING):
        return f"{node.op_type} reads its activation transposed: no branch is known for it"
    # Gather takes the table first; the others the activation.
    x = node.inputs[1] if target.kind == "embedding" else node.inputs[0]
    if x is None:
        return f"{node.op_type} has no activation"
    dtype = _dtype(use)
    if dtype is None:
        return f"the type that {node.op_type} computes in can't be told"
    return Call(node, _unquantised(x), _width(target, use), dtype)


def _width(target: Target, use: Use) -> int:
    if target.kind == "embedding":
        return target.shape[1]
    height, width = stored_shape(target, use)
    return width if use.transposed else height


def _dtype(use: Use) -> ir.DataType | None:
    """The float type that reaches the operator, behind Cast and DequantizeLinear."""
    if use.slot.shape is not None:
        # Packed weights come with scales, in the type of the activation.
        scales = use.node.inputs[2]
        return scales.dtype if scales is not None else None
    for node in reversed(use.chain):
        if node.op_type == "Cast":
            return ir.DataType(node.attributes["to"].as_int())
        if node.op_type == "CastLike" or node.op_type in DEQUANTIZE:
            like = node.inputs[1]
            return like.dtype if like is not None else None
    assert use.root.const_value is not None
    return use.root.const_value.dtype


def _unquantised(x: ir.Value) -> ir.Value:
    """The activation before a pair of QuantizeLinear and DequantizeLinear: the branch loses nothing by it."""
    maker = x.producer()
    if maker is not None and maker.op_type in DEQUANTIZE and maker.inputs[0] is not None:
        source = maker.inputs[0].producer()
        if source is not None and source.op_type == "QuantizeLinear" and source.inputs[0] is not None:
            return source.inputs[0]
    return x


def tiled(call: Call, pieces: list[Piece]) -> bool:
    """Whether pieces cover all outputs of a call, without gap or overlap."""
    at = 0
    for piece in sorted(pieces, key=lambda piece: piece.offset):
        if piece.offset != at:
            return False
        at += piece.rows[1] - piece.rows[0]
    return at == call.width
