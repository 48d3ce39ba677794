"""Engines run: the calls to TensorRT and CUDA, their order and their number, and every refusal.

No engine is executed here. A stand-in keeps the API's rules and computes with ONNX Runtime (`recording_trt`);
that it has the real API's names and arguments is checked against the installed bindings of TensorRT-RTX.
`test_rtx_laws` runs the same session with a real engine where there is a GPU.
"""

import dataclasses
import gc
import threading

import engine_files
import ml_dtypes
import numpy as np
import pytest
from engine_files import engine_of
from session_graphs import bank, base, both, feeds, fitting, linear, swap, wanted, wanted_blend
from small_graphs import adapter, error, graph, random, save

from lora_export import AdapterError, AdapterSession, BackendError, EngineSession, GraphError, save_adapter
from lora_export.runtimes.tensorrt.cuda import DeviceTensor

A, B = both(1), both(2, rank=4)
machine = engine_files.machine


def swap_engine(tmp_path, **options):
    return engine_of(swap(tmp_path, flavour="tensorrt"), **options)


@pytest.fixture
def session(machine, tmp_path):
    made = AdapterSession(swap_engine(tmp_path))
    made.load_adapter("a", A)
    made.load_adapter("b", B)
    return made


# --- what is called, in which order, how often ---------------------------------------------------------


def test_the_first_run_binds_everything_in_order(machine, session):
    before, copies = len(machine.calls), len(machine.cuda.calls)
    session.run(feeds(), "a")
    calls = [(call[0], call[1]) if len(call) > 1 else call for call in machine.calls[before:]]
    assert calls == [
        ("set_optimization_profile_async", 0),
        ("set_input_shape", "x"),
        ("set_tensor_address", "x"),
        ("set_tensor_address", "shift"),  # its shape is fixed in the graph
        *[
            (method, f"{path}.lora_{factor}.weight")
            for path in ("p", "q")
            for factor in ("A", "B")
            for method in ("set_input_shape", "set_tensor_address")
        ],
        ("infer_shapes",),
        ("set_tensor_address", "y"),
        ("set_tensor_address", "h"),
        ("execute_async_v3", 1),
    ]
    after_execute = [call[0] for call in machine.cuda.calls[copies:]][-3:]
    assert after_execute == ["cudaMemcpyAsync", "cudaMemcpyAsync", "cudaStreamSynchronize"]


def test_the_same_again_binds_nothing(machine, session):
    session.run(feeds(), "a")
    before = len(machine.calls)
    session.run(feeds(seed=3), "a")
    assert machine.calls[before:] == [("execute_async_v3", 1)]


def test_another_adapter_of_the_same_ranks_binds_its_addresses_alone(machine, session):
    session.load_adapter("c", both(3))
    session.run(feeds(), "a")
    before = len(machine.calls)
    session.run(feeds(), "c")
    assert {call[0] for call in machine.calls[before:]} == {"set_tensor_address", "execute_async_v3"}
    assert len(machine.calls[before:]) == 5


def test_no_run_copies_lora_tensors(machine, session):
    inputs = feeds()
    sizes = {values.nbytes for values in inputs.values()} | {4 * 3 * 4, 4 * 3 * 2}  # x, shift, y, h
    for name in ("a", "b", None, "a"):
        before = len(machine.cuda.named("cudaMemcpyAsync"))
        session.run(inputs, name)
        copies = machine.cuda.named("cudaMemcpyAsync")[before:]
        assert len(copies) == 4
        assert {size for _, _, _, size, _ in copies} <= sizes


def test_an_adapter_goes_to_the_gpu_in_one_copy(machine, session):
    before = len(machine.cuda.calls)
    session.load_adapter("c", both(3))
    calls = [call[0] for call in machine.cuda.calls[before:]]
    assert calls == ["cudaMalloc", "cudaMemcpyAsync", "cudaStreamSynchronize"]


def test_another_shape_is_inferred_anew_and_buffers_grow_only(machine, session):
    for batch in (4, 16, 2, 16):
        inputs = feeds(batch)
        assert error(session.run(inputs, "a")["y"], wanted(A, inputs)) < 2e-6
    before = len(machine.cuda.named("cudaMalloc"))
    session.run(feeds(3), "a")
    assert len(machine.cuda.named("cudaMalloc")) == before
    assert len(machine.named("infer_shapes")) == 5


def test_chosen_outputs_are_the_only_ones_read(machine, session):
    session.run(feeds(), "a")
    before = len(machine.cuda.named("cudaMemcpyAsync"))
    answer = session.run(feeds(), "a", outputs=["h"])
    assert list(answer) == ["h"]
    assert answer["h"].dtype == ml_dtypes.bfloat16
    assert len(machine.cuda.named("cudaMemcpyAsync")) == before + 3
    with pytest.raises(BackendError, match="no output 'v'"):
        session.run(feeds(), "a", outputs=["v"])


def test_an_unloaded_adapter_leaves_the_gpu(machine, session):
    session.run(feeds(), "a")
    before = sum(machine.cuda.allocated().values())
    session.unload_adapter("a")
    gc.collect()
    assert sum(machine.cuda.allocated().values()) < before
    session.load_adapter("a", B)  # perhaps at the same address
    assert error(session.run(feeds(), "a")["y"], wanted(B, feeds())) < 2e-6


def test_outputs_stay_on_the_gpu_and_are_fed_again(machine, session):
    inputs = feeds()
    first = session.run_on_device(inputs, "a")
    assert isinstance(first["y"], DeviceTensor)
    again = session.run_on_device(inputs, "b")
    assert error(first["y"].numpy(), wanted(A, inputs)) < 2e-6
    assert error(again["y"].numpy(), wanted(B, inputs)) < 2e-6
    # y of one run is x of the next in another engine's place: here only its shift.
    tensor = session.run_on_device({**inputs, "x": inputs["x"][:1]}, "a")["y"]
    shift = DeviceTensor(tensor.buffer, 0, (3,), tensor.dtype)
    before = len(machine.cuda.named("cudaMemcpyAsync"))
    fed = session.run({**inputs, "shift": shift}, "b")["y"]
    assert len(machine.cuda.named("cudaMemcpyAsync")) == before + 3
    assert error(fed, wanted(B, {**inputs, "shift": tensor.numpy()[0]})) < 2e-6
    with pytest.raises(BackendError, match="has no OrtValue"):
        session.run_ortvalues(inputs)


def test_a_failure_binds_everything_anew(machine, session):
    session.run(feeds(), "a")
    machine.fails = {"execute_async_v3"}
    with pytest.raises(BackendError, match="TensorRT could not run the engine") as failed:
        session.run(feeds(), "a")
    assert failed.value.problems == ("execute_async_v3 failed",)
    machine.fails, before = set(), len(machine.calls)
    assert error(session.run(feeds(), "a")["y"], wanted(A, feeds())) < 2e-6
    assert len(machine.calls) - before == 16  # as many as in a first run


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("set_optimization_profile_async", "use profile 'default'"),
        ("set_input_shape", r"take x of shape \(4, 4\)"),
        ("set_tensor_address", "bind x"),
    ],
)
def test_tensorrts_own_refusals_are_said(machine, session, method, words):
    machine.fails = {method}
    with pytest.raises(BackendError, match=words) as failed:
        session.run(feeds(), "a")
    assert failed.value.problems == (f"{method} failed",)


def test_no_memory(machine, session):
    machine.cuda.limit_bytes = 0
    with pytest.raises(BackendError, match="take 1024 bytes of memory: cudaErrorMemoryAll") as full:
        session.load_adapter("c", both(3))
    assert "max_adapters" in full.value.hint
    assert session.adapters == ["a", "b"]


def test_runs_take_turns(machine, session):
    inputs, failures = feeds(), []
    bits = {name: session.run(inputs, name)["y"] for name in ("a", "b", None)}

    def loop(name):
        try:
            for number in range(30):
                assert np.array_equal(session.run(inputs, name)["y"], bits[name])
                if name == "a" and number % 10 == 0:
                    session.load_adapter("passing", both(number), replace=True)
        except BaseException as failure:  # to be shown by the test, from whatever thread
            failures.append(failure)

    threads = [threading.Thread(target=loop, args=(name,)) for name in ("a", "b", None) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


# --- adapters ------------------------------------------------------------------------------------------


def test_an_evicted_adapter_comes_back_the_same(machine, tmp_path):
    session = AdapterSession(swap_engine(tmp_path), max_adapters=2)
    session.load_adapter("a", save_adapter(A, tmp_path / "a"))
    y = session.run(feeds(), "a")["y"]
    session.load_adapter("b", B)
    session.load_adapter("c", both(3))
    assert session.on_device == ["b", "c"]
    assert np.array_equal(session.run(feeds(), "a")["y"], y)
    assert session.on_device == ["c", "a"]


def test_ranks_beyond_the_profile_are_refused_when_the_adapter_is_loaded(machine, tmp_path):
    shapes = {f"{path}.lora_{factor}.weight": ranks(path, factor, 1, 4) for path in "pq" for factor in "AB"}
    session = AdapterSession(swap_engine(tmp_path, profiles={"small": shapes}))
    with pytest.raises(AdapterError, match="the engine was built for other ranks") as refused:
        session.load_adapter("b", both(2, rank=5))
    assert refused.value.problems == (
        "p.lora_A.weight (4, 5): profile 'small' takes (4, 1..4)",
        "p.lora_B.weight (5, 5): profile 'small' takes (1..4, 5)",
        "q.lora_A.weight (5, 6): profile 'small' takes (5, 1..4)",
        "q.lora_B.weight (6, 3): profile 'small' takes (1..4, 3)",
    )
    assert "rank=MIN:OPT:MAX" in refused.value.hint
    assert session.adapters == []


def ranks(path, factor, low, high):
    """Return the shapes of a profile that takes ranks from ``low`` to ``high``."""
    out_dim, in_dim = {"p": (5, 4), "q": (3, 5)}[path]
    return tuple((in_dim, rank) if factor == "A" else (rank, out_dim) for rank in (low, high, high))


def test_ranks_below_the_profile_are_padded_and_the_base_is_zeros_of_the_smallest(machine, tmp_path):
    shapes = {f"{path}.lora_{factor}.weight": ranks(path, factor, 4, 8) for path in "pq" for factor in "AB"}
    session = AdapterSession(swap_engine(tmp_path, profiles={"large": shapes}))
    notes = session.load_adapter("a", A)
    assert "4 tensors padded with zeros to the smallest rank that the engine takes" in notes
    assert error(session.run(feeds(), "a")["y"], wanted(A, feeds())) < 2e-6
    session.run(feeds())
    bound = {call[1]: call[2] for call in machine.named("set_input_shape")}
    assert bound["p.lora_A.weight"] == (4, 4)
    assert error(session.run(feeds())["y"], wanted(None, feeds())) < 2e-6


def test_a_rank_of_zero_is_bound_as_one_of_zeros(machine, tmp_path):
    shapes = {f"{path}.lora_{factor}.weight": ranks(path, factor, 0, 8) for path in "pq" for factor in "AB"}
    session = AdapterSession(swap_engine(tmp_path, profiles={"any": shapes}))
    session.run(feeds())
    assert {call[2] for call in machine.named("set_input_shape")} >= {(4, 1), (1, 5), (5, 1), (1, 3)}


def test_what_an_adapter_leaves_alone_is_the_base(machine, tmp_path):
    session = AdapterSession(swap_engine(tmp_path))
    only_q = adapter(linear("q", 5))
    session.load_adapter("full", A)
    session.load_adapter("q", only_q)
    session.run(feeds(), "full")
    assert error(session.run(feeds(), "q")["y"], wanted(only_q, feeds())) < 2e-6


def test_dora_needs_the_graph(machine, tmp_path):
    onnx = swap(tmp_path, flavour="tensorrt", dora=True)
    engine = engine_of(onnx)
    module = dataclasses.replace(linear("q", 6), magnitude=1 + np.abs(random(3, seed=21)))
    with pytest.raises(AdapterError, match=r"needs the base's weight q\.weight") as refused:
        AdapterSession(engine).load_adapter("dora", adapter(module))
    assert "source=" in refused.value.hint
    assert "convert-adapter" in refused.value.hint
    session, graph_session = AdapterSession(engine, source=onnx), AdapterSession(onnx)
    for opened in (session, graph_session):
        opened.load_adapter("dora", adapter(module))
    one, two = (opened.run(feeds(), "dora")["y"] for opened in (session, graph_session))
    assert error(one, two) < 1e-6


def test_another_source_is_refused(machine, tmp_path):
    engine, other = swap_engine(tmp_path), swap(tmp_path, "other.onnx", flavour="tensorrt", dora=True)
    with pytest.raises(BackendError, match=r"was not built from .*other\.onnx as it is now") as refused:
        AdapterSession(engine, source=other)
    assert refused.value.problems[0].startswith("swap.onnx: sha256 ")


# --- banks ---------------------------------------------------------------------------------------------


def test_a_bank_of_inputs_is_filled_while_it_runs(machine, tmp_path):
    session = AdapterSession(engine_of(bank(tmp_path, "inputs")))
    one, two = fitting(1, 0), fitting(2, 1)
    inputs = feeds(3)
    assert (
        error(session.run(inputs)["y"], np.stack([wanted_blend([], inputs, row) for row in range(3)])) < 2e-6
    )
    session.load_adapter("emotion", one)
    session.load_adapter("summary", two)
    rows = [
        ({"emotion": 1.0}, [(one, 1.0)]),
        (None, []),
        ({"emotion": 0.5, "summary": 2}, [(one, 0.5), (two, 2)]),
    ]
    got = session.run(inputs, adapters=[said for said, _ in rows])["y"]
    for number, (_, blend) in enumerate(rows):
        assert error(got[number], wanted_blend(blend, inputs, number)) < 2e-6
    session.unload_adapter("emotion")
    got = session.run(inputs, adapters=["summary", None, "summary"])["y"]
    assert error(got[0], wanted_blend([(two, 1.0)], inputs, 0)) < 2e-6
    with pytest.raises(BackendError) as refused:
        session.run({**inputs, "lora.adapter_weights": np.zeros((3, 3), np.float32)})
    assert refused.value.problems == ("lora.adapter_weights: run(adapters=…) sets it",)


def test_a_bank_of_constants(machine, tmp_path):
    one, two = fitting(1, 0), fitting(2, 1)
    session = AdapterSession(engine_of(bank(tmp_path, "constants", one, two)))
    inputs = feeds(2)
    got = session.run(inputs, adapters=["summary", "emotion"])["y"]
    for row, given in enumerate((two, one)):
        assert error(got[row], wanted_blend([(given, 1.0)], inputs, row)) < 2e-6


# --- shapes, feeds, profiles ---------------------------------------------------------------------------


def test_all_shapes_that_do_not_fit_are_said(machine, session):
    with pytest.raises(BackendError, match="the feeds' shapes don't fit") as refused:
        session.run({"x": random(17, 4), "shift": random(4)}, "a")
    assert refused.value.problems == (
        "x (17, 4): profile 'default' takes (1..16, 4)",
        "shift (4,): the engine takes (3,)",
    )
    with pytest.raises(BackendError) as refused:
        session.run({**feeds(), "x": random(2, 2, 4)}, "a")
    assert refused.value.problems == ("x (2, 2, 4): profile 'default' takes (1..16, 4)",)
    assert error(session.run(feeds(), "a")["y"], wanted(A, feeds())) < 2e-6


def test_dimensions_of_one_name_have_one_size(machine, tmp_path):
    text = "g (float[b,4] x, float[b,4] z) => (float[b,4] y) { y = Add(x, z) }"
    session = EngineSession(engine_of(save(graph(text, {}), tmp_path)))
    with pytest.raises(BackendError) as refused:
        session.run({"x": random(2, 4), "z": random(3, 4)})
    assert refused.value.problems == ("z (3, 4): dimension 'b' is 3, in x it is 2",)


def test_all_that_is_wrong_with_the_feeds(machine, session):
    wrong = {"x": np.zeros((2, 4)), "z": np.zeros(1), "p.lora_A.weight": np.zeros((4, 2), np.float32)}
    with pytest.raises(BackendError, match="the feeds don't fit") as refused:
        session.run(wrong, "a")
    assert list(refused.value.problems) == [
        "x: float64, the engine takes float32",
        "z: not an input of the graph",
        "p.lora_A.weight: a LoRA tensor; load_adapter and run(adapter=…) set it",
        "shift: missing, float32 (3)",
    ]
    with pytest.raises(BackendError) as refused:
        session.run({**feeds(), "x": feeds()["x"].tolist()})
    assert refused.value.problems == ("x: list, wanted a numpy array or a DeviceTensor of run_on_device",)


PROFILES = {"short": {"x": ((1, 4), (2, 4), (4, 4))}, "long": {"x": ((4, 4), (8, 4), (64, 4))}}


def test_the_first_profile_that_takes_the_shapes(machine, tmp_path):
    session = AdapterSession(swap_engine(tmp_path, profiles=PROFILES))
    session.load_adapter("a", A)
    for batch in (2, 64, 4):
        inputs = feeds(batch)
        assert error(session.run(inputs, "a")["y"], wanted(A, inputs)) < 2e-6
    assert [call[1] for call in machine.named("set_optimization_profile_async")] == [0, 1, 0]
    with pytest.raises(BackendError) as refused:
        session.run(feeds(65), "a")
    assert refused.value.problems == (
        "x (65, 4): profile 'short' takes (1..4, 4)",
        "x (65, 4): profile 'long' takes (4..64, 4)",
    )


def test_a_named_profile(machine, tmp_path):
    engine = swap_engine(tmp_path, profiles=PROFILES)
    session = AdapterSession(engine, profile="long")
    session.run(feeds(4))
    assert [call[1] for call in machine.named("set_optimization_profile_async")] == [1]
    with pytest.raises(BackendError) as refused:
        session.run(feeds(2))
    assert refused.value.problems == ("x (2, 4): profile 'long' takes (4..64, 4)",)
    with pytest.raises(BackendError, match="has no profile 'lang'") as refused:
        AdapterSession(engine, profile="lang")
    assert refused.value.hint == "it has: short, long"


def test_profiles_whose_ranks_differ(machine, tmp_path):
    small = {f"{path}.lora_{factor}.weight": ranks(path, factor, 1, 3) for path in "pq" for factor in "AB"}
    profiles = {"short": PROFILES["short"] | small, "long": PROFILES["long"]}
    session = AdapterSession(swap_engine(tmp_path, profiles=profiles))
    session.load_adapter("a", A)
    session.load_adapter("b", B)
    inputs = feeds(4)
    session.run(inputs, "a")
    assert error(session.run(inputs, "b")["y"], wanted(B, inputs)) < 2e-6
    assert [call[1] for call in machine.named("set_optimization_profile_async")] == [0, 1]
    with pytest.raises(BackendError) as refused:
        session.run(feeds(2), "b")
    assert refused.value.problems == ("x (2, 4): profile 'long' takes (4..64, 4)",)


# --- engines without LoRA ------------------------------------------------------------------------------


def test_an_engine_of_a_plain_graph(machine, tmp_path):
    engine = engine_of(base(tmp_path))
    with EngineSession(engine) as session:
        assert session.record.backend == "tensorrt-rtx"
        answer = session.run(feeds())
        assert list(answer) == ["y", "h"]
        assert error(answer["y"], wanted(None, feeds())) < 2e-6
        assert list(session.run(feeds(), ["h"])) == ["h"]
        assert error(session.run_on_device(feeds())["y"].numpy(), wanted(None, feeds())) < 2e-6
    with pytest.raises(BackendError, match="is closed"):
        session.run(feeds())
    session.close()
    with pytest.raises(GraphError, match="has no exposed LoRA") as refused:
        AdapterSession(engine)
    assert "EngineSession" in refused.value.hint


def test_an_engine_with_lora_is_for_the_other_session(machine, tmp_path):
    with pytest.raises(BackendError, match="has LoRA tensors among its inputs") as refused:
        EngineSession(swap_engine(tmp_path))
    assert "AdapterSession" in refused.value.hint


def test_closing_gives_everything_back(machine, tmp_path):
    session = EngineSession(engine_of(base(tmp_path)))
    session.run(feeds())
    session.close()
    del session
    gc.collect()
    assert not machine.cuda.allocated()


def test_an_engine_whose_lora_became_constants(machine, tmp_path):
    engine = engine_of(swap(tmp_path))  # the flavour of ONNX Runtime: inputs with defaults
    with pytest.raises(GraphError, match="lacks 4 of the 4 inputs") as refused:
        AdapterSession(engine)
    assert "a tool has changed it since" in refused.value.hint
