"""Import ONNX Runtime's weight-only quantisers without their effect on Python's logging."""

from __future__ import annotations

import importlib
import logging
from functools import cache
from importlib.util import find_spec
from typing import Any

from lora_export.errors import BackendUnavailable, install_line
from lora_export.modes.quantising import METHODS
from lora_export.modes.quantising.codes import Method

_MODULE = "onnxruntime.quantization.matmul_nbits_quantizer"


def method_named(name: str) -> Method:
    """Return the `Method` of a name that `METHODS` has.

    Raises:
        BackendUnavailable: A package that it needs is not installed.
    """
    module, _, attribute = METHODS[name].partition(":")
    method = getattr(importlib.import_module(module), attribute)
    assert isinstance(method, Method)
    for package, extra in (("onnxruntime", "cpu"), *((package, "hf") for package in method.packages)):
        if find_spec(package) is None:
            raise BackendUnavailable(
                f"the quantiser {name} needs {package}, which is not installed", install_line(extra)
            )
    return method


@cache
def nbits_module() -> Any:
    """Return ONNX Runtime's module of MatMulNBits quantisers.

    It calls `logging.basicConfig` when it is imported: every library's log would be printed from then on.
    """
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        return importlib.import_module(_MODULE)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
