"""`lora-export bench` and what it refuses, before anything is opened or timed."""

import json
import re

import numpy as np
import onnx_ir as ir
import pytest
import session_graphs
import tiny
from bench_runs import bench, cached_llama, decoders, measured
from engine_files import engine_of
from small_graphs import graph, save

from lora_export import LoraExportError, run_bench, save_adapter
from lora_export.graph.captured import Captured


def refused(capsys, *arguments):
    code, out, err = bench(capsys, *arguments)
    assert code == 1, err
    assert out == ""
    assert "Traceback" not in err
    return err


def test_everything_that_is_wrong_at_once(tmp_path, capsys):
    text = tmp_path / "notes.onnx"
    text.write_text("no model")
    err = refused(
        capsys,
        text,
        *("--against", tmp_path / "absent.onnx"),
        *("--narrow", "0"),
        *("--seed", "-1"),
        *("--plot", text / "out.jpg"),
        "--cuda-graph",
        *("--report", tmp_path / "twice", "--html", tmp_path / "twice"),
    )
    for wanted in (
        "notes.onnx is not a readable ONNX file",
        "no ONNX file at",
        "--narrow 0",
        "--seed -1: give at least 0",
        f"{text} is a file, not a folder",
        ".png or .svg",
        "--cuda-graph needs --provider cuda",
        "two of them are the same file",
    ):
        assert wanted in err
    assert f"{len(re.findall('^  ', err, re.MULTILINE))} problems" in err


@pytest.mark.parametrize(
    "flags",
    [
        ("--batch", "0,2"),
        ("--batch", "1,x"),
        ("--sequence", "1.5"),
        ("--sequence", "0"),
        ("--past", "-1"),
        ("--past", "1,x"),
        ("--past", ""),
    ],
)
def test_sizes_that_are_none_are_a_mistake_of_usage(tmp_path, capsys, flags):
    code, out, err = bench(capsys, session_graphs.base(tmp_path), *flags)
    assert (code, out) == (2, "")
    assert f"Invalid value for '{flags[0]}'" in err
    assert repr(flags[1]) in err


def test_sizes_of_the_function_are_refused_all_at_once(tmp_path):
    with pytest.raises(LoraExportError) as caught:
        run_bench(session_graphs.base(tmp_path), batches=(0,), sequences=(), pasts=(-1,), seed=-5)
    assert caught.value.problems == (
        "--batch 0: give at least 1",
        "--past -1: give at least 0",
        "--sequence names no size",
        "--seed -5: give at least 0",
        "--past: base.onnx has no key-value cache (omit it)",
    )


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--seconds", ["0", "-1", "inf", "nan"]),
        ("--narrow", ["0", "inf", "nan"]),
        ("--threads", ["0", "-2", "4097"]),
        ("--seed", ["-1"]),
    ],
)
def test_numbers_that_nothing_can_be_done_with(tmp_path, capsys, flag, values):
    path = session_graphs.base(tmp_path)
    for value in values:
        code, _, err = bench(capsys, path, flag, value, "--dry-run", quick=False)
        assert code == 1
        assert f"{flag} {value}: give " in err
    code, _, err = bench(capsys, path, "--threads", "4096", "--seed", "0", "--dry-run", quick=False)
    assert code == 0, err


def test_models_with_other_inputs(tmp_path, capsys):
    other = save(graph("g (float[b,4] y) => (float[b,4] z) { z = Relu(y) }", {}), tmp_path, "other.onnx")
    err = refused(capsys, session_graphs.base(tmp_path), "--against", other)
    assert "other.onnx lacks inputs of base.onnx: x, shift" in err
    assert "other.onnx has inputs that base.onnx lacks: y" in err


def test_adapters_that_nothing_takes(tmp_path, capsys):
    base = session_graphs.base(tmp_path)
    assert "base.onnx takes no adapter" in refused(capsys, base, "--adapter", f"a={tmp_path}")
    swap = session_graphs.swap(tmp_path)
    err = refused(
        capsys, swap, "--adapter", "a", "--adapter", f"b={tmp_path / 'none'}", "--adapter", f"={tmp_path}"
    )
    for wanted in ("a: swap.onnx needs its file", "--adapter b: ", "give NAME=PATH"):
        assert wanted in err
    save_adapter(session_graphs.both(1), tmp_path / "one", "peft")
    bank = session_graphs.bank(tmp_path, "constants", session_graphs.fitting(1, 0))
    err = refused(capsys, bank, "--adapter", f"x={tmp_path / 'one'}", "--adapter", f"x={tmp_path / 'one'}")
    assert "named twice" in err
    assert "bank.onnx has no such slot; it has: emotion" in err


def test_an_adapter_of_another_model(tmp_path, capsys):
    swap = session_graphs.swap(tmp_path)
    err = refused(capsys, swap, "--adapter", f"a={tiny.adapter('llama')}", "--dry-run")
    assert "--adapter a: " in err
    assert "was made for another model" in err
    save_adapter(session_graphs.both(1, rank=8), tmp_path / "rank", "peft")
    bank = session_graphs.bank(tmp_path, "inputs")
    err = refused(capsys, swap, "--against", bank, "--adapter", f"a={tmp_path / 'rank'}", "--dry-run")
    assert "rank 9, the graph takes 8 at most" in err
    assert "rank 8, slot 0 has 2 for p" in err


def test_an_adapter_gets_its_own_slot_of_a_bank_or_any(tmp_path, capsys):
    bank = session_graphs.bank(tmp_path, "inputs")
    save_adapter(session_graphs.fitting(1, 1), tmp_path / "wide", "peft")
    assert "slot 0 has" in refused(capsys, bank, "--adapter", f"emotion={tmp_path / 'wide'}", "--dry-run")
    for name in ("summary", "new"):  # its own has room for it; of the others one has
        code, _, err = bench(capsys, bank, "--adapter", f"{name}={tmp_path / 'wide'}", "--dry-run")
        assert code == 0, err


def test_a_slot_that_is_full_takes_the_adapter_in_the_process_of_its_own_as_well(tmp_path, capsys):
    bank = session_graphs.bank(tmp_path, "defaults", session_graphs.fitting(1, 0))
    save_adapter(session_graphs.fitting(2, 0), tmp_path / "one", "peft")
    found = measured(capsys, bank, "--adapter", f"emotion={tmp_path / 'one'}")
    assert found["models"][0]["loaded"]["problem"] == ""


def test_a_provider_that_is_not_there_is_said_before_anything_is_opened(tmp_path, capsys, monkeypatch):
    import onnxruntime as ort

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    path = session_graphs.base(tmp_path)
    err = refused(capsys, path, "--provider", "cuda", "--seconds", "inf", "--dry-run")
    assert "--provider cuda: this onnxruntime" in err
    assert "has no CUDA provider" in err
    assert "--seconds inf" in err
    engine = engine_of(path)  # always on a GPU, and not by ONNX Runtime
    code, _, err = bench(capsys, engine, "--provider", "cuda", "--dry-run")
    assert code == 0, err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "onnxruntime, which is not installed" in refused(capsys, path, "--dry-run")


def test_fixed_shapes_and_sizes_that_nobody_knows(tmp_path, capsys):
    fixed = save(
        graph("g (int64[2,8] input_ids) => (int64[2,8] y) { y = Identity(input_ids) }", {}),
        tmp_path,
        "f.onnx",
    )
    err = refused(capsys, fixed, "--batch", "1,2", "--sequence", "8,9")
    assert "input_ids has a fixed batch of 2, not 1" in err
    assert "input_ids has a fixed sequence of 8, not 9" in err
    code, _, err = bench(capsys, fixed, "--batch", "2", "--sequence", "8")
    assert code == 0, err
    strange = save(
        graph("g (float[b,height] x) => (float[b,height] y) { y = Relu(x) }", {}), tmp_path, "s.onnx"
    )
    assert "the size of axis 1 (height) is unknown" in refused(capsys, strange)


@cached_llama
def test_more_tokens_than_the_model_has_positions_for(capsys):
    files = decoders()
    metadata = ir.load(files["base"]).metadata_props
    most = json.loads(metadata["lora_export.dims"])["total_sequence"]["max"]
    err = refused(capsys, files["base"], "--sequence", str(most))
    assert f"positions for a total of {most}, not {most + 1}: give --past {most - 1} or less" in err
    err = refused(capsys, files["base"], "--sequence", str(most + 1))
    assert f"positions for a total of {most}, not {most + 1}" in err
    # The cache may hold so many that the next token is the last: no more.
    err = refused(capsys, files["base"], "--sequence", "4", "--past", str(most))
    assert f"not {most + 1}" in err
    code, _, err = bench(capsys, files["base"], "--sequence", "4", "--past", str(most - 1), "--dry-run")
    assert code == 0, err


def decoder_of(most, folder):
    """Write a graph with a key-value cache and so many positions."""
    made = graph(
        """g (int64[batch,sequence] input_ids, int64[batch,total_sequence] attention_mask,
              float[batch,1,past_sequence,2] past_key_values_0_key)
           => (int64[batch,total_sequence] y, int64[batch,sequence] z, float[batch,1,past_sequence,2] k)
           { y = Identity(attention_mask) z = Identity(input_ids) k = Identity(past_key_values_0_key) }""",
        {},
    )
    dims = dict.fromkeys(("sequence", "past_sequence", "total_sequence"), most)
    made.metadata_props.update(
        Captured(kind="decoder", kv_cache=True, dtype="float32", vocab_size=50, largest=dims).to_metadata()
    )
    return save(made, folder)


def test_the_usual_sizes_leave_room_for_the_token_that_is_decoded(tmp_path, capsys):
    found = measured(capsys, decoder_of(128, tmp_path))
    works = [table["workload"] for table in found["tables"]]
    assert [(work["sequence"], work["past"]) for work in works] == [(128, 0), (1, 127)]
    assert any(note.startswith("--past is 127, not 128") for note in found["notes"])


def test_past_without_a_cache(tmp_path, capsys):
    assert "has no key-value cache" in refused(capsys, session_graphs.base(tmp_path), "--past", "4")


def test_what_the_runtime_refuses_is_said_for_each_run(tmp_path, capsys):
    """A graph that says that it takes every batch and takes one."""
    text = "g (float[b,4] x) => (float[2,2] y) { y = Reshape(x, shape) }"
    path = save(graph(text, {"shape": np.array([2, 2], np.int64)}), tmp_path, "r.onnx")
    err = refused(capsys, path, "--batch", "1,2,3")
    assert "r.onnx, run 2" in err
    assert "r.onnx, run 3" in err
    assert "run 1" not in err


# --- files that a report must not replace -------------------------------------------------------------------


def test_a_report_never_replaces_what_is_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lora_export.bench.run.carry_out", lambda *a, **k: pytest.fail("it was run"))
    (tmp_path / "other").mkdir()
    model = ir.load(session_graphs.base(tmp_path / "other"))
    ir.save(model, tmp_path / "ext.onnx", external_data="weights.png", size_threshold_bytes=0)
    swap = session_graphs.swap(tmp_path)
    save_adapter(session_graphs.both(1), tmp_path / "one", "peft")
    save_adapter(session_graphs.both(2), tmp_path / "two", "peft")
    two = tmp_path / "two" / "adapter_model.safetensors"
    link = tmp_path / "link.json"
    link.symlink_to(swap)
    adapters = ["--adapter", f"one={tmp_path / 'one'}"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    arguments = [tmp_path / "other" / "base.onnx", "--against", swap, *adapters, "--force"]

    err = refused(
        capsys,
        *arguments,
        *("--report", swap),
        *("--html", tmp_path / "swap.lora.json"),
        *("--plot", tmp_path / "one" / "new" / "plot.png"),
        *("--seconds", "nan"),
    )
    for wanted in (
        f"--report {swap}: it is the model {swap} itself",
        f"swap.lora.json: it belongs to the model {swap}",
        f"plot.png: it is, or lies in, the adapter {tmp_path / 'one'}",
        "--seconds nan",
    ):
        assert wanted in err
    assert "5 problems" in err  # a report that ends in .onnx is one more
    err = refused(
        capsys,
        *(tmp_path / "ext.onnx", "--against", tmp_path / "absent.onnx", "--force"),
        *("--report", tmp_path / "absent.onnx.data"),
        *("--plot", tmp_path / "weights.png"),
        *("--html", tmp_path / "ext.onnx"),
    )
    assert f"weights.png: it belongs to the model {tmp_path / 'ext.onnx'}" in err
    assert f"ext.onnx: it is the model {tmp_path / 'ext.onnx'} itself" in err
    assert f"absent.onnx.data: it belongs to the model {tmp_path / 'absent.onnx'}" in err
    err = refused(
        capsys,
        *(swap, "--adapter", f"two={two}", "--force"),
        *("--report", link, "--html", two, "--plot", two.with_name("adapter_config.json")),
    )
    assert "link.json: it is the model" in err
    assert err.count(f"the adapter {two}") == 2
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_report_never_replaces_an_engines_record(tmp_path, capsys):
    engine = engine_of(session_graphs.base(tmp_path))
    err = refused(capsys, engine, "--report", engine.with_suffix(".json"), "--force", "--dry-run")
    assert f"it belongs to the model {engine}" in err
