"""Run an engine: inputs are copied in, outputs copied out, on one stream and one run at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from lora_export.adapter import Array
from lora_export.errors import BackendError
from lora_export.runtimes.feeds import Feeds
from lora_export.runtimes.session_options import EngineOptions
from lora_export.runtimes.tensorrt.context import EngineContext, shapes_by_name
from lora_export.runtimes.tensorrt.cuda import DeviceBuffer, DeviceTensor, Stream, nbytes_of
from lora_export.runtimes.tensorrt.engine import LoadedEngine
from lora_export.runtimes.tensorrt.graphs import CapturedRuns
from lora_export.runtimes.tensorrt.kernel_cache import RuntimeCache
from lora_export.runtimes.tensorrt.shapes import EngineShapes
from lora_export.runtimes.tensorrt.tensors import EngineTensors, FixedTensors

T = TypeVar("T")
_LESS_MEMORY = "it may need more memory than the GPU has free"


class EngineRunner:
    """One engine's execution context, stream and buffers.

    Many threads may call it: runs take turns, because a context does one at a time, and a second context
    would need the scratch memory a second time.

    Attributes:
        shapes: Shapes that the engine takes.
        unusable: The reason why the engine must not be run, or "".
    """

    def __init__(self, loaded: LoadedEngine, options: EngineOptions) -> None:
        self.shapes = EngineShapes(loaded.record, options.profile)
        self.unusable = ""
        self._loaded: LoadedEngine | None = loaded
        self._name, self._device = loaded.path.name, loaded.device
        self._dtypes = {port.name: np.dtype(port.dtype) for port in loaded.record.outputs}
        self._lock = threading.Lock()
        self._stream = Stream(loaded.device)
        self._buffers: dict[str, DeviceBuffer] = {}
        _stream_weights(loaded, options.weight_streaming_budget_bytes)
        self._cache = RuntimeCache(loaded, options.runtime_cache)
        self._fixed = FixedTensors(loaded.device) if options.cuda_graphs else None
        self._captured: CapturedRuns | None = None
        if options.cuda_graphs and not loaded.compiles_at_run:
            self._captured = CapturedRuns(loaded, self.shapes, self._stream, options.cuda_graphs)
        self._context = EngineContext(
            loaded, self._make_context(loaded, options.cuda_graphs > 0), self.shapes, self._stream
        )

    def run(self, lora: EngineTensors | None, feeds: Feeds, outputs: Sequence[str]) -> list[Array]:
        """Run the engine and return the outputs' values in the requested order.

        Args:
            lora: The LoRA tensors, if the engine has any.
            feeds: All other inputs, checked except for their shapes.
            outputs: Names of the outputs.

        Raises:
            BackendError: The engine doesn't take the shapes, CUDA or TensorRT failed, or the engine is
                closed.
        """

        def work() -> list[Array]:
            number = self._choose(lora, feeds)
            fixed = self._fixed.filled(lora, self._stream) if self._fixed and lora else lora
            if self._captured:
                tensors = self._captured.run(number, fixed, feeds)
                if tensors is not None:
                    return self._read([tensors[name] for name in outputs])
            tensors = self._run(number, fixed, feeds, self._shared)
            return self._read([tensors[name] for name in outputs])

        return self._alone(work)

    def run_on_device(
        self, lora: EngineTensors | None, feeds: Feeds, outputs: Sequence[str]
    ) -> list[DeviceTensor]:
        """Run the engine and leave the outputs on the GPU.

        Raises:
            BackendError: As for `run`, or the runs are CUDA graphs, which overwrite their outputs.
        """
        if self._fixed:
            raise BackendError(
                "the outputs of a CUDA graph are overwritten by the next run and can't be returned",
                "use run, or open the session with cuda_graph=False",
            )

        def work() -> list[DeviceTensor]:
            tensors = self._run(self._choose(lora, feeds), lora, feeds, self._own)
            self._stream.synchronize()
            return [tensors[name] for name in outputs]

        return self._alone(work)

    def alone(self, work: Callable[[LoadedEngine], T]) -> T:
        """Call ``work`` with the engine while nothing runs; drop captured graphs, as the engine may change.

        Raises:
            BackendError: ``work`` raises it, or the engine is closed.
        """

        def changing() -> T:
            assert self._loaded is not None
            if self._captured:
                self._captured.drop()
            return work(self._loaded)

        return self._alone(changing)

    def save_runtime_cache(self) -> None:
        """Write the kernels compiled so far.

        Raises:
            BackendError: The session has no runtime cache, or the engine is closed.
            OutputError: The file can't be written.
        """
        self._alone(self._cache.save)

    def close(self) -> None:
        """Write the runtime cache and release everything; a second call does nothing."""
        with self._lock:
            if self._loaded is None:
                return
            self._loaded.device.activate()
            try:
                if self._cache.wanted:
                    self._cache.save()
            finally:
                # Contexts must be deleted before their engine.
                del self._context, self._config
                self._captured = self._fixed = None
                self._cache.release()
                self._buffers.clear()
                self._loaded = None

    def _alone(self, work: Callable[[], T]) -> T:
        with self._lock:
            if self._loaded is None:
                raise BackendError(f"{self._name} is closed", "open a new session")
            self._device.activate()
            try:
                return work()
            except BaseException:
                self._context.forget()
                raise

    def _choose(self, lora: EngineTensors | None, feeds: Feeds) -> int:
        if self.unusable:
            raise BackendError(f"{self._name} can't be run: {self.unusable}", "call switch again")
        among = lora.profiles if lora else self.shapes.chosen
        return self.shapes.choose(shapes_by_name(feeds), among)

    def _run(
        self,
        number: int,
        lora: EngineTensors | None,
        feeds: Feeds,
        output: Callable[[str, int], DeviceBuffer],
    ) -> Mapping[str, DeviceTensor]:
        """Queue a run and return all outputs: TensorRT needs an address for each, requested or not."""
        context = self._context
        context.use_profile(number)
        for name, values in feeds:
            context.bind(name, tuple(values.shape), self._placed(name, values))
        if lora:
            context.bind_lora(lora)
        tensors = {}
        for name, shape in context.output_shapes().items():
            dtype = self._dtypes[name]
            tensors[name] = DeviceTensor(output(name, nbytes_of(shape, dtype)), 0, shape, dtype)
            context.bind_address(name, tensors[name].address)
        context.execute()
        return tensors

    def _placed(self, name: str, values: Array | DeviceTensor) -> int:
        """Return the address of an input on the GPU; arrays are copied there."""
        if isinstance(values, DeviceTensor):
            return values.address
        address = self._shared(name, values.nbytes).address
        self._device.upload(address, values, self._stream)
        return address

    def _shared(self, name: str, nbytes: int) -> DeviceBuffer:
        """Return the session's buffer for an input or output; its address changes only when it grows."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            buffer = self._buffers[name] = DeviceBuffer(self._device, nbytes)
        return buffer

    def _own(self, name: str, nbytes: int) -> DeviceBuffer:
        return DeviceBuffer(self._device, nbytes)

    def _read(self, tensors: Sequence[DeviceTensor]) -> list[Array]:
        arrays: list[Array] = [np.empty(tensor.shape, tensor.dtype) for tensor in tensors]
        for tensor, values in zip(tensors, arrays, strict=True):
            self._device.download(values, tensor.address, self._stream)
        self._stream.synchronize()
        return arrays

    def _make_context(self, loaded: LoadedEngine, cuda_graph: bool) -> Any:
        # Kept, as a context may refer to its configuration.
        self._config: Any = None
        if loaded.compiles_at_run:
            config = self._config = loaded.engine.create_runtime_config()
            self._cache.attach(config)
            if cuda_graph:
                # TensorRT-RTX decides itself when its kernels are final, and captures then.
                config.cuda_graph_strategy = loaded.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = loaded.engine.create_execution_context(runtime_config=config)
        else:
            context = loaded.engine.create_execution_context()
        if context is None:
            raise loaded.log.refused(loaded.path, "make an execution context", _LESS_MEMORY)
        return context


def _stream_weights(loaded: LoadedEngine, budget: int | None) -> None:
    """Limit the weights on the device; call it before the first context is made."""
    if budget is None:
        return
    if not loaded.record.options.weight_streaming:
        raise BackendError(
            f"{loaded.path.name} was not built for weight streaming",
            "build it with --weight-streaming, or omit weight_streaming_budget_bytes=",
        )
    engine = loaded.engine
    engine.weight_streaming_budget_v2 = min(budget, engine.streamable_weights_size)
    if engine.weight_streaming_budget_v2 > budget:
        raise loaded.log.refused(loaded.path, f"stream its weights with {budget} bytes on the GPU")
