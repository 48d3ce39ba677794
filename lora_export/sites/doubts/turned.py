"""Tell whether a graph has a module's weight in the other orientation as well: the model computes x @ W, too.

A Linear computes ``x @ Wᵀ``. A model that multiplies with the same weight from the other side (tied
autoencoders, attractor networks) has it in a graph twice: as one constant that is read in both orientations,
or, if an exporter or a tool has computed the transpose, as two. Changing only one of them would change half
of the weight's uses. Such a product is another use of the weight if

1. it reads the constant that is the module's, in the other orientation, unless both are modules of other
   names than the constant (a tool merges equal weights under one name); or
2. it reads a constant with the transpose of the weight's values, as they are, times a factor for each row, or
   as a quantiser's codes, and neither its own name nor its node's module says that it is another parameter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from functools import cache

import numpy as np

from lora_export.adapter import Array
from lora_export.graph.onnx_file import release, stored_matrix
from lora_export.sites.doubts.copies import named_parameters
from lora_export.sites.doubts.readers import module_by_name
from lora_export.sites.operand import Use
from lora_export.sites.target import ConstantPart, Site
from lora_export.sites.values.codes import canonical_shape, decoded_rows
from lora_export.sites.values.content import COSINE

# Number of rows and columns at whose crossings matrices are compared first; least cosine of rows of codes.
_LINES, _ALIKE = 8, 0.9


def other_orientations(sites: Sequence[Site], uses: Sequence[Use], parameters: Set[str]) -> Mapping[int, str]:
    """Return identity of a target → reason that names a product with its weight in the other orientation.

    Args:
        sites: Sites of an adapter's targets.
        uses: All uses in the graph.
        parameters: Paths of parameters, from the names of constants and from the checkpoint.
    """
    products: dict[tuple[int, int], list[Use]] = defaultdict(list)
    readers: dict[int, list[Use]] = defaultdict(list)
    for use in uses:
        if use.operand.kind == "linear":
            products[canonical_shape(use)].append(use)
            readers[id(use.root)].append(use)
    mine = {id(part.root) for site in sites for part in site.parts}
    crossings = cache(_crossings)
    found: dict[int, str] = {}
    for site in sites:
        if site.target.kind == "vector" or site.target.experts > 1 or not _is_product(site):
            continue
        reader = _turned_reader(site, readers)
        if reader is None and canonical_shape(site.parts[0].uses[0]) == site.target.matrix:
            copies = [use for use in products[site.target.matrix[::-1]] if id(use.root) not in mine]
            reader = _turned_copy(site, copies, parameters, crossings)
        if reader is not None:
            found[id(site.target)] = (
                f"its weight is read in both orientations: {reader.node.op_type} multiplies with "
                f"{reader.root.name!r}, which is its transpose"
            )
    return found


def _is_product(site: Site) -> bool:
    return all(use.operand.kind == "linear" for part in site.parts for use in part.uses)


def _turned_reader(site: Site, readers: Mapping[int, Sequence[Use]]) -> Use | None:
    """Apply rule 1; return the use, or None."""
    for part in site.parts:
        for use in readers.get(id(part.root), ()):
            if use.transposed != part.uses[0].transposed:
                named = named_parameters(use)
                merged = named and not set(named) & set(site.keys)
                if not (merged and _is_beside(module_by_name(use.node), site.target.path)):
                    return use
    return None


def _is_beside(module: str | None, path: str) -> bool:
    """Return True if a module is another one than ``path``, and not around it."""
    return bool(module) and module != path and not f".{path}.".count(f".{module}.")


def _turned_copy(
    site: Site, copies: Sequence[Use], parameters: Set[str], crossings: Callable[[Use], Array | None]
) -> Use | None:
    """Apply rule 2; return the use, or None."""
    part = site.parts[0]
    mine = part.uses[0]
    for use in copies:
        named = named_parameters(use)
        if named and not set(named) & set(site.keys):
            continue
        if (
            _are_transposes(crossings(mine), crossings(use), _least(mine, use))
            and (named or not _is_module(use, part, site.keys, parameters))
            and _hold_transposes(mine, use)
        ):
            return use
    return None


def _least(one: Use, other: Use) -> float:
    return _ALIKE if one.quantised or other.quantised else COSINE


def _is_module(use: Use, part: ConstantPart, keys: Sequence[str], parameters: Set[str]) -> bool:
    """Return True if the node that reads a constant belongs to another module, which has a weight."""
    module = module_by_name(use.node)
    if not module or module in {module_by_name(mine.node) for mine in part.uses}:
        return False
    own = f"{module}.weight"
    return own not in keys and any(_is_end(own, name) for name in parameters)


def _is_end(one: str, other: str) -> bool:
    """Return True if one of two paths ends in the other."""
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")


def _lines(count: int) -> Array:
    return np.unique(np.linspace(0, count - 1, _LINES).astype(int))


def _crossings(use: Use) -> Array | None:
    """Return the values of a canonical weight at the crossings of some rows and columns."""
    assert use.root.const_value is not None
    rows, cols = (_lines(count) for count in canonical_shape(use))
    if use.quantised:
        values = decoded_rows(use, rows)
        return None if values is None else values[:, cols]
    stored = stored_matrix(use.root.const_value)
    picked = np.asarray((stored.T if use.transposed else stored)[np.ix_(rows, cols)], np.float64)
    release(use.root)
    return picked


def _hold_transposes(one: Use, other: Use) -> bool:
    """Return True if some whole rows of a weight are another's columns, up to a factor each."""
    rows = _lines(canonical_shape(one)[0])
    mine, theirs = decoded_rows(one, rows), _columns_of(other, rows)
    for use in (one, other):
        release(use.root)
    return _are_transposes(mine, theirs, _least(one, other))


def _columns_of(use: Use, columns: Array) -> Array | None:
    assert use.root.const_value is not None
    if use.quantised:
        values = decoded_rows(use, np.arange(canonical_shape(use)[0]))
        return None if values is None else values[:, columns]
    stored = stored_matrix(use.root.const_value)
    return np.asarray((stored.T if use.transposed else stored)[:, columns], np.float64)


def _are_transposes(one: Array | None, other: Array | None, least: float) -> bool:
    """Return True if the rows of a matrix are another's columns; equal numbers tell nothing."""
    if one is None or other is None or np.ptp(one) == 0:
        return False
    turned = other.T
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(turned, axis=1)
    products = np.abs(np.einsum("ij,ij->i", one, turned))
    return bool(lengths.any() and (products >= least * lengths).all())
