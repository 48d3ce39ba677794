"""Find the weights of a graph that can be quantised, and account for all others with the reason.

A weight is quantised if one of ONNX Runtime's quantised operators computes what its reader does: MatMulNBits
what MatMul and Gemm do, wherever the exporter has put a Transpose or Cast; GatherBlockQuantized what Gather
does with an embedding.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import onnx_ir as ir

from lora_export.graph.exposed import KEY, lora_record_of
from lora_export.graph.onnx_file import FLOAT_TYPES, GraphFile, byte_size, shape_of
from lora_export.modes.quantising.choice import QuantiseChoice
from lora_export.sites.node_text import module_of
from lora_export.sites.operand import DEQUANTIZE, QUANTIZE, Use
from lora_export.sites.uses import find_uses

Kind = Literal["linear", "embedding"]
_HEADS = frozenset({"lm_head", "embed_out", "output_projection"})
_LOGITS = "logits"
# Operators that may stand between the head and the logits: a bias, a factor, a soft limit, a LoRA branch.
_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Identity"})
# Types of scales and activations that MatMulNBits has.
_SCALES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_TURNED = ("transA", "transBatchA", "transBatchB")


@dataclass(frozen=True, kw_only=True, eq=False)
class Product:
    """A weight that is quantised, with all nodes that will read its codes.

    Attributes:
        root: The stored weight.
        uses: Its readers.
        kind: Kind of the readers.
        rows: Number of outputs N; an embedding's entries.
        columns: Number of inputs K, along which blocks lie; an embedding's width.
        turned: True if it is stored as ``(K, N)``.
        dtype: Type that reaches the readers, which the scales get.
        module: Module path of the first reader; "" if unknown.
    """

    root: ir.Value
    uses: tuple[Use, ...]
    kind: Kind
    rows: int
    columns: int
    turned: bool
    dtype: ir.DataType
    module: str


@dataclass(frozen=True, kw_only=True)
class WeightRow:
    """The plan for one weight: every matrix of floats has one.

    Attributes:
        weight: Name of the stored weight.
        module: Module path of a reader; "" if unknown.
        operator: Operators that read it.
        shape: Stored shape.
        action: Fate of it.
        reason: The reason why it is left in float; "" if it is quantised.
    """

    weight: str
    module: str
    operator: str
    shape: tuple[int, ...]
    action: Literal["quantise", "leave"]
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def find_products(graph: GraphFile, choice: QuantiseChoice) -> tuple[list[Product], list[WeightRow]]:
    """Return the weights to quantise, and the row of every weight of two or more axes."""
    uses = [use for use in find_uses(graph) if _is_matrix(use)]
    rules = _Rules(graph, uses, choice)
    groups: dict[tuple[int, str, bool, str], list[Use]] = defaultdict(list)
    for use in uses:
        reason = rules.reason(use)
        kind = reason or f"{use.operand.kind} {use.operand_type}"
        groups[id(use.root), kind, use.transposed, reason].append(use)
    products, rows = [], []
    for (_, _, _, reason), group in groups.items():
        if not reason:
            product = _product(group)
            if reason := _unprofitable(product, choice):
                rows.append(_row(group, reason))
                continue
            products.append(product)
        rows.append(_row(group, reason))
    return products, rows


def _is_matrix(use: Use) -> bool:
    assert use.root.const_value is not None
    is_float = use.root.const_value.dtype in FLOAT_TYPES
    return (
        use.operand.shape is not None
        or (use.quantised and use.operand.kind != "vector")
        or (is_float and len(shape_of(use.root.const_value)) > 1)
    )


def _row(group: Sequence[Use], reason: str) -> WeightRow:
    first = group[0]
    assert first.root.const_value is not None
    return WeightRow(
        weight=str(first.root.name),
        module=module_of(first.node) or "",
        operator=", ".join(dict.fromkeys(use.node.op_type for use in group)),
        shape=shape_of(first.root.const_value),
        action="leave" if reason else "quantise",
        reason=reason,
    )


def _product(group: Sequence[Use]) -> Product:
    first = group[0]
    assert first.root.const_value is not None
    assert first.operand_type is not None
    height, width = shape_of(first.root.const_value)
    # An embedding is looked up by rows: `Use.transposed` says nothing of it.
    kind: Kind = "embedding" if first.operand.kind == "embedding" else "linear"
    turned = kind == "linear" and first.transposed
    return Product(
        root=first.root,
        uses=tuple(group),
        kind=kind,
        rows=width if turned else height,
        columns=height if turned else width,
        turned=turned,
        dtype=first.operand_type,
        module=module_of(first.node) or "",
    )


def quantised_bytes(product: Product, choice: QuantiseChoice) -> int:
    """Return the bytes of codes, scales and zero points."""
    blocks = math.ceil(product.columns / choice.block_size)
    codes = product.rows * blocks * choice.block_size * choice.bits // 8
    scales = product.rows * blocks * product.dtype.itemsize
    zeros = 0 if choice.is_symmetric else product.rows * math.ceil(blocks * choice.bits / 8)
    return codes + int(scales) + zeros


def _unprofitable(product: Product, choice: QuantiseChoice) -> str:
    assert product.root.const_value is not None
    if product.kind == "embedding" and product.columns % choice.block_size:
        return f"GatherBlockQuantized pads nothing, and {product.columns} is not a multiple of the block size"
    if quantised_bytes(product, choice) >= byte_size(product.root.const_value):
        return "its codes, padded to whole blocks, and scales would not be smaller"
    return ""


class _Rules:
    """The rules by which a weight's use is left in float, in the order in which they are tried.

    Args:
        graph: The graph.
        uses: Uses of all matrices.
        choice: The user's choice.
    """

    def __init__(self, graph: GraphFile, uses: Sequence[Use], choice: QuantiseChoice) -> None:
        self._choice = choice
        self._heads = set(_heads(graph, uses))
        metadata = graph.model.metadata_props
        record = lora_record_of(metadata, str(graph.path)) if KEY in metadata else None
        self._lora = set(record.tensor_names()) if record else set()
        members = [member for _, member in record.members()] if record and record.dora else []
        self._normed = {rows.weight for member in members for rows in member.stored}
        self._rules: tuple[Callable[[Use], str], ...] = (
            self._quantised,
            self._exposed,
            self._of_operator,
            self._of_values,
            self._chosen,
        )

    def reason(self, use: Use) -> str:
        """Return the reason why a use's weight stays in float, or ""."""
        return next((reason for rule in self._rules if (reason := rule(use))), "")

    def _quantised(self, use: Use) -> str:
        if use.quantised:
            return f"quantised already ({_codes_reader(use)})"
        if any(node.op_type in QUANTIZE | DEQUANTIZE for node in use.chain):
            return "the graph rounds it to a grid of its own (QuantizeLinear)"
        return ""

    def _exposed(self, use: Use) -> str:
        if str(use.root.name) in self._lora:
            return "a tensor of exposed LoRA"
        if use.root.is_graph_input():
            return "an input with a default: a caller may feed another"
        if str(use.root.name) in self._normed:
            return "adapters' DoRA factors are computed from it"
        return ""

    def _of_operator(self, use: Use) -> str:
        node, axes = use.node, len(shape_of(use.root.const_value)) if use.root.const_value else 0
        if use.operand.kind == "embedding" and not self._choice.embeddings:
            return "an embedding: --embeddings quantises it"
        if use.operand.kind not in ("linear", "embedding"):
            kind = {"conv": "a convolution", "vector": "an element-wise operator"}.get(use.operand.kind, "it")
            return f"{node.op_type}: no quantised operator computes what {kind} does"
        if axes != 2:
            return f"it has {axes} axes, and MatMulNBits takes matrices"
        if use.operand.kind == "embedding":
            moved = any(step.op_type == "Transpose" for step in use.chain)
            return "an embedding behind a Transpose" if moved else ""
        if use.operand.index != 1:
            return "the weight stands on the left (W @ x)"
        x = node.inputs[0]
        if x is not None and x.shape is not None and len(x.shape) < 2:
            return "its activation is a vector, and MatMulNBits takes matrices"
        return _operator_reason(node)

    def _of_values(self, use: Use) -> str:
        if use.refusal:
            return use.refusal
        kind = use.operand_type
        if kind not in _SCALES:
            return f"its operator computes in {kind.name.lower() if kind else 'an unknown type'}"
        return ""

    def _chosen(self, use: Use) -> str:
        name, module = str(use.root.name), module_of(use.node) or ""
        for kept in self._choice.keep:
            if is_kept(kept, name, module):
                return f"kept in float, as asked (--keep {kept})"
        if id(use.node) in self._heads and not self._choice.head:
            return "the head, which makes the logits: --head quantises it"
        return ""


def is_kept(kept: str, *paths: str | None) -> bool:
    """Return whether a name that stays in float is one of these, or what one of them ends in."""
    return any(path == kept or (path or "").endswith(f".{kept}") for path in paths)


def _operator_reason(node: ir.Node) -> str:
    """Return the reason why MatMulNBits can't replace a product, or ""."""
    if (node.domain, node.op_type) == ("", "MatMul"):
        return ""
    attributes = node.attributes
    factor = attributes.get_float("alpha", 1.0)
    turned = [name for name in _TURNED if attributes.get_int(name, 0)]
    if (node.domain, node.op_type) == ("com.microsoft", "FusedMatMul"):
        if factor != 1.0 or turned:
            return "FusedMatMul with a factor or a turned activation, which MatMulNBits lacks"
        return ""
    if (node.domain, node.op_type) == ("", "Gemm"):
        if factor != 1.0 or attributes.get_float("beta", 1.0) != 1.0 or turned:
            return "Gemm with a factor or a turned activation, which MatMulNBits lacks"
        return ""
    return f"{node.op_type} has a weight inside an operator that does more than a product"


def _codes_reader(use: Use) -> str:
    found = next((node.op_type for node in use.chain if node.op_type in DEQUANTIZE), None)
    return found or use.node.op_type


def _heads(graph: GraphFile, uses: Sequence[Use]) -> Iterator[int]:
    """Yield the ids of nodes that are the head: by name, by a table that is also an embedding, by logits."""
    linear = [use for use in uses if use.operand.kind == "linear"]
    tables = {id(use.root) for use in uses if use.operand.kind == "embedding"}
    nodes = {id(use.node) for use in linear}
    for use in linear:
        leaf = (module_of(use.node) or "").rpartition(".")[2]
        if leaf in _HEADS or id(use.root) in tables:
            yield id(use.node)
    waiting = [value.producer() for value in graph.graph.outputs if value.name == _LOGITS]
    seen: set[int] = set()
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if id(node) in nodes:
            yield id(node)
        elif node.op_type in _ELEMENTWISE:
            waiting += [value.producer() for value in node.inputs if value is not None]
