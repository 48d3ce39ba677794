"""Runs that are replayed as CUDA graphs: one launch in place of one for each kernel.

A captured graph reads and writes the addresses that it was captured with. So one is captured for each set
of LoRA tensors, input shapes and outputs, with buffers of its own: inputs are copied into them, outputs read
from them. ONNX Runtime knows it by the run's ``gpu_graph_id``
(https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html, "Using CUDA Graphs").

Three of its rules shape this module:

1. Graphs belong to the thread that captured them, and a capture fails if another thread allocates device
   memory meanwhile. So *everything* of a session that touches the device is done by one thread.
2. An id is never free again: graphs live as long as their session. So only a limited number is captured, in
   the session's life; further combinations run without a graph, and that is said once.
3. ``-1`` runs without a capture. The first run of a combination is one: it finds the outputs' shapes.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from lora_export.adapter import Array
from lora_export.runtimes.feeds import Feeds
from lora_export.runtimes.ort.device import DeviceMemory, OrtValue
from lora_export.runtimes.ort.resident import Resident

T = TypeVar("T")
_NO_CAPTURE = -1


@dataclass(frozen=True, eq=False)
class _Captured:
    """A graph's buffers."""

    binding: Any
    options: Any
    inputs: Mapping[str, OrtValue]
    outputs: Sequence[OrtValue]


# (outputs, signatures of the inputs) → the graph.
_Graphs = dict[tuple[Any, ...], _Captured]


class CudaGraphs:
    """Captures and replays the runs of one session.

    Attributes:
        limit: Most graphs captured.
        count: Graphs captured so far.
    """

    def __init__(self, session: Any, memory: DeviceMemory, limit: int) -> None:
        self.limit = limit
        self.count = 0
        self._session = session
        self._memory = memory
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lora-export-cuda-graph")
        self._ids = itertools.count(1)  # 0 is what ONNX Runtime takes for a run that names none
        # A set of tensors that is dropped takes the buffers captured with it along.
        self._captured: weakref.WeakKeyDictionary[Resident, _Graphs] = weakref.WeakKeyDictionary()

    def call(self, function: Callable[[], T]) -> T:
        """Do something on the device's thread, for instance copy an adapter to it."""
        return self._thread.submit(function).result()

    def run(self, resident: Resident, feeds: Feeds, outputs: Sequence[str]) -> list[Array]:
        """Run the graph with an adapter's tensors; return the outputs' values in the order asked for."""
        return self.call(lambda: self._run(resident, feeds, tuple(outputs)))

    def _run(self, resident: Resident, feeds: Feeds, outputs: tuple[str, ...]) -> list[Array]:
        graphs = self._captured.setdefault(resident, {})
        key = (outputs, tuple(sorted((name, _signature(value)) for name, value in feeds)))
        captured = graphs.get(key)
        if captured is not None:
            self._fill(captured, feeds)
            self._session.run_with_iobinding(captured.binding, captured.options)
            return [self._memory.read(value) for value in captured.outputs]
        if self.count >= self.limit:
            self._say_full()
            return [self._memory.read(value) for value in self._eager(resident, feeds, outputs)]
        captured = self._prepare(resident, feeds, outputs)
        self.count += 1  # also if the capture fails: its id is used up
        # ONNX Runtime makes the runs that a capture needs in this one call, and replays the graph once.
        self._session.run_with_iobinding(captured.binding, captured.options)
        graphs[key] = captured
        return [self._memory.read(value) for value in captured.outputs]

    def _eager(self, resident: Resident, feeds: Feeds, outputs: Sequence[str]) -> list[OrtValue]:
        binding = resident.new_binding()
        resident.bind_feeds(binding, feeds)
        for name in outputs:
            binding.bind_output(name, self._memory.kind, self._memory.device_id)
        self._session.run_with_iobinding(binding, _run_options(_NO_CAPTURE))
        values: list[OrtValue] = binding.get_outputs()
        return values

    def _prepare(self, resident: Resident, feeds: Feeds, outputs: Sequence[str]) -> _Captured:
        values = self._eager(resident, feeds, outputs)
        binding = resident.new_binding()
        inputs = {
            name: self._memory.empty(value.shape, value.dtype)
            if isinstance(value, np.ndarray)
            else self._memory.like(value)
            for name, value in feeds
        }
        for name, buffer in inputs.items():
            binding.bind_ortvalue_input(name, buffer)
        for name, value in zip(outputs, values, strict=True):
            binding.bind_ortvalue_output(name, value)
        captured = _Captured(binding, _run_options(next(self._ids)), inputs, values)
        self._fill(captured, feeds)
        return captured

    def _fill(self, captured: _Captured, feeds: Feeds) -> None:
        """Copy a run's inputs into the buffers, and wait: ONNX Runtime's own stream waits for no other."""
        for name, value in feeds:
            captured.inputs[name].update_inplace(value)
        captured.binding.synchronize_inputs()

    def _say_full(self) -> None:
        message = (
            f"{self.limit} CUDA graphs are captured, the most that this session keeps: "
            "runs with further adapters or input shapes are not captured (max_cuda_graphs)"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def _signature(value: Array | OrtValue) -> tuple[str, tuple[int, ...]]:
    """Return what a captured graph is fixed to: type and shape."""
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape
    return str(value.data_type()), tuple(value.shape())


def _run_options(graph_id: int) -> Any:
    import onnxruntime as ort

    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    return options
