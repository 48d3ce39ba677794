"""The base graph of a mode: loaded or captured, with what its weights may be compared with and shared with.

Also the names of what is written for it: a graph, its data, a manifest.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lora_export.adapter import Adapter
from lora_export.errors import GraphError, OutputError
from lora_export.graph import GraphFile, load_graph
from lora_export.manifest import FileHash, hash_file, identity_of
from lora_export.output import refuse_replacing
from lora_export.sites.target import BaseWeights


@dataclass(frozen=True, eq=False)
class Base:
    """A base graph.

    Attributes:
        graph: The graph.
        weight_of: The checkpoint's weights, where there is one.
        shared_files: Data files in which unchanged weights may stay.
        files: What it was read from.
    """

    graph: GraphFile
    weight_of: BaseWeights | None
    shared_files: set[Path]
    files: list[Path]

    @cached_property
    def hashes(self) -> dict[Path, FileHash]:
        """Each file's identity; read once, as a base is large."""
        return {path: hash_file(path) for path in self.files}

    @property
    def identity(self) -> str:
        """One SHA-256 for the base as a whole."""
        return identity_of(self.hashes.values())


@contextlib.contextmanager
def open_base(
    base: Path,
    out: Path,
    adapters: Collection[Adapter],
    *,
    checkpoint: str | os.PathLike[str] | None,
    share_base: bool,
    force: bool,
    dry_run: bool,
    allow_unmatched: bool = False,
    dtype: str | None = None,
    kv_cache: bool = False,
    prepare: Callable[[Path], Path] | None = None,
) -> Iterator[tuple[Base, dict[str, Path]]]:
    """Load a graph, or capture a checkpoint folder; yield it with the files to write.

    Args:
        base: An ONNX file or a Hugging Face folder.
        out: The graph to write.
        adapters: What is read besides: no output may replace it, and what they replace a folder may lack.
        checkpoint: The folder that an ONNX file was exported from.
        share_base: Unchanged weights are to stay in the base's files.
        force: Existing outputs may be replaced.
        dry_run: Nothing will be written.
        allow_unmatched: What has no place will be left out.
        dtype: To capture a folder in; float32 if left out.
        kv_cache: Capture it with its key-value cache.
        prepare: Makes the folder to capture in the base's place, in a temporary one.

    Raises:
        GraphError: The graph can't be read, or is to be captured in a dtype or with a cache.
        CheckpointError: The folder can't be read or captured.
        AdapterError: An adapter is not for the folder: seen before the capture, by names alone.
        SiteError: Some of an adapter is not in the folder.
        OutputError: An output exists or would replace what is read, or there is nothing to share.
    """
    paths = output_paths(out)
    refuse_overlap([base, *(Path(adapter.source) for adapter in adapters)], paths)
    if not dry_run:
        refuse_replacing(list(paths.values()), force)
    # A capture is as large as the base: it goes where the output will have room, not to a small /tmp.
    place = out.parent if base.is_dir() and out.parent.is_dir() else None
    with tempfile.TemporaryDirectory(prefix=".lora-export-", dir=place) as scratch:
        if base.is_dir():
            from lora_export.capture import capture_checkpoint
            from lora_export.checkpoint_merge import refuse_absent

            refuse_absent(base, list(adapters), allow_unmatched)
            source, captured = prepare(Path(scratch)) if prepare else base, Path(scratch) / "base.onnx"
            capture_checkpoint(
                source,
                captured,
                dtype=dtype or "float32",
                kv_cache=kv_cache,
                replaced=[] if prepare else [name for adapter in adapters for name in adapter.extras],
            )
            graph = load_graph(captured)
        else:
            graph = load_graph(base)
            _refuse_capturing(base, dtype, kv_cache)
        opened = _opened(base, graph, checkpoint, share_base)
        refuse_overlap(opened.files, paths)
        yield opened, paths


def _refuse_capturing(base: Path, dtype: str | None, kv_cache: bool) -> None:
    given = ["--dtype"] * (dtype is not None) + ["--kv-cache"] * kv_cache
    if given:
        raise GraphError(
            f"{base} is a graph already: {' and '.join(given)} can't change its dtype and cache",
            f"give the checkpoint folder that it comes from as --base, or leave out {' and '.join(given)}",
        )


def _opened(base: Path, graph: GraphFile, checkpoint: str | os.PathLike[str] | None, share: bool) -> Base:
    data_files = graph.data_files()
    if share and not data_files:
        raise OutputError(
            f"{base} has no weights in files of their own: nothing can be shared",
            "leave out --share-base, or save the base with external data first",
        )
    folder = base if base.is_dir() and checkpoint is None else checkpoint
    if folder is None:
        return Base(graph, None, data_files if share else set(), _base_files(base, graph))
    from lora_export.canonical import CheckpointWeights, link_weights
    from lora_export.checkpoint import Checkpoint

    opened = Checkpoint.open(Path(folder))
    shared = set()
    if share:
        shared = link_weights(graph, opened) if base.is_dir() else data_files
    return Base(graph, CheckpointWeights(opened), shared, _base_files(base, graph))


def refuse_overlap(base_files: Sequence[Path], targets: Mapping[str, Path]) -> None:
    """Raise `OutputError` where an output would replace what is read."""
    inputs = {path.resolve() for path in base_files}
    both = [str(path) for path in targets.values() if path.resolve() in inputs]
    if both:
        raise OutputError("the output would replace what is read", "choose another name", both)


def output_paths(out: Path) -> dict[str, Path]:
    """Return the files that belong to an output graph, the graph last: it appears when the rest is there.

    Raises:
        OutputError: The name does not end in ``.onnx``.
    """
    if out.suffix != ".onnx":
        raise OutputError(f"the output {out} does not end in .onnx", f"-o {out / 'model.onnx'}")
    return {
        "data": out.with_name(out.name + ".data"),
        "manifest": out.with_suffix(".lora.json"),
        "graph": out,
    }


def drop_dead(graph: GraphFile) -> None:
    """Remove constants that nothing reads after copies took over."""
    for owner in graph.graphs():
        inputs = {id(value) for value in owner.inputs}
        for name, value in list(owner.initializers.items()):
            if not value.uses() and not value.is_graph_output() and id(value) not in inputs:
                owner.initializers.pop(name)


def _base_files(base: Path, graph: GraphFile) -> list[Path]:
    if base.is_dir():
        return sorted([*base.glob("*.safetensors"), *base.glob("config.json")])
    return [base, *sorted(graph.data_files())]
