"""What a graph says about where its weights came from: parameter paths, by kind of evidence.

In the order in which they are to be believed:

1. ``scope``: node metadata ``pkg.torch.onnx.name_scopes`` (torch.onnx, dynamo): the module that called.
2. ``node name``: ``/model/layers.0/self_attn/q_proj/MatMul`` (TorchScript exporter, genai's builder).
3. ``folded from``: initializer metadata of onnxscript's optimiser.
4. ``weight name``: the initializer's own name. Last, because exporters merge weights of equal value under one
   name, and because a weight keeps its name when a batch norm has been folded into it.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from lora_export.sites.slot import Use

SCOPE, NODE_NAME, FOLDED, WEIGHT_NAME = "scope", "node name", "folded from", "weight name"
SOURCES = (SCOPE, NODE_NAME, FOLDED, WEIGHT_NAME)
_SCOPES = "pkg.torch.onnx.name_scopes"
_CLASSES = "pkg.torch.onnx.class_hierarchy"
_FOLDED = "pkg.onnxscript.optimizer.folded_from"
# What builders append to a parameter's name, e.g. `….q_proj.MatMul.weight_Q4`.
_WEIGHT_SUFFIX = re.compile(
    r"(?:\.(?:MatMul|Gemm|Add|LayerNorm))?\.(weight|bias)(?:_DQ)?(?:_Q4|_Q8|_quantized)?$"
)
# What ONNX Runtime appends to the name of a node that it has fused, e.g. `/fc/MatMul/MatMulAddFusion`.
_FUSION = re.compile(r"(/\w*Fusion/?)+$")
_CALL = re.compile(r"_\d+$")


def collect(uses: Sequence[Use]) -> dict[str, dict[str, list[Use]]]:
    """Return evidence source → parameter path (``model.layers.0.mlp.up_proj.weight``) → uses."""
    found: dict[str, dict[str, list[Use]]] = {source: defaultdict(list) for source in SOURCES}
    for use in uses:
        for source, key in _keys(use):
            found[source][key].append(use)
    _add_repeated_calls(found)
    return {source: dict(table) for source, table in found.items()}


def _keys(use: Use) -> Iterator[tuple[str, str]]:
    parameter = use.slot.parameter
    if parameter and (path := scope_path(use.node)) is not None:
        yield SCOPE, _join(path, parameter)
    if parameter and (path := node_path(use.node)) is not None:
        yield NODE_NAME, _join(path, parameter)
    for name in folded_from(use.root):
        yield FOLDED, weight_path(name)
    yield WEIGHT_NAME, weight_path(_name(use))


def _name(use: Use) -> str:
    """Name of the weight: the TorchScript exporter writes ``b.bias = Identity(a.bias)`` for equal values."""
    for node in reversed(use.chain):
        name = str(node.outputs[0].name)
        if node.op_type == "Identity" and _WEIGHT_SUFFIX.search(name):
            return name
    return use.root.name or ""


def _join(path: str, parameter: str) -> str:
    return f"{path}.{parameter}" if path else parameter


def scope_path(node: ir.Node) -> str | None:
    """Module path of a node from torch.onnx's metadata: the last scope but one (the last is the operator)."""
    return _last_but_one(node.metadata_props.get(_SCOPES))


def scope_class(node: ir.Node) -> str | None:
    """Class of the module of a node, from the same metadata: ``torch.nn.modules.linear.Linear``."""
    return _last_but_one(node.metadata_props.get(_CLASSES))


def _last_but_one(text: str | None) -> str | None:
    if not text:
        return None
    try:
        scopes = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return None
    return str(scopes[-2]) if isinstance(scopes, list) and len(scopes) >= 2 else None


def node_path(node: ir.Node) -> str | None:
    """Module path from a node name such as ``/seq/seq.0/MatMul``, where ``seq.0`` stands inside ``seq``."""
    name = _FUSION.sub("", node.name or "")
    if not name.startswith("/"):
        return None
    parts: list[str] = []
    for part in name.strip("/").split("/")[:-1]:
        if parts and part.startswith(parts[-1] + "."):
            parts[-1] = part
        else:
            parts.append(part)
    return ".".join(parts)


def folded_from(value: ir.Value) -> list[str]:
    """Name of the initializer that onnxscript's optimiser folded into this one, if it is one alone."""
    names = _folded_names(value)
    return names if len(names) == 1 else []


def computed_from(value: ir.Value) -> list[str]:
    """Names of all that went into a folded constant, where that is more than one: it is none of them."""
    names = _folded_names(value)
    return names if len(names) > 1 else []


def _folded_names(value: ir.Value) -> list[str]:
    tensor = value.const_value
    text = value.metadata_props.get(_FOLDED) or (tensor.metadata_props.get(_FOLDED) if tensor else None)
    try:
        names = ast.literal_eval(text) if text else []
    except (SyntaxError, ValueError):
        return []
    return [str(name) for name in names] if isinstance(names, (list, tuple, set)) else []


def weight_path(name: str) -> str:
    """Parameter path in a weight's name, with a builder's suffixes taken off."""
    match = _WEIGHT_SUFFIX.search(name)
    return f"{name[: match.start()]}.{match.group(1)}" if match else name


def _add_repeated_calls(found: Mapping[str, dict[str, list[Use]]]) -> None:
    """Add the uses of ``sh_1.weight`` to ``sh.weight``: the TorchScript exporter numbers repeated calls.

    Only where both read the same constant, and no parameter is named ``sh_1.…``: a module may really be
    called so.
    """
    table, named = found[NODE_NAME], {key.rpartition(".")[0] for key in found[WEIGHT_NAME]}
    for key in list(table):
        path, _, parameter = key.rpartition(".")
        parts = path.split(".")
        for position, part in enumerate(parts):
            if not _CALL.search(part) or path in named:
                continue
            first = ".".join([*parts[:position], _CALL.sub("", part), *parts[position + 1 :], parameter])
            known = {id(use.root) for use in table.get(first, ())}
            table_add = [use for use in table[key] if id(use.root) in known and use not in table[first]]
            if table_add:
                table[first].extend(table_add)
