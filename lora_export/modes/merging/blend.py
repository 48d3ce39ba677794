"""Check that several adapters can be blended, and with their weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from lora_export.adapter import Adapter, Array, LoraModule
from lora_export.base.ties.copies import alone_hint, not_so
from lora_export.errors import AdapterError
from lora_export.formats.given import AdapterLike, load_given
from lora_export.untrusted.fields import nearest_float

_MADE_FROM = "give the adapter that it was made from"


def check_blend(
    adapters: AdapterLike | Sequence[AdapterLike],
    weights: Sequence[float] | None,
    component: str | None = None,
) -> tuple[list[Adapter], list[float]]:
    """Load adapters that are given as paths, and check that they can be merged together.

    The blend is ``W0 + Σ wᵢ·ΔWᵢ`` (PEFT's ``add_weighted_adapter`` with ``combination_type="cat"``).

    Args:
        adapters: Paths or `Adapter` values.
        weights: Factor of each adapter.
        component: Part of each adapter that belongs, see `load_adapter`.

    Returns:
        The adapters and one weight for each.

    Raises:
        AdapterError: There are fewer or more weights than adapters, a weight is not finite, or adapters have
            DoRA or replaced rows in a blend (they are not sums), DoRA converted for a graph, or one adapter
            is given twice: it would count twice. Whole copies of parameters are judged with the base
            (`lora_export.base.ties.copies`).
    """
    loaded = load_given(adapters, component)
    if not loaded:
        raise AdapterError("no adapter given", "give at least one adapter")
    factors = [1.0] * len(loaded) if not weights else list(map(nearest_float, weights))
    if len(factors) != len(loaded):
        raise AdapterError(
            f"{len(loaded)} adapters and {len(factors)} weights",
            "give one --weight for each --adapter, or none",
        )
    problems = [f"weight {factor} is not a finite number" for factor in factors if not math.isfinite(factor)]
    plain = len(loaded) == 1 and factors == [1.0]
    for adapter in loaded:
        computed = [module.path for module in adapter.modules.values() if module.scale is not None]
        if computed:
            problems.append(
                f"{adapter.name}: DoRA, converted for a graph ({len(computed)} modules): "
                f"its factors hold for the exposed tensors only; {_MADE_FROM}"
            )
        dora = [module.path for module in adapter.modules.values() if module.magnitude is not None]
        if dora and not plain:
            problems.append(
                f"{adapter.name}: DoRA ({len(dora)} modules, {dora[0]} …) is not a sum: "
                "alone and with weight 1 only"
            )
        if adapter.token_rows and not plain:
            problems.append(
                f"{adapter.name}: replaces single rows ({next(iter(adapter.token_rows))} …): "
                "alone and with weight 1 only"
            )
    if problems:
        raise AdapterError(
            not_so(len(loaded)),
            alone_hint(factors, len(loaded)) or _MADE_FROM,
            problems,
        )
    _refuse_twice(loaded, factors)
    return loaded, factors


def _refuse_twice(adapters: Sequence[Adapter], factors: Sequence[float]) -> None:
    """Refuse an adapter that is given twice, under whatever name: it is seldom meant to count twice."""
    pairs = itertools.combinations(zip(adapters, factors, strict=True), 2)
    twice = [
        f"{one.name} ({one.source}) and {other.name} ({other.source}): together --weight {weight + more:g}"
        for (one, weight), (other, more) in pairs
        if _is_same(one, other)
    ]
    if twice:
        raise AdapterError(
            "the same adapter is given twice",
            "give it once; if it is meant to count more, with one --weight (weights=[…]) that is the sum",
            twice,
        )


def _is_same(one: Adapter, other: Adapter) -> bool:
    """Return whether two adapters change the same weights by the same values."""
    if one is other:
        return True
    if one.scope != other.scope or one.modules.keys() != other.modules.keys():
        return False
    if one.extras.keys() != other.extras.keys():
        return False
    return all(_is_same_change(module, other.modules[key]) for key, module in one.modules.items()) and all(
        np.array_equal(values, other.extras[path]) for path, values in one.extras.items()
    )


def _is_same_change(one: LoraModule, other: LoraModule) -> bool:
    meant, also = (
        (module.scaling, module.kind, module.turned, module.layout, module.table_everywhere)
        for module in (one, other)
    )
    return (
        meant == also
        and np.array_equal(one.lora_a, other.lora_a)
        and np.array_equal(one.lora_b, other.lora_b)
        and _are_equal(one.lora_bias, other.lora_bias)
    )


def _are_equal(one: Array | None, other: Array | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other)
