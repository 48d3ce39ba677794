"""Run a TensorRT engine of a base or merged graph: `EngineSession`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from lora_export.adapter import Array
from lora_export.engines.record import EngineRecord
from lora_export.runtimes.session_options import EngineOptions, PathLike
from lora_export.runtimes.tensorrt.cuda import DeviceTensor
from lora_export.runtimes.tensorrt.model import open_engine


class EngineSession:
    """Run an engine that ``build-engine`` built from a graph without LoRA.

    Many threads may call it at once; runs take turns.

    Example::

        with EngineSession("model.rtx-4090.engine", runtime_cache="model.cache") as session:
            logits = session.run({"input_ids": ids})["logits"]
    """

    _WRITES_WEIGHTS = False

    def __init__(
        self,
        engine: PathLike,
        *,
        profile: str | None = None,
        runtime_cache: PathLike | None = None,
        weight_streaming_budget_bytes: int | None = None,
        cuda_graph: bool = False,
        max_cuda_graphs: int = 64,
        device_id: int = 0,
    ) -> None:
        """Open an engine.

        Args:
            engine: The engine's file, with its record beside it.
            profile: Name of the optimisation profile; by default the first that takes a request's shapes.
            runtime_cache: For TensorRT-RTX: file of the kernels that it compiles for this GPU; read now,
                written by `close` and `save_runtime_cache`.
            weight_streaming_budget_bytes: For an engine built with weight streaming: largest device memory
                for its weights.
            cuda_graph: Replay runs as CUDA graphs, one for each combination of input shapes.
            max_cuda_graphs: Largest number of captured graphs; further combinations run without.
            device_id: Number of the GPU.

        Raises:
            BackendUnavailable: TensorRT or cuda-bindings is not installed.
            BackendError: The engine is missing, has LoRA inputs, or can't run here; every reason is listed.
        """
        graphs = max_cuda_graphs if cuda_graph else 0
        options = EngineOptions(
            profile=profile,
            runtime_cache=runtime_cache,
            weight_streaming_budget_bytes=weight_streaming_budget_bytes,
            source=None,
            device_id=device_id,
            cuda_graphs=graphs,
        )
        self._model = open_engine(Path(engine), options, self._WRITES_WEIGHTS)

    def __enter__(self) -> EngineSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def record(self) -> EngineRecord:
        """The engine record."""
        return self._model.engine_record

    def run(
        self, feeds: Mapping[str, Array | DeviceTensor], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Run the engine.

        Args:
            feeds: Input name → numpy array, or a tensor that `run_on_device` returned.
            outputs: Names of the outputs to read; by default all.

        Returns:
            Output name → values; bfloat16 as `ml_dtypes.bfloat16`.

        Raises:
            BackendError: Feeds that don't fit the engine, or TensorRT failed.
        """
        names = self._model.choose_outputs(outputs)
        return dict(zip(names, self._model.run(None, self._model.check_feeds(feeds), names), strict=True))

    def run_on_device(
        self, feeds: Mapping[str, Array | DeviceTensor], outputs: Sequence[str] | None = None
    ) -> dict[str, DeviceTensor]:
        """Run the engine as `run` does and leave the outputs on the GPU, to be fed again or read later."""
        names = self._model.choose_outputs(outputs)
        tensors = self._model.run_on_device(None, self._model.check_feeds(feeds), names)
        return dict(zip(names, tensors, strict=True))

    def save_runtime_cache(self) -> None:
        """Write the kernels that TensorRT-RTX has compiled so far to the file ``runtime_cache``."""
        self._model.save_runtime_cache()

    def close(self) -> None:
        """Write the runtime cache, if there is one, and release the engine."""
        self._model.close()
