"""Open a graph with ONNX Runtime, on the CPU or with its CUDA provider."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_export.errors import BackendError, BackendUnavailable, install_line
from lora_export.graph.data_identity import external_tensors, layout_hash, read_identity, refuse_changed_data
from lora_export.graph.onnx_file import load_graph
from lora_export.runtimes.ort.device import DeviceMemory
from lora_export.storage.inputs import note_inputs, same_inputs
from lora_export.untrusted.texts import is_utf8

_CUDA = "CUDAExecutionProvider"
# ONNX Runtime's log prints strangers' names unchanged to the terminal; its errors are raised anyway.
_FATAL_ONLY = 4


@same_inputs(at_end=True)
def open_session(
    path: Path,
    memory: DeviceMemory,
    threads: int | None = None,
    cuda_graph: bool = False,
    session_options: Any = None,
) -> Any:
    """Open any graph, with or without LoRA.

    Args:
        path: The ``.onnx`` file.
        memory: Memory of the device that it runs on.
        threads: Threads within one operator; None: one for each core.
        cuda_graph: Let ONNX Runtime capture runs as CUDA graphs.
        session_options: An `onnxruntime.SessionOptions`, if the defaults don't suit.

    Returns:
        An `onnxruntime.InferenceSession`. Float32 products on CUDA are float32, not TF32.

    Raises:
        BackendUnavailable: ONNX Runtime or its CUDA provider is not installed, or can't start.
        BackendError: ONNX Runtime can't open the file.
        GraphError: The graph's data files are not those that it was written with.
        InputChangedError: The files changed while they were read, so that graph and weights may not match.
    """
    if not is_utf8(str(path)):
        raise BackendError(f"ONNX Runtime can't open {path}: its path is not UTF-8", "rename it")
    note_inputs([path])
    ort = _onnxruntime("gpu" if memory.kind == "cuda" else "cpu")
    providers: list[Any] = ["CPUExecutionProvider"]
    if memory.kind == "cuda":
        providers.insert(0, (_CUDA, _cuda_options(ort, memory.device_id, cuda_graph)))
    options = session_options
    if options is None:
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions have no common class
        raise BackendError(
            f"ONNX Runtime can't open {path}: {error}",
            "a CUDA graph needs every node on the GPU: omit --cuda-graph (cuda_graph=True)"
            if cuda_graph
            else "check the file, and the operators that this onnxruntime supports",
        ) from error
    if memory.kind == "cuda" and _CUDA not in session.get_providers():
        raise BackendUnavailable(
            "ONNX Runtime could not start its CUDA provider and fell back to the CPU",
            "install CUDA and cuDNN for it: pip install 'onnxruntime-gpu[cuda,cudnn]'",
        )
    # If a data file differs, the graph is read to see whether it is still the written one; then it is
    # refused.
    metadata = session.get_modelmeta().custom_metadata_map
    identity = read_identity(metadata, path)
    note_inputs(path.parent / place for place in (identity.files if identity else ()))
    refuse_changed_data(metadata, path, lambda: layout_hash(external_tensors(load_graph(path).model)))
    return session


def _onnxruntime(extra: str) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailable(
            "running a graph needs onnxruntime, which is not installed", install_line(extra)
        ) from error
    return onnxruntime


def _cuda_options(ort: Any, device_id: int, cuda_graph: bool) -> dict[str, str]:
    """Load CUDA's libraries, and return the options of ONNX Runtime's CUDA provider."""
    if _CUDA not in ort.get_available_providers():
        raise BackendUnavailable(
            f"this onnxruntime ({ort.__version__}) has no CUDA provider",
            f"pip uninstall onnxruntime; {install_line('gpu')}",
        )
    ort.preload_dlls()  # if pip installed them
    # The provider's default for float32 products is TF32, which keeps 10 bits of each factor.
    chosen = {"use_tf32": "0"} | ({"enable_cuda_graph": "1"} if cuda_graph else {})
    if device_id:  # ONNX Runtime warns about the option even if it is 0
        chosen["device_id"] = str(device_id)
    return chosen
