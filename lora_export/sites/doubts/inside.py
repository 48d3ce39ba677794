"""Tell that a module does more with its product than add its bias, or that its product is read without it.

A trainer computes ``module(x) + B·A·x`` beside the module. A graph has the module's nodes, and a change of
its weight, or a branch at its product, is the same only where nothing but the bias lies between. It is not if

1. the product is read by another node than the Add of the module's bias: an exporter joined the module's
   call with ``F.linear(x, module.weight)`` on the same input, which no trainer changes;
2. the module's own nodes multiply the product by a number (a subclass of Linear or of a convolution). Of an
   embedding it is Gemma's ``embed_scale``, which PEFT applies to the adapter as well; or
3. it is a convolution with dilation, or with a padding of other values than zeros: PEFT, kohya and diffusers
   train a convolution without either, and merge into the one that has them. This is warned of only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from lora_export.graph.onnx_file import shape_of
from lora_export.sites.doubts.readers import module_of
from lora_export.sites.naming.evidence import weight_path
from lora_export.sites.slot import SHAPE_ONLY, Use, constant_behind
from lora_export.sites.target import BaseWeights, Site

APART = (
    "export with torch.onnx.export(..., dynamo=True, optimize=False) and run no simplifier before the "
    "adapter is in the graph"
)
PLAIN = (
    "multiply the number into the module's weight (a plain layer computes the same), and export that model"
)
_PRODUCTS = frozenset({"MatMul", "FusedMatMul", "Gemm", "Conv"})


def more_than_product(sites: Sequence[Site], base: BaseWeights | None) -> Mapping[int, tuple[str, str]]:
    """Return identity of a target → reason why its product is not the module's alone, and a hint."""
    found = {}
    for site in sites:
        if site.target.kind == "vector" or site.target.held_turned is not None or site.target.experts > 1:
            continue
        for use in (use for part in site.parts for use in part.uses):
            if use.node.op_type not in _PRODUCTS or use.node.domain not in ("", "ai.onnx", "com.microsoft"):
                continue
            if reason := _read_before_bias(site, use, base):
                found[id(site.target)] = reason, APART
            elif reason := _factor(site, use):
                found[id(site.target)] = reason, PLAIN
    return found


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
    one, other = module_of(use.node), module_of(node)
    if one or other:
        return one == other
    return base is not None and any(base.stores(f"{path}.bias") for path in paths)


def _factor(site: Site, use: Use) -> str:
    """Apply rule 2; return the reason, or an empty string."""
    module = module_of(use.node)
    if (
        not module
        or site.is_quantised
        or not any(f".{key}".endswith(f".{module}.weight") for key in site.keys)
    ):
        return ""
    for node in _behind_bias(use.node.outputs[0], module):
        if node.op_type in ("Mul", "Div") and module_of(node) == module and any(map(_is_number, node.inputs)):
            return f"the module multiplies its product by a number of its own ({node.op_type} {node.name!r})"
    return ""


def _behind_bias(product: ir.Value, module: str) -> Iterator[ir.Node]:
    for usage in product.uses():
        yield usage.node
        if usage.node.op_type == "Add" and module_of(usage.node) == module:
            yield from (other.node for other in usage.node.outputs[0].uses())


def _is_number(value: ir.Value | None) -> bool:
    constant = constant_behind(value)
    return constant is not None and constant.const_value is not None and constant.const_value.size == 1


def marked(site: Site) -> Site:
    """Return a site with rule 3 in its evidence, where it applies."""
    if site.target.kind == "conv" and any(
        _trained_otherwise(use) for part in site.parts for use in part.uses
    ):
        return replace(
            site,
            evidence=f"{site.evidence}; trained without its dilation or padding mode",
            trained_otherwise=True,
        )
    return site


def _trained_otherwise(use: Use) -> bool:
    node, tensor = use.node, use.root.const_value
    if tensor is None or use.slot.kind != "conv" or all(size == 1 for size in shape_of(tensor)[2:]):
        return False
    if any(step != 1 for step in node.attributes.get_ints("dilations", ())):
        return True
    pad = node.inputs[0].producer() if node.inputs[0] is not None else None
    # A padding layer of the model's own has another name.
    if pad is None or module_of(node) is None or module_of(pad) != module_of(node):
        return False
    # TorchScript writes circular padding as a Concat of slices.
    mode = pad.attributes.get_string("mode", "")
    return pad.op_type == "Concat" or (pad.op_type == "Pad" and mode not in ("", "constant"))
