"""The laws that a graph's session keeps, for engines.

They are run with a stand-in for TensorRT (`recording_trt`) in the host's memory; with the same in a real
GPU's memory, through the real CUDA (``gpu``); and by the compilers themselves on a GPU that they support,
where ``pytest -m rtx`` (TensorRT-RTX) and ``pytest -m tensorrt`` (classic) build the engines and run them.

merge(x) = base(x) + scaling·B·A·x · without an adapter the base · A→B→A gives A again · permuted rows give
permuted outputs · bank row i = swap with adapter i.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import engine_files
import numpy as np
import pytest
import tiny
from session_graphs import base, both, feeds, linear, swap, wanted
from small_graphs import adapter, error, random

import lora_export
from lora_export import AdapterSession, EngineSession, bank_onnx, convert_adapter, save_adapter, swap_onnx
from lora_export.machines.targets import RTX_COMPUTE_CAPABILITIES
from lora_export.runtimes.tensorrt.engine import gpu_compute_capability

A, B = both(1), both(2, rank=4)
machine, gpu_machine = engine_files.machine, engine_files.gpu_machine


@dataclass
class Place:
    """Where engines run.

    Attributes:
        engine: Graph → engine.
        tolerance: Of float32 results.
        exact: Results of the same arithmetic are the same bits.
        captures: Runs can be captured as CUDA graphs.
    """

    engine: Callable[[Path], Path]
    tolerance: float
    exact: bool
    captures: bool = True

    def same(self, one: np.ndarray, two: np.ndarray) -> bool:
        return np.array_equal(one, two) if self.exact else error(one, two) < self.tolerance


PLACES = [
    "stand-in",
    *(pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("gpu", "rtx", "tensorrt")),
]


@pytest.fixture(params=PLACES)
def place(request, tmp_path):
    if request.param == "stand-in":
        request.getfixturevalue("machine")
        return Place(engine_files.engine_of, 2e-6, exact=True)
    here = gpu_compute_capability()
    if here is None:
        pytest.skip("no NVIDIA GPU, or no cuda-bindings")
    if request.param == "gpu":
        request.getfixturevalue("gpu_machine")
        fields = {"backend": "tensorrt", "compute_capabilities": (here,)}
        return Place(lambda onnx: engine_files.engine_of(onnx, **fields), 2e-6, exact=True, captures=False)
    backend = {"rtx": "tensorrt-rtx"}.get(request.param, request.param)
    if backend == "tensorrt-rtx" and here not in RTX_COMPUTE_CAPABILITIES:
        pytest.skip(f"TensorRT-RTX does not support compute capability {here}")
    if backend == "tensorrt-rtx" and here == "7.5":
        pytest.skip("TensorRT-RTX multiplies no float32 on compute capability 7.5")
    pytest.importorskip(backend.replace("-", "_"), reason=f"{backend} is not installed")

    def build(onnx: Path) -> Path:
        target = f"sm{here.replace('.', '')}"
        report = lora_export.build_engine(onnx, target, tmp_path / "engines", backend=backend)
        return report.engines[0].path

    # Kernels are compiled for a shape while it runs: the same request may be summed in another order later.
    return Place(build, 1e-4, exact=False)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_each_adapter_adds_scaling_b_a_x_and_a_b_a_gives_a_again(place, tmp_path, cuda_graph):
    if cuda_graph and not place.captures:
        pytest.skip("what the stand-in computes is no work of the GPU")
    session = AdapterSession(place.engine(swap(tmp_path, flavour="tensorrt")), cuda_graph=cuda_graph)
    session.load_adapter("a", A)
    session.load_adapter("b", B)
    inputs, answers = feeds(), []
    for name, given in (("a", A), ("b", B), (None, None), ("a", A)):
        answers.append(session.run(inputs, name)["y"])
        assert error(answers[-1], wanted(given, inputs)) < place.tolerance
    assert place.same(answers[0], answers[3])
    assert error(answers[0], answers[1]) > 1e3 * place.tolerance


def test_without_an_adapter_it_is_the_base(place, tmp_path):
    plain, graph = base(tmp_path), swap(tmp_path, flavour="tensorrt")
    with AdapterSession(place.engine(graph)) as session, EngineSession(place.engine(plain)) as original:
        assert place.same(session.run(feeds())["y"], original.run(feeds())["y"])


def test_permuted_rows_give_permuted_outputs(place, tmp_path):
    session = AdapterSession(place.engine(swap(tmp_path, flavour="tensorrt")))
    session.load_adapter("a", A)
    inputs = feeds()
    turned = {**inputs, "x": inputs["x"][::-1].copy()}
    straight, reverse = session.run(inputs, "a")["y"], session.run(turned, "a")["y"]
    assert error(reverse[::-1], straight) < place.tolerance
    assert error(straight[::-1], straight) > 1e3 * place.tolerance


@pytest.mark.parametrize("resident", ["initializers", "inputs"])
def test_a_banks_row_is_a_swap_with_that_rows_adapter(place, tmp_path, resident):
    graph = swap(tmp_path, flavour="tensorrt")
    bank_onnx(
        tmp_path / "base.onnx",
        {"a": A, "b": B},
        tmp_path / "bank.onnx",
        resident=resident,
        flavour="tensorrt",
        batch_input="x",
    )
    one, many = AdapterSession(place.engine(graph)), AdapterSession(place.engine(tmp_path / "bank.onnx"))
    for name, given in (("a", A), ("b", B)):
        one.load_adapter(name, given)
        if resident == "inputs":
            many.load_adapter(name, given)
    inputs, rows = feeds(), ["b", None, "a", "b"]
    got = many.run(inputs, adapters=rows)["y"]
    for number, name in enumerate(rows):
        assert error(got[number], one.run(inputs, name)["y"][number]) < place.tolerance


def test_a_converted_adapter_is_the_same(place, tmp_path):
    graph = swap(tmp_path, flavour="tensorrt")
    session = AdapterSession(place.engine(graph))
    session.load_adapter("direct", A)
    for suffix in ("safetensors", "onnx_adapter"):
        converted = tmp_path / f"a.{suffix}"
        convert_adapter(save_adapter(A, tmp_path / suffix), graph, converted)
        session.load_adapter(suffix, converted)
        assert place.same(session.run(feeds(), suffix)["y"], session.run(feeds(), "direct")["y"])


def test_dora_beside_plain_adapters(place, tmp_path):
    graph = swap(tmp_path, flavour="tensorrt", dora=True)
    session = AdapterSession(place.engine(graph), source=graph)
    module = dataclasses.replace(linear("q", 6), magnitude=1 + np.abs(random(3, seed=21)))
    session.load_adapter("dora", adapter(module))
    session.load_adapter("plain", A)
    inputs = feeds()
    assert error(session.run(inputs, "plain")["y"], wanted(A, inputs)) < place.tolerance
    assert error(session.run(inputs)["y"], wanted(None, inputs)) < place.tolerance
    onnx_session = AdapterSession(graph, threads=1)
    onnx_session.load_adapter("dora", adapter(module))
    same = onnx_session.run(inputs, "dora")["y"]
    assert error(session.run(inputs, "dora")["y"], same) < place.tolerance


ZOO = [pytest.param(arch, marks=pytest.mark.xdist_group(arch)) for arch in ("llama", "gpt2", "conv")]


@pytest.mark.parametrize("arch", ZOO)
def test_models_answer_as_peft_does(place, tmp_path, arch):
    options = {"checkpoint": tiny.checkpoint(arch)} if arch == "conv" else {}
    given = {"a": tiny.adapter(arch), "b": tiny.adapter(arch, "patterns", 1)}
    graph = tmp_path / "swap.onnx"
    base_graph, both_of_them = tiny.base_onnx(arch, "dynamo"), list(given.values())
    swap_onnx(base_graph, graph, adapter=both_of_them, flavour="tensorrt", **options)
    session = AdapterSession(place.engine(graph))
    for name, path in given.items():
        session.load_adapter(name, path)
    inputs = tiny.feeds(arch, graph)
    for name in ("a", "b", "a", None):
        answer = next(iter(session.run(inputs, name).values()))
        wanted_answer = tiny.reference(arch, given[name]) if name else tiny.base_reference(arch)
        assert tiny.relative_error(answer, wanted_answer) < place.tolerance
