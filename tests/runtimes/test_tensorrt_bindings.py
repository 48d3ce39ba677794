"""Every attribute of TensorRT that we use exists in both packages; only one of them can be run here.

The classic bindings install without their libraries, so that they can't be imported; the names that pybind11
registers are strings in the binary.
"""

import ast
import re
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest
import recording_trt

PACKAGE = Path(__file__).resolve().parents[2] / "lora_export"
SOURCES = [
    *(
        PACKAGE / "engines" / name
        for name in ("backend.py", "builder_process.py", "tensorrt.py", "tensorrt_rtx.py")
    ),
    *(PACKAGE / "runtimes" / "tensorrt" / name for name in ("engine.py", "model.py", "refit.py")),
]
# What holds objects of the API where it is used.
API = {
    *("trt", "builder", "network", "config", "parser", "profile", "error", "tensor", "severity"),
    *("context", "runtime", "refitter", "runtime_config", "engine_api"),
}
# Not the API's: of Python's own objects under those names.
OURS = {"items", "get", "name", "value", "hint", "message", "errno"}
RTX_ONLY = {
    *("num_compute_capabilities", "set_compute_capability", "ComputeCapability"),
    *("create_runtime_config", "create_runtime_cache", "set_runtime_cache", "IRuntimeCache"),
    *("cuda_graph_strategy", "CudaGraphStrategy", "WHOLE_GRAPH_CAPTURE", "get_engine_validity"),
    *(
        "SUBOPTIMAL",
        "INVALID",
        "VALID",
        "get_runtime_cache",
        "EngineValidity",
        "EngineInvalidityDiagnostics",
        "engine_header_size",
    ),
}
CLASSIC_ONLY = {"create_timing_cache", "set_timing_cache", "get_timing_cache", "hardware_compatibility_level"}


def root(node):
    """Return the name that a chain of attributes and calls begins with."""
    while isinstance(node, (ast.Attribute, ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def used():
    """Yield (attribute, file:line) of everything that is asked of the API."""
    for path in SOURCES:
        if not path.exists():
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and root(node.value) in API and node.attr not in OURS:
                yield node.attr, f"{path.name}:{node.lineno}"


def test_something_is_found():
    names = {name for name, _ in used()}
    assert {"build_serialized_network", "STRONGLY_TYPED", "add_optimization_profile", "get_error"} <= names


def test_tensorrt_rtx_has_them():
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed")
    known = set(dir(trt))
    for name in dir(trt):
        known |= set(dir(getattr(trt, name)))
    assert not [at for at in used() if at[0] not in known and at[0] not in CLASSIC_ONLY]


def test_classic_tensorrt_has_them():
    try:
        listed = files("tensorrt-cu13-bindings") or []
    except PackageNotFoundError:
        pytest.skip("tensorrt-cu13-bindings is not installed")
    binary = next(path for path in listed if path.name == "tensorrt.so").locate()
    data = Path(binary).read_bytes()
    # The linker lets a string be the end of a longer one.
    known = set(re.findall(rb"[A-Za-z_0-9]+(?=\0)", data))
    tails = b"\0".join(known) + b"\0"
    at_run_time = {name for names in recording_trt.ATTRIBUTES["tensorrt"].values() for name in names}
    assert not [name for name in at_run_time if f"{name}\0".encode() not in tails]
    missing = [at for at in used() if at[0] not in RTX_ONLY and f"{at[0]}\0".encode() not in tails]
    assert not missing


def test_what_only_one_has_is_asked_of_that_one_alone():
    """The shared code uses nothing that only one of them has."""
    shared = {"backend.py", "builder_process.py"}
    wrong = [at for at in used() if at[0] in RTX_ONLY | CLASSIC_ONLY and at[1].split(":")[0] in shared]
    assert not wrong
