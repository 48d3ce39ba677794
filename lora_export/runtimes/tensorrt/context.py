"""Bind inputs and outputs to an execution context: only what differs from the last run is bound again."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from lora_export.errors import BackendError
from lora_export.runtimes.tensorrt.cuda import Stream
from lora_export.runtimes.tensorrt.engine import LoadedEngine
from lora_export.runtimes.tensorrt.shapes import EngineShapes
from lora_export.runtimes.tensorrt.tensors import EngineTensors


class EngineContext:
    """One ``IExecutionContext``. One thread at a time may use it."""

    def __init__(self, loaded: LoadedEngine, context: Any, shapes: EngineShapes, stream: Stream) -> None:
        # In this order, so that the context is deleted before its engine.
        self._context, self._loaded, self._stream = context, loaded, stream
        self._varies = shapes.varies
        self._outputs = [port.name for port in loaded.record.outputs]
        self.forget()

    def forget(self) -> None:
        """Make the next run bind everything again: after a failure it is unknown what is bound."""
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._inferred: dict[str, tuple[int, ...]] | None = None
        # A weak reference, which doesn't keep an adapter on the device.
        self._lora: weakref.ref[EngineTensors] | None = None

    def use_profile(self, number: int) -> None:
        """Select the optimisation profile, which makes TensorRT forget every shape."""
        if number == self._profile:
            return
        self.forget()
        name = self._loaded.record.profiles[number].name
        self._check(
            self._context.set_optimization_profile_async(number, int(self._stream)), f"use profile '{name}'"
        )
        # The copies that the change makes must be done before a run begins on any stream.
        self._stream.synchronize()
        self._profile = number

    def bind_lora(self, lora: EngineTensors) -> None:
        """Bind LoRA's inputs, unless they are bound since the last run."""
        if self._lora is not None and self._lora() is lora:
            return
        for name, tensor in lora.tensors.items():
            self.bind(name, tensor.shape, tensor.address)
        self._lora = weakref.ref(lora)

    def bind(self, name: str, shape: tuple[int, ...], address: int) -> None:
        """Bind an input."""
        if self._varies(name) and self._shapes.get(name) != shape:
            self._inferred = None
            self._shapes.pop(name, None)
            self._check(self._context.set_input_shape(name, shape), f"take {name} of shape {shape}")
            self._shapes[name] = shape
        self.bind_address(name, address)

    def bind_address(self, name: str, address: int) -> None:
        """Bind an input or output to memory."""
        if self._addresses.get(name) != address:
            self._addresses.pop(name, None)
            self._check(self._context.set_tensor_address(name, address), f"bind {name}")
            self._addresses[name] = address

    def output_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the outputs' shapes; every input must be bound."""
        if self._inferred is None:
            self._infer()
            found = {name: tuple(self._context.get_tensor_shape(name)) for name in self._outputs}
            self._refuse_unknown(found)
            self._inferred = found
        return self._inferred

    def _infer(self) -> None:
        try:
            missing = list(self._context.infer_shapes())
        except RuntimeError as error:
            raise self._loaded.log.refused(self._loaded.path, f"infer shapes: {error}") from error
        if missing:
            raise self._loaded.log.refused(self._loaded.path, f"infer shapes: it misses {', '.join(missing)}")

    def _refuse_unknown(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        unknown = [f"{name} {shape}" for name, shape in shapes.items() if any(size < 0 for size in shape)]
        if unknown:
            raise BackendError(
                f"{self._loaded.path.name} has outputs whose shape depends on values, which is not supported",
                "make the graph's outputs depend on its inputs' shapes alone",
                unknown,
            )

    def execute(self) -> None:
        """Queue a run on the stream."""
        self._check(self._context.execute_async_v3(int(self._stream)), "run the engine")

    def _check(self, done: bool, what: str) -> None:
        if not done:
            raise self._loaded.log.refused(self._loaded.path, what)


def shapes_by_name(tensors: Iterable[tuple[str, Any]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of arrays and device tensors, by name."""
    return {name: tuple(values.shape) for name, values in tensors}
