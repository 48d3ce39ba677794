"""Write the graphs of a pipeline or of a model that becomes several, without any adapter."""

from __future__ import annotations

from pathlib import Path

from lora_export import __version__
from lora_export.base.capture.capture import capture_checkpoint
from lora_export.base.pipeline_graphs import Pipeline, PipelineGraph
from lora_export.modes.pipelines.folder import check_output, write_folder
from lora_export.plan import Plan
from lora_export.storage.hashes import hash_file
from lora_export.storage.manifest import Manifest


def capture_pipeline(
    pipeline: Pipeline, output: Path, dtype: str, *, fused: bool, force: bool, proven: bool
) -> tuple[Path, ...]:
    """Write a folder of graphs and return their paths.

    Args:
        pipeline: The base.
        output: The folder to write.
        dtype: Dtype of weights, inputs and outputs.
        fused: Write attention as one node.
        force: Replace a folder that an earlier run has written.
        proven: Compare each graph with PyTorch before it is written.

    Raises:
        LoraExportError: As `capture.capture_checkpoint`; `OutputError` if the folder exists or is named as a
            graph.
    """
    reads = pipeline.files
    check_output(pipeline, output, force=force, reads=reads)

    def write_graph(graph: PipelineGraph, path: Path) -> None:
        capture_checkpoint(graph.folder, path, dtype=dtype, part=graph.part, fused=fused, proven=proven)

    def manifest() -> Manifest:
        return Manifest(
            mode="capture-onnx",
            base=[hash_file(path) for path in reads if path.suffix == ".safetensors"],
            adapters=[],
            plan=Plan(notes=pipeline.notes).as_dict(),
            rounding={},
            outputs={"graphs": pipeline.places},
            versions={"lora-export": __version__},
        )

    write_folder(pipeline, output, force=force, reads=reads, write_graph=write_graph, manifest=manifest)
    return tuple(output / graph.file for graph in pipeline.graphs)
