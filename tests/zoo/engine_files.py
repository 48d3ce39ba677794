"""Engines for tests: files that the stand-in for TensorRT opens, with records as `build_engine`'s."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import recording_trt
from recording_cuda import RecordingCuda

from lora_export.engines import BACKENDS, compiler_of
from lora_export.engines.record import BuildOptions, EngineRecord, EngineSource, Profile, record_path
from lora_export.engines.source import ports_of, serialize
from lora_export.graph.exposed import KEY, ExposedModule, LoraRecord, Member, Slot
from lora_export.graph.onnx_file import load_graph
from lora_export.graph.port import Port
from lora_export.runtimes.tensorrt.cuda import CudaDevice
from lora_export.storage.hashes import FileHash, sha256_of

RANKS, OTHERS = (1, 4, 8), (1, 2, 16)


@pytest.fixture
def machine(monkeypatch):
    """A machine with an RTX 4090, TensorRT-RTX and classic TensorRT, all of it stand-ins."""
    world = recording_trt.World(RecordingCuda())
    recording_trt.enter(world)
    cuda = ModuleType("cuda.bindings")
    cuda.runtime, cuda.__spec__ = world.cuda, ModuleSpec("cuda.bindings", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", cuda)
    for backend in BACKENDS:
        compiler = type(compiler_of(backend))
        monkeypatch.setattr(compiler, "load", lambda self: recording_trt.package(self.package))
        monkeypatch.setattr(compiler, "version", lambda self: "1.7.1.116")
    return world


class RealMemory:
    """What the stand-in for TensorRT wants of CUDA, of a real GPU: it computes while the stream waits."""

    def __init__(self):
        self._device = CudaDevice()

    def queue(self, stream, work):
        self._device.call("wait", "cudaStreamSynchronize", stream)
        work()

    def is_capturing(self, stream):
        return False

    def read(self, address, nbytes):
        values = np.empty(nbytes, np.uint8)
        self._device.download(values, address, self._device.copies)
        self._device.copies.synchronize()
        return values

    def write(self, address, values):
        self._device.upload(address, np.ascontiguousarray(values), self._device.copies)
        self._device.copies.synchronize()


@pytest.fixture
def gpu_machine(monkeypatch):
    """A real GPU, with a stand-in for classic TensorRT."""
    recording_trt.enter(recording_trt.World(RealMemory()))
    compiler = type(compiler_of("tensorrt"))
    monkeypatch.setattr(compiler, "load", lambda self: recording_trt.package(self.package))
    monkeypatch.setattr(compiler, "version", lambda self: "1.7.1.116")


def engine_of(
    onnx: Path,
    folder: Path | None = None,
    *,
    profiles: Mapping[str, Mapping[str, tuple[Any, ...]]] | None = None,
    joined: list[list[str]] | None = None,
    stripped: bool = False,
    **fields: Any,
) -> Path:
    """Write an engine of a graph with its record.

    Args:
        onnx: The graph.
        folder: Where to; by default beside the graph.
        profiles: Profile → input → shapes that differ from the usual: ranks 1–8, other sizes 1–16.
        joined: Weights that the compiler is to have joined, for refits.
        stripped: It holds no weights.
        fields: Fields of the record that are to be different.
    """
    graph = load_graph(onnx)
    inputs, outputs = ports_of(graph)
    metadata = graph.model.metadata_props
    made = tuple(
        Profile(name, {port.name: _shapes(port) for port in inputs if -1 in port.shape} | dict(own))
        for name, own in (profiles or {"default": {}}).items()
    )
    about = {
        "onnx": str(onnx.resolve()),
        "inputs": [dataclasses.asdict(port) for port in inputs],
        "outputs": [dataclasses.asdict(port) for port in outputs],
        "profiles": [dict(profile.shapes) for profile in made],
        "joined": joined or [],
        "stripped": stripped,
    }
    backend = fields.get("backend", "tensorrt-rtx")
    path = (folder or onnx.parent) / f"{onnx.stem}.rtx-4090.engine"
    path.parent.mkdir(parents=True, exist_ok=True)
    magic = b"vtrt" if backend == "tensorrt-rtx" else b"ftrt"
    path.write_bytes(magic + json.dumps(about).encode())
    record = EngineRecord(
        name=path.name,
        sha256=sha256_of(path),
        size_bytes=path.stat().st_size,
        backend=backend,
        builder_version="1.7.1.116",
        targets=("rtx-4090",),
        compute_capabilities=("8.9",),
        platform=f"{platform.system()}-{platform.machine()}".lower(),
        options=BuildOptions(),
        inputs=inputs,
        outputs=outputs,
        profiles=made,
        source=serialize(graph, sha256_of).source,
        exposed=LoraRecord.from_json(metadata[KEY]) if KEY in metadata else None,
        metadata={key: text for key, text in metadata.items() if key != KEY},
    )
    record_path(path).write_text(dataclasses.replace(record, **fields).to_json(), encoding="utf-8")
    return path


def _shapes(port):
    ranges = [
        (RANKS if ".lora_" in port.name else OTHERS) if size < 0 else (size,) * 3 for size in port.shape
    ]
    return tuple(tuple(sizes[at] for sizes in ranges) for at in range(3))


def record_of(engine: Path) -> EngineRecord:
    """Return an engine's record, without a look at the engine."""
    return EngineRecord.from_json(record_path(engine).read_text(encoding="utf-8"), engine.name)


def rewrite_record(engine: Path, **fields: Any) -> None:
    """Change fields of an engine's record."""
    text = dataclasses.replace(record_of(engine), **fields).to_json()
    record_path(engine).write_text(text, encoding="utf-8")


MODULE = ExposedModule(
    name="l.q",
    kind="linear",
    in_dim=4,
    out_dim=6,
    dtype="float16",
    members=(Member(path="l.q", start=0, out_dim=6, ranks=(2,)),),
)


EXPOSED = LoraRecord(
    mode="bank",
    base="b.onnx",
    base_sha256="0" * 64,
    modules=(MODULE,),
    max_rank=8,
    slots=(Slot("a", "1"),),
    batch_input="x",
)


RECORD = EngineRecord(
    name="m.rtx-4090.engine",
    sha256="",
    size_bytes=0,
    backend="tensorrt-rtx",
    builder_version="1.7.1",
    targets=("rtx-4090",),
    compute_capabilities=("8.9",),
    platform="linux-x86_64",
    options=BuildOptions(tf32=True, workspace_bytes=7),
    inputs=(Port("x", "int64", ("batch", 4)), Port("l.q.lora_A.weight", "float16", (4, 2))),
    outputs=(Port("y", "float16", ("batch",)),),
    profiles=(Profile("default", {"x": ((1, 4), (2, 4), (3, 4))}),),
    source=EngineSource("m.onnx", "f" * 64, (FileHash(name="m.onnx", size_bytes=3, sha256="a" * 64),)),
    exposed=EXPOSED,
    metadata={"lora_export.dims": "{}"},
    notes=("one",),
    memory={"weights": 5},
    build_s=1.5,
    peak_build_bytes=9,
)
