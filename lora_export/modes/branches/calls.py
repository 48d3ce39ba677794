"""Describe what a node with a weight computes: the activation for a branch, the result's width and dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Array, LoraModule
from lora_export.formats.reading.saved import LARGEST_RANK, change_of
from lora_export.graph.exposed import ExposedKind, StoredRows, path_of
from lora_export.graph.onnx_file import matrix_shape, shape_of
from lora_export.plan import Refusal
from lora_export.sites import operator_named
from lora_export.sites.fit import stored_shape
from lora_export.sites.operand import DEQUANTIZE, QUANTIZE, Use
from lora_export.sites.target import ConstantPart, Site, Target
from lora_export.sites.values.held import held_of, name_of_floats
from lora_export.sites.values.ranges import may_hold_activation
from lora_export.sites.values.verify import rectangle
from lora_export.sites.whole import stores_turned

_TRANSPOSING = ("transA", "transBatchA")

_KINDS: dict[str, ExposedKind] = {"linear": "linear", "conv": "conv", "embedding": "embedding"}


@dataclass(frozen=True, eq=False)
class Call:
    """Node that computes the products of one or several modules.

    Attributes:
        node: The operator.
        x: The activation; for an embedding, the indices.
        width: Number of the node's outputs, along its last axis (a convolution's second).
        dtype: Dtype of activation and result.
    """

    node: ir.Node
    x: ir.Value
    width: int
    dtype: ir.DataType


@dataclass(frozen=True, eq=False)
class Piece:
    """Range of a module's outputs in the result of a call.

    Attributes:
        call: The call.
        rows: Range of the module's outputs.
        offset: Its first output in the call's result.
        row_scale: Factor of each output in ``rows`` that an exporter folded into the weight.
    """

    call: Call
    rows: tuple[int, int]
    offset: int = 0
    row_scale: Array | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Branch:
    """Module that gets a branch.

    Attributes:
        path: Module path; the beginning of every name that is added.
        kind: Kind of the module.
        in_dim: Number of inputs: features, channels, or the rows of an embedding.
        out_dim: Number of outputs.
        pieces: Pieces of its outputs: one, or more if its weight is split or it is called again.
        kernel: Kernel of a convolution.
        groups: Groups of the convolution that B is.
        lora: Factors of the adapter that asked for it, if one did.
        stored: Stored rows of its weight; empty if they don't help (quantised, rescaled).
        bias: True if the branch has a bias too.
        stored_bias: Stored rows of the module's own bias.
        held_turned: See `Target`.
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
    bias: bool = False
    stored_bias: tuple[StoredRows, ...] = ()
    held_turned: bool | None = None

    @property
    def rank(self) -> int:
        """Rank of the adapter that asked for it, 0 if none did."""
        return self.lora.rank if self.lora else 0


def branch_of(site: Site, calls: dict[int, Call]) -> Branch | Refusal:
    """Return the branch beside a site, or the refusal: of kind "merge only", or "integers" beside codes.

    Args:
        site: Site of the module's weight.
        calls: Node → its call; several modules share the call of a fused weight.
    """
    made = _branch_of(site, calls)
    # With codes, a merge is not possible either.
    return replace(made, kind="integers") if isinstance(made, Refusal) and site.is_quantised else made


def _branch_of(site: Site, calls: dict[int, Call]) -> Branch | Refusal:
    target = _as_module(site)
    if isinstance(target, Refusal):
        return target
    form = _form(target, site)
    if isinstance(form, Refusal):
        return form
    kind, kernel = form
    pieces: list[Piece] = []
    for part in site.parts:
        placement = part.placements[0]
        offset = placement.col if placement.transposed else placement.row
        rows = (0, target.shape[1]) if target.kind == "embedding" else placement.rows
        for use in part.uses:
            if id(use.node) not in calls:
                call = _call_of(target, use)
                if isinstance(call, Refusal):
                    return call
                calls[id(use.node)] = call
            pieces.append(Piece(calls[id(use.node)], rows, offset, placement.row_scale))
    out_dim, in_dim = target.shape[:2] if target.kind != "embedding" else target.shape[:2][::-1]
    module, groups = target.module, site.parts[0].uses[0].node.attributes.get_int("group", 1)
    if module is not None and module.groups != groups:
        return _refused(f"lora_B has {module.groups} groups, the graph's convolution {groups}")
    if kind == "conv" and any((piece.rows, piece.call.width) != ((0, out_dim), out_dim) for piece in pieces):
        return _refused("it is a part of a convolution's outputs: no branch is known for it")
    if module is not None and module.is_pointwise:
        module = module.with_kernel(len(kernel))
    return Branch(
        # PEFT's name is the module's, so it is its weight's; another matrix of it needs a name of its own.
        path=target.path if target.held_turned is None else path_of(target.key),
        kind=kind,
        in_dim=in_dim * groups,
        out_dim=out_dim,
        pieces=tuple(pieces),
        kernel=kernel,
        groups=groups,
        lora=module,
        stored=_stored(site.parts, codes=site.target.action == "replace"),
        held_turned=_held_turned(target, site),
    )


def _held_turned(target: Target, site: Site) -> bool | None:
    """Return whether a module holds the transpose of its weight, for square ones and whole copies of them."""
    out_dim, in_dim, *more = target.shape
    if target.held_turned is not None or target.kind != "linear" or out_dim != in_dim or more:
        return target.held_turned
    return target.stored_turned if target.action == "replace" else stores_turned(site)


def _refused(reason: str) -> Refusal:
    return Refusal("merge only", reason)


def _form(target: Target, site: Site) -> tuple[ExposedKind, tuple[int, ...]] | Refusal:
    """Return the kind and kernel of a module in the graph: a Linear may be a convolution, or the reverse."""
    kernels: set[tuple[int, ...] | None] = set()
    for use in (use for part in site.parts for use in part.uses):
        tensor = use.root.const_value
        assert tensor is not None
        kernels.add(shape_of(tensor)[2:] if use.operand.kind == "conv" else None)
    kernel, *others = kernels
    if others:
        return _refused(
            "it is a Linear in one place of the graph and a convolution in another: no branch is known for it"
        )
    if kernel is None:
        return ("embedding" if target.kind == "embedding" else "linear"), ()
    return "conv", kernel


def _as_module(site: Site) -> Target | Refusal:
    """Return the target as a low-rank change: a whole replaced matrix becomes a difference to the base's."""
    target = site.target
    if target.action == "merge" and target.kind in _KINDS:
        return target
    kind = site.parts[0].uses[0].operand.kind
    pointwise = all(size == 1 for size in target.shape[2:])
    if target.kind != "any" or kind not in _KINDS or len(target.shape) < 2 or not pointwise:
        whole = "convolution" if kind == "conv" else kind
        what = f"replaces this whole {whole}" if target.kind == "any" else f"changes a {target.kind}"
        return _refused(f"the adapter {what}, and no branch goes beside it; merge it instead")
    if (rank := min(target.matrix)) > LARGEST_RANK:
        return _refused(
            f"the adapter replaces this whole matrix {target.shape}, as a change of rank {rank}: more than "
            f"{LARGEST_RANK}; merge it instead"
        )
    old = _values(site)
    if isinstance(old, Refusal):
        return old
    assert target.values is not None
    like: ExposedKind = "embedding" if kind == "embedding" else "linear"
    new = np.asarray(target.values).reshape(target.matrix)
    module = change_of(target.path, like, new=new, old=old, tensor_names=target.tensor_names)
    return replace(target, kind=like, shape=target.matrix, module=module)


def _values(site: Site) -> Array | Refusal:
    """Return the base's values of a whole canonical matrix."""
    values = np.zeros(site.target.matrix, np.float32)
    for part in site.parts:
        (placement,) = part.placements
        if placement.row_scale is not None:
            return _refused(
                "the adapter replaces it, and the base's values are not in the graph as they are; merge it"
            )
        held = held_of(part.uses[0])
        if isinstance(held, Refusal):
            return _refused(f"the adapter replaces it, and {held.detail}")
        matrix = held.values.reshape(matrix_shape(held.values.shape))
        values[slice(*placement.rows)] = rectangle(matrix, placement)
    return values


def _stored(parts: tuple[ConstantPart, ...], *, codes: bool) -> tuple[StoredRows, ...]:
    """Return the stored rows of W0, without those in a second constant (exporters repeat shared weights).

    Args:
        parts: Parts in which it was found.
        codes: Accept codes of a quantiser, because the adapter replaces the values that the graph computes
            with.
    """
    found: dict[tuple[int, int], StoredRows] = {}
    for part in parts:
        (placement,) = part.placements
        name = name_of_floats(part.uses[0])
        quantised = any(use.quantised for use in part.uses)
        if placement.row_scale is not None or name is None or (quantised and not codes):
            return ()
        rows = StoredRows(
            weight=name,
            rows=placement.rows,
            row=placement.row,
            col=placement.col,
            transposed=placement.transposed,
        )
        found.setdefault(placement.rows, rows)
    return tuple(found.values())


def _call_of(target: Target, use: Use) -> Call | Refusal:
    node = use.node
    if any(node.attributes.get_int(name, 0) for name in _TRANSPOSING):
        return _refused(f"{node.op_type} reads its activation transposed: no branch is known for it")
    operator = operator_named(node.op_type)
    if operator and operator.takes_codes:
        return _integer_call(target, use)
    # Gather takes the table first; the others take the activation first.
    x = node.inputs[1] if target.kind == "embedding" else node.inputs[0]
    if x is None:
        return _refused(f"{node.op_type} has no activation")
    dtype = use.operand_type
    if dtype is None:
        return _refused(f"the dtype that {node.op_type} computes in is unknown")
    return Call(node, _unquantised(x), _width(target, use), dtype)


def _integer_call(target: Target, use: Use) -> Call | Refusal:
    """Return the call of dynamically quantised integers: x before its quantiser, the product after Mul."""
    quantiser = use.node.inputs[0].producer() if use.node.inputs[0] is not None else None
    last = use.node
    for operator in ("Cast", "Mul") if last.op_type == "MatMulInteger" else ():
        readers = [usage.node for usage in last.outputs[0].uses()]
        if len(readers) != 1 or readers[0].op_type != operator:
            return _refused(
                "MatMulInteger without the Cast and Mul of dynamic quantisation: no branch is known for it"
            )
        (last,) = readers
    if last is not use.node and not _scales(last, quantiser):
        return _refused("MatMulInteger whose Mul is not by both scales at once: no branch is known for it")
    if quantiser is None or quantiser.op_type != "DynamicQuantizeLinear" or quantiser.inputs[0] is None:
        maker = "whose activation no DynamicQuantizeLinear makes"
        return _refused(f"{use.node.op_type} {maker}: no branch is known")
    return Call(last, quantiser.inputs[0], _width(target, use), ir.DataType.FLOAT)


def _scales(last: ir.Node, quantiser: ir.Node | None) -> bool:
    """Return True if a Mul turns integers into the product: by the activation's scale times the weight's."""
    factors = [value.producer() for value in last.inputs if value is not None]
    scale = quantiser.outputs[1] if quantiser is not None and len(quantiser.outputs) > 1 else None
    return any(node is not None and node.op_type == "Mul" and scale in node.inputs for node in factors)


def _width(target: Target, use: Use) -> int:
    if target.kind == "embedding":
        return target.shape[1]
    height, width = stored_shape(target, use)
    return width if use.transposed else height


def _unquantised(x: ir.Value) -> ir.Value:
    """Return the activation before QuantizeLinear and DequantizeLinear, so that the branch loses nothing.

    If the pair's range also does the work of an activation that the quantiser dropped, it is kept.
    """
    maker = x.producer()
    if maker is not None and maker.op_type in DEQUANTIZE and maker.inputs[0] is not None:
        source = maker.inputs[0].producer()
        if source is not None and source.op_type in QUANTIZE and source.inputs[0] is not None:
            before = source.inputs[0]
            other = None not in (x.dtype, before.dtype) and x.dtype != before.dtype
            return x if other or may_hold_activation(source) else before
    return x


def covers_outputs(call: Call, pieces: list[Piece]) -> bool:
    """Return True if pieces cover all outputs of a call, without gap or overlap."""
    at = 0
    for piece in sorted(pieces, key=lambda piece: piece.offset):
        if piece.offset != at:
            return False
        at += piece.rows[1] - piece.rows[0]
    return at == call.width
