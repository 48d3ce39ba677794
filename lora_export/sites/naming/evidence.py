"""Collect from a graph the parameter paths of its weights, by kind of evidence.

The kinds, the most trusted first:

1. ``scope``: node metadata ``pkg.torch.onnx.name_scopes`` (torch.onnx, dynamo) or
   ``pkg.onnxscript.name_scopes`` (onnxscript's modules, from which mobius builds): the module that called.
2. ``node name``: ``/model/layers.0/self_attn/q_proj/MatMul`` (TorchScript exporter, genai's builder).
3. ``folded from``: initializer metadata of onnxscript's optimiser.
4. ``weight name``: the initializer's own name. It is the last, because exporters merge weights of equal
   values under one name, and because a weight keeps its name when a batch norm has been folded into it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from lora_export.formats.reading.wrappers import is_too_deep, strip_wrappers
from lora_export.sites.naming.names import fused_of
from lora_export.sites.operand import Use
from lora_export.untrusted.texts import listed_texts

SCOPE, NODE_NAME, FOLDED, WEIGHT_NAME = "scope", "node name", "folded from", "weight name"
SOURCES = (SCOPE, NODE_NAME, FOLDED, WEIGHT_NAME)
_SCOPES = "pkg.torch.onnx.name_scopes"
_MODULES = "pkg.onnxscript.name_scopes"
_CLASSES = "pkg.torch.onnx.class_hierarchy"
_FOLDED = "pkg.onnxscript.optimizer.folded_from"
# Suffixes that builders append to a parameter's name, e.g. `….q_proj.MatMul.weight_Q4`. ONNX Runtime's
# quantiser makes a MatMul of `….weight_Transposed` from a Gemm (``replace_gemm_with_matmul``).
_WEIGHT_SUFFIX = re.compile(
    r"(?:\.(?:MatMul|Gemm|Add|LayerNorm))?\.(weight|bias)(?:_DQ)?(?:_Transposed)?(?:_Q4|_Q8|_Bnb4|_quantized)?$"
)
# mobius folds a Transpose, or a Concat along the outputs, into a constant (``mobius/_passes/fold_*.py``):
# `….q_proj.weight_t`, `….q_proj.weight__….k_proj.weight__….v_proj.weight__axis_0__concat_t`.
_FOLDED_TRANSPOSE = re.compile(r"(?<=\.weight)_t$")
_PACK = re.compile(r"(.+)__axis_(-?\d+)__concat(?:_t)?")
_NEXT_OF_PACK = re.compile(r"(?<=\.weight)__|(?<=\.bias)__|(?<=\.weight_t)__")
# What ONNX Runtime appends to the name of a node that it has fused, e.g. `/fc/MatMul/MatMulAddFusion`.
_FUSION = re.compile(r"\w*Fusion")
_CALL = re.compile(r"_\d+$")


def collect_evidence(uses: Sequence[Use]) -> dict[str, dict[str, list[Use]]]:
    """Return evidence source → parameter path (``model.layers.0.mlp.up_proj.weight``) → uses."""
    found: dict[str, dict[str, list[Use]]] = {source: defaultdict(list) for source in SOURCES}
    for use in uses:
        for source, key in _keys(use):
            if not is_too_deep(key):
                found[source][key].append(use)
    _add_repeated_calls(found)
    return {source: dict(table) for source, table in found.items()}


def _keys(use: Use) -> Iterator[tuple[str, str]]:
    parameter = use.operand.parameter
    if (packed := _packed(weight_name(use))) is not None:
        # Its node belongs to a module around the packed ones.
        yield WEIGHT_NAME, packed
        return
    if parameter and (path := scope_path(use.node)) is not None:
        yield SCOPE, _join(path, parameter)
    if parameter and (path := node_path(use.node)) is not None:
        yield NODE_NAME, _join(path, parameter)
    for name in folded_from(use.root):
        yield FOLDED, weight_path(name)
    yield WEIGHT_NAME, weight_path(weight_name(use))


def weight_name(use: Use) -> str:
    """Return the weight's name; TorchScript writes ``b.bias = Identity(a.bias)`` for equal values."""
    for node in reversed(use.chain):
        name = str(node.outputs[0].name)
        if node.op_type == "Identity" and _WEIGHT_SUFFIX.search(name):
            return name
    return use.root.name or ""


def _join(path: str, parameter: str) -> str:
    return f"{path}.{parameter}" if path else parameter


def scope_path(node: ir.Node) -> str | None:
    """Return the module path of a node from its metadata.

    torch.onnx lists the paths of the modules around it, and last the operator; onnxscript the names of
    modules that make up one path, the first of them empty.
    """
    scopes = _listed(node, _SCOPES)
    if len(scopes) >= 2:
        return strip_wrappers(scopes[-2])
    return ".".join(name for name in _listed(node, _MODULES) if name) or None


def scope_class(node: ir.Node) -> str | None:
    """Return the class of a node's module by torch.onnx's metadata: ``torch.nn.modules.linear.Linear``."""
    classes = _listed(node, _CLASSES)
    return classes[-2] if len(classes) >= 2 else None


def _listed(node: ir.Node, key: str) -> list[str]:
    return listed_texts(node.metadata_props.get(key))


def node_path(node: ir.Node) -> str | None:
    """Return the module path in a node name such as ``/seq/seq.0/MatMul``, where ``seq.0`` is in ``seq``."""
    return path_in(node.name or "")


def path_in(name: str) -> str | None:
    """Return the module path in a name by the TorchScript exporter, of a node or of its output."""
    name = _unfused(name)
    if not name.startswith("/"):
        return None
    parts: list[str] = []
    for part in name.strip("/").split("/")[:-1]:
        if parts and part.startswith(parts[-1] + "."):
            parts[-1] = part
        else:
            parts.append(part)
    return strip_wrappers(".".join(parts))


def _unfused(name: str) -> str:
    """Return a name without what fusions appended; part by part, in time that grows as the name does."""
    parts, kept = name.split("/"), 0
    for count in range(len(parts) - 1, 0, -1):
        if _FUSION.fullmatch(parts[count]):
            kept = count
        elif parts[count] or not _FUSION.fullmatch(parts[count - 1]):
            break
    return "/".join(parts[:kept]) if kept else name


def folded_from(value: ir.Value) -> list[str]:
    """Return the initializer that onnxscript's optimiser folded into this one, if it is only one."""
    names = folded_names(value)
    return names if len(names) == 1 else []


def computed_from(value: ir.Value) -> list[str]:
    """Return the initializers of a folded constant if they are several, so that it is none of them."""
    names = folded_names(value)
    return names if len(names) > 1 else []


def folded_names(value: ir.Value) -> list[str]:
    """Return the names of the initializers from which onnxscript's optimiser computed this one."""
    tensor = value.const_value
    text = value.metadata_props.get(_FOLDED) or (tensor.metadata_props.get(_FOLDED) if tensor else None)
    return listed_texts(text, "[({")


def weight_path(name: str) -> str:
    """Return the parameter path in a weight's name without builders' suffixes; for packs the fused one's."""
    packed = _packed(name)
    if packed is not None:
        return packed
    name = _FOLDED_TRANSPOSE.sub("", name)
    match = _WEIGHT_SUFFIX.search(name)
    return strip_wrappers(f"{name[: match.start()]}.{match.group(1)}" if match else name)


def _packed(name: str) -> str | None:
    """Return the parameter path that a constant of concatenated weights stands for, or None."""
    match = _PACK.fullmatch(name)
    if match is None:
        return None
    parts, axis = _NEXT_OF_PACK.split(match[1]), int(match[2])
    plain = [_FOLDED_TRANSPOSE.sub("", part) for part in parts]
    # The axis is that of the outputs: rows of weights as they are, columns of transposed ones.
    transposed = {part != other for part, other in zip(parts, plain, strict=True)}
    if transposed != {axis != 0} or axis not in (0, 1, -1):
        return None
    return fused_of(plain)


def _add_repeated_calls(found: Mapping[str, dict[str, list[Use]]]) -> None:
    """Add the uses of ``sh_1.weight`` to ``sh.weight``: the TorchScript exporter numbers repeated calls.

    Both have to read the same constant, and no parameter may be named ``sh_1.…``, because a module may really
    be called so.
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
