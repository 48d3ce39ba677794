"""Distinguish the readers of a weight: one module's uses of a constant from another's."""

from __future__ import annotations

import re
from collections.abc import Sequence

import onnx_ir as ir

from lora_export.sites import operator_named
from lora_export.sites.naming.evidence import (
    FOLDED,
    NODE_NAME,
    WEIGHT_NAME,
    folded_from,
    node_path,
    scope_path,
    weight_path,
)
from lora_export.sites.operand import WEIGHTS, Use
from lora_export.sites.target import ConstantPart, Site, Target
from lora_export.sites.uses import has_body

_CALL = re.compile(r"_\d+")


def module_by_name(node: ir.Node) -> str | None:
    """Return the module path of a node by its metadata or its name; None if the exporter left neither."""
    path = scope_path(node)
    return node_path(node) if path is None else path


def reads_another(use: Use, path: str, parameter: str) -> bool:
    """Return True if the constant's own name says that it is another parameter of module ``path``."""
    for name in (str(use.root.name), *folded_from(use.root)):
        module, _, leaf = weight_path(name).rpartition(".")
        if leaf != parameter and (module == path or (module and path.endswith(f".{module}"))):
            return True
    return False


def foreign_reader(path: str, uses: Sequence[Use]) -> str:
    """Return the reason why a weight with the right name may hold other values, or an empty string."""
    for use in uses:
        reader = module_by_name(use.node)
        if reader and not is_related(reader, path):
            return (
                f"the weight {use.root.name!r} is read by a node of {reader!r}: the exporter may have "
                "changed its values (a folded batch norm)"
            )
    return ""


def is_related(reader: str, path: str) -> bool:
    """Return True if a node of module ``reader`` may read ``path``'s weight: it is ``path`` or around it."""
    reader_parts, parts = reader.split("."), path.split(".")
    while parts:
        if reader_parts[-len(parts) :] == parts:
            return True
        parts = parts[:-1]
    return False


def doubt(site: Site, path: str, source: str, uses: Sequence[Use]) -> str:
    """Return the reason why it is not certain which readers of a constant are the module's, or "".

    Args:
        site: Site that was found.
        path: The module's path in the graph.
        source: Kind of evidence.
        uses: All uses in the graph.
    """
    for part in site.parts:
        found = _unclear(part, source) or _stranger(part, path, uses)
        if found:
            return f"ambiguous: the weight {part.root.name!r} {found}"
    return ""


def repeated_calls(site: Site, path: str, source: str) -> str:
    """Return a note on the nodes of other names that were taken for further calls of the module, or ""."""
    if source != NODE_NAME:
        return ""
    modules = {module_by_name(use.node) for part in site.parts for use in part.uses}
    others = sorted(str(module) for module in modules if module and not module.endswith(path))
    return f"; {', '.join(others)} taken for further calls of it" if others else ""


def _unclear(part: ConstantPart, source: str) -> str:
    """Return a reason if a weight found by name has several readers: exporters merge equal weights."""
    nodes = {id(use.node): use.node for use in part.uses}.values()
    if len(nodes) < 2 or source not in (FOLDED, WEIGHT_NAME):
        return ""
    modules = {module_by_name(node) for node in nodes}
    if None in modules:
        return (
            f"is read by {len(nodes)} nodes that have no names: one module called twice, "
            "or modules whose equal weights were merged"
        )
    listed = ", ".join(repr(module) for module in sorted(map(str, modules))[:4])
    return f"is read by several modules ({listed})" if len(modules) > 1 else ""


def is_numbered(module: str, path: str) -> bool:
    """Return True if a path is another one with the numbers that TorchScript gives to further calls."""
    parts, others = module.split("."), path.split(".")
    return (
        module != path
        and len(parts) == len(others)
        and all(
            part == other or (_CALL.fullmatch(part.removeprefix(other)) and part.startswith(other))
            for part, other in zip(parts, others, strict=True)
        )
    )


def has_two_products(node: ir.Node, uses: Sequence[Use]) -> bool:
    """Return True if TorchScript gave one name to a module's call and to a further call of another.

    Each call of a module has a number of its own, so that a Linear's name has one product. torch.export's
    metadata has no numbers.
    """
    module = module_by_name(node)
    named = {
        id(use.node) for use in uses if use.operand.kind in WEIGHTS and module_by_name(use.node) == module
    }
    return scope_path(node) is None and len(named) > 1


def _stranger(part: ConstantPart, path: str, uses: Sequence[Use]) -> str:
    """Return a reason if another reader may be the module's own: it would keep the old values."""
    mine = {(id(use.node), use.operand.index) for use in part.uses}
    kinds = {use.operand.kind for use in part.uses}
    for use in uses:
        if use.root is not part.root or (id(use.node), use.operand.index) in mine:
            continue
        if has_body(use.node):
            return f"is also given to {use.node.op_type} as an input: what reads it in there is not followed"
        module = module_by_name(use.node)
        # If one reader is a table and the other a matrix, they are different modules with a tied weight.
        tied = {*kinds, use.operand.kind} == {"embedding", "linear"} and not use.refusal
        if module == path or (module is None and not tied):
            return f"is also read by {use.node.op_type}, which can't be told from the module's own use"
        if module is not None and is_numbered(module, path) and has_two_products(use.node, uses):
            return f"is also read by {use.node.name!r}: a further call of the module, or {module!r}"
    return ""


def folded_into_conv(target: Target, part: ConstantPart) -> bool:
    """Return True if a convolution's weight or bias was computed by the exporter: a batch norm may be in it.

    Exporters either give the result a name of its own, or keep the name, and metadata names the norm as
    reader.
    """
    operators = [operator_named(use.node.op_type) for use in part.uses]
    if not any(operator and operator.is_convolution for operator in operators):
        return False
    # A quantiser's suffix tells nothing about a norm.
    name, parameter = weight_path(str(part.root.name)), target.key.rpartition(".")[2]
    return not name.endswith(f".{parameter}") or any(
        scope_path(use.node) not in (None, name.removesuffix(f".{parameter}")) for use in part.uses
    )
