"""TensorRT-RTX: builds on any machine, GPU or not, for every GPU from Turing on that it supports.

https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_export.engines.backend import Compiler, TensorRT, gpu_here
from lora_export.engines.record import BuildOptions
from lora_export.machines.targets import RTX_COMPUTE_CAPABILITIES


class TensorRTRTX(Compiler):
    """The compiler that runs in CI."""

    name = "tensorrt-rtx"
    package = "tensorrt_rtx"
    distributions = ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx")
    extra = "rtx"
    anywhere = True

    def target_problem(self, compute_capability: str) -> str | None:
        """Return why it can't build for such a GPU, or None."""
        if compute_capability in RTX_COMPUTE_CAPABILITIES:
            return None
        known = ", ".join(RTX_COMPUTE_CAPABILITIES)
        return f"compute capability {compute_capability}: TensorRT-RTX builds for {known}"

    def option_problems(self, options: BuildOptions, here: bool) -> list[str]:
        """Return which options it can't do (``here``: on this machine), one line each."""
        found = []
        if options.version_compatible:
            found.append("version_compatible: TensorRT-RTX needs a lean library for it, and there is none")
        if options.hardware_compatible:
            found.append(
                "hardware_compatible: TensorRT-RTX has no such engines; for one engine for several GPUs give "
                "each as --target, and --together"
            )
        needs = [name for name in ("refit", "strip_weights") if getattr(options, name)]
        if here and needs and gpu_here() is None:
            found.append(
                f"{', '.join(needs)}: TensorRT-RTX builds such engines only on a machine with a GPU, and "
                "this one has none: leave them out, or make a build kit and build it on one (--kit)"
            )
        return found

    def configure_own(
        self, trt: TensorRT, config: Any, options: BuildOptions, compute_capabilities: Sequence[str]
    ) -> None:
        """Set the GPUs it is for; without that it would build for a default set."""
        config.num_compute_capabilities = len(compute_capabilities)
        for index, name in enumerate(compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{name.replace('.', '')}"), index)
