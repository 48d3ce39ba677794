"""Capture runs of classic TensorRT as CUDA graphs and launch them again.

A captured graph contains shapes and addresses: each has its own buffers for inputs and outputs, and the LoRA
tensors at fixed addresses (`FixedTensors`). NVIDIA's advice for TensorRT is one execution context for each
graph, as a graph refers to its context's state, and one scratch memory for all, as they run in turn. A
context has to run once with new shapes before it is captured.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_export.runtimes.feeds import Feeds
from lora_export.runtimes.tensorrt.context import EngineContext, shapes_by_name
from lora_export.runtimes.tensorrt.cuda import CapturedGraph, DeviceBuffer, DeviceTensor, Stream, nbytes_of
from lora_export.runtimes.tensorrt.engine import LoadedEngine
from lora_export.runtimes.tensorrt.shapes import EngineShapes
from lora_export.runtimes.tensorrt.tensors import EngineTensors


@dataclass(frozen=True, eq=False)
class _Captured:
    """A graph with the tensors that it reads and writes, which must live as long as it does."""

    graph: CapturedGraph
    context: EngineContext
    inputs: Mapping[str, DeviceTensor]
    outputs: Mapping[str, DeviceTensor]


class CapturedRuns:
    """The captured graphs of one engine, for each profile, LoRA layout and input shapes."""

    def __init__(self, loaded: LoadedEngine, shapes: EngineShapes, stream: Stream, limit: int) -> None:
        self._loaded, self._shapes, self._stream, self._limit = loaded, shapes, stream, limit
        self._captured: dict[Any, _Captured] = {}
        self._scratch = DeviceBuffer(loaded.device, loaded.engine.device_memory_size_v2)

    def run(self, number: int, lora: EngineTensors | None, feeds: Feeds) -> Mapping[str, DeviceTensor] | None:
        """Queue a run and return the outputs, or None if the limit of graphs is reached.

        Args:
            number: Number of the optimisation profile.
            lora: LoRA tensors at their fixed addresses.
            feeds: All other inputs.
        """
        layout = lora.layout if lora else None
        key = (number, layout, tuple(sorted(shapes_by_name(feeds).items())))
        captured = self._captured.get(key)
        if captured is None:
            if len(self._captured) >= self._limit:
                self._say_full()
                return None
            captured = self._captured[key] = self._capture(number, lora, feeds)
        self._fill(captured.inputs, feeds)
        captured.graph.launch()
        return captured.outputs

    def drop(self) -> None:
        """Forget all graphs, because something that they contain has changed."""
        self._captured.clear()

    def _capture(self, number: int, lora: EngineTensors | None, feeds: Feeds) -> _Captured:
        context = self._new_context()
        context.use_profile(number)
        inputs = {name: self._tensor(tuple(values.shape), np.dtype(values.dtype)) for name, values in feeds}
        for name, tensor in inputs.items():
            context.bind(name, tensor.shape, tensor.address)
        if lora:
            context.bind_lora(lora)
        dtypes = {port.name: np.dtype(port.dtype) for port in self._loaded.record.outputs}
        outputs = {name: self._tensor(shape, dtypes[name]) for name, shape in context.output_shapes().items()}
        for name, tensor in outputs.items():
            context.bind_address(name, tensor.address)
        self._fill(inputs, feeds)
        context.execute()
        self._stream.synchronize()
        return _Captured(self._stream.capture(context.execute), context, inputs, outputs)

    def _new_context(self) -> EngineContext:
        engine, trt = self._loaded.engine, self._loaded.trt
        made = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if made is None:
            raise self._loaded.log.refused(self._loaded.path, "make an execution context")
        made.set_device_memory(self._scratch.address, self._scratch.nbytes)
        return EngineContext(self._loaded, made, self._shapes, self._stream)

    def _tensor(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceTensor:
        return DeviceTensor(DeviceBuffer(self._loaded.device, nbytes_of(shape, dtype)), 0, shape, dtype)

    def _fill(self, inputs: Mapping[str, DeviceTensor], feeds: Feeds) -> None:
        device = self._loaded.device
        for name, values in feeds:
            if isinstance(values, DeviceTensor):
                device.copy(inputs[name].address, values.address, values.nbytes, self._stream)
            else:
                device.upload(inputs[name].address, values, self._stream)

    def _say_full(self) -> None:
        message = (
            f"{self._limit} CUDA graphs are captured, the limit of this session: runs with further "
            "ranks or input shapes are not captured (max_cuda_graphs)"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)
