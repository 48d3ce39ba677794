"""`AdapterSession` with a swap graph: answers, files, limits, and every wrong request."""

import dataclasses
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from session_graphs import BASE, SHIFT, P, Q, bank, base, both, feeds, fitting, linear, swap, wanted
from small_graphs import adapter, conv, delta, error, graph, random, run, save

from lora_export import (
    AdapterError,
    AdapterSession,
    BackendError,
    BackendUnavailable,
    GraphError,
    LoraModule,
    SiteError,
    save_adapter,
)
from lora_export.binding.bind import bind_adapter
from lora_export.formats import writer_of
from lora_export.formats.provenance import Provenance
from lora_export.graph.exposed import KEY, lora_record_of
from lora_export.modes.swap_onnx import swap_onnx

A, B = both(1), both(2, rank=4)


def open_session(path, **options):
    return AdapterSession(path, threads=1, **options)


def client(path):
    """Return ONNX Runtime's own session."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.fixture
def session(tmp_path):
    made = open_session(swap(tmp_path))
    made.load_adapter("a", A)
    made.load_adapter("b", B)
    return made


# --- answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", ["ort", "tensorrt"])
def test_each_adapter_gives_its_own_answer_and_none_the_base(tmp_path, flavour):
    session = open_session(swap(tmp_path, flavour=flavour))
    session.load_adapter("a", A)
    session.load_adapter("b", B)
    inputs = feeds()
    for name, given in (("a", A), ("b", B), (None, None), ("a", A)):
        assert error(session.run(inputs, name)["y"], wanted(given, inputs)) < 2e-6
    assert session.adapters == ["a", "b"]


def test_the_base_is_the_original_graph_bit_for_bit(session, tmp_path):
    inputs = feeds()
    assert np.array_equal(session.run(inputs)["y"], client(tmp_path / "base.onnx").run(["y"], inputs)[0])


def test_requests_that_are_none(session):
    with pytest.raises(BackendError, match=r"outputs of swap\.onnx are asked for twice"):
        session.run(feeds(), outputs=["y", "y"])
    with pytest.raises(BackendError, match="are of type list"):
        session.run(list(feeds().values()))


def test_a_then_b_then_a_gives_the_bits_of_a(session):
    inputs = feeds()
    first, other = session.run(inputs, "a")["y"], session.run(inputs, "b")["y"]
    kept = first.copy()
    assert not np.array_equal(first, other)
    assert np.array_equal(session.run(inputs, "a")["y"], kept)
    assert np.array_equal(first, kept), "a later run wrote over an answer"


@pytest.mark.parametrize("flavour", ["ort", "tensorrt"])
def test_a_module_that_the_adapter_lacks_stays_the_base(tmp_path, flavour):
    session = open_session(swap(tmp_path, flavour=flavour))
    only_q = adapter(linear("q", 5))
    session.load_adapter("full", A)
    session.load_adapter("q", only_q)
    inputs = feeds()
    session.run(inputs, "full")
    assert error(session.run(inputs, "q")["y"], wanted(only_q, inputs)) < 2e-6


@pytest.mark.parametrize("flavour", ["ort", "tensorrt"])
def test_dora_beside_plain_adapters(tmp_path, flavour):
    session = open_session(swap(tmp_path, flavour=flavour, dora=True))
    magnitude = 1 + np.abs(random(3, seed=21))
    module = dataclasses.replace(linear("q", 6), magnitude=magnitude)
    session.load_adapter("dora", adapter(module))
    session.load_adapter("plain", A)
    inputs = feeds()
    merged = Q.astype(np.float64) + delta(module)
    merged *= (magnitude / np.linalg.norm(merged, axis=1))[:, None]
    x = inputs["x"].astype(np.float64)
    assert error(session.run(inputs, "dora")["y"], x @ P.T.astype(float) @ merged.T + inputs["shift"]) < 2e-6
    assert error(session.run(inputs, "plain")["y"], wanted(A, inputs)) < 2e-6
    assert error(session.run(inputs)["y"], wanted(None, inputs)) < 2e-6


def test_convolution_of_a_fixed_rank(tmp_path):
    text = "g (float[b,4,6,6] x) => (float[b,6,6,6] y) { y = Conv<pads = [1, 1, 1, 1]>(x, c_weight) }"
    path = save(graph(text, {"c.weight": random(6, 4, 3, 3, seed=31)}), tmp_path)
    given = adapter(conv("c", 6, 4, 3, 3))
    swap_onnx(path, tmp_path / "s.onnx", adapter=given, flavour="tensorrt")
    session = open_session(tmp_path / "s.onnx")
    session.load_adapter("c", given)
    x = random(2, 4, 6, 6, seed=32)
    base_answer = run(path, x=x)[0]
    assert error(session.run({"x": x})["y"], base_answer) < 2e-6
    change = delta(given.modules["c.weight"]).astype(np.float32)
    only = graph(text, {"c.weight": change})
    wanted_change = run(save(only, tmp_path, "delta.onnx"), x=x)[0]
    assert error(session.run({"x": x}, "c")["y"], base_answer.astype(np.float64) + wanted_change) < 2e-6


def test_chosen_outputs_and_bfloat16(session):
    inputs = feeds()
    answer = session.run(inputs, "a", outputs=["h"])
    assert list(answer) == ["h"]
    assert answer["h"].dtype == ml_dtypes.bfloat16
    full = session.run(inputs, "a")
    assert list(full) == ["y", "h"]
    assert np.array_equal(answer["h"], full["y"].astype(ml_dtypes.bfloat16))
    empty = session.run(feeds(batch=0), "a")
    assert empty["h"].shape == (0, 3)


def test_feeds_may_be_tensors_or_strided(session):
    inputs = feeds()
    y = session.run(inputs, "a")["y"]
    tensor = ort.OrtValue.ortvalue_from_numpy(inputs["x"])
    assert np.array_equal(session.run({**inputs, "x": tensor}, "a")["y"], y)
    strided = np.asfortranarray(inputs["x"])
    assert not strided.flags.c_contiguous
    assert np.array_equal(session.run({**inputs, "x": strided}, "a")["y"], y)


def test_an_input_with_a_default_may_be_fed(tmp_path):
    """An initializer of the same name; what one request feeds is not the next one's default."""
    weights = {"p.weight": P.T.copy(), "q.weight": Q.T.copy(), "shift": SHIFT}
    save(graph(BASE, weights), tmp_path)
    x, other = feeds()["x"], 7 * SHIFT
    with AdapterSession(swap(tmp_path)) as session:
        session.load_adapter("a", both(1))
        for name, given in (("a", both(1)), (None, None)):
            for shift in (other, None, ort.OrtValue.ortvalue_from_numpy(other), None):
                fed = {"x": x} if shift is None else {"x": x, "shift": shift}
                values = {"x": x, "shift": SHIFT if shift is None else other}
                got = session.run(fed, adapter=name)["y"]
                assert np.abs(got - wanted(given, values)).max() < 1e-5


def test_bfloat16_feeds(tmp_path):
    text = "g (bfloat16[b,4] x) => (float[b,5] y) { f = Cast<to = 1>(x)  y = MatMul(f, p_weight) }"
    path = save(graph(text, {"p.weight": P.T.copy()}), tmp_path)
    swap_onnx(path, tmp_path / "s.onnx", target_modules=["p"])
    session = open_session(tmp_path / "s.onnx")
    x = random(2, 4, seed=41).astype(ml_dtypes.bfloat16)
    assert error(session.run({"x": x})["y"], x.astype(np.float64) @ P.T) < 2e-6


def test_outputs_left_on_the_device(session):
    inputs = feeds()
    values = session.run_ortvalues(inputs, "b")
    assert isinstance(values["y"], ort.OrtValue)
    assert np.array_equal(values["y"].numpy(), session.run(inputs, "b")["y"])


def test_a_session_is_closed_by_its_block_and_feeds_what_it_left_on_the_device(tmp_path):
    inputs = feeds()
    with open_session(swap(tmp_path), provider="cpu") as opened:
        y = opened.run(inputs)["y"]
        tensors = opened.run_on_device({**inputs, "x": inputs["x"][:1]})
        shift = ort.OrtValue.ortvalue_from_numpy(tensors["y"].numpy()[0])
        assert np.array_equal(opened.run({**inputs, "shift": shift})["y"], y - SHIFT + shift.numpy())
    assert np.array_equal(opened.run(inputs)["y"], y), "a graph needs no closing"


def test_what_the_caller_does_to_arrays_afterwards_changes_nothing(session):
    # In the graph's layout already, with scaling 1: nothing on the way makes a copy.
    arrays = [np.asfortranarray(random(2, 4, seed=51)), np.asfortranarray(random(5, 2, seed=52))]
    module = LoraModule("p", "linear", *arrays, alpha=2.0, rank=2)
    given, inputs = adapter(module), feeds()
    oracle = wanted(given, inputs)
    session.load_adapter("mine", given)
    for array in arrays:
        array[:] = np.nan
    assert error(session.run(inputs, "mine")["y"], oracle) < 2e-6


def test_a_request_is_not_kept_alive(session):
    inputs = feeds()
    before = sys.getrefcount(inputs["x"])
    session.run(inputs, "a")
    after = sys.getrefcount(inputs["x"])  # outside of assert, which would hold one more
    assert after == before


def test_onnx_runtimes_own_adapters_give_the_same_bits(session, tmp_path):
    """An outside client: `LoraAdapter` and `RunOptions.add_active_adapter`, without lora-export."""
    binding = bind_adapter(A, session.record, where="swap.onnx")
    maker = ort.AdapterFormat()
    maker.set_adapter_version(1)
    maker.set_model_version(1)
    maker.set_parameters({n: ort.OrtValue.ortvalue_from_numpy(v) for n, v in binding.tensors.items()})
    maker.export_adapter(str(tmp_path / "a.onnx_adapter"))
    loaded, options = ort.LoraAdapter(), ort.RunOptions()
    loaded.Load(str(tmp_path / "a.onnx_adapter"))
    options.add_active_adapter(loaded)
    inputs = feeds()
    answer = client(tmp_path / "swap.onnx").run(["y"], inputs, options)[0]
    assert np.array_equal(answer, session.run(inputs, "a")["y"])


# --- files ---------------------------------------------------------------------------------------------


def test_a_peft_folder_and_converted_files(session, tmp_path):
    inputs = feeds()
    y = session.run(inputs, "a")["y"]
    session.load_adapter("peft", save_adapter(A, tmp_path / "peft"))
    assert np.array_equal(session.run(inputs, "peft")["y"], y)
    record = session.record
    binding = bind_adapter(A, record, where="swap.onnx")
    provenance = Provenance(
        adapter="a", adapter_sha256="", base=record.base, base_sha256=record.base_sha256, ranks=binding.ranks
    )
    for kind in ("safetensors", "onnx_adapter"):
        path = tmp_path / f"converted.{kind}"
        writer_of(kind).write(path, binding.tensors, provenance)
        session.load_adapter(kind, path)
        assert np.array_equal(session.run(inputs, kind)["y"], y)


def test_a_file_converted_for_another_base_is_refused_unless_allowed(session, tmp_path):
    binding = bind_adapter(A, session.record, where="swap.onnx")
    path = tmp_path / "other.safetensors"
    writer_of("safetensors").write(
        path,
        binding.tensors,
        Provenance(adapter="a", adapter_sha256="", base="o.onnx", base_sha256="f" * 64, ranks=binding.ranks),
    )
    with pytest.raises(AdapterError, match="another base"):
        session.load_adapter("other", path)
    assert session.adapters == ["a", "b"]
    (note,) = session.load_adapter("other", path, any_base=True)
    assert note.startswith("bound to another base")
    inputs = feeds()
    assert np.array_equal(session.run(inputs, "other")["y"], session.run(inputs, "a")["y"])


def test_alpha_goes_to_the_file_that_does_not_say_it(session, tmp_path):
    from safetensors.numpy import save_file

    module = A.modules["p.weight"]
    save_file({"p.lora_A": module.lora_a, "p.lora_B": module.lora_b}, tmp_path / "p.safetensors")
    session.load_adapter("p", tmp_path / "p.safetensors", alpha=3.0)
    inputs = feeds()
    assert error(session.run(inputs, "p")["y"], wanted(adapter(module), inputs)) < 2e-6
    with pytest.raises(AdapterError, match="states its own alpha"):
        session.load_adapter("q", A, alpha=3.0)


def test_what_was_converted_is_said(session):
    half = LoraModule(
        "p",
        "linear",
        random(2, 4, seed=1).astype(np.float16),
        random(5, 2, seed=2).astype(np.float16),
        alpha=3.0,
        rank=2,
    )
    notes = session.load_adapter("half", adapter(half))
    assert any("float16 to float32" in note for note in notes)


# --- limits --------------------------------------------------------------------------------------------


def test_the_least_recently_used_leaves_and_comes_back_the_same(tmp_path):
    session = open_session(swap(tmp_path), max_adapters=2)
    inputs = feeds()
    session.load_adapter("a", save_adapter(A, tmp_path / "a"))
    y = session.run(inputs, "a")["y"]
    session.load_adapter("b", B)
    session.run(inputs, "a")
    session.load_adapter("c", both(3))
    assert session.on_device == ["a", "c"]
    assert session.adapters == ["a", "b", "c"]
    assert error(session.run(inputs, "b")["y"], wanted(B, inputs)) < 2e-6  # an Adapter value comes back
    assert session.on_device == ["c", "b"]
    assert np.array_equal(session.run(inputs, "a")["y"], y)  # a file is read again
    assert session.on_device == ["b", "a"]


def test_an_evicted_adapter_whose_file_has_changed_is_refused(tmp_path):
    session = open_session(swap(tmp_path), max_adapters=1)
    folder = save_adapter(A, tmp_path / "a")
    session.load_adapter("a", folder)
    session.load_adapter("b", B)
    save_adapter(both(9), folder, force=True)
    with pytest.raises(AdapterError, match="has changed since it was loaded"):
        session.run(feeds(), "a")
    shutil.rmtree(folder)
    with pytest.raises(AdapterError):
        session.run(feeds(), "a")
    assert error(session.run(feeds(), "b")["y"], wanted(B, feeds())) < 2e-6
    session.unload_adapter("a")
    assert session.adapters == ["b"]


def test_the_byte_budget(tmp_path):
    path = swap(tmp_path)
    size = sum(m.lora_a.nbytes + m.lora_b.nbytes for m in A.modules.values())
    session = open_session(path, max_bytes=2 * size)
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        session.load_adapter(name, both(seed))
    assert session.on_device == ["b", "c"]
    with pytest.raises(AdapterError, match=f"the budget for all adapters is {size - 1}") as refused:
        open_session(path, max_bytes=size - 1).load_adapter("a", A)
    assert f"takes {size} bytes" in refused.value.message
    assert "max_bytes" in refused.value.hint


# --- names ---------------------------------------------------------------------------------------------


def test_a_taken_name_is_refused_unless_replaced(session):
    inputs = feeds()
    with pytest.raises(AdapterError, match="there is an adapter 'a' already") as refused:
        session.load_adapter("a", B)
    assert "replace=True" in refused.value.hint
    session.load_adapter("a", B, replace=True)
    assert np.array_equal(session.run(inputs, "a")["y"], session.run(inputs, "b")["y"])
    assert session.adapters == ["a", "b"]


def test_a_replacement_that_fails_leaves_the_old_one(session):
    inputs = feeds()
    y = session.run(inputs, "a")["y"]
    broken = both(4)
    broken.modules["p.weight"].lora_a[0, 0] = np.nan
    with pytest.raises(AdapterError, match="values that can't be used"):
        session.load_adapter("a", broken, replace=True)
    assert np.array_equal(session.run(inputs, "a")["y"], y)


def test_unload_forgets(session):
    session.unload_adapter("a")
    assert session.adapters == ["b"]
    with pytest.raises(AdapterError, match="no adapter is called 'a'") as unknown:
        session.run(feeds(), "a")
    assert "b" in unknown.value.hint
    with pytest.raises(AdapterError, match="no adapter is called 'a'"):
        session.unload_adapter("a")


def test_an_adapter_without_a_place_is_refused_and_not_kept(session):
    stranger = LoraModule("r", "linear", random(2, 4, seed=1), random(5, 2, seed=2), alpha=3.0, rank=2)
    mixed = adapter(linear("p", 5), stranger)
    with pytest.raises(SiteError, match="no place"):
        session.load_adapter("mixed", mixed)
    with pytest.raises(SiteError, match="no place"):
        session.load_adapter("rank", adapter(linear("p", 5, rank=9)))
    assert session.adapters == ["a", "b"]
    assert any("left out 1 of 2" in note for note in session.load_adapter("m", mixed, allow_unmatched=True))
    inputs = feeds()
    assert error(session.run(inputs, "m")["y"], wanted(adapter(linear("p", 5)), inputs)) < 2e-6


def test_a_name_that_is_almost_right_is_named(session):
    session.load_adapter("emotion", A)
    for request in (session.unload_adapter, lambda name: session.run(feeds(), name)):
        with pytest.raises(AdapterError, match="no adapter is called 'emotoin'") as unknown:
            request("emotoin")
        assert unknown.value.hint.startswith("did you mean 'emotion'? ")


@pytest.mark.parametrize("name", [["a"], {"a": 1.0}, 3])
def test_a_run_wants_one_name(session, name):
    for request in (session.unload_adapter, lambda given: session.run(feeds(), given)):
        with pytest.raises(AdapterError, match="no adapter is called") as refused:
            request(name)
        assert "an adapter's name is a text, or use one of: a, b" in refused.value.hint


@pytest.mark.parametrize("name", ["", None, 3])
def test_names_are_texts(session, name):
    with pytest.raises(AdapterError, match="an adapter's name is"):
        session.load_adapter(name, A)


# --- wrong requests ------------------------------------------------------------------------------------


def test_all_that_is_wrong_with_the_feeds_is_said_at_once(session):
    wrong = {"x": np.zeros((2, 4)), "z": np.zeros(1), "p.lora_A.weight": np.zeros((4, 2), np.float32)}
    with pytest.raises(BackendError, match=r"the feeds don't fit swap\.onnx") as refused:
        session.run(wrong, "a")
    assert list(refused.value.problems) == [
        "x: float64, the graph takes float32",
        "z: not an input of the graph",
        "p.lora_A.weight: a LoRA tensor; load_adapter and run(adapter=…) set it",
        "shift: missing, tensor(float)",
    ]


def test_feeds_of_other_kinds(session):
    inputs = feeds()
    with pytest.raises(BackendError) as refused:
        session.run({**inputs, "x": inputs["x"].tolist()}, "a")
    assert refused.value.problems == ("x: list, wanted a numpy array or an onnxruntime.OrtValue",)
    tensor = ort.OrtValue.ortvalue_from_numpy(inputs["x"].astype(np.float16))
    with pytest.raises(BackendError) as refused:
        session.run({**inputs, "x": tensor}, "a")
    assert refused.value.problems == ("x: tensor(float16), the graph takes tensor(float)",)


def test_a_wrong_shape_keeps_onnx_runtimes_words(session):
    with pytest.raises(BackendError, match="invalid dimensions") as refused:
        session.run({**feeds(), "x": random(2, 7)}, "a")
    assert "x: tensor(float) ['b', 4]" in refused.value.problems
    assert error(session.run(feeds(), "a")["y"], wanted(A, feeds())) < 2e-6


def test_unknown_outputs(session):
    with pytest.raises(BackendError, match="no output 'v', 'w'") as refused:
        session.run(feeds(), "a", outputs=["y", "v", "w"])
    assert refused.value.hint == "it has: y, h"


def test_a_swap_graph_takes_no_rows_and_no_slot(session):
    with pytest.raises(AdapterError, match="is a swap graph"):
        session.run(feeds(), adapters=["a"] * 4)
    with pytest.raises(AdapterError, match="has no slots"):
        session.load_adapter("c", A, slot="one")


# --- opening -------------------------------------------------------------------------------------------


def test_a_graph_without_a_record(tmp_path):
    with pytest.raises(GraphError, match="no exposed LoRA") as refused:
        open_session(base(tmp_path))
    assert "swap-onnx" in refused.value.hint


def test_a_record_that_the_graph_does_not_keep(tmp_path):
    model = onnx.load(swap(tmp_path))
    record = lora_record_of({entry.key: entry.value for entry in model.metadata_props}, "s")
    stranger = dataclasses.replace(record.modules[0], name="gone")
    changed = dataclasses.replace(record, modules=(*record.modules, stranger))
    next(entry for entry in model.metadata_props if entry.key == KEY).value = changed.to_json()
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(GraphError, match=r"names 2 inputs that the graph lacks \(of 6\)") as refused:
        open_session(tmp_path / "changed.onnx")
    assert refused.value.problems == ("gone.lora_A.weight", "gone.lora_B.weight")


def test_no_file_and_no_graph(tmp_path):
    with pytest.raises(GraphError, match="no ONNX file"):
        open_session(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(BackendError, match="can't open"):
        open_session(tmp_path / "text.onnx")


def test_options_that_can_not_be_used(tmp_path):
    with pytest.raises(BackendError) as refused:
        AdapterSession(
            swap(tmp_path), provider="tpu", cuda_graph=True, max_adapters=0, max_bytes=0, threads=-1
        )
    assert list(refused.value.problems) == [
        "provider is 'tpu', wanted 'cpu' or 'cuda'",
        "cuda_graph=True with provider 'tpu', wanted 'cuda'",
        "max_adapters is 0, wanted at least 1",
        "max_bytes is 0, wanted at least 1",
        "threads is -1, wanted at least 1",
    ]


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="there is CUDA")
def test_without_the_cuda_provider(tmp_path):
    with pytest.raises(BackendUnavailable, match="no CUDA provider") as refused:
        AdapterSession(swap(tmp_path), provider="cuda")
    assert "pip install 'lora-export[gpu]'" in refused.value.hint


@pytest.mark.parametrize(("provider", "extra"), [("cpu", "cpu"), ("cuda", "gpu")])
def test_without_onnxruntime(tmp_path, monkeypatch, provider, extra):
    path = swap(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendUnavailable, match="needs onnxruntime") as refused:
        AdapterSession(path, provider=provider)
    assert refused.value.hint == f"pip install 'lora-export[{extra}]'"


def test_the_name_alone_imports_no_runtime():
    script = "import sys, lora_export; lora_export.AdapterSession; assert 'onnxruntime' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


# --- what a run feeds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", ["ort", "tensorrt"])
@pytest.mark.parametrize("name", [None, "a", "b"])
def test_lora_inputs_are_what_a_client_has_to_feed(tmp_path, flavour, name):
    path = swap(tmp_path, flavour=flavour)
    session = open_session(path)
    session.load_adapter("a", A)
    session.load_adapter("b", B)
    given = feeds()
    inputs = session.lora_inputs(given, adapter=name)
    assert not set(inputs) & set(given)
    answer = session.run(given, adapter=name)["y"]
    assert np.array_equal(client(path).run(["y"], given | inputs)[0], answer)


# --- what is handed out is the caller's ----------------------------------------------------------------


def everything_handed_out(session, given, **who):
    yield from session.lora_inputs(given, **who).values()
    yield from session.run(given, **who).values()
    yield from (value.numpy() for value in session.run_on_device(given, outputs=["y"], **who).values())


def overwrite(arrays):
    """Write sevens into arrays; return how many could be written to."""
    writable = [values for values in arrays if values.flags.writeable]
    for values in writable:
        values[...] = 7
    return len(writable)


@pytest.mark.parametrize("flavour", ["ort", "tensorrt"])
@pytest.mark.parametrize("name", [None, "a", "b"])
def test_writing_into_what_a_swap_session_hands_out_changes_no_answer(tmp_path, flavour, name):
    session = open_session(swap(tmp_path, flavour=flavour))
    session.load_adapter("a", A)
    session.load_adapter("b", B)
    given = feeds()
    before = {who: session.run(given, adapter=who)["y"].copy() for who in (None, "a", "b")}
    assert overwrite(everything_handed_out(session, given, adapter=name))
    session.adapters.clear()
    session.on_device.clear()
    for who, y in before.items():
        assert np.array_equal(session.run(given, adapter=who)["y"], y)


@pytest.mark.parametrize("tensors", ["constants", "defaults", "inputs"])
def test_writing_into_what_a_bank_hands_out_changes_no_answer(tmp_path, tensors):
    filled = [] if tensors == "inputs" else [fitting(1, 0), fitting(2, 1)]
    session = AdapterSession(bank(tmp_path, tensors, *filled), threads=1)
    if tensors != "constants":
        session.load_adapter("emotion", fitting(5, 0), slot="emotion", replace=True)
    given, rows = feeds(2), np.array([[0.5, 0, 0], [1, 0, 0]], np.float32)
    before, base_before = session.run(given, adapters=rows)["y"].copy(), session.run(given)["y"].copy()
    assert overwrite(everything_handed_out(session, given, adapters=rows))
    assert rows[0, 0] == 0.5, "the request's own array was written to"
    assert np.array_equal(session.run(given, adapters=rows)["y"], before)
    assert np.array_equal(session.run(given)["y"], base_before)


# --- an `Adapter` whose arrays the caller writes to ------------------------------------------------------


def held(part):
    """Return an adapter, and an array that its answer depends on."""
    p, q = linear("p", 61), linear("q", 62)
    ones = np.ones(len(q.lora_b), np.float32)
    if part == "magnitude":
        q = dataclasses.replace(q, magnitude=ones)
    elif part == "lora_bias":
        q = dataclasses.replace(q, lora_bias=ones)
    given = dataclasses.replace(adapter(p, q), name="held", sha256="says nothing of the arrays")
    return given, getattr(given.modules["q.weight"], part)


@pytest.mark.parametrize("part", ["lora_a", "lora_b", "magnitude", "lora_bias"])
def test_an_evicted_adapter_whose_arrays_were_written_to_is_refused(part, tmp_path):
    given, array = held(part)
    swap_onnx(base(tmp_path), tmp_path / "swap.onnx", adapter=given, max_rank=8, dora=part == "magnitude")
    session, inputs = open_session(tmp_path / "swap.onnx", max_adapters=1), feeds()
    session.load_adapter("held", given)
    answer = session.run(inputs, "held")["y"]
    session.load_adapter("other", A)
    assert np.array_equal(session.run(inputs, "held")["y"], answer), "evicted, and nothing was written to"
    session.run(inputs, "other")
    kept, array.flat[-1] = array.flat[-1], 9
    assert session.on_device == ["other"]
    with pytest.raises(AdapterError, match="arrays were written to since"):
        session.run(inputs, "held")
    array.flat[-1] = kept
    assert np.array_equal(session.run(inputs, "held")["y"], answer)
    array.flat[-1] = 9
    session.load_adapter("held", given, replace=True)
    assert not np.array_equal(session.run(inputs, "held")["y"], answer)
