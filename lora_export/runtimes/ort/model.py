"""Open a graph with exposed LoRA in ONNX Runtime, describe it, check its feeds and run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_export.adapter import Array
from lora_export.binding.base_weights import GraphWeights, WeightOf
from lora_export.errors import BackendError, GraphError
from lora_export.graph.captured import Captured
from lora_export.graph.exposed import WEIGHTS_INPUT, LoraRecord, lora_record_of
from lora_export.graph.exposed_inputs import size_problems
from lora_export.graph.onnx_file import load_graph
from lora_export.graph.unused_inputs import unused_modules
from lora_export.runtimes.feeds import Feeds, check_feeds, choose_outputs
from lora_export.runtimes.ort.cuda_graphs import CudaGraphs
from lora_export.runtimes.ort.device import DTYPES, DeviceMemory, OrtValue, Provider, host_value
from lora_export.runtimes.ort.mapped import MappedFiles
from lora_export.runtimes.ort.open import open_session
from lora_export.runtimes.ort.padding import padding_problem
from lora_export.runtimes.ort.resident import Resident
from lora_export.storage.inputs import same_inputs
from lora_export.untrusted.places import is_file
from lora_export.untrusted.shown import limited

# Largest number of inputs with wrong sizes that are listed: mostly all inputs of a graph have them.
_SHOWN = 5


@dataclass(frozen=True)
class OrtInput:
    """An input of the graph.

    Attributes:
        name: Name of the input.
        type: ONNX Runtime's name of the type, ``tensor(float)``.
        shape: Size, name of a symbol, or None, for each axis.
        required: True if it has no default in the graph.
    """

    name: str
    type: str
    shape: tuple[int | str | None, ...]
    required: bool

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """The dtype that an array for it must have; None if that is not checked."""
        return DTYPES.get(self.type)


class OrtModel:
    """The opened graph.

    Attributes:
        path: Path of the file.
        session: The `onnxruntime.InferenceSession`.
        memory: Memory of the device.
        graphs: Captured CUDA graphs; None if runs are not captured.
        record: The graph's LoRA record.
        unused: `ExposedModule.name` of those whose tensors change no output.
        inputs: Inputs that a request feeds, by name: all except LoRA's.
        lora: LoRA's inputs by name.
        outputs: Names of the outputs in the graph's order.
    """

    def __init__(
        self,
        path: Path,
        provider: Provider,
        threads: int | None = None,
        cuda_graphs: int = 0,
        session_options: Any = None,
        device_id: int = 0,
    ) -> None:
        if not is_file(path):
            raise GraphError(f"no ONNX file at {path}", "check the path")
        self.path = path
        self.memory = DeviceMemory(provider, device_id)
        with same_inputs(at_end=True) as inputs:
            self.session = open_session(
                path,
                self.memory,
                threads=threads,
                cuda_graph=cuda_graphs > 0,
                session_options=session_options,
            )
            self._open_record(path)
            self._files = tuple(inputs.states.values())
        # The graph itself is read; and on a GPU the weights are copies.
        data = [state for state in self._files if state.path != path.absolute()]
        self._mapped = MappedFiles(data if provider == "cpu" else ())
        self.graphs = CudaGraphs(self.session, self.memory, cuda_graphs) if cuda_graphs else None

    def _open_record(self, path: Path) -> None:
        """Read what the graph says of its LoRA tensors, and compare it with the graph."""
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.record = lora_record_of(metadata, str(path))
        captured = Captured.from_metadata(metadata)
        self._is_right = captured is not None and captured.padding == "right"
        ports = {
            port.name: OrtInput(port.name, port.type, tuple(port.shape), required)
            for listed, required in (
                (self.session.get_inputs(), True),
                (self.session.get_overridable_initializers(), False),
            )
            for port in listed
        }
        lora = self.record.input_names()
        self.lora = {name: ports[name] for name in lora if name in ports}
        self.inputs = {name: port for name, port in ports.items() if name not in self.lora}
        self.outputs = [output.name for output in self.session.get_outputs()]
        _check_record(self.record, ports, path)
        self.unused = unused_modules(load_graph(path).graph, self.record)

    @property
    def weight_of(self) -> WeightOf:
        """The graph's constants; opened again for each use, so that an idle session holds none."""
        return GraphWeights(self.path, opened=self._files)

    def choose_outputs(self, names: Sequence[str] | None) -> Sequence[str]:
        """Return the outputs to compute: all, or the requested ones.

        Raises:
            BackendError: The graph lacks a requested output.
        """
        return choose_outputs(self.path, self.outputs, names)

    def check_feeds(self, feeds: Mapping[str, Array | OrtValue]) -> Feeds:
        """Return the feeds as they are bound.

        Raises:
            BackendError: Inputs missing, unknown or of another dtype, all of them listed; or rows that are
                padded as the graph does not take them.
        """
        check_feeds(self.path, feeds, inputs=self.inputs, lora=self.lora, type_problem=self._type_problem)
        if self._is_right and (problem := padding_problem(feeds)):
            raise BackendError(
                f"{self.path.name} takes rows that are padded on the right only, in a prompt",
                "pad on the right, and count each row's tokens; or capture the checkpoint with --runtime "
                "portable (runtime='portable')",
                [problem],
            )
        return [(name, _as_bound(value)) for name, value in feeds.items()]

    def fitted(self, tensors: Mapping[str, Array], adapter: str) -> tuple[Mapping[str, Array], list[str]]:
        """Return an adapter's tensors unchanged: a graph takes every rank."""
        return tensors, []

    def put(self, tensors: Mapping[str, Array], beside: Resident | None = None) -> Resident:
        """Copy LoRA tensors to the device; share missing ones with ``beside``."""

        def copy() -> Resident:
            values = {name: self.memory.put(array) for name, array in tensors.items()}
            return Resident(self.session, {**(beside.tensors if beside else {}), **values})

        return self.graphs.call(copy) if self.graphs else copy()

    def run(self, resident: Resident, feeds: Feeds, outputs: Sequence[str]) -> list[Array]:
        """Run the graph and return the outputs' values in the requested order.

        Raises:
            BackendError: ONNX Runtime refused the inputs or failed.
            InputChangedError: Its data were written to in place since it was opened.
        """
        self._mapped.refuse_written()
        try:
            if self.graphs:
                return self.graphs.run(resident, feeds, outputs)
            return [self.memory.read(value) for value in resident.run(feeds, outputs, "cpu")]
        except Exception as error:  # ONNX Runtime's exceptions have no common class
            raise self._failed(error) from error

    def run_on_device(self, resident: Resident, feeds: Feeds, outputs: Sequence[str]) -> list[OrtValue]:
        """Run the graph and leave the outputs on the device.

        Raises:
            BackendError: As for `run`, or the session replays CUDA graphs, which overwrite their outputs.
            InputChangedError: As for `run`.
        """
        self._mapped.refuse_written()
        if self.graphs:
            raise BackendError(
                "the outputs of a CUDA graph are overwritten by the next run and can't be returned",
                "use run, or open the session with cuda_graph=False",
            )
        try:
            return resident.run(feeds, outputs, self.memory.kind, self.memory.device_id)
        except Exception as error:  # ONNX Runtime's exceptions have no common class
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> BackendError:
        return BackendError(
            f"ONNX Runtime could not run {self.path.name}: {error}",
            "compare the feeds' shapes with the graph's inputs",
            [f"{port.name}: {port.type} {list(port.shape)}" for port in self.inputs.values()],
        )

    def save_runtime_cache(self) -> None:
        """Raise `BackendError`: ONNX Runtime keeps no compiled kernels.

        Raises:
            BackendError: Always.
        """
        raise BackendError("only a TensorRT-RTX engine has a runtime cache", f"{self.path.name} is a graph")

    def close(self) -> None:
        """Do nothing: ONNX Runtime releases what it holds when the session is deleted."""

    def _type_problem(self, name: str, value: object) -> str:
        port = self.inputs[name]
        if isinstance(value, np.ndarray):
            fits = port.dtype is None or value.dtype == port.dtype
            return "" if fits else f"{value.dtype}, the graph takes {port.dtype}"
        if not hasattr(value, "data_type"):
            return f"{type(value).__name__}, wanted a numpy array or an onnxruntime.OrtValue"
        return "" if value.data_type() == port.type else f"{value.data_type()}, the graph takes {port.type}"


def _as_bound(value: Array | OrtValue) -> Array | OrtValue:
    if not isinstance(value, np.ndarray):
        return value
    values = np.asarray(value, order="C")
    return host_value(values) if values.dtype.kind == "V" else values


def _check_record(record: LoraRecord, ports: Mapping[str, OrtInput], path: Path) -> None:
    expected = record.input_names()
    if record.mode == "bank":
        expected += [WEIGHTS_INPUT, record.batch_input]
    if missing := [name or "(the batch input has no name)" for name in expected if name not in ports]:
        raise GraphError(
            f"{path}: the LoRA record names {len(missing)} inputs that the graph lacks (of {len(expected)})",
            "a tool has changed the graph since it was written; make it again with swap-onnx or bank-onnx",
            missing,
        )
    if sizes := size_problems(record, {name: port.shape for name, port in ports.items()}):
        raise GraphError(
            f"{path}: {len(sizes)} LoRA inputs have other sizes than the LoRA record states",
            "a tool has changed the graph since it was written; make it again with swap-onnx or bank-onnx",
            limited(sizes, most=_SHOWN),
        )
