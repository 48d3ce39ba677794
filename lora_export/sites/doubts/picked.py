"""Tell that a constant holds answers that an adapter changes: rows of its table, columns of its matrix.

An embedding that is looked up for constants (the first token, positions 0 … n), or a Linear without a bias on
one-hot rows, answers with its own values. Exporters and tools put them into the graph as a constant, perhaps
times a factor, and the adapter would not change them. A constant belongs to a site if

1. one of its vectors has the direction of a row of an adapted table;
2. with a checkpoint: one of its vectors has that of a column of an adapted matrix (exporters compute no
   products, and tools give names that `answers` doubts anyway); or
3. it has one axis, and the order or the direction of an adapted bias: a call on zeros answers with it.

A weight of the whole table's size is the other end of a tie or another call's, see `copies`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

from lora_export.adapter import Array
from lora_export.graph.onnx_file import release, shape_of
from lora_export.sites.doubts.readers import module_by_name
from lora_export.sites.naming.evidence import weight_name
from lora_export.sites.operand import WEIGHTS, Use
from lora_export.sites.target import BaseWeights, Site
from lora_export.sites.values.codes import canonical_shape
from lora_export.sites.values.moved import first_as_row, lines_of, same_order
from lora_export.sites.values.verify import canonical_rows

# TorchScript's name for a value that it computed itself, never a product of matrices (`constant_fold.cpp` of
# torch's passes/onnx lists the operators).
NUMBERED = re.compile(r"onnx::\w+_\d+")


def picked_rows(
    sites: Sequence[Site], constants: Mapping[int, Use], base: BaseWeights | None
) -> Iterator[tuple[Site, Use]]:
    """Yield the sites of which constants hold values, each with one of these constants.

    Args:
        sites: Sites of an adapter's targets.
        constants: Identity of a constant → a use of it.
        base: The checkpoint.
    """
    lines = {key: lines_of(use.root) for key, use in constants.items()}
    told = {key: use for key, use in constants.items() if lines[key]}
    for site in sites if told else ():
        able = [use for use in told.values() if _may_hold(site, use, base)]
        for values in _values(site) if able else ():
            found = _holder(site, values, [(use, line) for use in able for line in lines[id(use.root)]])
            if found is not None:
                yield site, found
                break
        for part in site.parts if able else ():
            release(part.root)


def _may_hold(site: Site, use: Use, base: BaseWeights | None) -> bool:
    assert use.root.const_value is not None
    if site.target.kind == "vector":
        shape = shape_of(use.root.const_value)
        return max(shape) == math.prod(shape) == site.target.shape[0]
    numbered = NUMBERED.fullmatch(weight_name(use)) is not None
    if site.target.experts > 1 or (not _is_table(site) and (base is None or numbered)):
        return False
    if use.operand.kind not in WEIGHTS:
        return True
    rows, cols = canonical_shape(use)
    is_whole = rows >= site.target.matrix[0] and cols == site.target.matrix[1]
    module = module_by_name(use.node)
    has_weight = base is not None and bool(module) and base.stores(f"{module}.weight")
    return not is_whole and not has_weight


def _is_table(site: Site) -> bool:
    return any(use.operand.kind == "embedding" for part in site.parts for use in part.uses)


def _values(site: Site) -> Iterator[Array]:
    """Yield the vectors that a site's module may answer with, as rows; none for codes of a quantiser."""
    if site.is_quantised:
        return
    for part in site.parts:
        for placement in part.placements:
            rows = canonical_rows(part, placement)
            yield rows if _is_table(site) else rows.T


def _holder(site: Site, values: Array, lines: Sequence[tuple[Use, Array]]) -> Use | None:
    """Return the first use whose constant has a line that is one of a site's vectors, or None."""
    if site.target.kind == "vector":
        own = values.reshape(-1)
        return next((use for use, line in lines if len(line) == own.size and same_order(own, line)), None)
    fitting = [(use, line) for use, line in lines if len(line) == values.shape[1]]
    number = first_as_row(values, [line for _, line in fitting]) if fitting else None
    return None if number is None else fitting[number][0]
