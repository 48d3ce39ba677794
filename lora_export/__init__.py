"""Take a trained LoRA adapter from PyTorch to the runtime that serves it.

The names below are loaded on first use, so that ``import lora_export`` costs nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_export.adapter import Adapter, LoraModule
    from lora_export.bench.run import run_bench
    from lora_export.engines.build import build_engine
    from lora_export.engines.profiles import ProfileRequest
    from lora_export.engines.record import BuildOptions
    from lora_export.errors import (
        AdapterError,
        BackendError,
        BackendUnavailable,
        CheckpointError,
        EngineBuildError,
        GraphError,
        InputChangedError,
        LoraExportError,
        OutputError,
        ParityError,
        SiteError,
    )
    from lora_export.formats import load_adapter, save_adapter
    from lora_export.integrity.check import VerifyReport, verify
    from lora_export.modes.bank_onnx import bank_onnx
    from lora_export.modes.capture_onnx import capture_onnx
    from lora_export.modes.convert_adapter import convert_adapter
    from lora_export.modes.merge_checkpoint import merge_checkpoint
    from lora_export.modes.merge_onnx import export_onnx, merge_onnx
    from lora_export.modes.quantize_onnx import quantize_onnx
    from lora_export.modes.swap_onnx import swap_onnx
    from lora_export.parity.check import check_parity
    from lora_export.parity.result import ParityReport
    from lora_export.reports.parity.to_assertion import assert_parity
    from lora_export.runtimes.session import AdapterSession
    from lora_export.runtimes.tensorrt.refit import MergedEngine
    from lora_export.runtimes.tensorrt.session import EngineSession

__version__ = "0.1.0"

# onnxruntime's wheels look up a telemetry host when they are imported: nothing of ours reaches the network.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOME = {
    "Adapter": "lora_export.adapter",
    "AdapterError": "lora_export.errors",
    "AdapterSession": "lora_export.runtimes.session",
    "BackendError": "lora_export.errors",
    "BackendUnavailable": "lora_export.errors",
    "BuildOptions": "lora_export.engines.record",
    "CheckpointError": "lora_export.errors",
    "EngineBuildError": "lora_export.errors",
    "EngineSession": "lora_export.runtimes.tensorrt.session",
    "GraphError": "lora_export.errors",
    "InputChangedError": "lora_export.errors",
    "LoraExportError": "lora_export.errors",
    "LoraModule": "lora_export.adapter",
    "MergedEngine": "lora_export.runtimes.tensorrt.refit",
    "OutputError": "lora_export.errors",
    "ParityError": "lora_export.errors",
    "ParityReport": "lora_export.parity.result",
    "ProfileRequest": "lora_export.engines.profiles",
    "SiteError": "lora_export.errors",
    "VerifyReport": "lora_export.integrity.check",
    "assert_parity": "lora_export.reports.parity.to_assertion",
    "bank_onnx": "lora_export.modes.bank_onnx",
    "build_engine": "lora_export.engines.build",
    "capture_onnx": "lora_export.modes.capture_onnx",
    "check_parity": "lora_export.parity.check",
    "convert_adapter": "lora_export.modes.convert_adapter",
    "export_onnx": "lora_export.modes.merge_onnx",
    "load_adapter": "lora_export.formats",
    "merge_checkpoint": "lora_export.modes.merge_checkpoint",
    "merge_onnx": "lora_export.modes.merge_onnx",
    "quantize_onnx": "lora_export.modes.quantize_onnx",
    "run_bench": "lora_export.bench.run",
    "save_adapter": "lora_export.formats",
    "swap_onnx": "lora_export.modes.swap_onnx",
    "verify": "lora_export.integrity.check",
}

__all__ = [
    "Adapter",
    "AdapterError",
    "AdapterSession",
    "BackendError",
    "BackendUnavailable",
    "BuildOptions",
    "CheckpointError",
    "EngineBuildError",
    "EngineSession",
    "GraphError",
    "InputChangedError",
    "LoraExportError",
    "LoraModule",
    "MergedEngine",
    "OutputError",
    "ParityError",
    "ParityReport",
    "ProfileRequest",
    "SiteError",
    "VerifyReport",
    "__version__",
    "assert_parity",
    "bank_onnx",
    "build_engine",
    "capture_onnx",
    "check_parity",
    "convert_adapter",
    "export_onnx",
    "load_adapter",
    "merge_checkpoint",
    "merge_onnx",
    "quantize_onnx",
    "run_bench",
    "save_adapter",
    "swap_onnx",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lora_export' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
