"""Part adapters by the components of a pipeline: each tensor goes into one, or the adapter is refused.

Rules:

1. A component that a file names is the pipeline's of that name; else one that trainers call so: kohya's
   ``lora_unet_`` and ``diffusion_model.`` are any denoiser's.
2. A file that names no component goes into the one that has all of its parameters, if that is one only.
3. The user's ``--component`` decides; the rest of the file is left out, and the plan says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lora_export.adapter import Adapter, LoraModule
from lora_export.base.pipeline import components_named, is_own
from lora_export.base.pipeline_graphs import Pipeline
from lora_export.base.planning.refuse import refuse_absent
from lora_export.errors import AdapterError, LoraExportError
from lora_export.formats.reading.scope import part_of

_LEAVE_OUT = "--allow-unmatched leaves them out"


@dataclass(frozen=True)
class Share:
    """Part of an adapter that goes into one component.

    Attributes:
        adapter: The adapter with this part alone.
        factor: Its weight in the blend.
    """

    adapter: Adapter
    factor: float


def part_adapters(
    adapters: Sequence[Adapter], factors: Sequence[float], pipeline: Pipeline, allow_unmatched: bool
) -> tuple[dict[str, list[Share]], list[str]]:
    """Return the shares of each component that some adapter changes, and notes on what is left out.

    Args:
        adapters: The adapters, as they were read.
        factors: Weight of each.
        pipeline: The pipeline.
        allow_unmatched: Leave out tensors for components that the pipeline lacks.

    Raises:
        AdapterError: An adapter has parts for components that the pipeline lacks, or it is not known for
            which one; all of its tensors are listed.
        SiteError: Parameters of an adapter have no site in their component.
    """
    shares: dict[str, list[Share]] = {}
    notes: list[str] = []
    for adapter, factor in zip(adapters, factors, strict=True):
        parts, lost = _parts(adapter, pipeline)
        if lost and not (allow_unmatched and parts):
            raise _lacking(adapter, pipeline, lost)
        notes += [f"adapter '{adapter.name}': left out: {line}" for line in lost]
        for component, part in parts:
            shares.setdefault(component, []).append(Share(part, factor))
    for component, given in shares.items():
        refuse_absent(pipeline.components[component], [share.adapter for share in given], allow_unmatched)
    return shares, notes


def _parts(adapter: Adapter, pipeline: Pipeline) -> tuple[list[tuple[str, Adapter]], list[str]]:
    """Return the parts of an adapter, each with its component, and a line for each tensor without one."""
    named = components_named(adapter)
    if not named:
        return [(_component_by_names(adapter, pipeline), adapter)], []
    parts, lost = [], []
    for name, modules in named.items():
        owner = _owner(adapter, name, modules, pipeline)
        if owner is None:
            lost += [f"{tensor}, for '{name}'" for module in modules for tensor in module.tensor_names]
        else:
            # Without the note that the rest is ignored: it goes into other components.
            part = replace(part_of(adapter, name), notes=adapter.notes)
            parts.append((owner, adapter if adapter.part else part))
    return parts, lost + list(_without_component(adapter))


def _owner(adapter: Adapter, name: str, modules: Sequence[LoraModule], pipeline: Pipeline) -> str | None:
    """Return the component that a file's name for one means; None if the pipeline has none (rule 1)."""
    known = pipeline.components
    if name in known:
        return name
    found = [own for own in known if is_own(name, own, modules, known)]
    if len(found) > 1:
        raise AdapterError(
            f"adapter '{adapter.name}' is for a denoiser, and {pipeline.folder} has several: "
            f"{', '.join(found)}",
            "give the folder of the one that it was trained on as the base",
        )
    return found[0] if found else None


def _without_component(adapter: Adapter) -> Iterator[str]:
    """Yield a line for each tensor of no component, in a file that names components."""
    for module in adapter.modules.values():
        if module.component is None:
            yield from (f"{tensor}, for no component" for tensor in module.tensor_names)
    # A part that the user has asked for has none of these.
    for path in (*adapter.extras, *adapter.token_rows):
        yield f"{adapter.extra_tensors.get(path, path)}, for no component"


def _component_by_names(adapter: Adapter, pipeline: Pipeline) -> str:
    """Return the only component that has all of an adapter's parameters (rule 2)."""
    found, reasons = [], []
    for component, folder in pipeline.components.items():
        try:
            refuse_absent(folder, [adapter], allow_unmatched=False)
        except LoraExportError as error:
            reasons.append(f"{component}: {error.message}")
        else:
            found.append(component)
    if len(found) == 1:
        return found[0]
    fits = f"fits several of them: {', '.join(found)}" if found else "does not fit any of them"
    raise AdapterError(
        f"adapter '{adapter.name}' does not say which part of the pipeline {pipeline.folder} it is for, and "
        f"{fits}",
        "give the folder of the part that it was trained on as the base: "
        f"{' or '.join(str(folder) for folder in pipeline.components.values())}",
        reasons,
    )


def _lacking(adapter: Adapter, pipeline: Pipeline, lost: Sequence[str]) -> AdapterError:
    named = components_named(adapter).items()
    owned = [name for name, modules in named if _owner(adapter, name, modules, pipeline)]
    hints = [f"--component {name} takes that part alone" for name in owned[:1]]
    hints += [_LEAVE_OUT] if owned else ["give the pipeline that it was trained on"]
    return AdapterError(
        f"adapter '{adapter.name}' has {len(lost)} tensors for parts that the pipeline {pipeline.folder} "
        f"lacks (it has: {', '.join(pipeline.components)})",
        "; ".join(hints),
        lost,
    )
