"""TensorRT's runtime without a GPU: a stand-in that keeps the API's rules and lets ONNX Runtime do the sums.

Every class and method has the name and arguments of the real one; `ATTRIBUTES` lists what is used of each
package, for tests that compare it with the packages' own bindings. An "engine" is a file that names its ONNX
graph; a run reads its inputs from the (stand-in) device's memory at the addresses that were bound, and writes
its outputs there. What TensorRT refuses, this refuses: shapes outside of the profile, tensors without an
address or with an unaligned one, runs before every shape is known.

`WORLD` is the machine that a test is on; the fixture ``machine`` of `engine_files` makes a new one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

from onnx_engine import OnnxEngine
from recording_cuda import RecordingCuda

# What is used of both packages, and of TensorRT-RTX alone.
BOTH = {
    "ILogger": ("ERROR", "INTERNAL_ERROR", "log"),
    "Runtime": ("deserialize_cuda_engine", "engine_host_code_allowed"),
    "ICudaEngine": (
        "create_execution_context",
        "device_memory_size_v2",
        "streamable_weights_size",
        "weight_streaming_budget_v2",
    ),
    "IExecutionContext": (
        "execute_async_v3",
        "get_tensor_shape",
        "infer_shapes",
        "set_device_memory",
        "set_input_shape",
        "set_optimization_profile_async",
        "set_tensor_address",
    ),
    "Refitter": (
        "get_all_weights",
        "get_missing_weights",
        "get_weights_prototype",
        "refit_cuda_engine",
        "set_named_weights",
    ),
    "Weights": ("dtype", "size"),
    "DataType": ("FLOAT", "HALF", "BF16", "FP8", "INT8", "UINT8", "INT32", "INT64", "BOOL"),
    "ExecutionContextAllocationStrategy": ("USER_MANAGED",),
}
RTX_ALONE = {
    "Runtime": ("get_engine_validity",),
    "ICudaEngine": ("create_runtime_config",),
    "IRuntimeConfig": ("create_runtime_cache", "cuda_graph_strategy", "set_runtime_cache"),
    "IRuntimeCache": ("deserialize", "serialize"),
    "CudaGraphStrategy": ("WHOLE_GRAPH_CAPTURE",),
    "EngineValidity": ("INVALID", "SUBOPTIMAL"),
    "EngineInvalidityDiagnostics": (),
}
ATTRIBUTES = {
    "tensorrt": BOTH,
    "tensorrt_rtx": {name: (*BOTH.get(name, ()), *RTX_ALONE.get(name, ())) for name in {**BOTH, **RTX_ALONE}},
}


@dataclass
class World:
    """One machine.

    Attributes:
        cuda: Its CUDA.
        calls: Every call to TensorRT, in order: method, then arguments. Shapes are queried without a record.
        validity: What TensorRT-RTX says of every engine.
        diagnostics: Its reasons.
        fails: Methods that return False or None, and log why.
        runs: How many runs were computed.
        contexts: Number of the last one made.
    """

    cuda: RecordingCuda
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    validity: int = 0
    diagnostics: int = 0
    fails: set[str] = field(default_factory=set)
    runs: int = 0
    contexts: int = 0

    def named(self, *names: str) -> list[tuple[Any, ...]]:
        """Return the recorded calls of these methods."""
        return [call for call in self.calls if call[0] in names]


class _Current:
    """The world that a test is in."""

    world: World


def world() -> World:
    return _Current.world


def enter(new: World) -> None:
    _Current.world = new


def _called(logger: ILogger, name: str, *arguments: Any) -> bool:
    """Record a call; return whether it is to succeed."""
    world().calls.append((name, *arguments))
    if name in world().fails:
        logger.log(ILogger.ERROR, f"{name} failed")
        return False
    return True


class Severity(IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    INTERNAL_ERROR, ERROR = Severity.INTERNAL_ERROR, Severity.ERROR

    def __init__(self):
        pass

    def log(self, severity, msg):
        raise NotImplementedError


class DataType(IntEnum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64 = range(9)


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class CudaGraphStrategy(IntEnum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class EngineValidity(IntEnum):
    VALID, SUBOPTIMAL, INVALID = range(3)


class EngineInvalidityDiagnostics(IntEnum):
    VERSION_MISMATCH, UNSUPPORTED_CC, OLD_CUDA_DRIVER, OLD_CUDA_RUNTIME = 1, 2, 4, 8
    INSUFFICIENT_GPU_MEMORY, MALFORMED_ENGINE, CUDA_ERROR = 16, 32, 64


class Weights:
    def __init__(self, type, ptr, count):
        self.dtype, self.pointer, self.size = type, ptr, count


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, logger):
        self._logger = logger

    def get_engine_validity(self, buffer):
        assert bytes(buffer).startswith(b"vtrt"), "classic TensorRT has no such method"
        return EngineValidity(world().validity), world().diagnostics

    def deserialize_cuda_engine(self, serialized_engine):
        if not _called(self._logger, "deserialize_cuda_engine"):
            return None
        return ICudaEngine(self, self._logger, bytes(serialized_engine))


class ICudaEngine:
    device_memory_size_v2 = 4096

    def __init__(self, runtime, logger, data):
        self._runtime, self.logger = runtime, logger
        self._is_rtx, self.about = data.startswith(b"vtrt"), json.loads(data[4:])
        about = self.about
        self.graph = OnnxEngine(about["onnx"])
        self.inputs = [port["name"] for port in about["inputs"]]
        self.outputs = [port["name"] for port in about["outputs"]]
        self.streamable_weights_size = 1000
        self._budget = 1000

    @property
    def weight_streaming_budget_v2(self):
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget):
        assert not world().contexts, "the budget comes before the first context"
        if _called(self.logger, "weight_streaming_budget_v2", budget):
            self._budget = budget

    def create_runtime_config(self):
        assert self._is_rtx, "classic TensorRT has one, without what we want of it"
        return IRuntimeConfig(self.logger)

    def create_execution_context(self, strategy=None, runtime_config=None):
        if not _called(self.logger, "create_execution_context", strategy, runtime_config):
            return None
        return IExecutionContext(self, strategy, runtime_config)


class IRuntimeConfig:
    cuda_graph_strategy = CudaGraphStrategy.DISABLED

    def __init__(self, logger):
        self.logger, self.cache = logger, None

    def create_runtime_cache(self):
        return IRuntimeCache()

    def set_runtime_cache(self, cache):
        self.cache = cache
        return _called(self.logger, "set_runtime_cache")


class IRuntimeCache:
    """What was "compiled": the shapes that were run."""

    def __init__(self):
        self.kernels = set()

    def deserialize(self, blob):
        if not bytes(blob).startswith(b"cache:"):
            return False
        self.kernels |= set(bytes(blob)[6:].decode().split("|"))
        return True

    def serialize(self):
        return b"cache:" + "|".join(sorted(self.kernels)).encode()


class IExecutionContext:
    def __init__(self, engine, strategy, config):
        self._engine, self._logger = engine, engine.logger
        self._config, self._scratch = config, strategy != ExecutionContextAllocationStrategy.USER_MANAGED
        world().contexts += 1
        self.number = world().contexts
        self._profile, self._shapes, self._addresses = 0, self._static(), {}
        self._warm = None

    def _static(self):
        ports = self._engine.about["inputs"]
        fixed = (port for port in ports if all(isinstance(dim, int) for dim in port["dims"]))
        return {port["name"]: tuple(port["dims"]) for port in fixed}

    def set_device_memory(self, memory, size):
        assert memory % 256 == 0
        assert size >= self._engine.device_memory_size_v2
        self._scratch = True

    def set_optimization_profile_async(self, profile_index, stream_handle):
        assert isinstance(stream_handle, int)
        if not _called(self._logger, "set_optimization_profile_async", profile_index):
            return False
        self._profile, self._shapes = profile_index, self._static()
        return True

    def set_input_shape(self, name, shape):
        if not _called(self._logger, "set_input_shape", name, tuple(shape)):
            return False
        low, _, high = self._engine.about["profiles"][self._profile][name]
        fits = len(shape) == len(low) and all(
            a <= size <= b for a, size, b in zip(low, shape, high, strict=True)
        )
        if not fits:
            self._logger.log(ILogger.ERROR, f"{name}: {shape} is not in {low}..{high}")
            return False
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name, memory):
        assert isinstance(memory, int)
        assert memory
        assert memory % 256 == 0
        assert name in (*self._engine.inputs, *self._engine.outputs)
        if not _called(self._logger, "set_tensor_address", name, memory):
            return False
        self._addresses[name] = memory
        return True

    def infer_shapes(self):
        world().calls.append(("infer_shapes",))
        return [name for name in self._engine.inputs if name not in self._shapes]

    def get_tensor_shape(self, name):
        if name in self._engine.inputs:
            return self._shapes[name]
        assert not [other for other in self._engine.inputs if other not in self._shapes]
        return self._engine.graph.output_shapes(tuple(self._shapes.items()))[name]

    def execute_async_v3(self, stream_handle):
        assert isinstance(stream_handle, int)
        if not _called(self._logger, "execute_async_v3", self.number):
            return False
        assert self._scratch, "no scratch memory"
        needed = [*self._engine.inputs, *self._engine.outputs]
        missing = [name for name in needed if name not in self._addresses or name not in self._known()]
        assert not missing, missing
        shapes, addresses = dict(self._known()), dict(self._addresses)
        cuda = world().cuda
        if cuda.is_capturing(stream_handle) and self._warm != shapes:
            self._logger.log(ILogger.ERROR, "the context has to run once with these shapes before")
            cuda.fail_capture(stream_handle)
            return False
        self._warm = shapes
        if self._config is not None and self._config.cache is not None:
            self._config.cache.kernels.add(repr(sorted(shapes.items())))
        cuda.queue(stream_handle, lambda: self._compute(shapes, addresses))
        return True

    def _compute(self, shapes, addresses):
        world().runs += 1
        self._engine.graph.run(world().cuda, self._engine.inputs, shapes, addresses)

    def _known(self):
        unknown = [name for name in self._engine.inputs if name not in self._shapes]
        return self._shapes if unknown else {**self._shapes, **self._outputs()}

    def _outputs(self):
        return self._engine.graph.output_shapes(tuple(self._shapes.items()))


class Refitter:
    def __init__(self, engine, logger):
        self._engine, self._logger, self._given = engine, logger, {}

    def get_all_weights(self):
        return sorted(self._engine.graph.weights())

    def get_weights_prototype(self, weights_name):
        values = self._engine.graph.weights()[weights_name]
        return SimpleNamespace(dtype=_TYPES[values.dtype.name], size=values.size)

    def set_named_weights(self, name, weights):
        assert weights.size == self._engine.graph.weights()[name].size
        self._given[name] = weights
        return _called(self._logger, "set_named_weights", name)

    def get_missing_weights(self):
        about = self._engine.about
        groups = [group for group in about["joined"] if set(group) & set(self._given)]
        groups += [self.get_all_weights()] if about["stripped"] else []
        return [name for group in groups for name in group if name not in self._given]

    def refit_cuda_engine(self):
        assert not self.get_missing_weights()
        if not _called(self._logger, "refit_cuda_engine"):
            return False
        for name, weights in self._given.items():
            self._engine.graph.write(name, weights.pointer)
        self._engine.about["stripped"] = False
        return True


_TYPES = {
    "float32": DataType.FLOAT,
    "float16": DataType.HALF,
    "bfloat16": DataType.BF16,
    "int64": DataType.INT64,
}


def package(backend):
    """Return the stand-in for a package, with what that package has."""
    names = ATTRIBUTES[backend]
    return SimpleNamespace(**{name: globals()[name] for name in names})
