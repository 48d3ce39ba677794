"""Refuse adapters that are not for a PyTorch module by its names and sizes, before it is exported.

An export takes a minute. A graph has the module's names and sizes, or fewer of them: what the module lacks,
its graph lacks. Where a name is in doubt (several changes of prefix, a part to be named), the graph decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lora_export.adapter import Adapter
from lora_export.base.planning.lookup import named_of
from lora_export.errors import SiteError
from lora_export.formats.reading.wrappers import strip_wrappers
from lora_export.formats.schemes import fitted
from lora_export.plan import refuse
from lora_export.sites.naming.adapter_layers import adapters_among
from lora_export.sites.naming.known_names import KnownNames
from lora_export.sites.naming.likeness import counterparts
from lora_export.sites.naming.renaming import rename

if TYPE_CHECKING:
    import torch

_TRAINED = "give the module that the adapter was trained on"
_WITHOUT = "allow_unmatched=True goes on without them"


def refuse_other_modules(
    module: torch.nn.Module, adapters: Sequence[Adapter], allow_unmatched: bool = False
) -> None:
    """Refuse adapters with low-rank changes that a module surely has no parameters for.

    Args:
        module: The module that will be exported.
        adapters: Adapters to merge into its graph.
        allow_unmatched: Parameters without a site will be left out.

    Raises:
        AdapterError: As `lora_export.formats.schemes.fitted`.
        SiteError: An adapter is for another module; all parameters without a site are listed.
    """
    shapes = _shapes(module)
    if adapters_among(shapes):
        return  # The graph tells what it contains.
    known = KnownNames(shapes, shapes.get)
    for given in adapters:
        adapter = fitted(given, known.names, [])
        named = named_of(adapter)
        found = rename(named, known, flattened=adapter.flattened, scope=adapter.scope)
        if found.hint or any(problem.kind == "ambiguous" for problem in found.problems.values()):
            continue
        low_rank = [n for n, one in enumerate(named) if one.action == "merge"]
        lines, lost = [], {}
        for number in low_rank:
            one, name = named[number], found.names[number]
            if name is None or not known.has(name):
                lines.append(f"{one.key}  not found: the module has no parameter of that name")
                lost[one.key] = one.shape or ()
            elif _is_other(one.shape, stored := known.shape(name)):
                lines.append(f"{one.key}  shapes differ: the module's is {stored}, the adapter's {one.shape}")
        if not lines or (allow_unmatched and len(lines) < len(low_rank)):
            continue
        place, name = type(module).__name__, f"adapter {adapter.name!r}"
        if len(lost) == len(low_rank):
            raise _foreign(name, place, lost, shapes=shapes, lines=lines)
        hints = [_TRAINED, _WITHOUT] if len(lines) < len(low_rank) else [_TRAINED]
        refuse(name, place, lines, hints, count=len(lines), total=len(low_rank))


def _shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...] | None]:
    """Return the shape of each parameter that a module has or computes; None for codes, and if not known."""
    found: dict[str, tuple[int, ...] | None] = {}
    for path, inner in module.named_modules(remove_duplicate=False):
        # A parametrized or quantised module has a weight, but no parameter of that name.
        if path and hasattr(type(inner), "weight"):
            found[strip_wrappers(f"{path}.weight")] = None
    own = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, values in own:
        found[strip_wrappers(name)] = tuple(values.shape) if values.is_floating_point() else None
    return found


def _is_other(mine: tuple[int, ...] | None, theirs: tuple[int, ...] | None) -> bool:
    """Return whether two shapes can't be one parameter's in any layout."""
    return mine is not None and theirs is not None and math.prod(mine) != math.prod(theirs)


def _foreign(
    name: str,
    place: str,
    lost: Mapping[str, tuple[int, ...]],
    *,
    shapes: Mapping[str, tuple[int, ...] | None],
    lines: Sequence[str],
) -> SiteError:
    """Return the error for an adapter of which the module has no name: another naming, or another model."""
    matrices = {key: shape for key, shape in shapes.items() if shape and len(shape) > 1}
    total = len(lost)
    if pairs := counterparts(lost, matrices):
        listed = ", ".join(f"{one} is perhaps {other}" for one, other in pairs)
        return SiteError(
            f"{name} names its modules in another way than {place}: none of its {total} parameters is found",
            f"the shapes fit ({listed}): rename the adapter's tensors",
            lines,
        )
    return SiteError(
        f"{name} was made for another model: none of its {total} parameters has a place in {place}",
        _TRAINED,
        lines,
    )
