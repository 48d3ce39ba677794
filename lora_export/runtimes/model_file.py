"""Read what an ONNX file or an engine says of itself, without running it or loading its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_export.engines.record import EngineRecord, is_engine, read_engine
from lora_export.graph.captured import Captured
from lora_export.graph.exposed import KEY, WEIGHTS_INPUT, LoraRecord, lora_record_of
from lora_export.graph.onnx_file import GraphFile, load_graph


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """An ONNX file or an engine by its own metadata or record.

    Attributes:
        path: Path of the file.
        content: The graph, or the engine's record.
        lora_record: The LoRA record; None for a base or merged model.
        captured: Metadata on the model that was captured; None if we did not capture it.
    """

    path: Path
    content: GraphFile | EngineRecord
    lora_record: LoraRecord | None
    captured: Captured | None

    @classmethod
    def read(cls, path: Path) -> ModelFile:
        """Read a file: an engine by its first bytes or its ending, else a graph.

        Raises:
            BackendError: The engine or its record is missing or damaged, or they don't belong together.
            GraphError: The file is missing, damaged or not an ONNX file, or its LoRA record is damaged.
        """
        if is_engine(path):
            record = read_engine(path)
            captured = Captured.from_metadata(record.metadata)
            return cls(path=path, content=record, lora_record=record.exposed, captured=captured)
        graph = load_graph(path)
        metadata = graph.model.metadata_props
        return cls(
            path=path,
            content=graph,
            lora_record=lora_record_of(metadata, str(path)) if KEY in metadata else None,
            captured=Captured.from_metadata(metadata),
        )

    @property
    def lora_inputs(self) -> frozenset[str]:
        """Names of the inputs that sessions feed: LoRA's tensors, and the rows' weights of a bank."""
        record = self.lora_record
        return frozenset({*record.input_names(), WEIGHTS_INPUT} if record else ())
