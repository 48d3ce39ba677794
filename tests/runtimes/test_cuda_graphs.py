"""`CudaGraphs`: what is captured, what is replayed, and with which buffers.

There is no GPU in CI. The stand-in is ONNX Runtime on the CPU behind a session that keeps to the rules of
CUDA graphs: an id is captured once, with its binding, and whoever replays it gets that binding's buffers.
The tests marked ``gpu`` run the real thing.
"""

import gc
import threading

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from session_graphs import bank, both, feeds, fitting, swap, wanted, wanted_blend
from small_graphs import error

from lora_export import AdapterSession, BackendError
from lora_export.runtimes.ort.cuda_graphs import CudaGraphs
from lora_export.runtimes.ort.device import DeviceMemory, host_value

A, B = both(1), both(2, rank=4)
gpu = pytest.mark.skipif(
    "CUDAExecutionProvider" not in ort.get_available_providers(), reason="onnxruntime has no CUDA provider"
)


class CapturingSession:
    """An ONNX Runtime session with ``gpu_graph_id`` as the CUDA provider understands it.

    Attributes:
        runs: The id of each run, in order.
    """

    def __init__(self, session):
        self._session, self._captured, self._threads = session, {}, set()
        self.runs = []
        self.fails = False

    def io_binding(self):
        return self._session.io_binding()

    def run_with_iobinding(self, binding, options):
        graph = int(options.get_run_config_entry("gpu_graph_id"))
        self.runs.append(graph)
        self._threads.add(threading.get_ident())
        assert len(self._threads) == 1, "graphs belong to one thread"
        assert graph, "0 is every run without an id"
        if graph != -1:
            if self.fails and graph not in self._captured:
                raise RuntimeError("operation not permitted when stream is capturing")
            binding = self._captured.setdefault(graph, binding)
        self._session.run_with_iobinding(binding)


class Memory(DeviceMemory):
    """The CPU's memory, read as a device's is: into memory of the host's own."""

    def read(self, value):
        return super().read(value).copy()


@pytest.fixture
def session(tmp_path):
    """Return a session on the CPU whose runs go through `CudaGraphs`, at most four of them."""
    return captured_session(swap(tmp_path), 4)


def captured_session(path, limit):
    made = AdapterSession(path, threads=1)
    model = made._model
    model.graphs = CudaGraphs(CapturingSession(model.session), Memory("cpu"), limit)
    return made


def runs(session):
    return session._model.graphs._session.runs


def test_a_graph_for_each_adapter_and_shape(session):
    session.load_adapter("a", A)
    session.load_adapter("b", B)
    for batch, name, given in [(4, "a", A), (4, "b", B), (2, "a", A), (4, None, None)] * 3:
        inputs = feeds(batch, seed=60 + len(runs(session)))
        assert error(session.run(inputs, name)["y"], wanted(given, inputs)) < 2e-6
    # First run of each: without capture, to learn the outputs' shapes; then its graph, again and again.
    assert runs(session) == [-1, 1, -1, 2, -1, 3, -1, 4, *[1, 2, 3, 4] * 2]
    assert session._model.graphs.count == 4


def test_answers_are_not_written_over(session):
    session.load_adapter("a", A)
    inputs, others = feeds(seed=1), feeds(seed=2)
    first = session.run(inputs, "a")["y"]
    kept = first.copy()
    second = session.run(others, "a")["y"]
    assert not np.array_equal(second, kept)
    assert np.array_equal(first, kept)
    assert np.array_equal(session.run(inputs, "a")["y"], kept)


def test_outputs_are_part_of_what_is_captured(session):
    inputs = feeds()
    assert list(session.run(inputs, outputs=["y"])) == ["y"]
    both_outputs = session.run(inputs)
    assert list(both_outputs) == ["y", "h"]
    assert str(both_outputs["h"].dtype) == "bfloat16"
    assert runs(session) == [-1, 1, -1, 2]


def test_feeds_that_are_tensors(session):
    inputs = feeds()
    tensors = {name: ort.OrtValue.ortvalue_from_numpy(values) for name, values in inputs.items()}
    for _ in range(2):
        assert error(session.run(tensors)["y"], wanted(None, inputs)) < 2e-6
    assert runs(session) == [-1, 1, 1]


def test_above_the_limit_runs_are_not_captured(session):
    for batch in range(1, 5):
        session.run(feeds(batch))
    with pytest.warns(RuntimeWarning, match="4 CUDA graphs are captured"):
        answer = session.run(feeds(5))["y"]
    assert error(answer, wanted(None, feeds(5))) < 2e-6
    assert runs(session)[-1] == -1
    session.run(feeds(2))
    assert runs(session)[-1] == 2


def test_an_adapter_that_is_replaced_takes_its_graphs_along(session):
    inputs = feeds()
    session.load_adapter("a", A)
    session.run(inputs, "a")
    session.load_adapter("a", B, replace=True)
    gc.collect()
    assert not list(session._model.graphs._captured)
    assert error(session.run(inputs, "a")["y"], wanted(B, inputs)) < 2e-6
    assert runs(session) == [-1, 1, -1, 2]


def test_a_capture_that_fails_is_said_and_uses_up_its_id(session):
    session._model.graphs._session.fails = True
    with pytest.raises(BackendError, match="not permitted when stream is capturing"):
        session.run(feeds())
    session._model.graphs._session.fails = False
    assert error(session.run(feeds())["y"], wanted(None, feeds())) < 2e-6
    assert runs(session) == [-1, 1, -1, 2]


def test_a_bank_needs_one_graph_for_all_rows(tmp_path):
    first, second = fitting(1, 0), fitting(2, 1)
    session = captured_session(bank(tmp_path, "constants", first, second), 4)
    inputs = feeds(2)
    for rows in (["emotion", None], [None, "summary"], ["summary", "emotion"]):
        given = {"emotion": [(first, 1.0)], "summary": [(second, 1.0)], None: []}
        answer = session.run(inputs, adapters=rows)["y"]
        for row, name in enumerate(rows):
            assert error(answer[row], wanted_blend(given[name], inputs, row)) < 2e-6
    assert runs(session) == [-1, 1, 1, 1]


def test_threads_take_turns(session):
    session.load_adapter("a", A)
    session.load_adapter("b", B)
    inputs, failures = feeds(), []
    bits = {name: session.run(inputs, name)["y"] for name in ("a", "b", None)}

    def loop(name):
        for _ in range(50):
            if not np.array_equal(session.run(inputs, name)["y"], bits[name]):
                failures.append(name)

    threads = [threading.Thread(target=loop, args=(name,)) for name in ("a", "b", None) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "float16", "int64", "bool", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
)
def test_tensors_come_back_as_they_went(dtype):
    values = np.arange(6).reshape(2, 3).astype(getattr(ml_dtypes, dtype, None) or dtype)
    memory = DeviceMemory("cpu")
    for given in (values, values.T, values[:0]):
        tensor = memory.put(given)
        back = memory.read(tensor)
        assert back.dtype == given.dtype
        assert np.array_equal(back, given)
        assert memory.like(tensor).data_type() == tensor.data_type() == host_value(values).data_type()


def test_outputs_of_a_graph_are_not_handed_out(session):
    with pytest.raises(BackendError, match="overwritten by the next run"):
        session.run_ortvalues(feeds())


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_swap_on_cuda(tmp_path, cuda_graph):
    session = AdapterSession(swap(tmp_path), provider="cuda", cuda_graph=cuda_graph)
    session.load_adapter("a", A)
    session.load_adapter("b", B)
    first = session.run(feeds(), "a")["y"]
    for seed in (1, 2, 3):
        for name, given in (("a", A), ("b", B), (None, None)):
            inputs = feeds(seed=seed)
            # TF32 is ONNX Runtime's default for float32 products on CUDA.
            assert error(session.run(inputs, name)["y"], wanted(given, inputs)) < 2e-3
    assert np.array_equal(session.run(feeds(), "a")["y"], first)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_bank_on_cuda(tmp_path, cuda_graph):
    first, new = fitting(1, 0), fitting(3, 2)
    path = bank(tmp_path, "defaults", first, fitting(2, 1))
    session = AdapterSession(path, provider="cuda", cuda_graph=cuda_graph)
    inputs = feeds(2)
    session.run(inputs, adapters=["emotion", None])
    session.load_adapter("new", new)
    answer = session.run(inputs, adapters=["emotion", "new"])["y"]
    for row, given in enumerate((first, new)):
        assert error(answer[row], wanted_blend([(given, 1.0)], inputs, row)) < 2e-3
