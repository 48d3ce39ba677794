"""Tell whether a tool may have joined a module with a copy of it: two modules of the checkpoint, one site.

Copies of a network (policy and reference, online and target network) and cloned heads hold equal values
until they are trained. Optimisers join two calls of equal weights on one input into one node that feeds both,
and changing its weight for one of the copies would change the other. The graph is then that of a model which
calls one module and uses its answer twice. The checkpoint tells them apart: it has another parameter with the
target's values, and the graph has no site of its own for it. Such a site is

1. a use of a matrix, not the target's, that belongs to the other parameter by its name; or
2. one without a module's name, with the same values.

A copy that has a site for one call and lost it for another is not noticed. Without a checkpoint one thing
shows:

3. The copies' biases differ: each is added to the one product, and one is of a module that has no weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lora_export.graph.onnx_file import FLOAT_TYPES
from lora_export.sites.doubts.copies import holds_rows, is_nameless
from lora_export.sites.doubts.readers import is_related, module_by_name
from lora_export.sites.naming import names
from lora_export.sites.naming.evidence import NODE_NAME, SCOPE, weight_name, weight_path
from lora_export.sites.operand import WEIGHTS, Use
from lora_export.sites.target import Site, WeightOf
from lora_export.sites.values.codes import canonical_shape

_APART = (
    "export with torch.onnx.export(..., dynamo=True, optimize=False) and run no simplifier before the "
    "adapter is in the graph: each copy then has a place of its own"
)
# Evidence source → parameter path → uses.
Evidence = Mapping[str, Mapping[str, Sequence[Use]]]


def joined_copies(
    sites: Sequence[Site], uses: Sequence[Use], evidence: Evidence, weight_of: WeightOf
) -> Mapping[int, tuple[str, str]]:
    """Return identity of a target → reason why its site may be a copy's as well, and a hint.

    Args:
        sites: Sites of an adapter's targets.
        uses: All uses in the graph.
        evidence: Result of `evidence.collect_evidence`.
        weight_of: The checkpoint.
    """
    found: dict[int, tuple[str, str]] = {}
    for site in sites:
        if site.target.kind == "vector":
            continue
        dtype = _dtype(site)
        own, alike = weight_of.alike(site.target, dtype)
        alike = [other for other in alike if not _has_place(own, other, site, evidence)]
        if not alike:
            continue
        table = any(use.operand.kind == "embedding" for part in site.parts for use in part.uses)
        own, copies = weight_of.copies(site.target, alike, dtype, table)
        copies = [other for other in copies if not _has_place(own, other, site, evidence)]
        if len(copies) > _nameless_places(site, uses, len(copies)):
            found[id(site.target)] = _reason(copies), _hint(copies)
    return found


def copies_with_biases(
    sites: Sequence[Site], uses: Sequence[Use], evidence: Evidence
) -> Mapping[int, tuple[str, str]]:
    """Return identity of a target → reason why its product is a copy's as well (rule 3), and a hint."""
    biases = [use for use in uses if use.node.op_type == "Add" and use.operand.kind == "vector"]
    found: dict[int, tuple[str, str]] = {}
    for site in sites:
        products = {id(out) for part in site.parts for use in part.uses for out in use.node.outputs}
        for bias in biases:
            (product,) = (
                value for index, value in enumerate(bias.node.inputs) if index != bias.operand.index
            )
            if product is None or id(product) not in products or len(product.uses()) < 2:
                continue
            name = weight_path(weight_name(bias))
            module, _, leaf = name.rpartition(".")
            paths = [key.rpartition(".")[0] for key in site.keys]
            own = any(is_related(module, path) or is_related(path, module) for path in paths)
            if leaf == "bias" and module and not own and not any(_named(f"{module}.weight", evidence)):
                reason = (
                    f"{name} is added to its product as well, and the graph has no {module}.weight: a tool "
                    "joined the two modules, whose weights were equal"
                )
                found[id(site.target)] = reason, _APART
    return found


def _dtype(site: Site) -> Any:
    """Return the dtype to which the checkpoint's values were rounded in the graph."""
    tensor = site.parts[0].root.const_value
    return tensor.dtype.numpy() if tensor is not None and tensor.dtype in FLOAT_TYPES else np.float32


def _has_place(own: str, other: str, site: Site, evidence: Evidence) -> bool:
    """Return True if names give another parameter a site of its own (rule 1)."""
    mine = {id(use) for part in site.parts for use in part.uses}
    for key in _in_graph(own, other, site.keys):
        for variant in (*names.variants(key), *names.per_expert(key, site.target.experts)):
            # Other rows of the constant that holds the target.
            if variant.part is not None and variant.keys == site.keys:
                return True
            if all(any(id(use) not in mine for use in _named(key, evidence)) for key in variant.keys):
                return True
    return False


def _in_graph(own: str, other: str, keys: Sequence[str]) -> Iterator[str]:
    """Yield names that a parameter of the checkpoint may have in the graph, by the target's names."""
    yield other
    for key in keys:
        if key.endswith(f".{own}"):
            yield key.removesuffix(own) + other
        elif own.endswith(f".{key}"):
            prefix = own.removesuffix(key)
            yield other.removeprefix(prefix)


def _named(key: str, evidence: Evidence) -> Iterator[Use]:
    """Yield the uses of matrices that belong to a parameter by name; the node's outvotes the constant's."""
    path = key.rpartition(".")[0]
    for source, table in evidence.items():
        for use in table.get(key, ()):
            if use.operand.kind == "vector" or use.root.const_value is None:
                continue
            module = module_by_name(use.node)
            if source in (SCOPE, NODE_NAME) or not module or is_related(module, path):
                yield use


def _nameless_places(site: Site, uses: Sequence[Use], enough: int) -> int:
    """Count the uses of rule 2, up to ``enough``."""
    mine = {id(use) for part in site.parts for use in part.uses}
    count = 0
    for use in uses:
        if (
            count < enough
            and id(use) not in mine
            and use.operand.kind in WEIGHTS
            and is_nameless(use)
            and canonical_shape(use) == site.target.matrix
            and holds_rows(site, use)
        ):
            count += 1
    return count


def _reason(copies: Sequence[str]) -> str:
    listed = ", ".join(copies[:2]) + (", …" if len(copies) > 2 else "")
    count = "both" if len(copies) == 1 else "all of them"
    return (
        f"in the checkpoint {listed} has the same values, and the graph has one place for {count}: a tool "
        f"joined them, or {copies[0]} is not in the graph"
    )


def _hint(copies: Sequence[str]) -> str:
    return (
        f"{_APART}; if {copies[0].rpartition('.')[0]} is not in the graph at all, give --checkpoint a folder "
        "without it, or --no-checkpoint (checkpoint=False)"
    )
