"""Write a graph with exposed LoRA: the graph with its LoRA record, the base's weights, the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_export import __version__
from lora_export.adapter import Adapter
from lora_export.base.open_base import Base
from lora_export.base.write_options import WriteOptions
from lora_export.errors import GraphError
from lora_export.graph.data_identity import mark_data
from lora_export.graph.exposed import KEY, LoraRecord, lora_record_of
from lora_export.graph.exposed_inputs import size_problems
from lora_export.graph.external_data import plan_data, write_data
from lora_export.graph.onnx_file import GraphFile, save_graph
from lora_export.machines.packages import package_versions
from lora_export.modes.branches.inputs import ir_type
from lora_export.modes.quantising.choice import choice_of
from lora_export.modes.quantising.quantise import QuantisedWeights, Quantising, packages_of, quantise
from lora_export.plan import Plan
from lora_export.storage.beside import stage_beside
from lora_export.storage.hashes import FileHash, hash_content, hash_written
from lora_export.storage.manifest import Manifest, adapter_entry
from lora_export.storage.outputs import OutputSet, output_errors
from lora_export.untrusted.places import is_file

_SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class ExposeReport:
    """Result of exposing LoRA, or with ``dry_run`` the result that it would have.

    Attributes:
        plan: Every target and the site of its branch.
        exposed: The graph's LoRA record.
        outputs: Files that were (or would be) written: ``graph``, ``data``, ``manifest``.
        size_bytes: Size of the written weights.
        shared_bytes: Size of the weights that stay in the base's files.
        dry_run: True if nothing was written.
        warnings: Warnings that a user should not miss.
        reads: Files that were read.
        quantised: Weights of the base that were quantised; None if all stay floats.
    """

    plan: Plan
    exposed: LoraRecord
    outputs: dict[str, Path] = field(default_factory=dict)
    size_bytes: int = 0
    shared_bytes: int = 0
    dry_run: bool = False
    warnings: tuple[str, ...] = ()
    reads: tuple[Path, ...] = ()
    quantised: QuantisedWeights | None = None

    def __str__(self) -> str:
        """Return a few lines: what was exposed, warnings, and the files."""
        plan = replace(self.plan, warnings=tuple(dict.fromkeys((*self.plan.warnings, *self.warnings))))
        return "\n".join(plan.summary(self.outputs.values(), self.dry_run))

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "outputs": {name: str(path) for name, path in self.outputs.items()},
            "dry_run": self.dry_run,
            "size_bytes": self.size_bytes,
            "shared_bytes": self.shared_bytes,
            "plan": self.plan.as_dict(),
            "warnings": list(self.warnings),
            "exposed": asdict(self.exposed),
            **({"quantised": self.quantised.as_dict()} if self.quantised else {}),
        }


def base_name(base: Path) -> str:
    """Return the name of the base in a LoRA record: its file or folder name."""
    # The name of a link's target is not used: files in Hugging Face's cache are called by their hashes.
    return base.absolute().name if is_file(base) else base.resolve().name


def write_exposed(
    base: Base,
    report: ExposeReport,
    adapters: Sequence[Adapter],
    options: WriteOptions,
    beside: Mapping[str, bytes] | None = None,
) -> ExposeReport:
    """Write the graph of a report, unless it is a dry run; return the report with the sizes.

    Args:
        base: The graph with its branches.
        report: Report with plan, LoRA record and paths.
        adapters: Adapters that the graph was made from.
        options: Options of the mode.
        beside: Name → content of files that belong beside the graph and are a part of the set.

    Raises:
        OutputError: A file exists or can't be written.
    """
    paths, out = report.outputs, report.outputs["graph"]
    report, quantising = _quantised(base, report, options)
    slots, size, shared = plan_data(base.graph, {}, out, base.shared_files)
    report = replace(report, size_bytes=size, shared_bytes=shared, reads=base.reads)
    if report.dry_run:
        return report
    text = report.exposed.to_json()
    # Nothing is written that our own readers refuse.
    LoraRecord.from_json(text)
    base.graph.model.metadata_props[KEY] = text
    with output_errors(out), OutputSet(options.force, base.reads) as outputs:
        # The manifest comes before the graph, which is written last.
        others = {out.parent / name: content for name, content in (beside or {}).items()}
        check = stage_beside(outputs, others, options.force)
        staged = {name: outputs.stage(path) for name, path in paths.items()}
        name = paths["data"].name
        write_data(
            staged["data"],
            name,
            slots,
            size=size,
            changes={},
            rounding="sample",
            progress=options.progress,
        )
        if quantising:
            report = replace(report, quantised=quantising.finished())
        own = {name: hash_written(staged["data"], name)}
        own |= mark_data(base.graph.model, base.shared_places(out) | own, paths["manifest"].name)
        save_graph(base.graph.model, staged["graph"])
        own[out.name] = hash_written(staged["graph"], out.name)
        own |= {name: hash_content(name, content) for name, content in (beside or {}).items()}
        _manifest(base, report, adapters, own).save(staged["manifest"])
        outputs.commit(check)
    return report


def _quantised(
    base: Base, report: ExposeReport, options: WriteOptions
) -> tuple[ExposeReport, Quantising | None]:
    """Let the base's products read codes, if the user wants that; LoRA tensors stay as they are."""
    choice = choice_of(options.quantize)
    if choice is None:
        return report, None
    metadata = base.graph.model.metadata_props
    metadata[KEY] = report.exposed.to_json()
    quantising = quantise(base.graph, choice)
    exposed = lora_record_of(metadata, str(base.graph.path))
    return replace(report, exposed=exposed, quantised=quantising.quantised), quantising


def _manifest(
    base: Base, report: ExposeReport, adapters: Sequence[Adapter], files: Mapping[str, FileHash]
) -> Manifest:
    outputs = {name: path.name for name, path in report.outputs.items()}
    return Manifest(
        mode=f"{report.exposed.mode}-onnx",
        base=list(base.hashes.values()),
        adapters=[adapter_entry(adapter, 1.0) for adapter in adapters],
        plan=report.plan.as_dict(),
        rounding={},
        outputs=outputs | {"shared_bytes": report.shared_bytes},
        versions={"lora-export": __version__} | package_versions(packages_of(report.quantised)),
        exposed=asdict(report.exposed),
        files=files,
        quantised=report.quantised.as_dict() if report.quantised else {},
    )


def refuse_lost_inputs(exposed: LoraRecord, graph: GraphFile) -> None:
    """Raise `GraphError` if a graph's inputs differ from those in its LoRA record.

    Simplifiers and quantisers take an input that has a default for a constant; float16 converters change its
    dtype.

    Args:
        exposed: The graph's LoRA record.
        graph: The graph.
    """
    inputs = {str(value.name): value.dtype for value in graph.graph.inputs}
    lost, changed = [], []
    for module in exposed.modules:
        dtype = ir_type(module)
        for name in exposed.names_of(module):
            if name not in inputs:
                lost.append(f"{name}: not an input any more")
            elif inputs[name] != dtype:
                changed.append(f"{name}: {inputs[name]}, the LoRA record says {dtype}")
    shapes = {
        str(value.name): None if value.shape is None else value.shape.dims for value in graph.graph.inputs
    }
    sizes = [] if lost or changed else size_problems(exposed, shapes)
    if sizes:
        raise GraphError(
            f"{graph.path}: {len(sizes)} LoRA inputs have other sizes than the graph's LoRA record says",
            "make it again with swap-onnx or bank-onnx; a tool has changed it since",
            sizes[:_SHOWN],
        )
    if lost or changed:
        raise GraphError(
            f"{graph.path} was changed after LoRA was exposed in it: {len(lost)} of its LoRA inputs "
            f"became constants, {len(changed)} have another type; adapters made for it would not fit",
            "change the base first (simplify, optimise, quantise, convert), then run swap-onnx on the result",
            [*lost, *changed][:_SHOWN],
        )
