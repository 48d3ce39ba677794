"""The common part of the two compilers: TensorRT-RTX and classic TensorRT have one API.

A `Compiler` knows how it is installed and which options and GPUs it takes, and configures a builder.
Everything else, from reading ONNX to writing the engine, is the same code for both (`builder_process`).
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
from lora_export.errors import BackendUnavailable, install_line
from lora_export.machines.local_gpus import LocalGpu, local_gpus
from lora_export.machines.packages import PACKAGES

# The packages have no types; a test checks the names that we use against their bindings.
TensorRT = Any


# Types whose names in the bindings differ from those of numpy and ml_dtypes.
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
        name: Name that the user types.
        title: Name in messages.
        package: Python package.
        extra: Our extra that installs it.
        anywhere: True if it builds without a GPU, for GPUs of other machines.
        runs_on: Compute capabilities that its engines run on; None: those that the engine was built for.
        compiles_at_run: True if its engines hold no kernels yet and compile them while they run.
        magic: First bytes of its engines.
        tool: Command-line tool in its package, of trtexec's kind.
        contrib_operators: ONNX Runtime's own operators that its parser reads as ONNX Runtime means them.
        no_float32_products: Compute capabilities for which it can't multiply float32 matrices.
    """

    name: str
    title: str
    package: str
    extra: str
    anywhere: bool
    runs_on: tuple[str, ...] | None
    compiles_at_run: bool
    magic: bytes
    tool: str
    contrib_operators: frozenset[str]
    no_float32_products: frozenset[str]

    def load(self) -> TensorRT:
        """Import the package.

        Raises:
            BackendUnavailable: The package is not installed, or its libraries can't be loaded.
        """
        try:
            return import_module(self.package)
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == self.package
            raise BackendUnavailable(
                f"{self.name} is not installed"
                if missing
                else f"{self.name} is installed but can't be loaded: {error}",
                install_line(self.extra),
            ) from error

    def version(self) -> str:
        """Return the package's version without importing it.

        Raises:
            BackendUnavailable: The package is not installed.
        """
        for distribution in PACKAGES[self.package]:
            try:
                return version(distribution)
            except PackageNotFoundError:
                continue
        raise BackendUnavailable(f"{self.name} is not installed", install_line(self.extra))

    @abstractmethod
    def target_problem(self, compute_capability: str) -> str | None:
        """Return the reason why it can't build for such a GPU here, or None."""

    @abstractmethod
    def option_problems(self, options: BuildOptions, here: bool) -> list[str]:
        """Return the options that it does not support (``here``: on this machine), one line each."""

    def configure(
        self, trt: TensorRT, config: Any, options: BuildOptions, compute_capabilities: Sequence[str]
    ) -> None:
        """Set a builder's configuration.

        Args:
            trt: The package.
            config: Its ``IBuilderConfig``.
            options: The user's options.
            compute_capabilities: Compute capabilities of the GPUs that the engine is for.
        """
        # Set or cleared: the package's own defaults may change.
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
    def tool_flags(self, compute_capabilities: Sequence[str]) -> list[str]:
        """Return the flags with which its tool builds for these GPUs what `builder_process` builds."""

    @abstractmethod
    def configure_own(
        self, trt: TensorRT, config: Any, options: BuildOptions, compute_capabilities: Sequence[str]
    ) -> None:
        """Set the options that only this compiler has."""

    def read_timings(self, config: Any, path: Path) -> None:
        """Give the builder the timings of earlier builds; do nothing if the compiler has none."""
        return

    def write_timings(self, config: Any, path: Path) -> None:
        """Keep the timings of this build for later ones; do nothing if the compiler has none."""
        return


@cache
def _first_gpu() -> LocalGpu | None:
    return next((gpu for gpu in local_gpus().gpus if gpu.compute_capability), None)


def gpu_here() -> str | None:
    """Return the compute capability of this machine's first GPU (``8.9``), or None without a GPU."""
    gpu = _first_gpu()
    return gpu.compute_capability if gpu else None


def gpu_name_here() -> str:
    """Return the driver's name of the same GPU, or ""."""
    gpu = _first_gpu()
    return gpu.name if gpu else ""
