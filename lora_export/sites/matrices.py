"""Find a module's own matrix that an adapter changes (PEFT's ``target_parameters``) in a graph.

PEFT adds ``B·A`` to the matrix as the module holds it, whatever the module does with it: ``x @ W``, or
``x @ Wᵀ`` as `nn.Linear`, or a look-up of rows. A graph shows the operator, but its constant may be the
matrix or its transpose. So each form is tried (`forms_of`), and the one that agrees is taken:

1. A shape that is not square fits in one way only.
2. Else the checkpoint's values tell.
3. Else the node may say that it is an `nn.Linear`'s, which uses its weight as ``x @ Wᵀ``.
4. Else a constant that has the parameter's own name, and was not computed, is the matrix as the module holds
   it.
5. Else it is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora_export.adapter import Array, LoraModule
from lora_export.plan import Refusal
from lora_export.sites.naming.evidence import computed_from, folded_from, scope_class, scope_path
from lora_export.sites.target import Miss, Site, Target
from lora_export.sites.values import content
from lora_export.sites.values.verify import canonical_rows

_SQUARE = (
    "the matrix is square {shape}: whether the graph stores it transposed can't be known from its shape; "
    "give --checkpoint to compare the values"
)
_LINEAR = "torch.nn.modules.linear.Linear"
# Function that finds a target, given its values in the checkpoint.
Find = Callable[[Target, Array | None], Site | Miss]


@dataclass(frozen=True, eq=False)
class Form:
    """Form in which a graph may use a matrix.

    Attributes:
        target: The change as that of a module of the form's kind.
        turned: True if the canonical weight is the transpose of the matrix that the module holds.
    """

    target: Target
    turned: bool


def is_matrix(target: Target) -> bool:
    """Return True if a target is a module's own matrix, whose use only the graph shows."""
    return target.kind == "parameter" and target.experts == 1 and target.module is not None


def forms_of(target: Target) -> Iterator[Form]:
    """Yield the forms in which a graph may use the matrix of a target, see `is_matrix`."""
    module = target.module
    assert module is not None
    for turned in (False, True):
        shape = target.shape[::-1] if turned else target.shape
        for made in (linear_of(module, turned), embedding_of(module, turned), replace(module, turned=turned)):
            yield Form(replace(target, kind=made.kind, shape=shape, module=made, held_turned=turned), turned)


def linear_of(module: LoraModule, turned: bool) -> LoraModule:
    """Return the change of a matrix as that of an `nn.Linear`.

    Args:
        module: Change of a module's own matrix.
        turned: True if the matrix is used as ``x @ W``, so that `nn.Linear` would hold its transpose.
    """
    a, b = (module.lora_b.T, module.lora_a.T) if turned else (module.lora_a, module.lora_b)
    return replace(module, kind="linear", lora_a=np.ascontiguousarray(a), lora_b=np.ascontiguousarray(b))


def embedding_of(module: LoraModule, turned: bool) -> LoraModule:
    """Return the change of a matrix as that of an `nn.Embedding`, whose factors change by ``(B·A)ᵀ``."""
    return replace(linear_of(module, not turned), kind="embedding")


def find_matrix(target: Target, wanted: Array | None, find: Find) -> Site | Miss:
    """Return the site of a module's own matrix, with a target of the kind that the graph uses it as.

    Args:
        target: Target for which `is_matrix` is True.
        wanted: The checkpoint's values, as the module holds them.
        find: Function that finds a target of a certain kind.
    """
    fitting: list[tuple[Form, Site]] = []
    misses: list[Miss] = []
    for form in forms_of(target):
        values = wanted.T if wanted is not None and form.turned else wanted
        found = find(form.target, values)
        if isinstance(found, Site):
            fitting.append((form, found))
        elif found.reason:
            misses.append(found)
    if not fitting:
        # A miss of a later step tells more: a site that doesn't fit says more than no site.
        told = [miss for miss in misses if miss.kind not in ("not found", "nameless")] or misses
        return replace(told[0], target=target) if told else Miss(target, Refusal("not found", ""))
    return _choose(target, wanted, fitting)


def _choose(target: Target, wanted: Array | None, fitting: Sequence[tuple[Form, Site]]) -> Site | Miss:
    """Apply rules 1 to 5 to the forms that have a site."""
    if len({frozenset(id(part.root) for part in site.parts) for _, site in fitting}) > 1:
        names = sorted({str(part.root.name) for _, site in fitting for part in site.parts})
        return Miss(
            target, Refusal("ambiguous", f"ambiguous: {len(names)} weights fit ({', '.join(names[:4])})")
        )
    rows, cols = target.matrix
    quantised = any(use.quantised for _, site in fitting for part in site.parts for use in part.uses)
    if wanted is not None and not quantised:
        fitting = [(form, site) for form, site in fitting if _agrees(form, site, wanted)]
    elif rows == cols:
        linear = [(form, site) for form, site in fitting if not form.turned and _is_linear(target, site)]
        fitting = linear or [
            (form, site)
            for form, site in fitting
            if _is_raw(target, site) and _stored_turned(site) == form.turned
        ]
    if len(fitting) == 1:
        return fitting[0][1]
    return Miss(target, Refusal("unproven", _SQUARE.format(shape=target.shape)))


def _agrees(form: Form, site: Site, wanted: Array) -> bool:
    """Return True if the values in a site are the form's (rule 2)."""
    canonical = wanted.T if form.turned else wanted
    for part in site.parts:
        (placement,) = part.placements
        start, stop = placement.rows
        match = content.compare(canonical_rows(part, placement), canonical[start:stop])
        scaled = placement.row_scale is not None and match.cosine >= content.COSINE
        if not (match.same or scaled):
            return False
    return True


def _is_linear(target: Target, site: Site) -> bool:
    """Return True if by all nodes' metadata the module is an `nn.Linear` (rule 3)."""
    nodes = [use.node for part in site.parts for use in part.uses]
    paths = {scope_path(node) for node in nodes}
    named = {path for path in paths if path and (path == target.path or path.endswith(f".{target.path}"))}
    return paths == named and {scope_class(node) for node in nodes} == {_LINEAR}


def _is_raw(target: Target, site: Site) -> bool:
    """Return True if the constants have the parameter's own name and were not computed (rule 4)."""
    for part in site.parts:
        name = str(part.root.name)
        named = name == target.key or name.endswith(f".{target.key}") or target.key.endswith(f".{name}")
        if not named or folded_from(part.root) or computed_from(part.root):
            return False
    return True


def _stored_turned(site: Site) -> bool:
    return all(placement.transposed for part in site.parts for placement in part.placements)
