"""What the two compilers have in common: TensorRT-RTX and classic TensorRT have one API.

A `Compiler` says how it is installed, which options and GPUs it takes, and sets a builder's configuration.
Everything else, from reading ONNX to writing the engine, is the same code for both (`worker`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lora_export.engines.record import BuildOptions
from lora_export.errors import BackendUnavailable
from lora_export.machines.local_gpus import Gpu, local_gpus

# The packages have no types; what is used of them is checked by a test against their bindings.
TensorRT = Any


# How the bindings call what numpy and ml_dtypes call otherwise; the other types have one name.
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "FP8": "float8_e4m3fn",
    "FP4": "float4_e2m1fn",
}


class Compiler(ABC):
    """One of the compilers.

    Attributes:
        name: What the user calls it.
        package: What Python imports.
        distributions: What pip may call it, the first found counts.
        extra: Our extra that installs it.
        anywhere: It builds without a GPU, for GPUs that are elsewhere.
    """

    name: str
    package: str
    distributions: tuple[str, ...]
    extra: str
    anywhere: bool

    def load(self) -> TensorRT:
        """Import the package.

        Raises:
            BackendUnavailable: It is not installed, or its libraries can't be loaded.
        """
        try:
            return import_module(self.package)
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == self.package
            raise BackendUnavailable(
                f"{self.name} is not installed"
                if missing
                else f"{self.name} is installed and can't be loaded: {error}",
                f"pip install 'lora-export[{self.extra}]'",
            ) from error

    def version(self) -> str:
        """Return its version without importing it.

        Raises:
            BackendUnavailable: It is not installed.
        """
        for distribution in self.distributions:
            try:
                return version(distribution)
            except PackageNotFoundError:
                continue
        raise BackendUnavailable(f"{self.name} is not installed", f"pip install 'lora-export[{self.extra}]'")

    @abstractmethod
    def target_problem(self, compute_capability: str) -> str | None:
        """Return why it can't build for such a GPU here, or None."""

    @abstractmethod
    def option_problems(self, options: BuildOptions, here: bool) -> list[str]:
        """Return which options it can't do (``here``: on this machine), one line each."""

    def configure(
        self, trt: TensorRT, config: Any, options: BuildOptions, compute_capabilities: Sequence[str]
    ) -> None:
        """Set a builder's configuration.

        Args:
            trt: The package.
            config: Its ``IBuilderConfig``.
            options: What the user asks for.
            compute_capabilities: Which GPUs it is for.
        """
        # Both states: a package's own default is nothing to rely on.
        flags = {
            trt.BuilderFlag.TF32: options.tf32,
            trt.BuilderFlag.WEIGHT_STREAMING: options.weight_streaming,
            trt.BuilderFlag.REFIT: options.refit,
            trt.BuilderFlag.STRIP_PLAN: options.strip_weights,
        }
        for flag, wanted in flags.items():
            if wanted:
                config.set_flag(flag)
            else:
                config.clear_flag(flag)
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if options.workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
        self.configure_own(trt, config, options, compute_capabilities)

    @abstractmethod
    def configure_own(
        self, trt: TensorRT, config: Any, options: BuildOptions, compute_capabilities: Sequence[str]
    ) -> None:
        """Set what only this compiler has."""

    def read_timings(self, config: Any, path: Path) -> None:
        """Let the builder know what earlier builds measured; nothing where a compiler measures nothing."""
        return

    def write_timings(self, config: Any, path: Path) -> None:
        """Keep what this build measured for later ones; nothing where a compiler measures nothing."""
        return


@cache
def _first_gpu() -> Gpu | None:
    return next((gpu for gpu in local_gpus().gpus if gpu.compute_capability), None)


def gpu_here() -> str | None:
    """Return the compute capability of this machine's first GPU (``8.9``), or None where there is none."""
    gpu = _first_gpu()
    return gpu.compute_capability if gpu else None


def gpu_name_here() -> str:
    """Return what the driver calls the same GPU, or ""."""
    gpu = _first_gpu()
    return gpu.name if gpu else ""
