"""TensorRT-RTX: it builds on any machine, with or without a GPU, for its supported GPUs from Turing on.

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
    title = "TensorRT-RTX"
    package = "tensorrt_rtx"
    extra = "rtx"
    anywhere = True
    runs_on = RTX_COMPUTE_CAPABILITIES
    compiles_at_run = True
    magic = b"vtrt"
    tool = "tensorrt_rtx"
    # Their layers in the network were compared with the operators' definitions.
    contrib_operators = frozenset(
        {
            *("Gelu", "MultiHeadAttention", "SimplifiedLayerNormalization"),
            *("SkipSimplifiedLayerNormalization", "QuantizeLinear", "DequantizeLinear"),
        }
    )
    # It has float32 convolutions for them.
    no_float32_products = frozenset({"7.5"})

    def target_problem(self, compute_capability: str) -> str | None:
        """Return the reason why it can't build for such a GPU, or None."""
        if compute_capability in RTX_COMPUTE_CAPABILITIES:
            return None
        known = ", ".join(RTX_COMPUTE_CAPABILITIES)
        return f"compute capability {compute_capability}: TensorRT-RTX builds for {known}"

    def option_problems(self, options: BuildOptions, here: bool) -> list[str]:
        """Return the options that it does not support (``here``: on this machine), one line each."""
        found = []
        if options.version_compatible:
            found.append("version_compatible: it needs a lean library, which TensorRT-RTX does not have")
        if options.hardware_compatible:
            found.append(
                "hardware_compatible: TensorRT-RTX has no such engines; for one engine for several GPUs give "
                "each GPU as --target, and --together"
            )
        needs = [name for name in ("refit", "strip_weights") if getattr(options, name)]
        if here and needs and gpu_here() is None:
            found.append(
                f"{', '.join(needs)}: TensorRT-RTX builds such engines only on a machine with a GPU, and "
                "this machine has none: omit them, or make a build kit (--kit) and build it on one"
            )
        return found

    def tool_flags(self, compute_capabilities: Sequence[str]) -> list[str]:
        """Return the flag that names the GPUs: without it the tool builds for a default set."""
        # Its networks are always strongly typed.
        return [f"--computeCapabilities={','.join(name.replace('.', '') for name in compute_capabilities)}"]

    def configure_own(
        self, trt: TensorRT, config: Any, options: BuildOptions, compute_capabilities: Sequence[str]
    ) -> None:
        """Set the GPUs of the engine; TensorRT-RTX would otherwise build for a default set."""
        config.num_compute_capabilities = len(compute_capabilities)
        for index, name in enumerate(compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{name.replace('.', '')}"), index)
