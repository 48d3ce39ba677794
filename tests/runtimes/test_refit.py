"""`MergedEngine`: which weights a switch writes, that A→B→A is A, and every refusal.

Nothing here is TensorRT: see `recording_trt`. A refittable engine needs a GPU to be built and to run.
"""

import dataclasses

import engine_files
import ml_dtypes
import numpy as np
import pytest
from engine_files import engine_of, rewrite_record
from safetensors.numpy import save_file
from session_graphs import P, base, both, feeds, linear, wanted
from small_graphs import adapter, delta, error, graph, random, run, save

from lora_export import (
    AdapterError,
    BackendError,
    EngineSession,
    GraphError,
    InputChangedError,
    LoraModule,
    MergedEngine,
    OutputError,
    SiteError,
    load_adapter,
    merge_onnx,
    save_adapter,
)
from lora_export.engines.record import BuildOptions

A, B = both(1), both(2, rank=4)
ONLY_Q = dataclasses.replace(adapter(linear("q", 5)), name="only-q", sha256="5")
REFIT = BuildOptions(refit=True)
machine = engine_files.machine


@pytest.fixture
def engine(machine, tmp_path):
    return open_engine(tmp_path)


def open_engine(tmp_path, **options):
    onnx = base(tmp_path)
    return MergedEngine(engine_of(onnx, options=REFIT, **options), onnx)


def written(machine):
    """Return the weights that the last switch wrote."""
    names = [call[1] for call in machine.named("set_named_weights")]
    machine.calls.clear()
    return sorted(names)


def test_switches_give_each_adapters_answers_and_a_b_a_is_a(engine, tmp_path):
    inputs = feeds()
    first = engine.run(inputs)["y"]
    assert error(first, wanted(None, inputs)) < 2e-6
    answers = []
    for given in (A, B, ONLY_Q, A, None):
        engine.switch(given)
        assert engine.adapter == (given and given.name)
        answers.append(engine.run(inputs)["y"])
        assert error(answers[-1], wanted(given, inputs)) < 2e-6
    assert np.array_equal(answers[0], answers[3])
    assert np.array_equal(answers[4], first)
    engine.switch(save_adapter(A, tmp_path / "peft"))
    assert np.array_equal(engine.run(inputs)["y"], answers[0])


def test_every_weight_that_was_touched_is_written_each_time(machine, engine):
    engine.switch(ONLY_Q)
    assert written(machine) == ["q.weight"]
    engine.switch(A)
    assert written(machine) == ["p.weight", "q.weight"]
    engine.switch(ONLY_Q)
    assert written(machine) == ["p.weight", "q.weight"]
    engine.switch(None)
    assert written(machine) == ["p.weight", "q.weight"]


def test_a_refit_is_the_merge_bit_for_bit(engine, tmp_path):
    merge_onnx(tmp_path / "base.onnx", A, tmp_path / "merged.onnx")
    engine.switch(A)
    merged = EngineSession(engine_of(tmp_path / "merged.onnx"))
    assert np.array_equal(engine.run(feeds())["y"], merged.run(feeds())["y"])


def test_bfloat16_weights(machine, tmp_path):
    weight = P.T.astype(ml_dtypes.bfloat16)
    text = "g (float[b,4] x) => (float[b,5] y) { w = Cast<to = 1>(p_weight)  y = MatMul(x, w) }"
    onnx = save(graph(text, {"p.weight": weight}), tmp_path)
    engine = MergedEngine(engine_of(onnx, options=REFIT), onnx)
    given = adapter(linear("p", 3))
    engine.switch(given)
    x, change = feeds()["x"], delta(given.modules["p.weight"]).astype(np.float32)
    rounded = (weight.astype(np.float32).T + change).astype(ml_dtypes.bfloat16).astype(np.float64)
    assert error(engine.run({"x": x})["y"], x.astype(np.float64) @ rounded.T) < 1e-6


def test_joined_weights_go_along(machine, tmp_path):
    engine = open_engine(tmp_path, joined=[["p.weight", "q.weight"]])
    engine.switch(ONLY_Q)
    assert written(machine) == ["p.weight", "q.weight"]
    assert error(engine.run(feeds())["y"], wanted(ONLY_Q, feeds())) < 2e-6
    engine.switch(None)
    assert written(machine) == ["p.weight", "q.weight"]


def test_joined_with_what_the_graph_lacks(machine, tmp_path):
    engine = open_engine(tmp_path, joined=[["q.weight", "folded"]])
    with pytest.raises(BackendError, match="joined weights with others") as refused:
        engine.switch(A)
    assert refused.value.problems == ("folded",)
    assert error(engine.run(feeds())["y"], wanted(None, feeds())) < 2e-6


def test_a_switch_that_fails_while_it_writes(machine, engine):
    machine.fails = {"refit_cuda_engine"}
    with pytest.raises(BackendError, match="could not write the new weights"):
        engine.switch(A)
    machine.fails = set()
    with pytest.raises(BackendError, match="weights are those of two adapters"):
        engine.run(feeds())
    written(machine)
    engine.switch(None)
    assert written(machine) == ["p.weight", "q.weight"]
    assert error(engine.run(feeds())["y"], wanted(None, feeds())) < 2e-6


def test_an_adapter_that_does_not_fit_changes_nothing(machine, engine):
    stranger = adapter(LoraModule("r", "linear", random(2, 4, seed=1), random(5, 2, seed=2), 3.0, 2))
    with pytest.raises(SiteError, match="names its modules in another way"):
        engine.switch(stranger)
    with pytest.raises(AdapterError):
        engine.switch("no-such-folder")
    assert not machine.named("set_named_weights", "refit_cuda_engine")
    assert engine.adapter is None
    assert error(engine.run(feeds())["y"], wanted(None, feeds())) < 2e-6


def test_captured_graphs_are_dropped_by_a_switch(machine, tmp_path):
    onnx = base(tmp_path)
    made = MergedEngine(engine_of(onnx, options=REFIT, backend="tensorrt"), onnx, cuda_graph=True)
    for given in (None, A, B, A):
        made.switch(given)
        for _ in range(2):
            assert error(made.run(feeds())["y"], wanted(given, feeds())) < 2e-6
    assert len(machine.cuda.named("cudaStreamEndCapture")) == 4


# --- weights that modules share ------------------------------------------------------------------------


def tied(tmp_path):
    """Write a graph in which modules ``one`` and ``two`` have one weight."""
    text = "g (float[b,4] x) => (float[b,4] y, float[b,4] z) { [n1] y = MatMul(x, one_weight)  "
    text += "[n2] z = MatMul(x, one_weight) }"
    return save(graph(text, {"one.weight": random(4, 4, seed=8)}, {"n1": "one", "n2": "two"}), tmp_path)


def of_one(seed):
    module = LoraModule("one", "linear", random(2, 4, seed=seed), random(4, 2, seed=seed + 50), 3.0, 2)
    return dataclasses.replace(adapter(module), name=f"one{seed}", sha256=f"{seed}")


def test_a_shared_weight_needs_the_merged_graph(machine, tmp_path):
    onnx = tied(tmp_path)
    with pytest.raises(BackendError, match="lacks 1 of the 1 weights") as refused:
        MergedEngine(engine_of(onnx, options=REFIT), onnx).switch(of_one(1))
    assert refused.value.problems == ("one.lora_merged.weight: no weight of the engine",)
    assert "merged=" in refused.value.hint
    merged = tmp_path / "merged.onnx"
    merge_onnx(onnx, of_one(1), merged)
    x = feeds()["x"]
    engine = MergedEngine(engine_of(merged, options=REFIT), onnx, merged=of_one(1))
    assert engine.adapter == "one1"
    first = engine.run({"x": x})
    assert np.array_equal(first["y"], run(merged, x=x)[0])
    engine.switch(None)
    plain = engine.run({"x": x})
    assert np.array_equal(plain["y"], run(onnx, x=x)[0])
    engine.switch(of_one(1))
    again = engine.run({"x": x})
    assert np.array_equal(again["y"], first["y"])
    assert all(np.array_equal(answer["z"], plain["z"]) for answer in (first, again))


def test_the_engines_own_adapter_is_undone_by_the_first_switch(machine, tmp_path):
    onnx, merged = base(tmp_path), tmp_path / "merged.onnx"
    merge_onnx(onnx, A, merged)
    engine = MergedEngine(engine_of(merged, options=REFIT), onnx, merged=A)
    assert error(engine.run(feeds())["y"], wanted(A, feeds())) < 2e-6
    engine.switch(ONLY_Q)
    assert written(machine) == ["p.weight", "q.weight"]
    assert error(engine.run(feeds())["y"], wanted(ONLY_Q, feeds())) < 2e-6


# --- engines and graphs that don't fit -----------------------------------------------------------------


def test_an_engine_built_without_refit(machine, tmp_path):
    onnx = base(tmp_path)
    with pytest.raises(BackendError, match="was built without refit") as refused:
        MergedEngine(engine_of(onnx), onnx)
    assert "on a machine with a GPU" in refused.value.hint
    assert not machine.calls


def test_an_engine_without_weights_gets_them_first(machine, tmp_path):
    onnx = base(tmp_path)
    options = BuildOptions(refit=True, strip_weights=True)
    engine = MergedEngine(engine_of(onnx, options=options, stripped=True), onnx)
    assert written(machine) == ["p.weight", "q.weight"]
    assert error(engine.run(feeds())["y"], wanted(None, feeds())) < 2e-6


def test_other_bases_are_refused(machine, tmp_path):
    onnx, merged = base(tmp_path), tmp_path / "merged.onnx"
    merge_onnx(onnx, A, merged)
    text = "g (float[b,4] x) => (float[b,5] y) { y = MatMul(x, p_weight) }"
    other = save(graph(text, {"p.weight": P.T.copy()}), tmp_path, "o.onnx")
    plain, of_merged = engine_of(onnx, options=REFIT), engine_of(merged, options=REFIT)
    for engine, options in ((plain, {}), (of_merged, {"merged": A})):
        with pytest.raises(BackendError, match="is not this source, as it is now"):
            MergedEngine(engine, other, **options)
    for engine, options in ((plain, {"merged": A}), (of_merged, {}), (of_merged, {"merged": [A, B]})):
        with pytest.raises(BackendError, match="other adapters in it than merged= says"):
            MergedEngine(engine, onnx, **options)
    with pytest.raises(BackendError) as refused:
        MergedEngine(of_merged, onnx, merged=B)
    assert refused.value.problems == ("a1 sha256=1-2 weight=1.0",)


def test_a_base_that_changes_meanwhile(machine, tmp_path):
    engine = open_engine(tmp_path)
    text = "g (float[b,4] x) => (float[b,5] y) { y = MatMul(x, p_weight) }"
    save(graph(text, {"p.weight": P.T.copy()}), tmp_path)
    with pytest.raises(GraphError, match="has changed since the engine was opened"):
        engine.switch(A)


def test_w0_that_is_replaced_meanwhile(machine, tmp_path):
    """The base's own values are read at each switch back to it, from the files beside the graph."""
    engine = open_engine(tmp_path)
    engine.switch(A)
    inputs = feeds()
    answer = engine.run(inputs)["y"]
    file = tmp_path / "base.onnx"
    (tmp_path / "same").write_bytes(file.read_bytes())
    (tmp_path / "same").replace(file)
    with pytest.raises(InputChangedError, match="since the engine was opened"):
        engine.switch(None)
    assert engine.adapter == A.name
    assert np.array_equal(engine.run(inputs)["y"], answer)


def test_a_weight_of_another_size(machine, tmp_path):
    onnx = base(tmp_path)
    path = engine_of(onnx, options=REFIT)
    other = save(
        graph("g (float[b,4] x) => (float[b,7] y) { y = MatMul(x, p_weight) }", {"p.weight": random(4, 7)}),
        tmp_path,
        "other.onnx",
    )
    swapped = engine_of(other, options=REFIT)
    rewrite_record(swapped, source=engine_files.record_of(path).source)
    with pytest.raises(BackendError) as refused:
        MergedEngine(swapped, onnx).switch(adapter(linear("p", 3)))
    assert refused.value.problems == ("p.weight: float32 × 20, the engine has FLOAT × 28",)


def test_the_runtime_cache_is_none_of_what_is_read(machine, tmp_path):
    onnx = base(tmp_path)
    engine = engine_of(onnx, options=REFIT)
    for file in (engine, onnx):
        with pytest.raises(OutputError, match="would replace what is read"):
            MergedEngine(engine, onnx, runtime_cache=file)
    given = tmp_path / "adapter.safetensors"
    save_file({"p.lora_A.weight": P[:2, :4].copy(), "p.lora_B.weight": P[:, :2].copy()}, given)
    opened = MergedEngine(engine, onnx, runtime_cache=given)
    with pytest.raises(OutputError, match="would replace what is read"):
        opened.switch(load_adapter(given, alpha=2))
