"""Tell whether a constant is a module's parameter as an exporter writes it, or may have been changed since.

Tools that optimise graphs multiply factors and norms into a constant and keep the module's name, on the node
or in the constant's new name. So a site is believed by name only if

1. the constant has the parameter's own path, alone or with a suffix that an exporter is known to append, or
   by its name is that parameter transposed (``folded_from``, ``onnx::MatMul_12``); and
2. the product that reads it names its module, by metadata or by a path in its name. Every exporter known here
   writes one of the two. Without them, exporters may have folded a batch norm into a Gemm's or a
   convolution's constant without a new name, and tools that smooth or permute a MatMul's constant keep its
   name; and it is not the weight of a norm in a graph of onnxruntime-genai's builder, which adds 1 to some.

Everything else is a doubt, which the checkpoint's values can settle.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import onnx_ir as ir

from lora_export.plan import Refusal
from lora_export.sites import fit, operator_named
from lora_export.sites.doubts.readers import module_by_name
from lora_export.sites.naming.evidence import (
    FOLDED,
    WEIGHT_NAME,
    computed_from,
    folded_from,
    weight_name,
    weight_path,
)
from lora_export.sites.operand import Use
from lora_export.sites.target import ConstantPart, Target

_RULE = "pkg.onnxscript.rewriter.rule_name"
# Evidence from another module's parameter: exporters keep one of two that are tied or equal.
_PATH = re.compile(r"[A-Za-z_]\w*(\.\w+)+")
# Name that the TorchScript exporter gives to a parameter that it transposed, which only a MatMul needs.
_TRANSPOSED = re.compile(r"onnx::MatMul_\d+")
# onnxruntime-genai's builder (``models/builders/base.py``: ``layernorm_attrs["add_offset"]``).
_GENAI_NORM = re.compile(r"norm/(Skip)?LayerNorm(/|$)")
# Names that torch.onnx gives to what it computed itself.
_OF_EXPORTER = re.compile(r"onnx::\w+|val_\d+")
# What quantisers append to a name, up to its end.
_CODES = re.compile(r"(_DQ)?_Q\d")
_QUANTISED = re.compile(r"(_DQ)?(_Bnb4|_quantized)$")
# Names that tools are known to give, and what the tools did to the values.
_TOOLS = (
    (
        re.compile(r"Conv(Bn|Mul|Add)Fusion_|MatMulBn(?:(?!MatMulBn)\w)*_"),
        "ONNX Runtime's optimiser folded a norm or a factor into it",
    ),
    (re.compile(r"_(weight|bias)_fused$"), "onnxslim multiplied or added a constant into it"),
    (re.compile(r"\w_(weight|bias)$"), "onnxslim made it when it fused nodes"),
    (re.compile(r"_(scaled|offset)$"), "onnxscript's rewriter multiplied or added a constant into it"),
    (re.compile(r"^onnx::"), "torch.onnx (TorchScript) computed it, perhaps with a norm or a factor"),
    (re.compile(r"^val_\d+$"), "torch.onnx computed it and does not say what from"),
)


def is_path(path: str) -> bool:
    """Return True if a text is a path of modules, with dots, and no tool is known to have made it."""
    return _PATH.fullmatch(path) is not None and not any(tool.search(path) for tool, _ in _TOOLS)


def doubt_of(target: Target, part: ConstantPart, source: str, key: str) -> str:
    """Return the reason why a constant may hold other values than a parameter, or an empty string.

    Args:
        target: The parameter.
        part: Constant in which it was found by name.
        source: Kind of evidence.
        key: The parameter's path in the graph.
    """
    name = str(part.root.name)
    if any(
        use.operand.parameter == "weight" and _GENAI_NORM.search(use.node.name or "") for use in part.uses
    ):
        return (
            f"onnxruntime-genai's builder adds 1 to the weights of some models' norms (Gemma, Nemotron), and "
            f"{name!r} does not say whether it is one of them"
        )
    if names := computed_from(part.root):
        return f"the exporter computed {name!r} from {', '.join(names[:4])}"
    for use in part.uses:
        rule = use.node.metadata_props.get(_RULE, "")
        if "BatchNorm" in rule or "Affine" in rule:
            return f"the exporter computed {name!r}: it folded a batch norm or a factor into it ({rule})"
        if source in (FOLDED, WEIGHT_NAME) and (hidden := _nameless_product(use)):
            return (
                f"the {use.node.op_type} that reads {name!r} has neither metadata nor a name that says of "
                f"which module it is: a tool dropped them, and {hidden} would not show"
            )
        if not _is_own_name(target, use, key):
            return f"{name!r} is not a name that an exporter gives to {key}: {what_a_tool_did(name)}"
    return ""


def _nameless_product(use: Use) -> str:
    """Return what may be hidden in the constant of a product that names no module; empty for other nodes."""
    if module_by_name(use.node) is not None:
        return ""
    operator = operator_named(use.node.op_type)
    if operator and operator.folds_norms:
        return "a folded batch norm"
    return "a factor or another order of the values" if operator and operator.is_product else ""


def _is_own_name(target: Target, use: Use, key: str) -> bool:
    if folded_from(use.root):
        return True
    name = _unquantised(weight_name(use))
    path = weight_path(name)
    if path == key or (is_path(path) and not any(tool.search(name) for tool, _ in _TOOLS)):
        return True
    linear = target.kind in ("linear", "any") or use.operand.kind == "linear"
    return linear and _TRANSPOSED.fullmatch(name) is not None


def is_computed_by_exporter(root: ir.Value) -> bool:
    """Return True if torch.onnx made a constant from the model's own operations on parameters."""
    named = _OF_EXPORTER.fullmatch(str(root.name)) is not None
    return named or bool(folded_from(root) or computed_from(root))


def is_transposed_constant(name: str) -> bool:
    """Return True if the TorchScript exporter made a constant from a Linear's weight for a MatMul.

    It computes all that depends on constants only, so a factor of the model on the weight is in it as well.
    """
    return _TRANSPOSED.fullmatch(_unquantised(name)) is not None


def _unquantised(name: str) -> str:
    """Return a name without what quantisers appended, in time that grows as the name does."""
    # Read from the end: a search for words that reach it begins anew at each place.
    word = re.match(r"\w*", name[::-1])
    assert word is not None
    codes = _CODES.search(name, len(name) - word.end())
    return name[: codes.start()] if codes else _QUANTISED.sub("", name)


def what_a_tool_did(name: str) -> str:
    """Return what may have become of a constant with a name that no exporter gives to a parameter."""
    found = next((what for tool, what in _TOOLS if tool.search(name)), "")
    return found or "a tool may have multiplied or added something into it"


def nameless(target: Target, uses: Sequence[Use]) -> list[str]:
    """Return some constants of a target's shape for which neither they nor their nodes name a module."""
    found: dict[str, None] = {}
    for use in uses:
        if use.quantised or not fit.accepts(target, use) or isinstance(fit.place(target, use), Refusal):
            continue
        name = weight_name(use)
        if (
            module_by_name(use.node) is None
            and not folded_from(use.root)
            and _PATH.fullmatch(weight_path(name)) is None
        ):
            found[name] = None
    return list(found)[:2]
