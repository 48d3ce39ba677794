"""Convert an adapter for one graph with exposed LoRA: checked against it, and in the layout of its inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_export import __version__
from lora_export.adapter import Adapter, Array
from lora_export.base.pipeline import refuse_other_components
from lora_export.base.reads import files_read, graph_files
from lora_export.binding.base_weights import GraphWeights
from lora_export.binding.bind import Binding, bind_adapter
from lora_export.binding.foreign import foreign_lora
from lora_export.errors import GraphError, OutputError, SiteError
from lora_export.formats import WRITERS, as_adapter, writer_of
from lora_export.formats.edge_llm import own_files
from lora_export.formats.provenance import Provenance, Writer, is_converted
from lora_export.graph.exposed import KEY, ExposedGraph, exposed_of
from lora_export.graph.onnx_file import GraphFile, load_graph
from lora_export.graph.reach import Reach
from lora_export.modes.branches.output import refuse_lost_inputs
from lora_export.modes.branches.place import refuse_contained
from lora_export.plan import Plan
from lora_export.storage.folders import refuse_strangers
from lora_export.storage.inputs import same_inputs
from lora_export.storage.outputs import OutputSet, output_errors, refuse_existing, refuse_inputs

PathLike = str | os.PathLike[str]
# What other runtimes know: no factors, biases, or packs whose B is cut.
_EVERYWHERE = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did, or with ``dry_run`` would do.

    Attributes:
        adapter: Its name.
        graph: File name of the graph that it is for.
        format: Key of `WRITERS`.
        output: What was (or would be) written.
        plan: A row for each parameter of the adapter.
        ranks: Name of a pair of tensors → its rank.
        size_bytes: Of the tensors.
        notes: What was converted, padded, assumed or left out.
        warnings: Those of the notes that a user should not miss.
        dry_run: Nothing was written.
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
        adapter: What `load_adapter` reads, or an `Adapter`.
        graph: The ``.onnx`` file that it is for: of `swap_onnx`, or one that another tool gave LoRA inputs.
        output: File (or for ``edge-llm`` folder) to write.
        format: A key of `WRITERS`; by default what the output's suffix says.
        component: The part of the adapter that belongs to the graph, see `load_adapter`.
        allow_unmatched: Go on without what has no place in the graph.
        any_base: Go on with a file that was converted for another base, unless its values were computed from
            that one: DoRA's factors, changes that make whole parameters.
        force: Replace an existing output.
        dry_run: Check and plan, and write nothing.

    Returns:
        The plan, ranks and notes.

    Raises:
        AdapterError: The adapter can't be read or used, or was made for another base.
        BackendUnavailable: The format needs onnxruntime, and it is not installed.
        GraphError: The graph can't be read, has no exposed LoRA, or is a bank.
        OutputError: The output exists, can't be written, or its name doesn't fit the format.
        SiteError: Something of the adapter has no place in the graph; everything is listed.
    """
    target, file = Path(output), load_graph(graph)
    exposed, genai = _exposed(file)
    format = _format_of(target, format, genai)
    writer = writer_of(format)
    _check_output(target, format, writer, file, genai)
    loaded = as_adapter(adapter, component)
    said = refuse_other_components([loaded], [file.path.parent])
    reads = [*graph_files(file), *files_read(file.path, [loaded])]
    refuse_inputs([target], reads)
    if not dry_run:
        refuse_existing([target], force)
    typed = exposed
    if writer.dtype:
        typed = replace(exposed, modules=tuple(replace(m, dtype=writer.dtype) for m in exposed.modules))
    binding = bind_adapter(
        loaded,
        typed,
        where=file.path.name,
        weight_of=GraphWeights(file.path, file),
        allow_unmatched=allow_unmatched,
        any_base=any_base,
        unused=_unused(file, exposed, genai),
    )
    provenance = _provenance(loaded, exposed, binding)
    _refuse_modules(binding, exposed, format, writer)
    report = ConvertReport(
        loaded.name,
        file.path.name,
        format,
        target,
        binding.plan,
        binding.ranks,
        sum(values.nbytes for values in binding.tensors.values()),
        (*said, *binding.notes),
        binding.warnings,
        dry_run,
    )
    if not dry_run:
        _write(target, writer.write, binding.tensors, provenance, not writer.suffix, force, reads)
    return report


def _exposed(file: GraphFile) -> tuple[ExposedGraph, bool]:
    """Return the graph's record, and whether its tensors have onnxruntime-genai's own names."""
    if KEY not in file.model.metadata_props:
        if found := foreign_lora(file):
            return found.exposed, found.genai
        refuse_contained(file)
    exposed = exposed_of(file.model.metadata_props, str(file.path))
    if exposed.mode == "bank":
        raise GraphError(
            f"{file.path} is a bank: its slots take adapters as they are, not converted files",
            "give the adapter to bank-onnx or to AdapterSession.load_adapter",
        )
    refuse_lost_inputs(exposed, file)
    return exposed, False


def _unused(file: GraphFile, exposed: ExposedGraph, genai: bool) -> frozenset[str]:
    """Return the names of modules whose tensors no output of the graph depends on."""
    reach, inputs = Reach(file.graph), {str(value.name): value for value in file.graph.inputs}
    end = ".MatMul.weight" if genai else ".weight"
    return frozenset(
        module.name
        for module in exposed.modules
        for name in (module.lora_a, *(name for name, _, _ in module.b_parts))
        if not reach.depends_on(inputs[name.removesuffix(".weight") + end])
    )


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


def _check_output(output: Path, format: str, writer: Writer, file: GraphFile, genai: bool) -> None:
    if writer.suffix and output.suffix != writer.suffix:
        raise OutputError(
            f"the output {output} does not end in {writer.suffix}, which {format} files do",
            f"-o {output.with_suffix(writer.suffix)}",
        )
    if genai != writer.foreign:
        names = "onnxruntime-genai's own names" if genai else "the names of ONNX Runtime's adapters"
        better = "genai" if genai else "onnx_adapter (onnxruntime-genai takes it for this graph)"
        raise OutputError(
            f"{file.path.name} has {names} for its LoRA inputs: a {format} file would not fit them",
            f"--format {better}",
        )
    if not writer.suffix:
        _check_folder(output)


def _check_folder(output: Path) -> None:
    """Refuse to replace a folder with more in it than an earlier conversion has written."""
    if output.is_dir():
        refuse_strangers(output, own_files(output), "converted adapter")


def _provenance(adapter: Adapter, exposed: ExposedGraph, binding: Binding) -> Provenance:
    kinds = {module.name: module.kind for module in exposed.modules if module.kind != "linear"}
    # Of a file that was converted before: the adapter that it was made of.
    made_of = adapter.config if is_converted(adapter.config) else {}
    return Provenance(
        str(made_of.get("adapter") or adapter.name),
        str(made_of.get("adapter_sha256") or adapter.sha256),
        exposed.base,
        exposed.base_sha256,
        binding.ranks,
        {name: kind for name, kind in kinds.items() if name in binding.ranks},
        binding.only_this_base,
        __version__,
    )


def _refuse_modules(binding: Binding, exposed: ExposedGraph, format: str, writer: Writer) -> None:
    problems = [
        f"{module.name}  {reason}"
        for module in exposed.modules
        if module.name in binding.ranks and (reason := writer.refusal(module.name, module.kind))
    ]
    if not writer.suffix or writer.foreign:
        more = [name for name in binding.tensors if not name.endswith(_EVERYWHERE)]
        problems += [f"{name}  has no place in the format" for name in more]
    if problems:
        raise SiteError(
            f"adapter '{binding.adapter}' can't be written as {format}",
            "write it as safetensors or onnx_adapter, or train it without these modules",
            problems,
        )


def _write(
    target: Path,
    write: Callable[[Path, Mapping[str, Array], Provenance], None],
    tensors: Mapping[str, Array],
    provenance: Provenance,
    folder: bool,
    force: bool,
    reads: Sequence[Path],
) -> None:
    with output_errors(target), OutputSet(force, reads) as outputs:
        write(outputs.stage(target, folder), tensors, provenance)
        outputs.commit((lambda: _check_folder(target)) if folder else None)
