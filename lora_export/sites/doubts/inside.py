"""Tell that a module does more with its product than add its bias, or that its product is read without it.

A trainer computes ``module(x) + B·A·x`` beside the module. A graph has the module's nodes, and a change of
its weight, or a branch at its product, is the same only where nothing but the bias lies between. It is not if

1. the product is read by another node than the Add of the module's bias: an exporter joined the module's
   call with ``F.linear(x, module.weight)`` on the same input, which no trainer changes;
2. the module's own nodes (of a subclass of Linear, of a convolution or of an embedding) compute something of
   the product, or of the input before the product, or the exporter has computed a factor into the weight:
   anything but moves, casts and sums with the product. Of an embedding a factor may be Gemma's
   ``embed_scale``, which PEFT applies to the adapter as well; it is warned of where the class is unknown; or
3. it is a convolution with dilation, or with a padding of other values than zeros: PEFT, kohya and diffusers
   train a convolution without either, and merge into the one that has them. This is warned of only.

A module that the adapter replaces as a whole has its own forward there, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from lora_export.graph.onnx_file import shape_of
from lora_export.plan import Refusal
from lora_export.sites.doubts.changed import is_computed_by_exporter
from lora_export.sites.doubts.readers import module_by_name
from lora_export.sites.naming.evidence import scope_class, weight_path
from lora_export.sites.operand import ROUNDED_OR_MOVED, SHAPE_ONLY, Use, constant_behind
from lora_export.sites.target import BaseWeights, Site

APART = (
    "export with torch.onnx.export(..., dynamo=True, optimize=False) and run no simplifier before the "
    "adapter is in the graph"
)
PLAIN = (
    "multiply the number into the module's weight (a plain layer computes the same), and export that model"
)
OUTSIDE = (
    "give the module's class a plain layer of its own for the product, train and export that model: trainers "
    "add the adapter behind everything that the module computes"
)
_PRODUCTS = frozenset({"MatMul", "FusedMatMul", "Gemm", "Conv"})
_DOMAINS = ("", "ai.onnx", "com.microsoft")
# Operators after which values are the same ones, moved or rounded.
_MOVES = ROUNDED_OR_MOVED | {"Expand", "Flatten", "Reshape", "Slice", "Split", "Squeeze", "Unsqueeze"}
# Those that pad a convolution's input (rule 3).
_PADS = frozenset({"Concat", "Pad"})
_FACTORS = frozenset({"Mul", "Div"})
# Operators with which a module computes another weight from its own (standardised, normalised).
ARITHMETIC = _FACTORS | {
    *(
        "Abs",
        "Add",
        "Clip",
        "Neg",
        "Pow",
        "ReduceL2",
        "ReduceMax",
        "ReduceMean",
        "ReduceSum",
        "ReduceSumSquare",
    ),
    *("Round", "Sign", "Sub", "Tanh"),
}
# Part of the names of transformers' classes with PEFT's ``embed_scale``.
_SCALED = "ScaledWordEmbedding"


def more_than_product(sites: Sequence[Site], base: BaseWeights | None) -> Mapping[int, tuple[str, str]]:
    """Return identity of a target → reason why its product is not the module's alone, and a hint."""
    found = {}
    for site in sites:
        if site.target.kind == "vector" or site.target.held_turned is not None or site.target.experts > 1:
            continue
        for use in (use for part in site.parts for use in part.uses):
            if use.node.domain not in _DOMAINS:
                continue
            if use.node.op_type in _PRODUCTS and (reason := _read_before_bias(site, use, base)):
                found[id(site.target)] = reason, APART
            elif site.target.action == "merge" and (own := _own_work(site, use) or _computed_factor(site)):
                found[id(site.target)] = own
    return found


def computes_with_weight(by: Sequence[str]) -> Refusal:
    """Return the refusal of a module that multiplies with another weight than its own, which it computes.

    Args:
        by: Names of the tensors, or the operators, of which it is computed.
    """
    detail = f"the module computes another weight of its own before the product (with {', '.join(by[:4])})"
    return Refusal("ambiguous", f"ambiguous: {detail}", OUTSIDE)


def _read_before_bias(site: Site, use: Use, base: BaseWeights | None) -> str:
    """Apply rule 1; return the reason, or an empty string."""
    product = use.node.outputs[0]
    readers = [usage.node for usage in product.uses() if usage.node.op_type not in SHAPE_ONLY]
    biased = [node for node in readers if _adds_bias(site, use, node, base)]
    if not biased or (len(biased) == len(readers) and not product.is_graph_output()):
        return ""
    other = next((node.op_type for node in readers if node not in biased), "an output")
    return f"its product is also read without its bias (by {other}): a tool joined it with another product"


def _adds_bias(site: Site, use: Use, node: ir.Node, base: BaseWeights | None) -> bool:
    if node.op_type != "Add":
        return False
    vectors = [value for value in map(constant_behind, node.inputs) if value is not None]
    vectors = [v for v in vectors if v.const_value is not None and len(shape_of(v.const_value)) == 1]
    if not vectors:
        return False
    paths = [key.rpartition(".")[0] for key in site.keys]
    if any(weight_path(str(value.name)) == f"{path}.bias" for value in vectors for path in paths):
        return True
    one, other = module_by_name(use.node), module_by_name(node)
    if one or other:
        return one == other
    return base is not None and any(base.stores(f"{path}.bias") for path in paths)


def _own_work(site: Site, use: Use) -> tuple[str, str] | None:
    """Apply rule 2 to the module's nodes; return the reason and a hint."""
    module = module_by_name(use.node)
    if (
        not module
        or site.is_quantised
        or use.node.op_type not in (*_PRODUCTS, "Gather")
        or not any(f".{key}".endswith(f".{module}.weight") for key in site.keys)
    ):
        return None
    behind = [node for node, value in _behind(use.node.outputs[0], module) if not _is_sum(node, value)]
    factors = [node for node in behind if node.op_type in _FACTORS and any(map(_is_number, node.inputs))]
    if others := [node for node in behind if node not in factors]:
        return f"the module computes more than its product and a sum ({_named(others[0])})", OUTSIDE
    for node in _before(use, module):
        return f"the module computes something of its input before the product ({_named(node)})", OUTSIDE
    if factors and use.node.op_type != "Gather":
        return f"the module multiplies its product by a number of its own ({_named(factors[0])})", PLAIN
    return None


def _named(node: ir.Node) -> str:
    return f"{node.op_type} {node.name!r}"


def _is_sum(node: ir.Node, value: ir.Value) -> bool:
    """Return True if a node adds something to a value, or subtracts something from it."""
    one, *others = node.inputs
    if node.op_type == "Add":
        return [one, *others].count(value) == 1
    return node.op_type == "Sub" and one is value and value not in others


def _behind(product: ir.Value, module: str) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Yield the module's own nodes that read its product, moved or in a sum, each with what it reads."""
    values, seen = [product], {id(product)}
    for value in values:
        for usage in value.uses():
            node = usage.node
            if node.op_type in SHAPE_ONLY or not _is_own(node, module):
                continue
            if node.op_type not in _MOVES:
                yield node, value
            new = [made for made in node.outputs if id(made) not in seen]
            seen |= set(map(id, new))
            values += new


def _before(use: Use, module: str) -> Iterator[ir.Node]:
    """Yield the module's own nodes through which its product's input has come, except moves."""
    moves = _MOVES | (_PADS if use.operand.kind == "conv" else frozenset())
    given = [value for value in use.node.inputs if value is not None and constant_behind(value) is None]
    values, seen = list(given[:1]), set[int]()
    for value in values:
        node = value.producer()
        if node is None or id(node) in seen or not _is_own(node, module):
            continue
        seen.add(id(node))
        if node.op_type not in moves:
            yield node
            return
        # The others are sizes and positions.
        values += [one for one in node.inputs[: None if node.op_type == "Concat" else 1] if one is not None]


def _is_own(node: ir.Node, module: str) -> bool:
    """Return True if a node is of a module, or of one inside it."""
    return f"{module_by_name(node) or ''}.".startswith(f"{module}.")


def _computed_factor(site: Site) -> tuple[str, str] | None:
    """Apply rule 2 to the weight: exporters compute constants only, so the factor is the module's own."""
    for part in site.parts:
        scaled = any(placement.row_scale is not None for placement in part.placements)
        if scaled and site.target.kind == "linear" and is_computed_by_exporter(part.root):
            return f"the module multiplies its weight by a number of its own ({part.root.name!r})", PLAIN
    return None


def _is_number(value: ir.Value | None) -> bool:
    constant = constant_behind(value)
    return constant is not None and constant.const_value is not None and constant.const_value.size == 1


def marked(site: Site) -> Site:
    """Return a site with rule 3, or rule 2 for embeddings, in its evidence, where it applies."""
    uses = [use for part in site.parts for use in part.uses]
    if site.target.kind == "conv" and any(map(_trained_otherwise, uses)):
        how = "trained without its dilation or padding mode"
    elif site.target.action == "merge" and any(map(_has_unknown_factor, uses)):
        how = "trained without the embedding's factor, unless that is its embed_scale"
    else:
        return site
    return replace(site, evidence=f"{site.evidence}; {how}", trained_otherwise=True)


def _has_unknown_factor(use: Use) -> bool:
    module = module_by_name(use.node)
    if use.node.op_type != "Gather" or use.operand.kind != "embedding" or not module:
        return False
    if _SCALED in (scope_class(use.node) or ""):
        return False
    return any(node.op_type in _FACTORS for node, _ in _behind(use.node.outputs[0], module))


def _trained_otherwise(use: Use) -> bool:
    node, tensor = use.node, use.root.const_value
    if tensor is None or use.operand.kind != "conv" or all(size == 1 for size in shape_of(tensor)[2:]):
        return False
    if any(step != 1 for step in node.attributes.get_ints("dilations", ())):
        return True
    pad = node.inputs[0].producer() if node.inputs[0] is not None else None
    # A padding layer of the model's own has another name; where a tool has lost the names, it may be either.
    if pad is None or module_by_name(pad) != module_by_name(node):
        return False
    if pad.op_type == "Concat":
        return module_by_name(node) is not None or _repeats_ends(pad)
    return pad.op_type == "Pad" and pad.attributes.get_string("mode", "") not in ("", "constant")


def _repeats_ends(node: ir.Node) -> bool:
    """Return whether a Concat puts slices of a value around it, as TorchScript writes circular padding."""
    makers = [value.producer() for value in node.inputs if value is not None]
    sliced = [maker.inputs[0] for maker in makers if maker is not None and maker.op_type == "Slice"]
    return any(one is value for one in sliced for value in node.inputs)
