"""CUDA graphs of engines: what runs of classic TensorRT are captured with; TensorRT-RTX does it itself."""

import gc

import engine_files
import numpy as np
import pytest
import recording_trt
from engine_files import engine_of
from session_graphs import bank, base, both, feeds, fitting, swap, wanted, wanted_blend
from small_graphs import error

from lora_export import AdapterSession, BackendError, EngineSession

A, B, C = both(1), both(2, rank=4), both(3)
machine = engine_files.machine


def open_session(tmp_path, backend="tensorrt", **options):
    engine = engine_of(swap(tmp_path, flavour="tensorrt"), backend=backend)
    session = AdapterSession(engine, cuda_graph=True, **options)
    for name, given in (("a", A), ("b", B), ("c", C)):
        session.load_adapter(name, given)
    return session


def check(session, *requests):
    for number, (batch, name) in enumerate(requests):
        inputs = feeds(batch, seed=60 + number)
        given = {"a": A, "b": B, "c": C, None: None}[name]
        assert error(session.run(inputs, name)["y"], wanted(given, inputs)) < 2e-6


def count(machine, *names):
    return len(machine.named(*names)) or len(machine.cuda.named(*names))


def test_a_graph_for_each_ranks_and_shapes_whichever_adapter(machine, tmp_path):
    session = open_session(tmp_path)
    check(session, (4, "a"), (4, "c"), (4, "a"))  # the same ranks
    assert count(machine, "cudaStreamEndCapture") == 1
    assert count(machine, "cudaGraphLaunch") == 3
    check(session, (4, "b"), (4, None), (2, "c"), (2, "a"))
    assert count(machine, "cudaStreamEndCapture") == 4
    check(session, *[(4, "a"), (4, "b"), (2, "c"), (4, None)] * 2)
    assert count(machine, "cudaStreamEndCapture") == 4


def test_a_replay_asks_tensorrt_nothing(machine, tmp_path):
    session = open_session(tmp_path)
    check(session, (4, "a"))
    before = len(machine.calls)
    check(session, (4, "a"), (4, "c"))
    assert machine.calls[before:] == []


def test_an_adapter_is_copied_once_when_it_takes_anothers_place(machine, tmp_path):
    session = open_session(tmp_path)
    check(session, (4, "a"), (4, "c"))

    def within():
        return [call for call in machine.cuda.named("cudaMemcpyAsync") if call[4] == 3]

    before = len(within())
    check(session, (4, "c"), (4, "c"))
    assert len(within()) == before
    check(session, (4, "a"), (4, "a"))
    assert len(within()) == before + 1


def test_each_graph_has_its_context_and_all_share_the_scratch(machine, tmp_path):
    session = open_session(tmp_path)
    check(session, (4, "a"), (2, "a"))
    managed = recording_trt.ExecutionContextAllocationStrategy.USER_MANAGED
    strategies = [call[1] for call in machine.named("create_execution_context")]
    assert strategies == [None, managed, managed]
    sizes = list(machine.cuda.allocated().values())
    assert sizes.count(recording_trt.ICudaEngine.device_memory_size_v2) == 1


def test_answers_are_not_written_over(machine, tmp_path):
    session = open_session(tmp_path)
    first = session.run(feeds(seed=1), "a")["y"]
    kept = first.copy()
    session.run(feeds(seed=2), "a")
    assert np.array_equal(first, kept)
    assert np.array_equal(session.run(feeds(seed=1), "a")["y"], kept)
    with pytest.raises(BackendError, match="overwritten by the next run"):
        session.run_on_device(feeds(), "a")


def test_above_the_limit_runs_are_not_captured(machine, tmp_path):
    session = open_session(tmp_path, max_cuda_graphs=2)
    check(session, (1, "a"), (2, "a"))
    with pytest.warns(RuntimeWarning, match="2 CUDA graphs are captured"):
        check(session, (3, "a"))
    check(session, (1, "c"), (2, "a"))
    assert count(machine, "cudaStreamEndCapture") == 2


def test_an_adapter_that_is_replaced(machine, tmp_path):
    session = open_session(tmp_path)
    check(session, (4, "a"))
    session.load_adapter("a", C, replace=True)
    gc.collect()
    inputs = feeds()
    assert error(session.run(inputs, "a")["y"], wanted(C, inputs)) < 2e-6


def test_a_capture_that_fails_is_said_and_tried_again(machine, tmp_path, monkeypatch):
    session = open_session(tmp_path)
    real = recording_trt.IExecutionContext.execute_async_v3

    def failing(self, stream_handle):
        if machine.cuda.is_capturing(stream_handle):
            machine.cuda.fail_capture(stream_handle)
            return False
        return real(self, stream_handle)

    monkeypatch.setattr(recording_trt.IExecutionContext, "execute_async_v3", failing)
    with pytest.raises(BackendError, match="could not run the engine"):
        session.run(feeds(), "a")
    monkeypatch.setattr(recording_trt.IExecutionContext, "execute_async_v3", real)
    check(session, (4, "a"), (4, "c"))


def test_a_bank_needs_one_graph_for_all_rows_and_adapters(machine, tmp_path):
    session = AdapterSession(engine_of(bank(tmp_path, "inputs"), backend="tensorrt"), cuda_graph=True)
    one, two = fitting(1, 0), fitting(2, 1)
    session.load_adapter("emotion", one)
    inputs = feeds(2)
    got = session.run(inputs, adapters=["emotion", None])["y"]
    assert error(got[0], wanted_blend([(one, 1.0)], inputs, 0)) < 2e-6
    session.load_adapter("summary", two)
    got = session.run(inputs, adapters=["summary", "emotion"])["y"]
    for row, given in enumerate((two, one)):
        assert error(got[row], wanted_blend([(given, 1.0)], inputs, row)) < 2e-6
    assert count(machine, "cudaStreamEndCapture") == 1


def test_an_engine_without_lora(machine, tmp_path):
    session = EngineSession(engine_of(base(tmp_path), backend="tensorrt"), cuda_graph=True)
    for seed in range(3):
        assert error(session.run(feeds(seed=seed))["y"], wanted(None, feeds(seed=seed))) < 2e-6
    assert count(machine, "cudaGraphLaunch") == 3
    session.close()
    del session
    gc.collect()
    assert not machine.cuda.allocated()


def test_tensorrt_rtx_captures_itself_at_addresses_that_stay(machine, tmp_path):
    session = open_session(tmp_path, backend="tensorrt-rtx")
    (call,) = machine.named("create_execution_context")
    assert call[2].cuda_graph_strategy == recording_trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    check(session, (4, "a"))
    before = len(machine.named("set_tensor_address"))
    check(session, (4, "c"), (4, "a"))
    assert len(machine.named("set_tensor_address")) == before
    check(session, (4, "b"), (2, None))
    assert not machine.cuda.named("cudaStreamBeginCapture")
    with pytest.raises(BackendError, match="overwritten by the next run"):
        session.run_on_device(feeds(), "a")
