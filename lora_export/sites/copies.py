"""Tell that a module's weight is in a graph once more, for another call of the module.

A Linear that is called on a matrix and on a batch of them becomes a Gemm with the weight and a MatMul with a
transposed copy; a call on a constant is computed by the exporter. To change one of them would change half of
the module.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.graph import stored_matrix
from lora_export.sites.evidence import computed_from, folded_from, weight_name, weight_path
from lora_export.sites.readers import module_of
from lora_export.sites.slot import Use
from lora_export.sites.target import Site

# What makes all calls of a module share its weight.
REMEDY = "export with torch.onnx.export(..., dynamo=True, optimize=False), and run tools on the result"
_CALL = re.compile(r"_\d+(?=\.|$)")
_PARAMETER = re.compile(r"[A-Za-z_]\w*(\.\w+)*\.(weight|bias)")
# Values that are compared before all are.
_FIRST = 16


def computed_parameters(constants: Iterable[ir.Value]) -> Mapping[str, Sequence[ir.Value]]:
    """Return parameter path → constants that an exporter computed from it and from others."""
    found: dict[str, list[ir.Value]] = defaultdict(list)
    for constant in constants:
        for name in computed_from(constant):
            found[weight_path(name)].append(constant)
    return found


def by_first_value(uses: Iterable[Use]) -> Mapping[tuple[int, float], Sequence[Use]]:
    """Return (size, first value) of a constant → its uses: what copies share, whichever way they lie.

    Without it, a large graph's constants would all be looked at once for each module.
    """
    found: dict[tuple[int, float], list[Use]] = defaultdict(list)
    first: dict[int, tuple[int, float]] = {}
    for use in uses:
        if not _is_matrix(use):
            continue
        if id(use.root) not in first:
            assert use.root.const_value is not None
            matrix = stored_matrix(use.root.const_value)
            if not matrix.size:
                continue
            first[id(use.root)] = matrix.size, float(matrix[0, 0])
        found[first[id(use.root)]].append(use)
    return found


def other_call(
    site: Site,
    keys: Sequence[str],
    alike: Mapping[tuple[int, float], Sequence[Use]],
    computed: Mapping[str, Sequence[ir.Value]],
) -> str:
    """Say which other constant stands for a call of the module, or return an empty text.

    Args:
        site: Where the module's weight was found.
        keys: The paths in the graph that it was found under.
        alike: Of `by_first_value`, of all uses in the graph.
        computed: Of `computed_parameters`.
    """
    mine = {id(part.root) for part in site.parts}
    for key in keys:
        for constant in computed.get(key, ()):
            if id(constant) not in mine:
                return (
                    f"the exporter has computed a call of the module into {constant.name!r}, which would "
                    "stay the base's"
                )
    if len(keys) != 1 or len(site.parts) != 1 or site.target.kind == "vector" or site.target.experts > 1:
        return ""
    (part,), path = site.parts, keys[0].rpartition(".")[0]
    if any(use.quantised for use in part.uses) or part.root.const_value is None:
        return ""
    matrix = stored_matrix(part.root.const_value)
    for use in alike.get((matrix.size, float(matrix[0, 0])), ()) if matrix.size else ():
        other = use.root.const_value
        if other is None or id(use.root) in mine:
            continue
        if _may_be_call(use, path, keys[0]) and _is_copy(matrix, stored_matrix(other)):
            return (
                f"its weight is in the graph twice: {use.root.name!r} of another {use.node.op_type} holds "
                "the same values, for another call of the module"
            )
    return ""


def _is_matrix(use: Use) -> bool:
    return not use.quantised and use.slot.kind in ("linear", "conv", "embedding")


def _may_be_call(use: Use, path: str, key: str) -> bool:
    """Whether nothing says that a constant is another module's."""
    names = [weight_path(name) for name in (weight_name(use), *folded_from(use.root))]
    if any(_PARAMETER.fullmatch(name) and name != key for name in names):
        return False
    module = module_of(use.node)
    return module is None or _CALL.sub("", module) == _CALL.sub("", path)


def _is_copy(one: Array, other: Array) -> bool:
    """Whether two matrices, in any orientation, hold the same values."""
    for candidate in (other, other.T):
        if candidate.shape == one.shape and np.array_equal(one[0, :_FIRST], candidate[0, :_FIRST]):
            # All zeros tell nothing: freshly made layers are alike.
            return bool(np.array_equal(one, candidate) and np.any(one))
    return False
