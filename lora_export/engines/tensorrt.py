"""Classic TensorRT, for data-centre GPUs and Jetson: it builds on the GPU that the engine is for.

https://docs.nvidia.com/deeplearning/tensorrt/latest/

We have never run it: no machine that develops this project has the package. A test checks every attribute
that is used against its bindings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_export.engines.backend import Compiler, TensorRT, gpu_here
from lora_export.engines.record import BuildOptions
from lora_export.storage.outputs import OutputSet
from lora_export.untrusted.places import is_file


class TensorRTClassic(Compiler):
    """The compiler for the GPU in this machine."""

    name = "tensorrt"
    title = "TensorRT"
    package = "tensorrt"
    extra = "tensorrt"
    anywhere = False
    runs_on = None
    compiles_at_run = False
    magic = b"ftrt"
    tool = "trtexec"
    # Its parser could not be tried.
    contrib_operators = frozenset()
    no_float32_products = frozenset()

    def target_problem(self, compute_capability: str) -> str | None:
        """Return the reason why it can't build for such a GPU here, or None."""
        here = gpu_here()
        if here == compute_capability:
            return None
        has = "no NVIDIA GPU" if here is None else f"a GPU of compute capability {here}"
        return f"TensorRT builds on the GPU that the engine is for; this machine has {has}"

    def option_problems(self, options: BuildOptions, here: bool) -> list[str]:
        """Return the options that it does not support: none."""
        return []

    def tool_flags(self, compute_capabilities: Sequence[str]) -> list[str]:
        """Return the flag for the types that the graph states; it builds for the GPU that it runs on."""
        return ["--stronglyTyped"]

    def configure_own(
        self, trt: TensorRT, config: Any, options: BuildOptions, compute_capabilities: Sequence[str]
    ) -> None:
        """Set compatibility."""
        if options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if options.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS

    def read_timings(self, config: Any, path: Path) -> None:
        """Give the builder the timings of earlier builds."""
        cache = config.create_timing_cache(path.read_bytes() if is_file(path) else b"")
        # False: a cache of another GPU is refused, not used.
        config.set_timing_cache(cache, False)

    def write_timings(self, config: Any, path: Path) -> None:
        """Keep the timings of this build for later ones."""
        with OutputSet(force=True, listed=False) as outputs:
            outputs.stage(path).write_bytes(bytes(config.get_timing_cache().serialize()))
            outputs.commit()
