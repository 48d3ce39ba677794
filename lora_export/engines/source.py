"""The graph that an engine is built from: its inputs, outputs, metadata and files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from lora_export.engines.cache import combined
from lora_export.engines.record import EngineSource
from lora_export.graph.captured import Captured
from lora_export.graph.onnx_file import GraphFile, proto_bytes
from lora_export.graph.port import Port
from lora_export.storage.hashes import FileHash, hash_file


def ports_of(graph: GraphFile) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Return a graph's inputs (without those that are constants) and outputs."""
    constants = set(graph.graph.initializers)
    inputs = tuple(_port(value) for value in graph.graph.inputs if value.name not in constants)
    return inputs, tuple(_port(value) for value in graph.graph.outputs)


def _port(value: ir.Value) -> Port:
    port = Port.of(value)
    # TensorRT has no float64 and computes in float32; `admit` notes it.
    dtype = "float32" if port.dtype == "float64" else port.dtype
    return port_of(port.name, dtype, [-1 if dim in (None, "") else dim for dim in port.dims])


def port_of(name: str, dtype: str, dims: Sequence[int | str]) -> Port:
    """Return an input or output.

    Args:
        name: Its name.
        dtype: Its type.
        dims: Sizes and names of sizes; -1 for a size that varies and has no name, and so gets one of its own.
    """
    named = tuple(f"{name}[{axis}]" if dim == -1 else dim for axis, dim in enumerate(dims))
    return Port(name, dtype, named)


def largest_sizes(graph: GraphFile) -> dict[str, int]:
    """Return dimension → the largest size that the model takes; empty unless our capture states it.

    Raises:
        GraphError: The capture's metadata is damaged.
    """
    captured = Captured.from_metadata(graph.model.metadata_props)
    return dict(captured.largest) if captured else {}


@dataclass(frozen=True)
class Serialized:
    """A graph as the compiler gets it.

    Attributes:
        data: The protobuf.
        source: Its identity and files.
    """

    data: bytes
    source: EngineSource


def serialize(graph: GraphFile, sha256: Callable[[Path], str]) -> Serialized:
    """Return the graph's bytes, and hashes of them and of all its weights.

    Args:
        graph: The graph.
        sha256: Function that returns a file's hash.

    Raises:
        GraphError: With weights that were rewritten for the compiler, the graph exceeds 2 GB.
    """
    data = proto_bytes(graph.model)
    hashes = [sha256(path) for path in sorted(graph.data_files())]
    identity = combined([hashlib.sha256(data).hexdigest(), *hashes])
    source = EngineSource(graph.path.name, identity, tuple(graph_hashes(graph)))
    return Serialized(data, source)


def graph_hashes(graph: GraphFile) -> list[FileHash]:
    """Return the hashes of a graph's file and of its data files."""
    return [hash_file(path) for path in (graph.path, *sorted(graph.data_files()))]
