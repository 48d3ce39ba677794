"""Compile an ONNX graph to an engine: backend → ``module:attribute``, imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from lora_export.errors import BackendError

if TYPE_CHECKING:
    from lora_export.engines.backend import Compiler

BACKENDS: dict[str, str] = {
    "tensorrt-rtx": "lora_export.engines.tensorrt_rtx:TensorRTRTX",
    "tensorrt": "lora_export.engines.tensorrt:TensorRTClassic",
}


def compiler_of(backend: str) -> Compiler:
    """Return the compiler of that name; it is installed or not.

    Raises:
        BackendError: There is none of that name.
    """
    if backend not in BACKENDS:
        raise BackendError(f"there is no backend {backend!r}", f"use one of: {', '.join(BACKENDS)}")
    module, _, attribute = BACKENDS[backend].partition(":")
    compiler: Compiler = getattr(import_module(module), attribute)()
    return compiler
