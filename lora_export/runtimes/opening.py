"""Open a file with its runtime: a graph with ONNX Runtime, an engine with its TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_export.engines.record import is_engine
from lora_export.runtimes.model import Model
from lora_export.runtimes.ort.model import OrtModel
from lora_export.runtimes.session_options import SessionOptions
from lora_export.runtimes.tensorrt.model import TensorRTModel


def open_model(path: Path, options: SessionOptions) -> Model[Any]:
    """Open a graph or an engine with exposed LoRA.

    Raises:
        BackendUnavailable: The runtime is not installed.
        BackendError: The file can't be opened or can't run here, or options are wrong.
        GraphError: The graph is missing, or has no exposed LoRA.
    """
    if is_engine(path):
        return TensorRTModel(path, options.for_engine(path))
    return OrtModel(
        path,
        options.for_graph(path),
        threads=options.threads,
        cuda_graphs=options.cuda_graphs,
        session_options=options.session_options,
        device_id=options.device_id,
    )
