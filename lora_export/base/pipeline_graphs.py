"""Read which graphs a pipeline of diffusers becomes, and which of its parts stay files as they are.

The folders of graphs have the names of optimum's ONNX pipelines: ``unet``, ``transformer``, ``text_encoder``,
``vae_decoder``, ``vae_encoder`` with a ``model.onnx`` each, beside ``tokenizer``, ``scheduler`` and
``model_index.json``: https://github.com/huggingface/optimum-onnx
``optimum/onnxruntime/modeling_diffusion.py``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_export.base.capture.export import require
from lora_export.base.checkpoint.checkpoint import Checkpoint, read_config
from lora_export.base.checkpoint.own_code import model_class
from lora_export.base.checkpoint.quantised import refuse_packed
from lora_export.base.history.history import MANIFEST
from lora_export.base.kinds import DIFFUSERS
from lora_export.base.kinds.vision_language import TEXT_ALONE, is_vision_language, whole_only, why_whole
from lora_export.base.parts import OF_ONE_MODEL, VISION_LANGUAGE, Part
from lora_export.base.pipeline import INDEX
from lora_export.errors import CheckpointError, LoraExportError, OutputError
from lora_export.storage.inputs import note_inputs
from lora_export.untrusted.documents import read_json
from lora_export.untrusted.fields import seen
from lora_export.untrusted.links import refuse_links
from lora_export.untrusted.places import is_file, is_folder, listed

_TEXT_ENCODER = re.compile(r"text_encoder(?:_\d)?")
_VAE, _VAE_CLASS = "vae", "AutoencoderKL"
_DOWNLOAD = "download the pipeline again, or save it with save_pretrained"
# Ends of files that hold weights.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx")
# Documents of tokenizers, schedulers and processors.
_DOCUMENTS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".bpe")
# The list of a model's shards is not one of its small files.
_SHARDS = ".index.json"
_GRAPH = "model.onnx"
# Tokenizers of large vocabularies have 30 MB.
_COPIED_BYTES = 64 << 20


@dataclass(frozen=True)
class PipelineGraph:
    """A graph that a folder becomes one of several of.

    Attributes:
        name: Its folder in the output, or, of a part of one model, its file without the ending.
        component: Component of the pipeline that it is made from.
        folder: The component's folder.
        part: Use of the model, if its graph differs for it.
    """

    name: str
    component: str
    folder: Path
    part: Part = ""

    @property
    def file(self) -> Path:
        """Its path in the output."""
        return Path(f"{self.name}.onnx") if self.part in OF_ONE_MODEL else Path(self.name, _GRAPH)

    @property
    def takes_adapters(self) -> bool:
        """True if an adapter for the component changes this graph: trainers leave autoencoders alone."""
        return self.component != _VAE


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A folder of which several graphs are made: a pipeline's, or that of a model of several parts.

    Attributes:
        folder: The folder.
        index: Its ``model_index.json``, without the components that are left out; empty if it is one model.
        graphs: The graphs that it becomes.
        copied: Files that are copied, by their paths in the pipeline.
        notes: Notes on what is left out.
    """

    folder: Path
    index: Mapping[str, Any]
    graphs: tuple[PipelineGraph, ...]
    copied: tuple[Path, ...]
    notes: tuple[str, ...] = ()

    @property
    def described(self) -> str:
        """Sentence on why it is not one graph."""
        if self.index:
            return f"{self.folder} is a pipeline of several models"
        if self.graphs[0].part in VISION_LANGUAGE:
            return f"{self.folder} becomes three graphs with --kv-cache, of vision, embedding and text"
        return f"{self.folder} becomes two graphs with --kv-cache, an encoder's and a decoder's"

    def refuse_options(self, flags: Mapping[str, bool]) -> None:
        """Raise `OutputError` if options are given that several graphs don't have.

        Args:
            flags: Option → whether it is given.
        """
        given = " and ".join(flag for flag, is_given in flags.items() if is_given)
        if given:
            other = "give the folder of one of its models" if self.index else "--kv-cache"
            if self.graphs[0].part in VISION_LANGUAGE:
                other = TEXT_ALONE
            raise OutputError(f"{self.described}, for which there is no {given}", f"omit {given}, or {other}")

    @property
    def components(self) -> dict[str, Path]:
        """Component that adapters may be for → its folder."""
        return {graph.component: graph.folder for graph in self.graphs if graph.takes_adapters}

    @property
    def places(self) -> dict[str, str]:
        """Name of each graph → its path in the output."""
        return {graph.name: graph.file.as_posix() for graph in self.graphs}

    @property
    def files(self) -> list[Path]:
        """All files that are read, but the weights' of components that are left out."""
        folders = dict.fromkeys(graph.folder for graph in self.graphs)
        own = [path for folder in folders for path in listed(folder) if is_file(path)]
        index = [self.folder / INDEX] if self.index else []
        return list(dict.fromkeys([*index, *own, *(self.folder / path for path in self.copied)]))


def open_several(folder: Path, kv_cache: bool, output: Path) -> Pipeline | None:
    """Return the graphs of a folder that becomes several; None if it becomes one.

    Args:
        folder: A pipeline of diffusers, or another folder or file.
        kv_cache: As for `open_parts`.
        output: As for `open_parts`.

    Raises:
        CheckpointError: As `open_pipeline`.
        OutputError: As `open_parts`.
        BackendUnavailable: torch or transformers is missing.
    """
    if is_pipeline(folder):
        return open_pipeline(folder)
    return open_parts(folder, kv_cache, output)


def open_parts(folder: Path, kv_cache: bool, output: Path) -> Pipeline | None:
    """Return the graphs of a model that generates text and becomes several; None if it becomes one.

    Args:
        folder: A folder, or a file.
        kv_cache: True if it is captured with its cache: an encoder–decoder becomes two graphs.
        output: The output: a vision–language model becomes three graphs, if that is named as a folder, and
            its language model's alone, if it is named as a graph.

    Raises:
        CheckpointError: The folder can't be read, or can't become the three.
        OutputError: A folder of three is wanted without the cache.
        BackendUnavailable: torch or transformers is missing.
    """
    is_one_graph = output.suffix == ".onnx"
    if not is_folder(folder) or (is_one_graph and not kv_cache):
        return None
    config = read_config(folder)
    kinds = [kind for kind in _generating(config) if kv_cache or is_vision_language(kind)]
    if not kinds:
        return None
    if config.get("is_encoder_decoder") is True:
        return _parts(folder, {"encoder_model": "encoder", "decoder_model": "decoder"}) if kv_cache else None
    if is_one_graph or not is_vision_language(kinds[0]):
        return None
    parts: dict[str, Part] = {"vision": "vision", "embedding": "embedding", "text": "text"}
    graphs = _parts(folder, parts)
    if not kv_cache:
        raise OutputError(
            f"{graphs.described}, and without it the output is one graph", f"give --kv-cache, or {TEXT_ALONE}"
        )
    if reason := why_whole(kinds[0]):
        raise whole_only(folder, kinds[0].__name__, reason)
    return graphs


def _generating(config: Mapping[str, Any]) -> list[Any]:
    """Return the classes of a config that generate text, if it may be that of a model of several parts."""
    names = config.get("architectures")
    is_of_parts = config.get("is_encoder_decoder") is True or "vision_config" in config
    if not is_of_parts or not isinstance(names, list):
        return []
    require("torch", "transformers")
    found = [_class(name) for name in names if isinstance(name, str)]
    return [kind for kind in found if kind is not None and kind.can_generate()]


def _class(name: str) -> Any:
    try:
        return model_class(name)
    except ImportError:  # of a package that the class needs: said when it is loaded
        return None


def _parts(folder: Path, parts: Mapping[str, Part]) -> Pipeline:
    """Return the graphs of one model.

    Args:
        folder: Its folder.
        parts: Name of each graph → its part of the model.
    """
    refuse_packed(folder)
    files = [
        path.relative_to(folder)
        for path in _seen_files(folder)
        if path.suffix in _DOCUMENTS
        and not path.name.endswith(_SHARDS)
        and path.name != MANIFEST
        and path.stat().st_size <= _COPIED_BYTES
    ]
    graphs = tuple(PipelineGraph(name, "", folder, part) for name, part in parts.items())
    pipeline = Pipeline(folder=folder, index={}, graphs=graphs, copied=tuple(files))
    refuse_links(folder, pipeline.files, CheckpointError)
    note_inputs(pipeline.files)
    return pipeline


def is_pipeline(folder: Path) -> bool:
    """Return whether a folder is that of a pipeline."""
    return is_folder(folder) and is_file(folder / INDEX)


def open_pipeline(folder: Path) -> Pipeline:
    """Read a pipeline's index and the headers of its weights.

    Raises:
        CheckpointError: Components are missing, damaged, or can't be captured; all of them are listed.
    """
    note_inputs([folder / INDEX])
    index = _read_index(folder)
    reading = _Reading(folder=folder)
    for name, entry in index.items():
        if isinstance(entry, list):
            reading.add(name, entry)
    for name, count in Counter(graph.name for graph in reading.graphs).items():
        if count > 1:
            owners = " and ".join(graph.component for graph in reading.graphs if graph.name == name)
            reading.problems.append(f"{owners}: the folder of its graph, {name}, is another's")
    if not any(graph.component != _VAE and not graph.part for graph in reading.graphs):
        found = ", ".join(f"{name} ({index[name][1]})" for name in reading.left_out)
        wanted = ", ".join(name for name in DIFFUSERS if name != _VAE_CLASS)
        reading.problems.append(f"no denoiser among its models ({found or 'none'}), wanted one of {wanted}")
    reading.problems += _damaged(reading.graphs)
    if reading.problems:
        raise CheckpointError(
            f"the diffusers pipeline {folder} can't be captured", _DOWNLOAD, reading.problems
        )
    kept = {name: [None, None] if name in reading.left_out else value for name, value in index.items()}
    notes = [f"left out, as no graph is made from it: {name}" for name in reading.left_out]
    notes += [f"left out, as it is not a document: {name}" for name in reading.not_copied]
    pipeline = Pipeline(
        folder=folder,
        index=kept,
        graphs=tuple(reading.graphs),
        copied=tuple(reading.copied),
        notes=tuple(notes),
    )
    refuse_links(folder, pipeline.files, CheckpointError)
    note_inputs(pipeline.files)
    return pipeline


def _read_index(folder: Path) -> dict[str, Any]:
    """Return a pipeline's index, which names a class of diffusers."""
    file = folder / INDEX
    index = read_json(file, CheckpointError, _DOWNLOAD, given=folder)
    if not isinstance(index, dict):
        raise CheckpointError(f"{file} holds {type(index).__name__}, not an object", _DOWNLOAD)
    if not isinstance(index.get("_class_name"), str):
        raise CheckpointError(
            f"{file}: _class_name is {seen(index.get('_class_name'))}, wanted the name of a class of "
            "diffusers (code of a pipeline's own is never run)",
            "capture its components one by one: give their folders",
        )
    return index


@dataclass(kw_only=True)
class _Reading:
    """Components of a pipeline, sorted by what becomes of them."""

    folder: Path
    graphs: list[PipelineGraph] = field(default_factory=list)
    copied: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    not_copied: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, name: str, entry: list[Any]) -> None:
        """Sort an entry of the index: library and class, both null for a component that is not there."""
        place = self.folder / name
        match entry:
            case [None, None]:
                return
            case [str() as library, str() as kind]:
                pass
            case _:
                self.problems.append(f"{INDEX}: {name} is {seen(entry)}, wanted library and class")
                return
        if Path(name).name != name or name in (INDEX, MANIFEST) or not is_folder(place):
            self.problems.append(f"{name} ({kind}): no folder of it")
        elif library == "diffusers" and kind == _VAE_CLASS and name == _VAE:
            self.graphs.append(PipelineGraph("vae_decoder", name, place))
            self.graphs.append(PipelineGraph("vae_encoder", name, place, "vae-encoder"))
        elif library == "diffusers" and kind in DIFFUSERS and kind != _VAE_CLASS:
            self.graphs.append(PipelineGraph(name, name, place))
        elif _TEXT_ENCODER.fullmatch(name):
            if library == "transformers":
                self.graphs.append(PipelineGraph(name, name, place, "prompt"))
            else:
                self.problems.append(f"{name} ({library}.{kind}): not a model of transformers")
        else:
            self._copy(name, place)

    def _copy(self, name: str, place: Path) -> None:
        """Keep the files of a component without weights: a tokenizer, a scheduler."""
        files = _seen_files(place)
        if any(path.suffix in _WEIGHTS for path in files):
            self.left_out.append(name)
            return
        large = [path for path in files if path.stat().st_size > _COPIED_BYTES]
        self.problems += [f"{path}: more than {_COPIED_BYTES} bytes" for path in large]
        # Code is not needed for a class of a library, and nobody should be asked to run it.
        self.copied += [path.relative_to(self.folder) for path in files if path.suffix in _DOCUMENTS]
        self.not_copied += [f"{name}/{path.name}" for path in files if path.suffix not in _DOCUMENTS]


def _seen_files(folder: Path) -> list[Path]:
    return [path for path in listed(folder) if is_file(path) and not path.name.startswith(".")]


def _damaged(graphs: list[PipelineGraph]) -> Iterator[str]:
    """Yield the problems of the weights of components."""
    for folder in dict.fromkeys(graph.folder for graph in graphs):
        try:
            Checkpoint.open(folder)
        except LoraExportError as error:
            yield from (f"{folder.name}: {line}" for line in (error.problems or (error.message,)))
