"""Convert an adapter for one graph with exposed LoRA: check it against the graph, use its inputs' layout."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_export import __version__
from lora_export.adapter import Adapter
from lora_export.base.pipeline import refuse_other_components
from lora_export.base.reads import files_read, graph_files
from lora_export.binding.base_weights import GraphWeights
from lora_export.binding.bind import Binding, bind_adapter
from lora_export.binding.foreign import foreign_lora
from lora_export.errors import GraphError, OutputError, SiteError
from lora_export.formats import WRITERS, as_adapter, writer_of
from lora_export.formats.edge_llm import own_files
from lora_export.formats.provenance import Provenance, Writer, is_converted
from lora_export.graph.exposed import KEY, LoraRecord, lora_record_of
from lora_export.graph.onnx_file import GraphFile, load_graph
from lora_export.graph.unused_inputs import unused_modules
from lora_export.modes.branches.find_branches import refuse_contained
from lora_export.modes.branches.output import refuse_lost_inputs
from lora_export.plan import Plan
from lora_export.storage.folders import refuse_strangers
from lora_export.storage.inputs import same_inputs
from lora_export.storage.outputs import OutputSet, output_errors, refuse_existing, refuse_inputs
from lora_export.untrusted.places import is_folder

PathLike = str | os.PathLike[str]
# Features that other runtimes lack: factors, biases, and packs whose B is cut.
_EVERYWHERE = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """Result of a conversion, or with ``dry_run`` the result that it would have.

    Attributes:
        adapter: Name of the adapter.
        graph: File name of the graph that it is for.
        format: Format, a key of `WRITERS`.
        output: File or folder that was (or would be) written.
        plan: A row for each parameter of the adapter.
        ranks: Name of a pair of tensors → its rank.
        size_bytes: Size of the tensors.
        notes: Conversions, padding, assumptions and omissions.
        warnings: The notes that a user should not miss.
        dry_run: True if nothing was written.
    """

    adapter: str
    graph: str
    format: str
    output: Path
    plan: Plan
    ranks: Mapping[str, int] = field(default_factory=dict)
    size_bytes: int = 0
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    dry_run: bool = False

    def __str__(self) -> str:
        """Return a few lines: what was converted, warnings, and the output."""
        plan = replace(self.plan, warnings=tuple(dict.fromkeys((*self.plan.warnings, *self.warnings))))
        return "\n".join(plan.summary([self.output], self.dry_run))

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "adapter": self.adapter,
            "graph": self.graph,
            "format": self.format,
            "output": str(self.output),
            "plan": self.plan.as_dict(),
            "ranks": dict(self.ranks),
            "size_bytes": self.size_bytes,
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "dry_run": self.dry_run,
        }


@same_inputs()
def convert_adapter(
    adapter: PathLike | Adapter,
    graph: PathLike,
    output: PathLike,
    *,
    format: str | None = None,
    component: str | None = None,
    allow_unmatched: bool = False,
    any_base: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> ConvertReport:
    """Write an adapter as the tensors that a graph takes, scaling folded in.

    Args:
        adapter: Path for `load_adapter`, or an `Adapter`.
        graph: The ``.onnx`` file that it is for: of `swap_onnx`, or one that another tool gave LoRA inputs.
        output: File (or for ``edge-llm`` folder) to write.
        format: Format, a key of `WRITERS`; by default that of the output's suffix.
        component: The part of the adapter that belongs to the graph, see `load_adapter`.
        allow_unmatched: Leave out parameters that have no site in the graph.
        any_base: Accept an adapter whose own base, on this machine, has other values, and a file that was
            converted for another base, unless its values were computed from that base: DoRA's factors,
            changes that make whole parameters.
        force: Replace an existing output.
        dry_run: Check and plan, and write nothing.

    Returns:
        The plan, ranks and notes.

    Raises:
        AdapterError: The adapter can't be read or used, or was made for another base.
        BackendUnavailable: The format needs onnxruntime, and it is not installed.
        GraphError: The graph can't be read, has no exposed LoRA, or is a bank.
        OutputError: The output exists, can't be written, or its name doesn't fit the format.
        SiteError: Parameters of the adapter have no site in the graph; all are listed.
    """
    target, file = Path(output), load_graph(graph)
    exposed, genai = _exposed(file)
    form = _form_of(target, format, file, genai=genai)
    loaded = as_adapter(adapter, component)
    notes = refuse_other_components([loaded], [file.path.parent])
    reads = [*graph_files(file), *files_read(file.path, [loaded], None)]
    refuse_inputs([target], reads)
    if not dry_run:
        refuse_existing([target], force)
    binding = bind_adapter(
        loaded,
        form.typed(exposed),
        where=file.path.name,
        weight_of=GraphWeights(file.path, file),
        allow_unmatched=allow_unmatched,
        any_base=any_base,
        unused=unused_modules(file.graph, exposed, genai=genai),
        own_base=True,
    )
    _refuse_modules(binding, exposed, form)
    if not dry_run:
        form.write(target, binding, _provenance(loaded, exposed, binding), reads, force=force)
    return ConvertReport(
        adapter=loaded.name,
        graph=file.path.name,
        format=form.name,
        output=target,
        plan=binding.plan,
        ranks=binding.ranks,
        size_bytes=sum(values.nbytes for values in binding.tensors.values()),
        notes=(*notes, *binding.notes),
        warnings=binding.warnings,
        dry_run=dry_run,
    )


@dataclass(frozen=True)
class _Form:
    """Form in which an adapter is written.

    Attributes:
        name: Name of the form, a key of `WRITERS`.
        writer: Facts of the form, and the function that writes it.
    """

    name: str
    writer: Writer

    @property
    def is_folder(self) -> bool:
        """True if several files are written."""
        return not self.writer.suffix

    def typed(self, exposed: LoraRecord) -> LoraRecord:
        """Return a LoRA record with the dtype that the form has for all tensors, if it has one."""
        dtype = self.writer.dtype
        if not dtype:
            return exposed
        return replace(exposed, modules=tuple(replace(module, dtype=dtype) for module in exposed.modules))

    def write(
        self, target: Path, binding: Binding, provenance: Provenance, reads: Sequence[Path], *, force: bool
    ) -> None:
        """Write the tensors of an adapter."""
        with output_errors(target), OutputSet(force, reads) as outputs:
            self.writer.write(outputs.stage(target, self.is_folder), binding.tensors, provenance)
            outputs.commit((lambda: _check_folder(target)) if self.is_folder else None)


def _exposed(file: GraphFile) -> tuple[LoraRecord, bool]:
    """Return the graph's LoRA record, and True if its tensors have onnxruntime-genai's own names."""
    if KEY not in file.model.metadata_props:
        if found := foreign_lora(file):
            return found.exposed, found.genai
        refuse_contained(file)
    exposed = lora_record_of(file.model.metadata_props, str(file.path))
    if exposed.mode == "bank":
        raise GraphError(
            f"{file.path} is a bank: its slots take adapters as they are, not converted files",
            "give the adapter to bank-onnx or to AdapterSession.load_adapter",
        )
    refuse_lost_inputs(exposed, file)
    return exposed, False


def _form_of(output: Path, format: str | None, file: GraphFile, *, genai: bool) -> _Form:
    """Return the form to write; refuse one that doesn't fit the output or the graph."""
    name = _format_of(output, format, genai)
    form = _Form(name, writer_of(name))
    _check_output(output, form, file, genai=genai)
    return form


def _format_of(output: Path, format: str | None, genai: bool) -> str:
    if format is not None:
        if format not in WRITERS:
            raise OutputError(f"there is no format '{format}' to write", f"one of: {', '.join(WRITERS)}")
        return format
    if output.suffix == ".onnx_adapter":
        return "genai" if genai else "onnx_adapter"
    if output.suffix == ".safetensors":
        return "safetensors"
    raise OutputError(
        f"the output {output} doesn't tell its format",
        f"let it end in .onnx_adapter or .safetensors, or give --format {'|'.join(WRITERS)}",
    )


def _check_output(output: Path, form: _Form, file: GraphFile, *, genai: bool) -> None:
    writer = form.writer
    if writer.suffix and output.suffix != writer.suffix:
        is_folder_name = not output.stem.strip(".")
        better_name = (
            output / f"adapter{writer.suffix}" if is_folder_name else output.with_suffix(writer.suffix)
        )
        raise OutputError(
            f"the output {output} does not end in {writer.suffix}, which {form.name} files do",
            f"-o {better_name}",
        )
    if genai != writer.foreign:
        names = "onnxruntime-genai's own names" if genai else "the names of ONNX Runtime's adapters"
        better = "genai" if genai else "onnx_adapter (onnxruntime-genai takes it for this graph)"
        raise OutputError(
            f"{file.path.name} has {names} for its LoRA inputs: a {form.name} file would not fit them",
            f"--format {better}",
        )
    if form.is_folder:
        _check_folder(output)


def _check_folder(output: Path) -> None:
    """Refuse to replace a folder that holds more than an earlier conversion has written."""
    if is_folder(output):
        refuse_strangers(output, own_files(output), "converted adapter")


def _provenance(adapter: Adapter, exposed: LoraRecord, binding: Binding) -> Provenance:
    kinds = {module.name: module.kind for module in exposed.modules if module.kind != "linear"}
    # For a file that was converted before, this is the adapter that it was made from.
    made_of = adapter.config if is_converted(adapter.config) else {}
    return Provenance(
        adapter=str(made_of.get("adapter") or adapter.name),
        adapter_sha256=str(made_of.get("adapter_sha256") or adapter.sha256),
        base=exposed.base,
        base_sha256=exposed.base_sha256,
        ranks=binding.ranks,
        kinds={name: kind for name, kind in kinds.items() if name in binding.ranks},
        only_this_base=binding.only_this_base,
        version=__version__,
    )


def _refuse_modules(binding: Binding, exposed: LoraRecord, form: _Form) -> None:
    writer = form.writer
    problems = [
        f"{module.name}  {reason}"
        for module in exposed.modules
        if module.name in binding.ranks and (reason := writer.refusal(module.name, module.kind))
    ]
    if form.is_folder or writer.foreign:
        more = [name for name in binding.tensors if not name.endswith(_EVERYWHERE)]
        problems += [f"{name}  has no place in the format" for name in more]
    if problems:
        raise SiteError(
            f"adapter '{binding.adapter}' can't be written as {form.name}",
            "write it as safetensors or onnx_adapter, or train it without these modules",
            problems,
        )
