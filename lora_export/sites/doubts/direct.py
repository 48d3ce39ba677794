"""Tell that the model reads a parameter directly, beside the module's call, and training replaces it.

LoRA adds its product to what a module gives: whoever reads the weight elsewhere keeps W0. A parameter that
was trained itself (``bias="lora_only"``, a saved module's) is another one for every reader. A graph has one
constant for both, and gives the module a copy of its own where others read it: right for modules whose equal
weights an exporter has joined, wrong for ``h @ self.embed.weight.T`` in the module around it. A reader is a
direct one if its node is of a module around the parameter's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import onnx_ir as ir

from lora_export.sites.doubts.copies import holds_rows
from lora_export.sites.doubts.readers import module_by_name
from lora_export.sites.isolate import reading_nodes
from lora_export.sites.naming.evidence import folded_names
from lora_export.sites.operand import WEIGHTS, Use
from lora_export.sites.target import Site
from lora_export.sites.values.codes import canonical_shape

# Hint on what changes a parameter wherever it is read.
MERGE = "merge the adapter into the checkpoint (lora-export merge), which has one parameter, and export that"


def direct_readers(sites: Sequence[Site], uses: Sequence[Use]) -> Mapping[int, str]:
    """Return identity of a target → the reason why replacing its values for its module is not enough.

    Args:
        sites: Sites of an adapter's targets.
        uses: All uses of constants in the graph: an exporter may have moved the values into another one.
    """
    found = {}
    for site in sites:
        if site.target.action != "replace":
            continue
        modules = {key.rpartition(".")[0] for key in site.keys}
        readers = chain(_readers(site, modules), _copies(site, modules, uses), _computed(site, uses))
        if (node := next(readers, None)) is not None:
            found[id(site.target)] = (
                f"its values are also read by {node.op_type} {node.name!r}, outside of its module, where the "
                "trained ones belong, too"
            )
    return found


def _readers(site: Site, modules: set[str]) -> Iterator[ir.Node]:
    mine = {(id(use.node), use.operand.index) for part in site.parts for use in part.uses}
    for part in site.parts:
        for node, index in reading_nodes(part.root):
            if isinstance(node, ir.Node) and (id(node), index) not in mine and _is_around(node, modules):
                yield node


def _copies(site: Site, modules: set[str], uses: Sequence[Use]) -> Iterator[ir.Node]:
    roots = {id(part.root) for part in site.parts}
    if site.target.kind == "vector":
        return
    for use in uses:
        if id(use.root) in roots or use.operand.kind not in WEIGHTS or not _is_around(use.node, modules):
            continue
        if canonical_shape(use) == site.target.matrix and holds_rows(site, use):
            yield use.node


def _computed(site: Site, uses: Sequence[Use]) -> Iterator[ir.Node]:
    """Yield readers of other constants that the exporter says to have computed from the parameter."""
    roots = {id(part.root) for part in site.parts}
    for use in uses:
        if id(use.root) not in roots and set(site.keys) & set(folded_names(use.root)):
            yield use.node


def _is_around(node: ir.Node, modules: set[str]) -> bool:
    reader = module_by_name(node)
    return reader is not None and any(not reader or module.startswith(f"{reader}.") for module in modules)
