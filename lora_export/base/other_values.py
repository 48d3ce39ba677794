"""Compare the parameters that an adapter changes in two checkpoints, or in a graph and a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lora_export.adapter import Adapter, Array
from lora_export.base.checkpoint.weights import AdapterWeights, CheckpointWeights
from lora_export.sites.target import ExpertStack, Target, Wanted, targets_of
from lora_export.sites.values import content
from lora_export.sites.values.verify import orientations


def other_values(adapter: Adapter, base: CheckpointWeights, own: CheckpointWeights) -> Iterator[str]:
    """Yield the parameters that have other values in an adapter's own base."""
    # Single rows that are replaced are not a change of what was there.
    settled = base.settled(replace(adapter, token_rows={}))[0]
    targets = [target for target in targets_of(settled) if target.action != "replace"]
    mine, theirs = look_up(settled, base, targets), look_up(settled, own, targets)
    for target in targets:
        held, wanted = mine(target), theirs(target)
        if held is not None and wanted is not None and not _are_same(target, held, wanted):
            yield target.key


def look_up(adapter: Adapter, weights: CheckpointWeights, targets: Sequence[Target]) -> AdapterWeights:
    """Return the look-up of an adapter's targets in a checkpoint."""
    return weights.for_adapter([target.named for target in targets], adapter.flattened, adapter.scope)


def _are_same(target: Target, held: Wanted, wanted: Wanted) -> bool:
    if isinstance(held, ExpertStack) and isinstance(wanted, ExpertStack):
        return all(agrees(held.matrix(n), [wanted.matrix(n)]) for n in range(target.experts))
    if isinstance(held, ExpertStack) or isinstance(wanted, ExpertStack):
        return False
    if target.kind == "vector":
        return agrees(held.reshape(1, -1), [wanted.reshape(1, -1)])
    return agrees(held.reshape(target.matrix), orientations(target, wanted))


def agrees(stored: Array, wanted: Sequence[Array]) -> bool:
    """Return whether stored rows are those of one of the matrices, up to the rounding of a float type."""
    for one in wanted:
        if one.shape != stored.shape:
            continue
        match = content.compare(stored, one)
        if match.worst <= content.EXACT or (match.same and match.worst <= content.step(stored, one)):
            return True
    return False
