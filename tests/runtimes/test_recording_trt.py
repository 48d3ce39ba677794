"""The stand-ins for TensorRT and CUDA have the real bindings' names and arguments, and nothing else."""

import inspect
import re

import pytest
import recording_cuda
import recording_trt


def overloads(function):
    """Return the argument names of each overload of a pybind function, without self."""
    found = []
    for line in (function.__doc__ or "").splitlines():
        if matched := re.match(r"(?:\d+\. )?\w+\((.*)\) -> ", line):
            names = re.findall(r"(?:^|, )(\w+): ", matched.group(1))
            found.append([name for name in names if name != "self"])
    return found


REAL = [
    pytest.param(owner, name, id=f"{owner}.{name}")
    for owner, names in recording_trt.ATTRIBUTES["tensorrt_rtx"].items()
    for name in ("__init__", *names)
]


@pytest.mark.parametrize(("owner", "name"), REAL)
def test_names_and_arguments_are_the_bindings(owner, name):
    real = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed")
    ours, theirs = getattr(recording_trt, owner), getattr(real, owner)
    if name == "__init__" and owner not in ("Runtime", "Refitter", "Weights", "ILogger"):
        return  # not made by us
    assert hasattr(theirs, name), f"{owner} has no {name}"
    function = getattr(ours, name, None)
    if not inspect.isfunction(function):
        return
    arguments = [parameter for parameter in inspect.signature(function).parameters if parameter != "self"]
    known = overloads(getattr(theirs, name))
    if name == "create_execution_context":  # one overload for each
        assert all([argument] in known for argument in arguments), known
    else:
        assert any(arguments == names[: len(arguments)] for names in known), known


def test_the_stand_in_offers_nothing_else():
    for owner, names in recording_trt.ATTRIBUTES["tensorrt_rtx"].items():
        made = getattr(recording_trt, owner)
        offered = set(getattr(made, "__members__", None) or vars(made))
        public = {name for name in offered if not name.startswith("_")}
        assert public <= set(names) or issubclass(made, int), owner


@pytest.mark.parametrize("name", recording_cuda.FUNCTIONS)
def test_cuda_functions_are_the_bindings(name):
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    ours = list(inspect.signature(getattr(recording_cuda.RecordingCuda, name)).parameters)[1:]
    assert ours == list(inspect.signature(getattr(runtime, name)).parameters)


@pytest.mark.parametrize("name", recording_cuda.ENUMERATIONS)
def test_cuda_enumerations_are_the_bindings(name):
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    for member in recording_cuda.ENUMERATIONS[name]:
        ours = getattr(getattr(recording_cuda.RecordingCuda, name), member)
        assert int(getattr(getattr(runtime, name), member)) == ours
    assert runtime.cudaStreamNonBlocking == 1
