"""Refuse adapters whose targets have no sites in a checkpoint, or only some of them, with hints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_export.adapter import Adapter
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.quantised import HINT, find_quantised
from lora_export.base.history.history import MANIFEST
from lora_export.base.history.merged import refuse_contained, refuse_merged
from lora_export.base.planning.checkpoint_plan import CheckpointPlan
from lora_export.base.planning.find_sites import plan_checkpoint
from lora_export.base.planning.hints import Situation, hints_of
from lora_export.base.ties.copies import refuse_overwriting
from lora_export.errors import AdapterError, SiteError
from lora_export.plan import Plan, refuse
from lora_export.sites.naming.likeness import counterparts, side_by_side

_EXAMPLES = 4


def refuse_absent(base: Path, adapters: Sequence[Adapter], allow_unmatched: bool) -> None:
    """Refuse adapters whose low-rank changes are of parameters that a folder lacks, or has in another size.

    A capture takes a minute; by names and shapes a wrong adapter is found in a second.

    Args:
        base: Folder with config.json and safetensors.
        adapters: Adapters for the graph that is captured from it.
        allow_unmatched: Parameters without a site will be left out.

    Raises:
        AdapterError: An adapter is for another architecture, was merged into the base already, or holds
            copies of parameters that an earlier merge has changed.
        CheckpointError: The base is damaged.
        SiteError: Some parameters of an adapter have no site in the base; all are listed.
    """
    if not adapters:
        return
    checkpoint = Checkpoint.open(base)
    refuse_contained(checkpoint)
    refuse_merged(checkpoint.folder, adapters)
    for adapter in adapters:
        shared = len(adapters) > 1
        planned = plan_checkpoint(checkpoint, [adapter], [1.0], find_quantised(checkpoint), shared=shared)
        refuse_overwriting(planned.copied, checkpoint.folder / MANIFEST, [adapter])
        changed = {f"{module.path}.{module.parameter}" for module in adapter.modules.values()}
        # A graph of the folder lacks the same parameters, and has the others in the same sizes.
        sized = {row.parameter for row in planned.plan.rows if row.kind == "shape"}
        unfit = changed & {*planned.absent, *sized}
        rows = [row for row in planned.plan.rows if row.parameter in unfit or row.action != "refused"]
        if unfit:
            found = replace(planned, plan=Plan(tuple(rows)))
            refuse_without_site(checkpoint, [adapter], found, allow_unmatched)


def refuse_without_site(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], planned: CheckpointPlan, allow_unmatched: bool
) -> None:
    """Raise the error for a plan's refused rows: another model's adapter, a quantised base, or a list."""
    refused, rows = planned.plan.refused, planned.plan.rows
    names = ", ".join(f"'{adapter.name}'" for adapter in adapters)
    if not rows:
        raise AdapterError(f"adapter {names} changes nothing", "check that the right file was given")
    hints = list(dict.fromkeys(planned.hints))
    if len(refused) == len(rows) and len(set(planned.absent)) >= len({row.parameter for row in rows}):
        raise _foreign(checkpoint, adapters, hints, len(rows))
    if not refused or (allow_unmatched and len(refused) < len(rows)):
        return
    lines = [f"{row.parameter}   {row.reason}" for row in refused]
    kinds = {row.kind for row in refused}
    if "quantised" in kinds:
        closed = sum(row.kind == "quantised" for row in refused)
        raise SiteError(
            f"the base {checkpoint.folder} is quantised: {closed} of the {len(rows)} parameters that adapter "
            f"{names} changes can't be merged into",
            HINT,
            lines,
        )
    if kinds & {"not found", "shape"} and "branch only" not in kinds and not hints:
        hints = [_trained_on(checkpoint, adapters)]
    situation = Situation(into="folder", some=len(refused) < len(rows), given=hints)
    refuse(
        f"adapter {names}",
        str(checkpoint.folder),
        lines,
        hints_of(kinds, situation),
        count=len(refused),
        total=len(rows),
    )


def _foreign(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], hints: Sequence[str], total: int
) -> AdapterError:
    """Return the error for adapters of which no name is known: another naming, or another model."""
    names = ", ".join(f"'{adapter.name}'" for adapter in adapters)
    wanted = {
        f"{module.path}.{module.parameter}": module.weight_shape
        for adapter in adapters
        for module in adapter.modules.values()
    }
    stored = {tensor.name: tensor.shape for tensor in checkpoint.tensors.values() if len(tensor.shape) > 1}
    # If the hint names a part, the base's names that are meant are known, so that no guess is shown.
    alike = [] if hints else counterparts(wanted, stored)
    seen = side_by_side(alike) or [
        *(f"the adapter has {name}" for name in list(wanted)[:_EXAMPLES]),
        *(f"the base has {name}" for name in list(stored)[:_EXAMPLES]),
    ]
    if hints:
        what, hint = "does not belong as a whole to", "; ".join(hints)
    elif alike:
        what = "names its modules in another way than"
        hint = (
            "the shapes fit: if these are the same modules, rename the adapter's tensors to the base's names"
        )
    else:
        what = "is for another architecture than"
        hint = _trained_on(checkpoint, adapters)
    return AdapterError(
        f"adapter {names} {what} {checkpoint.folder}: none of its {total} parameters is planned", hint, seen
    )


def _trained_on(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> str:
    """Return a hint on the base to give, never the one that was given."""
    names = {adapter.base_model for adapter in adapters if adapter.base_model}
    others = sorted(name for name in names if Path(name).absolute() != checkpoint.folder.absolute())
    if names and not others:
        return (
            "the adapter names this very folder as its base: if it has changed since, give it as it was then"
        )
    told = f", {', '.join(others)}" if others else ""
    return f"give the base that the adapter was trained on{told}"
