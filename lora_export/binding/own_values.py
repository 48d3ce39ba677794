"""Compare W0 of a graph with exposed LoRA with the folder that an adapter names as its base.

The LoRA record tells where a graph holds W0, so nothing is searched. Not compared are weights that are
quantised or were rescaled (their places are not in the record), and those of a graph that isn't at hand (an
engine without its source).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from lora_export.adapter import Adapter, Array
from lora_export.base.other_values import agrees, look_up
from lora_export.base.own_base import OwnBase, own_bases
from lora_export.binding.base_weights import WeightOf, stored_blocks
from lora_export.binding.match import Pairing
from lora_export.errors import AdapterError
from lora_export.formats.provenance import is_converted
from lora_export.graph.exposed import StoredRows
from lora_export.sites.target import ExpertStack, targets_of
from lora_export.sites.values.verify import orientations


def compare_own_values(
    adapter: Adapter,
    pairings: Sequence[Pairing],
    *,
    merged: str,
    where: str,
    weight_of: WeightOf | None,
    any_base: bool,
) -> tuple[list[str], list[str]]:
    """Compare what an adapter changes with the local folder that it names as its base.

    Args:
        adapter: The adapter as it was read.
        pairings: Its modules and their sites.
        merged: Entries of the adapters that merges have put into the graph.
        where: The graph's file, for messages.
        weight_of: The graph's constants.
        any_base: Go on with other values.

    Returns:
        Notes, and warnings.

    Raises:
        AdapterError: The graph holds other values, and ``any_base`` is False.
    """
    if is_converted(adapter.config) or weight_of is None:
        # A converted file belongs to a graph, by its identity.
        return [], []
    notes: list[str] = []
    warnings: list[str] = []
    for own in own_bases([adapter], merged):
        if own.weights is None:
            notes.append(own.note)
            continue
        compared = list(_compared(adapter, pairings, own, weight_of))
        others = [key for key, same in compared if not same]
        if not compared:
            why_not = "the graph's weights are not at hand, or not as they are there"
            own = replace(own, weights=None, why_not=why_not)
        notes.append(own.note)
        if others and not any_base:
            raise AdapterError(
                f"adapter {adapter.name!r} was trained on another base than {where}: {len(others)} of the "
                f"{len(compared)} modules that it changes have other values in {own.where}",
                "give the graph that was made from that folder; if the graph is right, and the folder is "
                "another model by now, go on with convert-adapter --any-base (any_base=True)",
                others,
            )
        if others:
            warnings.append(
                f"bound to another base than it was trained on: {len(others)} of {len(compared)} modules "
                f"have other values in {own.where}"
            )
    return notes, warnings


def _compared(
    adapter: Adapter, pairings: Sequence[Pairing], own: OwnBase, weight_of: WeightOf
) -> Iterator[tuple[str, bool]]:
    """Yield (parameter, True if the graph holds the folder's values) of what can be compared."""
    assert own.weights is not None
    settled = own.weights.settled(replace(adapter, token_rows={}))[0]
    targets = {target.key: target for target in targets_of(settled)}
    wanted_of = look_up(settled, own.weights, list(targets.values()))
    for pair in pairings:
        target = targets.get(f"{pair.lora.path}.{pair.lora.parameter}")
        if target is None or pair.from_base or pair.whole or not pair.member.stored:
            continue
        wanted = wanted_of(target)
        if wanted is None or isinstance(wanted, ExpertStack):
            continue
        matrices = orientations(target, wanted)
        if target.kind == "parameter":
            # The graph may use the transpose of what the module holds.
            matrices = [matrices[0], matrices[0].T]
        with contextlib.suppress(KeyError, AdapterError):  # the graph's weights are not at hand
            yield target.key, any(_holds(matrix, pair.member.stored, weight_of) for matrix in matrices)


def _holds(matrix: Array, stored: Sequence[StoredRows], weight_of: WeightOf) -> bool:
    seen = 0
    try:
        for row, block in stored_blocks(stored, matrix.shape[1], weight_of):
            seen += len(block)
            if not agrees(block, [matrix[row : row + len(block)]]):
                return False
    except ValueError:  # another shape
        return False
    return seen == len(matrix)
