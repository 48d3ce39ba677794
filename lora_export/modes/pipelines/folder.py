"""Write a folder of graphs beside the small files of its base: all of it appears at once, or none of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lora_export.base.history.history import MANIFEST
from lora_export.base.pipeline import INDEX
from lora_export.base.pipeline_graphs import Pipeline, PipelineGraph
from lora_export.errors import OutputError
from lora_export.modes.merging.output_folder import refuse_output
from lora_export.storage.hashes import hash_folder
from lora_export.storage.manifest import Manifest
from lora_export.storage.outputs import OutputSet, output_errors, refuse_inputs

_CONFIG = "config.json"


def check_output(pipeline: Pipeline, output: Path, *, force: bool, reads: Sequence[Path]) -> None:
    """Refuse an output that can't be a folder of graphs, before anything is captured.

    Args:
        pipeline: The pipeline.
        output: The folder to write.
        force: Replace a folder that an earlier run has written.
        reads: Files that are read.

    Raises:
        OutputError: The folder is named as a graph, or would replace what is read or what no run has written.
    """
    if output.suffix == ".onnx":
        raise OutputError(
            f"{pipeline.described}, and the output {output} is one graph",
            f"give a folder: -o {output.with_suffix('')}",
        )
    refuse_inputs([output], reads)
    refuse_output(output, pipeline.folder, force)


def write_folder(
    pipeline: Pipeline,
    output: Path,
    *,
    force: bool,
    reads: Sequence[Path],
    write_graph: Callable[[PipelineGraph, Path], object],
    manifest: Callable[[], Manifest],
) -> int:
    """Write the folder and return the bytes of its graphs.

    Args:
        pipeline: The pipeline.
        output: The folder to write.
        force: Replace a folder that an earlier run has written.
        reads: Files that are read.
        write_graph: Function that writes one graph.
        manifest: Function that returns the manifest, without its ``files``, when all graphs are written.

    Raises:
        OutputError: The folder exists or can't be written.
    """
    with OutputSet(force, reads) as outputs:
        staged = outputs.stage(output, folder=True)
        with output_errors(output):
            staged.mkdir()
            for graph in pipeline.graphs:
                path = staged / graph.file
                path.parent.mkdir(exist_ok=True)
                write_graph(graph, path)
                shutil.copyfile(graph.folder / _CONFIG, path.parent / _CONFIG)
            for path in pipeline.copied:
                (staged / path).parent.mkdir(exist_ok=True)
                shutil.copyfile(pipeline.folder / path, staged / path)
            if pipeline.index:
                index = json.dumps(pipeline.index, indent=2, ensure_ascii=False) + "\n"
                (staged / INDEX).write_text(index, "utf-8")
            made = replace(manifest(), files=hash_folder(staged))
            made.save(staged / MANIFEST)
        size = sum(file.size_bytes for file in made.files.values())
        outputs.commit(lambda: refuse_output(output, pipeline.folder, force))
    return size
