"""Open engines of TensorRT-RTX and classic TensorRT for running: `EngineModel`, with LoRA `TensorRTModel`.

Both packages have the same API. Tests check the used part of it against both packages' bindings; we have
never run classic TensorRT, nor TensorRT-RTX on the machines that this was written on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from lora_export.adapter import Array
from lora_export.base.reads import graph_files
from lora_export.binding.base_weights import GraphWeights, WeightOf
from lora_export.engines.record import EngineRecord, read_engine, record_path
from lora_export.errors import AdapterError, BackendError, GraphError
from lora_export.graph.exposed import WEIGHTS_INPUT, LoraRecord
from lora_export.graph.onnx_file import load_graph
from lora_export.graph.port import Port
from lora_export.runtimes.feeds import Feeds, check_feeds, choose_outputs
from lora_export.runtimes.session_options import EngineOptions
from lora_export.runtimes.tensorrt.context import shapes_by_name
from lora_export.runtimes.tensorrt.cuda import DeviceTensor
from lora_export.runtimes.tensorrt.engine import LoadedEngine, check_source, load_engine
from lora_export.runtimes.tensorrt.runner import EngineRunner
from lora_export.runtimes.tensorrt.tensors import EngineTensors, put_together
from lora_export.storage.inputs import same_inputs
from lora_export.storage.outputs import refuse_inputs

T = TypeVar("T")


@dataclass(frozen=True)
class EngineInput:
    """An input of an engine.

    Attributes:
        port: The input in the engine record.
        required: Always True: an engine's inputs have no defaults.
    """

    port: Port
    required: bool = True

    @property
    def name(self) -> str:
        """Name of the input."""
        return self.port.name

    @property
    def type(self) -> str:
        """Type and shape of the input as text."""
        return f"{self.port.dtype} ({', '.join(map(str, self.port.dims))})"


class EngineModel:
    """An engine that is ready to run.

    Attributes:
        path: The engine's file.
        engine_record: The engine record.
        inputs: Inputs that a request feeds, by name: all except LoRA's.
        outputs: Names of the outputs in the graph's order.
    """

    def __init__(
        self, path: Path, record: EngineRecord, options: EngineOptions, refits: bool = False
    ) -> None:
        """Open an engine.

        Args:
            path: The engine's file.
            record: The engine record, see `read_engine`.
            options: Options for running it.
            refits: True if the caller writes the weights, so that the file need not hold them.

        Raises:
            BackendUnavailable: TensorRT or cuda-bindings is not installed.
            BackendError: The engine can't run here; every reason is listed.
            OutputError: The runtime cache would be written over the engine, its record or its source.
        """
        if record.options.strip_weights and not refits:
            raise BackendError(
                f"{path} was built with strip_weights and holds no weights",
                "run it with lora_export.MergedEngine, which writes them, or build without --strip-weights",
            )
        if options.source is not None:
            check_source(path, record, Path(options.source))
        if options.runtime_cache is not None:
            graph = [] if options.source is None else graph_files(load_graph(Path(options.source)))
            refuse_inputs([Path(options.runtime_cache)], [path, record_path(path), *graph])
        loaded = load_engine(path, record, options.device_id)
        self.path, self.engine_record = path, record
        self.inputs = {port.name: EngineInput(port) for port in record.inputs}
        self.outputs = [port.name for port in record.outputs]
        self._device = loaded.device
        self._runner = EngineRunner(loaded, options)

    def choose_outputs(self, names: Sequence[str] | None) -> Sequence[str]:
        """Return the outputs to read: all, or the requested ones.

        Raises:
            BackendError: The engine lacks a requested output.
        """
        return choose_outputs(self.path, self.outputs, names)

    def check_feeds(self, feeds: Mapping[str, Array | DeviceTensor]) -> Feeds:
        """Return the feeds as they are copied; the run checks their shapes.

        Raises:
            BackendError: Inputs missing, unknown or of another dtype; all of them are listed.
        """
        check_feeds(
            self.path, feeds, inputs=self.inputs, lora=self._lora_names(), type_problem=self._type_problem
        )
        return [(name, _as_copied(value)) for name, value in feeds.items()]

    def run(self, resident: EngineTensors | None, feeds: Feeds, outputs: Sequence[str]) -> list[Array]:
        """Run the engine; see `EngineRunner.run`."""
        return self._runner.run(resident, feeds, outputs)

    def run_on_device(
        self, resident: EngineTensors | None, feeds: Feeds, outputs: Sequence[str]
    ) -> list[DeviceTensor]:
        """Run the engine; see `EngineRunner.run_on_device`."""
        return self._runner.run_on_device(resident, feeds, outputs)

    def set_unusable(self, reason: str) -> None:
        """Refuse runs from now on, or allow them again if the reason is empty; call it within `alone`."""
        self._runner.unusable = reason

    def alone(self, work: Callable[[LoadedEngine], T]) -> T:
        """Call a function with the engine while nothing runs; see `EngineRunner.alone`."""
        return self._runner.alone(work)

    def save_runtime_cache(self) -> None:
        """Write the kernels compiled so far; see `EngineRunner.save_runtime_cache`."""
        self._runner.save_runtime_cache()

    def close(self) -> None:
        """Write the runtime cache and release everything; see `EngineRunner.close`."""
        self._runner.close()

    def _lora_names(self) -> Sequence[str]:
        return ()

    def _type_problem(self, name: str, value: object) -> str:
        expected = self.inputs[name].port.dtype
        if not isinstance(value, (np.ndarray, DeviceTensor)):
            return f"{type(value).__name__}, wanted a numpy array or a DeviceTensor of run_on_device"
        if isinstance(value, DeviceTensor) and value.buffer.device.device_id != self._device.device_id:
            return f"on GPU {value.buffer.device.device_id}, the engine is on GPU {self._device.device_id}"
        return "" if value.dtype == np.dtype(expected) else f"{value.dtype}, the engine takes {expected}"


class TensorRTModel(EngineModel):
    """An engine with LoRA tensors among its inputs.

    Attributes:
        record: The LoRA record of the engine's graph.
        lora: LoRA's inputs by name.
    """

    def __init__(self, path: Path, options: EngineOptions) -> None:
        """Open an engine.

        Args:
            path: The engine's file.
            options: Options for running it.

        Raises:
            BackendUnavailable: TensorRT or cuda-bindings is not installed.
            BackendError: The engine is missing or can't run here; every reason is listed.
            GraphError: The engine has no LoRA record, or lacks inputs that the LoRA record names.
        """
        with same_inputs(at_end=True) as inputs:
            engine_record = read_engine(path)
            self.record = _exposed(path, engine_record)
            super().__init__(path, engine_record, options)
            beside = (path.absolute(), record_path(path).absolute())
            # W0 is never read from the engine, only from its source.
            self._files = [state for found, state in inputs.states.items() if found not in beside]
        self.lora = {name: self.inputs.pop(name) for name in self.record.input_names()}
        self._source = None if options.source is None else Path(options.source)

    @property
    def unused(self) -> frozenset[str]:
        """None: ``build-engine`` refuses a graph that leaves a module unused."""
        return frozenset()

    @property
    def weight_of(self) -> WeightOf:
        """The base's weights, read from the graph that the engine was built from."""
        return self._no_weights if self._source is None else GraphWeights(self._source, opened=self._files)

    def fitted(self, tensors: Mapping[str, Array], adapter: str) -> tuple[Mapping[str, Array], list[str]]:
        """Return LoRA tensors in shapes that a profile takes, padded with zeros to its smallest rank.

        Raises:
            AdapterError: No profile takes them.
        """
        shapes = self._runner.shapes
        for number in shapes.chosen:
            padded = shapes.padded(number, tensors)
            if shapes.taking(shapes_by_name(padded.items())):
                grown = [name for name, values in padded.items() if values.shape != tensors[name].shape]
                note = f"{len(grown)} tensors padded with zeros to the smallest rank that the engine takes"
                return padded, [note] if grown else []
        raise AdapterError(
            f"{adapter} doesn't fit {self.path.name}: the engine was built for other ranks",
            "build the engine with a wider range of ranks: --shape rank=MIN:OPT:MAX",
            shapes.problems(shapes_by_name(tensors.items())),
        )

    def put(self, tensors: Mapping[str, Array], beside: EngineTensors | None = None) -> EngineTensors:
        """Copy LoRA tensors to the GPU; copy missing ones from ``beside``."""
        shapes = {} if beside is None else shapes_by_name(beside.tensors.items())
        shapes |= shapes_by_name(tensors.items())
        self._device.activate()
        fitting = self._runner.shapes.taking(shapes)
        return put_together(self._device, list(self.lora), arrays=tensors, beside=beside, profiles=fitting)

    def _lora_names(self) -> Sequence[str]:
        return list(self.lora)

    def _no_weights(self, name: str) -> Array:
        raise AdapterError(
            f"the adapter needs the base's weight {name}, which {self.path.name}, an engine, can't provide",
            "give source=, the ONNX graph that the engine was built from; or convert the adapter for that "
            "graph with convert-adapter, and load the converted file",
        )


def _as_copied(value: Array | DeviceTensor) -> Array | DeviceTensor:
    return np.asarray(value, order="C") if isinstance(value, np.ndarray) else value


def _exposed(path: Path, record: EngineRecord) -> LoraRecord:
    exposed = record.exposed
    if exposed is None:
        raise GraphError(
            f"{path} has no exposed LoRA: it was built from a base or a merged graph",
            "run it with lora_export.EngineSession; or build it from a graph of swap-onnx or bank-onnx "
            "(--flavour tensorrt)",
        )
    expected = exposed.input_names()
    expected += [WEIGHTS_INPUT, exposed.batch_input] if exposed.mode == "bank" else []
    inputs = {port.name for port in record.inputs}
    if missing := [name for name in expected if name not in inputs]:
        raise GraphError(
            f"{path} lacks {len(missing)} of the {len(expected)} inputs that its LoRA record names",
            "build the engine from the file that swap-onnx or bank-onnx wrote: a tool has changed it since",
            missing,
        )
    return exposed


@same_inputs(at_end=True)
def open_engine(path: Path, options: EngineOptions, refits: bool = False) -> EngineModel:
    """Open an engine that needs no LoRA tensors; see `EngineModel`.

    Raises:
        BackendUnavailable: TensorRT or cuda-bindings is not installed.
        BackendError: The engine is missing, has LoRA inputs, or can't run here.
    """
    record = read_engine(path)
    if record.exposed is not None:
        raise BackendError(
            f"{path} has LoRA tensors among its inputs", "run it with lora_export.AdapterSession"
        )
    return EngineModel(path, record, options, refits)
