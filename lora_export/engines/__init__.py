"""Compile an ONNX graph to an engine: backend → ``module:attribute``, imported when it is used."""

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
    """Return the compiler of that name; its package may not be installed.

    Raises:
        BackendError: No compiler has that name.
    """
    if backend not in BACKENDS:
        raise BackendError(f"the backend {backend!r} is unknown", f"use one of: {', '.join(BACKENDS)}")
    module, _, attribute = BACKENDS[backend].partition(":")
    compiler: Compiler = getattr(import_module(module), attribute)()
    return compiler
