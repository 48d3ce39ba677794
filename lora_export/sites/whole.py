"""Find whole matrices that an adapter replaces (``modules_to_save``): its file holds them as the module does.

An `nn.Linear` holds its weight as ``(out_dim, in_dim)``, transformers' Conv1D its transpose, and the file
doesn't say which of them the module is. So both forms are tried (`forms_of`), and the one that agrees is
taken:

1. A shape that is not square fits in one way only.
2. Else the checkpoint's values tell (rule 4 of `resolve`).
3. Else the graph's values may tell: training starts from the base's, so the copy is like them in one
   orientation only.
4. Else the node may say that it is an `nn.Linear`'s, or a Conv1D's.
5. Else a constant that has the parameter's own name, and was not computed, is the matrix as the module holds
   it.
6. Else it is unknown, and refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from lora_export.adapter import Array
from lora_export.graph.onnx_file import matrix_shape
from lora_export.plan import Refusal
from lora_export.sites.naming.evidence import computed_from, folded_from, scope_class, scope_path
from lora_export.sites.target import Miss, Site, Target
from lora_export.sites.values import content
from lora_export.sites.values.held import held_of
from lora_export.sites.values.verify import rectangle

# Classes of PyTorch modules that multiply with a matrix → True if they hold the transpose of ``(out, in)``.
_CLASSES = {"torch.nn.modules.linear.Linear": False, "transformers.pytorch_utils.Conv1D": True}
# Least cosine of a copy with the base's values, and the largest one with their transpose, as a part of it.
_ALIKE, _APART = 0.9, 0.5
_SQUARE = (
    "the adapter replaces a whole square matrix {shape}: whether its module stores it transposed, as "
    "transformers' Conv1D does, can't be known from its shape"
)


def forms_of(target: Target) -> tuple[Target, ...]:
    """Return the forms in which a graph may hold a target: as it is, and turned."""
    if target.kind != "any" or len(target.shape) != 2 or target.values is None or target.stored_turned:
        return (target,)
    turned = replace(target, shape=target.shape[::-1], values=np.asarray(target.values).T, stored_turned=True)
    return target, turned


def find_whole(target: Target, find: Callable[[Target], Site | Miss], remedy: str) -> Site | Miss:
    """Return the site of a target, with the form that the graph holds if it has several.

    Args:
        target: Any target.
        find: Function that finds one form.
        remedy: Advice where only values would tell.
    """
    return choose(target, [find(form) for form in forms_of(target)], remedy)


def choose(target: Target, found: Sequence[Site | Miss], remedy: str) -> Site | Miss:
    """Apply the rules to what was found for each form of a target, see `forms_of`."""
    sites = [one for one in found if isinstance(one, Site)]
    if not sites:
        # A form that doesn't fit by its shape tells less.
        misses = [one for one in found if isinstance(one, Miss)]
        told = [miss for miss in misses if miss.kind not in ("not found", "shape")] or misses
        return replace(told[0], target=target)
    if len(sites) == 1:
        return sites[0]
    as_it_is, turned = sites
    is_turned = _is_turned(as_it_is)
    if is_turned is None:
        return Miss(target, Refusal("unproven", f"{_SQUARE.format(shape=target.shape)}; {remedy}"))
    return turned if is_turned else as_it_is


def _is_turned(site: Site) -> bool | None:
    """Apply rules 3 to 5; return None if they don't tell."""
    values = np.asarray(site.target.values)
    held = _held(site)
    by_values = is_like_transpose(values, held) if held is not None else None
    return by_values if by_values is not None else stores_turned(site)


def _held(site: Site) -> Array | None:
    """Return the base's values of a canonical square matrix, or None if they can't be read."""
    matrix = np.full(site.target.shape, np.nan, np.float32)
    for part in site.parts:
        held = held_of(part.uses[0])
        if isinstance(held, Refusal) or len(part.placements) != 1:
            return None
        (placement,) = part.placements
        stored = held.values.reshape(matrix_shape(held.values.shape))
        matrix[slice(*placement.rows)] = rectangle(stored, placement)
    return matrix


def is_like_transpose(values: Array, held: Array) -> bool | None:
    """Return whether a square copy is the base's transpose, not the base, as far as values tell (rule 3).

    Args:
        values: The copy.
        held: The base's canonical values.
    """
    if np.array_equal(values, values.T):
        return False
    same, turned = _cosine(values, held), _cosine(values.T, held)
    if max(same, turned) < _ALIKE or min(same, turned) > _APART * max(same, turned):
        return None
    return turned > same


def _cosine(one: Array, other: Array) -> float:
    sums = np.zeros(3)
    for left, right in content.blocks(one, other):
        sums += (left * right).sum(), (left * left).sum(), (right * right).sum()
    product, *squares = sums
    return float(product / np.sqrt(squares[0] * squares[1])) if np.all(sums[1:] > 0) else 0.0


def stores_turned(site: Site) -> bool | None:
    """Return whether a module holds the transpose of its canonical weight, or None (rules 4 and 5)."""
    by_class = {_CLASSES.get(scope_class(use.node) or "") for part in site.parts for use in part.uses}
    if len(by_class) == 1 and None not in by_class and _is_own_node(site):
        return by_class.pop()
    turned = {placement.transposed for part in site.parts for placement in part.placements}
    return turned.pop() if len(turned) == 1 and _is_own_constant(site) else None


def _is_own_node(site: Site) -> bool:
    """Return True if by their metadata all nodes are in the target's module."""
    paths = {scope_path(use.node) for part in site.parts for use in part.uses}
    return all(path and _is_end(path, site.target.path) for path in paths)


def _is_own_constant(site: Site) -> bool:
    """Return True if the constants are matrices that have the parameter's own name and were not computed."""
    for part in site.parts:
        assert part.root.const_value is not None
        is_matrix = len(part.root.const_value.shape) == 2 and not part.uses[0].quantised
        computed = folded_from(part.root) or computed_from(part.root)
        if computed or not is_matrix or not _is_end(str(part.root.name), site.target.key):
            return False
    return True


def _is_end(one: str, other: str) -> bool:
    """Return True if one of two paths ends in the other."""
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")
