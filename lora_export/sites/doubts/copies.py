"""Tell whether a module's weight is in a graph once more, for another call of the module.

A module that is called twice has one weight in PyTorch. In a graph it may have several: a Linear that is
called on a matrix and on a batch of matrices becomes a Gemm with the weight and a MatMul with a transposed
copy; tools fold a factor or a norm into one call's weight, pack it with others (Attention), or quantise it.
Changing only one of them would change the module for some calls. A constant belongs to another call if

1. the exporter says that it was computed from the weight;
2. its own name or its node's is the module's, and it has the weight's shape; or
3. no name tells its module, and it holds the weight's values: as they are, times a factor for each row,
   among others, or as a quantiser's codes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import cache
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.graph.onnx_file import release
from lora_export.sites.doubts.readers import has_two_products, module_by_name, reads_another
from lora_export.sites.naming.evidence import computed_from, folded_from, path_in, weight_name, weight_path
from lora_export.sites.operand import WEIGHTS, Use
from lora_export.sites.target import Site
from lora_export.sites.values.codes import canonical_shape, decoded_rows
from lora_export.sites.values.fingerprints import find_places
from lora_export.sites.values.verify import canonical_rows, search

# Remedy that makes all calls of a module share its weight.
REMEDY = (
    "give the graph as torch.onnx.export(..., dynamo=True, optimize=False) writes it, and run simplifiers "
    "and other tools on what is written here"
)
_CALL = re.compile(r"_\d+(?=\.|$)")
# Name that simplifiers give to the result of a node that they have computed.
_OUTPUT = "_output_0"
# A parameter's path in a constant's name, with the text that ONNX Runtime puts around it. It looks ahead:
# where no path follows at all, none is looked for behind each of the letters before it.
_PARAMETER = re.compile(
    r"(?=(?:\w+\.)+(?:weight|bias)(?![A-Za-z]))"
    r"(?:(?:Conv|MatMul)\w*?_[WB]_)?((?:[A-Za-z0-9_]\w*\.)+(?:weight|bias))(?![A-Za-z])"
)
# Number of rows by which a quantised weight is recognised, and their least cosine; 4-bit codes have 0.99.
_ROWS, _ALIKE = 8, 0.9


def computed_parameters(constants: Iterable[ir.Value]) -> Mapping[str, Sequence[ir.Value]]:
    """Return parameter path → constants that an exporter computed from it and from others."""
    found: dict[str, list[ir.Value]] = defaultdict(list)
    for constant in constants:
        for name in computed_from(constant):
            found[weight_path(name)].append(constant)
    return found


def computed_result(key: str, constants: Iterable[ir.Value]) -> str:
    """Return the name of a constant that is the computed result of a parameter's module, or ""."""
    module = key.rpartition(".")[0]
    for constant in constants:
        name = str(constant.name)
        if name.endswith(_OUTPUT) and (path := path_in(name)) is not None and _is_end(path, module):
            return name
        if any(_is_end(weight_path(one), key) for one in computed_from(constant)):
            return name
    return ""


def _is_end(one: str, other: str) -> bool:
    """Return True if one of two paths ends in the other."""
    return bool(one and other) and (f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}"))


def other_calls(
    sites: Sequence[Site],
    uses: Sequence[Use],
    computed: Mapping[str, Sequence[ir.Value]],
    modules: Set[str],
) -> Mapping[int, str]:
    """Return identity of a target → reason that names another constant for a call of its module.

    Args:
        sites: Sites of an adapter's targets.
        uses: All uses in the graph.
        computed: Result of `computed_parameters`.
        modules: Paths that are known to be modules of their own, not numbered calls of others.
    """
    mine = {id(part.root) for site in sites for part in site.parts}
    rest = [use for use in uses if use.operand.kind in WEIGHTS and id(use.root) not in mine]
    nameless = [use for use in rest if is_nameless(use)]
    found: dict[int, str] = {}
    left = []
    for site in sites:
        if reason := _computed(site, computed) or _named(site, rest, modules, uses):
            found[id(site.target)] = reason
        elif site.target.kind != "vector" and site.target.experts == 1:
            left.append(site)
    floats = [use for use in nameless if not use.quantised]
    found.update(_copied(left, floats))
    found.update(_quantised(left, nameless))
    return found


def _computed(site: Site, computed: Mapping[str, Sequence[ir.Value]]) -> str:
    """Apply rule 1; return the reason, or an empty string."""
    mine = {id(part.root) for part in site.parts}
    for key in _names_of(site, computed):
        for constant in computed[key]:
            if id(constant) not in mine:
                return (
                    f"the exporter has computed a call of the module into {constant.name!r}, which would "
                    "stay the base's"
                )
    return ""


def _names_of(site: Site, computed: Mapping[str, Sequence[ir.Value]]) -> list[str]:
    """Return the names of ``computed`` that may be a site's.

    The keys of a site that was found by values are the adapter's; the graph's own may have a wrapper's
    prefix, or lack one.
    """
    named = {weight_path(str(part.root.name)) for part in site.parts} & computed.keys()
    if site.evidence != "content" or named:
        return [key for key in computed if key in named or key in site.keys]
    return [name for name in computed if any(_is_end(name, key) for key in site.keys)]


def _named(site: Site, rest: Sequence[Use], modules: Set[str], uses: Sequence[Use]) -> str:
    """Apply rule 2; return the reason, or an empty string."""
    if len(site.keys) != 1 or site.target.held_turned is not None or site.target.experts > 1:
        return ""
    path, _, leaf = site.keys[0].rpartition(".")
    calls = {path, *(str(module_by_name(use.node)) for part in site.parts for use in part.uses)}
    calls = {call if call in modules else _CALL.sub("", call) for call in calls}
    tables = {use.operand.kind == "embedding" for part in site.parts for use in part.uses}
    for use in rest:
        # A table and a matrix of the same values are two tied modules.
        if canonical_shape(use) != site.target.matrix or (use.operand.kind == "embedding") not in tables:
            continue
        module = module_by_name(use.node)
        is_call = not module or _CALL.sub("", module) in calls
        if named := named_parameters(use):
            # Exporters keep one name for modules whose weights are equal, so the node tells the module.
            own = site.keys[0] in named and (is_call or f"{path}.".startswith(f"{module}."))
        else:
            own = module == path and not reads_another(use, path, leaf)
            if not own and module and is_call:
                # ``fc_1`` may be a second call of ``fc``, or a module of that name; and the exporter numbers
                # calls beside a module of that name, too.
                held = holds_rows(site, use)
                own = held is not False
                if module in modules:
                    own = held is True and has_two_products(use.node, uses)
        # A site that was found by values outvotes a name.
        if own and (site.evidence != "content" or holds_rows(site, use) is not False):
            return _in_the_graph_again(use)
    return ""


def _copied(sites: Sequence[Site], uses: Sequence[Use]) -> Mapping[int, str]:
    """Apply rule 3 to floats; return identity of a target → reason."""
    if not uses:
        return {}
    weights = {id(site.target): _weight(site) for site in sites if site.evidence != "content"}
    held = {key: weight for key, weight in weights.items() if weight}
    sought = {id(site.target): site for site in sites if id(site.target) in held}
    targets = [site.target for site in sought.values()]
    places = find_places(uses, targets, lambda target: held[id(target)])
    found = {}
    for key, site in sought.items():
        for use in uses:
            offsets = places.get(key, {}).get((id(use.root), use.transposed), ())
            # Zeros tell nothing, because all new layers have them.
            if offsets and np.any(held[key][0]) and any(search(site.target, use, held[key][0], offsets)):
                found[key] = _in_the_graph_again(use)
                break
    for use in uses:
        release(use.root)
    return found


def _weight(site: Site) -> list[Array]:
    """Return the stored weight of a site in canonical orientation, or an empty list if it is quantised."""
    if any(use.quantised for part in site.parts for use in part.uses):
        return []
    rows = [(placement.rows, part, placement) for part in site.parts for placement in part.placements]
    rows.sort(key=lambda item: item[0])
    if len(site.parts) > 1 and any(one[0] == other[0] for one, other in pairwise(rows)):
        rows = rows[:1]
    parts = [canonical_rows(part, placement) for _, part, placement in rows]
    matrix = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return [matrix] if matrix.shape == site.target.matrix else []


def _quantised(sites: Sequence[Site], nameless: Sequence[Use]) -> Mapping[int, str]:
    """Apply rule 3 if the site or the other constant holds codes; return identity of a target → reason."""
    found = {}
    # Rows of each constant are read once, however many sites have its shape.
    rows = cache(_sampled)
    for site in sites:
        (first, *_) = site.parts[0].uses
        for other in nameless:
            if (
                (other.quantised or first.quantised)
                and (other.operand.kind == "embedding") == (first.operand.kind == "embedding")
                and canonical_shape(other) == site.target.matrix
                and holds_rows(site, other, rows)
            ):
                found[id(site.target)] = _in_the_graph_again(other)
                break
    return found


def _sampled(use: Use) -> Array | None:
    """Return some rows of a weight, evenly spaced; None if they can't be read."""
    return decoded_rows(use, np.unique(np.linspace(0, canonical_shape(use)[0] - 1, _ROWS).astype(int)))


def holds_rows(site: Site, other: Use, sampled: Callable[[Use], Array | None] = _sampled) -> bool | None:
    """Return True if some rows of a constant are the site's, up to a factor each; None if they can't be read.

    Args:
        site: The site.
        other: A use of the constant, which has the shape of the site's weight.
        sampled: Function that reads the rows.
    """
    use = site.parts[0].uses[0]
    if canonical_shape(use) != site.target.matrix:
        return None
    one, two = sampled(use), sampled(other)
    return None if one is None or two is None else _are_alike(one, two)


def _are_alike(one: Array, other: Array) -> bool:
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    products = np.abs(np.einsum("ij,ij->i", one, other))
    return bool(lengths.any() and (products >= _ALIKE * lengths).all())


def is_nameless(use: Use) -> bool:
    """Return True if neither a constant's name nor its node names a module."""
    return not named_parameters(use) and not module_by_name(use.node)


def named_parameters(use: Use) -> list[str]:
    """Return the parameters in a constant's name."""
    names = (weight_path(name) for name in (weight_name(use), *folded_from(use.root)))
    return [match[1] for name in names if (match := _PARAMETER.match(name))]


def _in_the_graph_again(use: Use) -> str:
    return (
        f"its weight is in the graph twice: {use.root.name!r}, which {use.node.op_type} reads, is for "
        "another call of the module"
    )
