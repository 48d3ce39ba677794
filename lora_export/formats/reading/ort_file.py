"""Read and write onnxruntime's ``.onnx_adapter`` file (named tensors, two versions) with its own code."""

from __future__ import annotations

import ctypes
import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lora_export.adapter import Array
from lora_export.errors import AdapterError, BackendUnavailable, install_line
from lora_export.formats.provenance import ONLY_THIS_BASE_KEY
from lora_export.formats.reading.ort_tables import TablesError, check_tables
from lora_export.storage.sums.seal import UNSEALED, seal_file

SUFFIX = ".onnx_adapter"
# Adapter versions of our files, in which the model's version is a part of the base's identity. The second one
# is for files with values computed from that base's, see `Provenance.only_this_base`.
OURS, OURS_ONLY_THIS_BASE = 0x4C45, 0x4C46
# onnx.TensorProto.DataType
_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.float32),
    10: np.dtype(np.float16),
    11: np.dtype(np.float64),
    16: np.dtype(ml_dtypes.bfloat16),
}
_BFLOAT16 = 16


def read_ort_file(path: Path) -> tuple[dict[str, Array], dict[str, int]]:
    """Return the file's tensors by name, and its ``adapter_version`` and ``model_version``.

    Raises:
        AdapterError: The file is damaged, or has a tensor that is not floating-point.
        BackendUnavailable: onnxruntime is not installed.
    """
    file = _onnxruntime("read").AdapterFormat
    try:
        check_tables(path)
        adapter = file.read_adapter(str(path))
    except TablesError as error:
        raise AdapterError(
            f"{path} is not a complete {SUFFIX} file: {error}", "convert or copy it again"
        ) from error
    except OSError as error:
        raise AdapterError(
            f"cannot read {path}: {error.strerror}", "check the path and its permissions"
        ) from error
    except RuntimeError as error:
        raise AdapterError(
            f"{path} is not a complete {SUFFIX} file: {_reason(error)}", "convert or copy it again"
        ) from error
    parameters = adapter.get_parameters()
    odd = [f"{name}: {v.data_type()}" for name, v in parameters.items() if v.element_type() not in _DTYPES]
    if odd:
        raise AdapterError(
            f"{path} has tensors that are not floating-point", "convert the adapter again", sorted(odd)
        )
    # In the order of the names: the file's own order is a hash table's.
    tensors = {name: _array(parameters[name]) for name in sorted(parameters)}
    versions = {
        "adapter_version": adapter.get_adapter_version(),
        "model_version": adapter.get_model_version(),
    }
    return tensors, versions


def config_of(versions: Mapping[str, Any]) -> dict[str, Any]:
    """Return the meaning of a file's two versions, as `Adapter.config` keeps it."""
    config = {key: versions[key] for key in ("adapter_version", "model_version") if key in versions}
    if config.get("adapter_version") in (OURS, OURS_ONLY_THIS_BASE):
        config["base_version"] = config["model_version"]
        config[ONLY_THIS_BASE_KEY] = "true" if config["adapter_version"] == OURS_ONLY_THIS_BASE else "false"
    return config


def write_ort_file(
    path: Path, tensors: Mapping[str, Array], model_version: int, only_this_base: bool
) -> None:
    """Write ``tensors`` in the order of their names, and a seal after the tables of the format.

    Args:
        path: The file.
        tensors: Name → float32, float16, float64 or bfloat16 values.
        model_version: Version of the base, see `lora_export.formats.provenance.base_version`.
        only_this_base: See `lora_export.formats.provenance.Provenance`.

    Raises:
        BackendUnavailable: onnxruntime is not installed.
        OSError: The file can't be written.
    """
    ort = _onnxruntime("write")
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(OURS_ONLY_THIS_BASE if only_this_base else OURS)
    adapter.set_model_version(model_version)
    # Kept until they are written: onnxruntime takes the arrays' own memory, and does not keep them.
    arrays = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    adapter.set_parameters({name: _value(ort.OrtValue, values) for name, values in arrays.items()})
    try:
        adapter.export_adapter(str(path))
    except RuntimeError as error:
        raise OSError(f"onnxruntime: {_reason(error)}") from error
    with path.open("ab") as file:
        file.write(UNSEALED.encode())
    seal_file(path)


def _reason(error: RuntimeError) -> str:
    """Return the error's text without the C++ source line that onnxruntime puts first."""
    return re.sub(r"^\S+:\d+ .*?\)>? ", "", str(error).strip(), count=1)[:200]


def _value(maker: Any, values: Array) -> Any:
    if values.dtype == ml_dtypes.bfloat16:
        return maker.ortvalue_from_numpy_with_onnx_type(values.view(np.uint16), _BFLOAT16)
    return maker.ortvalue_from_numpy(values)


def _array(value: Any) -> Array:
    # Not value.numpy(): it lacks bfloat16, and the file's bytes need not be aligned to the dtype.
    raw = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    return np.frombuffer(raw, _DTYPES[value.element_type()]).reshape(value.shape())


def _onnxruntime(what: str) -> Any:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise BackendUnavailable(
            f"onnxruntime is needed to {what} {SUFFIX} files: {error}", install_line("cpu")
        ) from error
