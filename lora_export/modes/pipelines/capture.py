"""Write the graphs of a pipeline, without any adapter."""

from __future__ import annotations

from pathlib import Path

from lora_export import __version__
from lora_export.base.capture.capture import capture_checkpoint
from lora_export.base.pipeline_graphs import PipelineGraph, open_pipeline
from lora_export.modes.pipelines.folder import GRAPH, check_output, write_folder
from lora_export.plan import Plan
from lora_export.storage.hashes import hash_file
from lora_export.storage.manifest import Manifest


def capture_pipeline(
    folder: Path, output: Path, dtype: str, *, force: bool, proven: bool
) -> tuple[Path, ...]:
    """Write a folder of graphs and return their paths.

    Args:
        folder: Folder of a pipeline.
        output: The folder to write.
        dtype: Dtype of weights, inputs and outputs.
        force: Replace a folder that an earlier run has written.
        proven: Compare each graph with PyTorch before it is written.

    Raises:
        LoraExportError: As `capture.capture_checkpoint`; `CheckpointError` if the pipeline lacks a part;
            `OutputError` if the folder exists or is named as a graph.
    """
    pipeline = open_pipeline(folder)
    reads = pipeline.files
    check_output(pipeline, output, force=force, reads=reads)

    def write_graph(graph: PipelineGraph, path: Path) -> None:
        capture_checkpoint(graph.folder, path, dtype=dtype, part=graph.part, proven=proven)

    def manifest() -> Manifest:
        return Manifest(
            mode="capture-onnx",
            base=[hash_file(path) for path in reads if path.suffix == ".safetensors"],
            adapters=[],
            plan=Plan(notes=pipeline.notes).as_dict(),
            rounding={},
            outputs={"graphs": {graph.name: f"{graph.name}/{GRAPH}" for graph in pipeline.graphs}},
            versions={"lora-export": __version__},
        )

    write_folder(pipeline, output, force=force, reads=reads, write_graph=write_graph, manifest=manifest)
    return tuple(output / graph.name / GRAPH for graph in pipeline.graphs)
