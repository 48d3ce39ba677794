"""Describe a model in a benchmark before it is opened: its inputs, limits, LoRA and identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from lora_export.engines.record import EngineRecord
from lora_export.errors import GraphError
from lora_export.graph.exposed import LoraRecord
from lora_export.graph.onnx_file import GraphFile
from lora_export.graph.port import Port
from lora_export.graph.told_sizes import told_sizes
from lora_export.runtimes.model_file import ModelFile
from lora_export.storage.hashes import sha256_of
from lora_export.storage.inputs import FileState, same_inputs

Kind = Literal["graph", "engine"]


@dataclass(frozen=True, kw_only=True)
class BenchModel:
    """A model in a benchmark.

    Attributes:
        path: The model's file.
        label: Name in the report: the file's name, with as much of its folder as tells it from others.
        kind: ``graph`` for ONNX Runtime, or ``engine`` for TensorRT.
        inputs: Inputs that a request has to feed, without LoRA's inputs.
        exposed: The LoRA record; None for a base or merged model.
        largest: Name of a dimension → the largest size that the model has positions for.
        vocab_size: Number of token ids, or None if unknown.
        files: The files that hold it.
        states: States of the files when they were read.
    """

    path: Path
    label: str
    kind: Kind
    inputs: tuple[Port, ...]
    exposed: LoraRecord | None = None
    largest: Mapping[str, int] = field(default_factory=dict)
    vocab_size: int | None = None
    files: tuple[Path, ...] = ()
    states: tuple[FileState, ...] = ()

    @property
    def mode(self) -> str:
        """``swap`` or ``bank``; "" for a model without exposed LoRA."""
        return self.exposed.mode if self.exposed else ""

    @property
    def takes_files(self) -> bool:
        """True if adapters can be loaded into it, which a bank of constants doesn't allow."""
        exposed = self.exposed
        return exposed is not None and (exposed.mode == "swap" or exposed.resident == "inputs")

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of a bank's slots that hold an adapter."""
        return tuple(slot.name for slot in self.exposed.slots if slot.adapter) if self.exposed else ()

    @property
    def size_bytes(self) -> int:
        """Size of its files."""
        return sum(file.stat().st_size for file in self.files)

    def sha256(self) -> dict[str, str]:
        """Return the SHA-256 of each file, by name; all of each file is read."""
        return {file.name: sha256_of(file) for file in self.files}


def read_bench_model(path: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> BenchModel:
    """Read a model of a benchmark, without loading its weights.

    Args:
        path: The file.
        shapes: Sizes that a graph leaves open, by the user, see `graph.told_sizes`.

    Raises:
        GraphError: The file is not an ONNX file, is damaged, or has inputs that are not tensors.
        BackendError: The file is not an engine, or has no record.
        InputChangedError: The file changed while it was read.
    """
    with same_inputs(at_end=True) as inputs:
        file = ModelFile.read(path)
        content = file.content
        if isinstance(content, EngineRecord):
            found = _of_engine(file, content)
        else:
            found = _with_told(_of_graph(file, content), shapes or {})
        return replace(found, states=tuple(inputs.states.values()))


def _with_told(model: BenchModel, shapes: Mapping[str, tuple[int, ...]]) -> BenchModel:
    """Return a graph with the sizes that are told of it.

    Raises:
        BackendError: They don't fit the graph, or the config beside it is needed and damaged.
    """
    ports = [(port.name, port.dims) for port in model.inputs]
    told = told_sizes(model.path, ports, shapes)
    told.refuse_unknown(ports)
    inputs = tuple(replace(port, dims=told.dims(port.name, port.dims)) for port in model.inputs)
    return replace(model, inputs=inputs, vocab_size=model.vocab_size or told.vocab_size)


def label_models(models: Sequence[BenchModel]) -> list[BenchModel]:
    """Return the models with distinct labels: equal file names get parts of their folders, or a number."""
    labels = [model.path.name for model in models]
    resolved = [model.path.resolve().parts for model in models]
    for depth in range(2, max(map(len, resolved), default=0) + 1):
        if len(set(labels)) == len(set(resolved)):
            break
        labels = [
            "/".join(parts[-depth:]) if labels.count(label) > 1 else label
            for label, parts in zip(labels, resolved, strict=True)
        ]
    seen: dict[str, int] = {}
    for number, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        labels[number] = label if seen[label] == 1 else f"{label} #{seen[label]}"
    return [replace(model, label=label) for model, label in zip(models, labels, strict=True)]


def _of_graph(file: ModelFile, graph: GraphFile) -> BenchModel:
    defaults = set(graph.graph.initializers)
    inputs, problems = [], []
    for value in graph.graph.inputs:
        name = str(value.name)
        if name in file.lora_inputs or name in defaults:
            continue
        if value.dtype is None or value.shape is None:
            problems.append(f"{name}: a tensor of unknown type or rank, or not a tensor")
            continue
        if (port := Port.of(value)).dtype == "object":
            problems.append(f"{name}: texts, for which no values are made")
        inputs.append(port)
    if problems:
        raise GraphError(
            f"{file.path}: no feeds can be made for these inputs",
            "export it with tensors of a known type and rank as inputs",
            problems,
        )
    return _model(file, inputs, sorted(graph.data_files()))


def _of_engine(file: ModelFile, record: EngineRecord) -> BenchModel:
    return _model(file, [port for port in record.inputs if port.name not in file.lora_inputs])


def _model(file: ModelFile, inputs: Sequence[Port], data: Sequence[Path] = ()) -> BenchModel:
    captured = file.captured
    return BenchModel(
        path=file.path,
        label=file.path.name,
        kind="engine" if isinstance(file.content, EngineRecord) else "graph",
        inputs=tuple(inputs),
        exposed=file.lora_record,
        largest=captured.largest if captured else {},
        vocab_size=captured.vocab_size if captured else None,
        files=(file.path, *data),
    )
