"""Check the options of a session: which of them a graph takes, and which an engine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

from lora_export.errors import BackendError
from lora_export.runtimes.ort.device import Provider

PathLike = str | os.PathLike[str]
_ENGINE_ALONE = ("profile", "runtime_cache", "weight_streaming_budget_bytes", "source")
# The smallest and the largest number that an option takes; threads and device_id are C's int in the runtimes.
_INT, _INT64 = 2**31 - 1, 2**63 - 1
_RANGES = {
    "max_adapters": (1, _INT64),
    "max_bytes": (1, _INT64),
    "threads": (1, _INT),
    "max_cuda_graphs": (1, _INT64),
    "device_id": (0, _INT),
    "weight_streaming_budget_bytes": (0, _INT64),
}
_GRAPH_ALONE = ("threads", "session_options")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options for running an engine.

    Attributes:
        profile: Name of the optimisation profile; None: the first that takes a request's shapes.
        runtime_cache: File of the kernels that TensorRT-RTX compiles for this GPU; read when the engine is
            opened, written when it is closed.
        weight_streaming_budget_bytes: Largest device memory for weights; other weights stay in host memory
            and are streamed. None: all weights are on the device.
        source: The ONNX graph that the engine was built from.
        device_id: Number of the GPU.
        cuda_graphs: Largest number of captured CUDA graphs; 0: runs are not captured.
    """

    profile: str | None = None
    runtime_cache: PathLike | None = None
    weight_streaming_budget_bytes: int | None = None
    source: PathLike | None = None
    device_id: int = 0
    cuda_graphs: int = 0


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """Options of `AdapterSession`, which explains them."""

    provider: Provider | None
    max_adapters: int
    max_bytes: int | None
    threads: int | None
    cuda_graph: bool
    max_cuda_graphs: int
    session_options: Any
    device_id: int
    profile: str | None
    runtime_cache: PathLike | None
    weight_streaming_budget_bytes: int | None
    source: PathLike | None

    @property
    def cuda_graphs(self) -> int:
        """Largest number of captured CUDA graphs; 0: runs are not captured."""
        return self.max_cuda_graphs if self.cuda_graph else 0

    def for_engine(self, path: Path) -> EngineOptions:
        """Return the options for an engine.

        Raises:
            BackendError: Options are wrong, or only for a graph.
        """
        problems = self._problems("cuda")
        if self.provider == "cpu":
            problems.append("provider is 'cpu': an engine runs on a GPU")
        problems += self._strange(_GRAPH_ALONE, f"for ONNX Runtime only, and {path.name} is an engine")
        _raise(problems)
        return EngineOptions(
            profile=self.profile,
            runtime_cache=self.runtime_cache,
            weight_streaming_budget_bytes=self.weight_streaming_budget_bytes,
            source=self.source,
            device_id=self.device_id,
            cuda_graphs=self.cuda_graphs,
        )

    def for_graph(self, path: Path) -> Provider:
        """Return the provider that a graph runs on.

        Raises:
            BackendError: Options are wrong, or only for an engine.
        """
        provider = self.provider or "cpu"
        problems = self._problems(provider)
        problems += self._strange(_ENGINE_ALONE, f"for engines only, and {path.name} is a graph")
        if self.device_id and provider == "cpu":
            problems.append(f"device_id is {self.device_id} with provider 'cpu'")
        _raise(problems)
        return provider

    def _problems(self, provider: str) -> list[str]:
        problems = []
        if self.provider not in (None, "cpu", "cuda"):
            problems.append(f"provider is {self.provider!r}, wanted 'cpu' or 'cuda'")
        if self.cuda_graph and provider != "cuda":
            problems.append(f"cuda_graph=True with provider {provider!r}, wanted 'cuda'")
        problems += [
            problem
            for name, (least, most) in _RANGES.items()
            if (value := getattr(self, name)) is not None
            and (problem := _number_problem(name, value, least, most))
        ]
        return problems

    def _strange(self, names: tuple[str, ...], reason: str) -> list[str]:
        return [f"{name} is {reason}" for name in names if getattr(self, name) is not None]


def _number_problem(name: str, value: Any, least: int, most: int) -> str:
    wrong = f"{name} is {value!r}, wanted a whole number"
    if isinstance(value, bool):
        return wrong
    try:
        number = index(value)
    except TypeError:
        return wrong
    if number < least:
        return f"{name} is {value}, wanted at least {least}"
    return f"{name} is {value}, wanted at most {most}" if number > most else ""


def _raise(problems: list[str]) -> None:
    if problems:
        raise BackendError("the session's options can't be used", "fix the listed problems", problems)
