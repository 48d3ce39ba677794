"""`lora-export bench` from the command line, on tiny models: plain, swap, bank, with a key-value cache."""

import dataclasses
import json
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import engine_files
import numpy as np
import pytest
import session_graphs
from bench_runs import bench, cached_llama, decoders, measured
from engine_files import engine_of
from small_graphs import graph, save

from lora_export import (
    LoraExportError,
    run_bench,
    save_adapter,
)
from lora_export.bench import load_probe
from lora_export.bench.result import Row, WorkloadTable
from lora_export.bench.statistics import Latency
from lora_export.bench.workloads import Workload
from lora_export.reports.bench.to_text import report_lines
from lora_export.storage.hashes import sha256_of

machine = engine_files.machine


# --- what comes out ----------------------------------------------------------------------------------------


@cached_llama
def test_all_kinds_of_a_decoder_side_by_side(capsys):
    files = decoders()
    against = [part for name in ("base", "swap", "bank") for part in ("--against", files[name])]
    adapters = ["--adapter", f"one={files['one']}", "--adapter", f"two={files['two']}"]
    sizes = ["--batch", "1,3", "--sequence", "4,8", "--past", "5"]
    found = measured(capsys, files["merged"], *against, *adapters, *sizes)

    works = [table["workload"] for table in found["tables"]]
    assert [(w["phase"], w["batch"], w["sequence"], w["past"]) for w in works] == [
        *(("prefill", batch, sequence, 0) for batch in (1, 3) for sequence in (4, 8)),
        *(("decode", batch, 1, 5) for batch in (1, 3)),
    ]
    for table in found["tables"]:
        names = [row["contender"] for row in table["rows"]]
        assert names == [
            "merged.onnx",
            "base.onnx",
            "swap.onnx + one",
            "swap.onnx, no adapter",
            "bank.onnx, rows mixed",
        ]
        for row in table["rows"]:
            check_row(table, row)
        assert table["rows"][0]["ratio"] is None
    assert {(entry["model"], entry["adapter"]) for entry in found["adapters"]} == {
        ("swap.onnx", "one"),
        ("swap.onnx", "two"),
    }
    assert all(entry["median_ms"] > 0 and entry["loadings"] >= 1 for entry in found["adapters"])
    (swap,) = found["swapping"]
    assert (swap["model"], swap["adapters"]) == ("swap.onnx", 2)
    assert swap["added_ms"]["low"] <= swap["added_ms"]["value"] <= swap["added_ms"]["high"]


def check_row(table, row):
    work, latency = table["workload"], row["latency"]
    assert 0 < latency["min_ms"] <= latency["median_ms"] <= latency["p95_ms"]
    assert latency["count"] == table["rounds"] * row["runs_per_block"]
    assert row["rows_per_s"] == pytest.approx(work["batch"] * 1e3 / latency["median_ms"])
    assert row["tokens_per_s"] == pytest.approx(work["sequence"] * row["rows_per_s"])
    if row["ratio"]:
        assert row["ratio"]["low"] <= row["ratio"]["value"] <= row["ratio"]["high"]


@cached_llama
def test_models_and_machine_are_recorded(capsys):
    files = decoders()
    found = measured(capsys, files["merged"], "--against", files["base"], "--sequence", "4")
    for facts, path in zip(found["models"], (files["merged"], files["base"]), strict=True):
        data = path.with_name(path.name + ".data")
        assert facts["sha256"] == {file.name: sha256_of(file) for file in (path, data)}
        assert facts["size_bytes"] == path.stat().st_size + data.stat().st_size
        loaded = facts["loaded"]
        assert loaded["problem"] == ""
        assert loaded["first_s"] > 0
        assert loaded["again_s"] > 0
        assert 0 < loaded["loaded_bytes"] <= loaded["peak_bytes"]
        assert loaded["gpu_running_bytes"] is None
    machine = found["environment"]
    assert machine["packages"]["numpy"] == np.__version__
    assert machine["cores"] >= 1
    assert machine["cpu"]
    assert machine["gpus"] == []
    assert found["settings"] == {
        "seconds": 0.4,
        "narrow": 1e-9,
        "seed": 0,
        "provider": "cpu",
        "threads": 1,
        "cuda_graph": False,
    }
    assert found["kind"] == "lora_export.bench"
    assert "time budget" in found["stopped_by"]


def test_memory_is_the_models_own(tmp_path, capsys):
    """A graph with 64 MB more of weights takes so much more memory, whichever is opened first."""
    sizes = {"small": 16, "large": 4096}
    for name, rows in sizes.items():
        (tmp_path / name).mkdir()
        text = f"g (float[b,4096] x) => (float[b,{rows}] y) {{ y = MatMul(x, w) }}"
        save(graph(text, {"w": np.ones((4096, rows), np.float32)}), tmp_path / name)
    large, small = (next((tmp_path / name).glob("*.onnx")) for name in ("large", "small"))
    found = measured(capsys, large, "--against", small)
    assert [model["label"] for model in found["models"]] == ["large/base.onnx", "small/base.onnx"]
    more, less = (model["loaded"]["running_bytes"] for model in found["models"])
    weights = 4096 * (sizes["large"] - sizes["small"]) * 4
    assert 0.8 * weights < more - less < 3 * weights


def test_a_model_against_itself(tmp_path, capsys):
    path = session_graphs.base(tmp_path)
    found = measured(capsys, path, "--against", path, "--batch", "2")
    (table,) = found["tables"]
    assert [row["contender"] for row in table["rows"]] == ["base.onnx", "base.onnx #2"]
    # No tokens: rows alone are counted, and --sequence has nothing to act on.
    assert [row["tokens_per_s"] for row in table["rows"]] == [None, None]
    assert any("reads no sequence" in note for note in found["notes"])


def test_narrow_intervals_end_it(tmp_path, capsys):
    path = session_graphs.base(tmp_path)
    code, out, err = bench(capsys, path, "--against", path, "--narrow", "50", "--json", quick=False)
    assert code == 0, err
    found = json.loads(out)
    (table,) = found["tables"]
    assert table["stopped_by"] == "narrow"
    assert "every interval was narrower" in found["stopped_by"]


def test_a_bank_mixes_its_own_slots_and_takes_new_ones(tmp_path, capsys):
    constants = session_graphs.bank(tmp_path, "constants", *(session_graphs.fitting(1, i) for i in range(2)))
    found = measured(capsys, constants, "--batch", "1,5", "--adapter", "emotion")
    assert len(found["tables"]) == 2
    assert found["adapters"] == []
    inputs = session_graphs.bank(tmp_path / "inputs", "inputs")
    save_adapter(session_graphs.fitting(2, 1), tmp_path / "summary", "peft")
    found = measured(capsys, inputs, "--adapter", f"summary={tmp_path / 'summary'}")
    assert [entry["adapter"] for entry in found["adapters"]] == ["summary"]


def test_a_row_of_a_bank_has_its_adapter():
    from lora_export.bench.contenders import Contender
    from lora_export.bench.model import BenchModel
    from lora_export.graph.exposed import LoraRecord, Slot

    record = LoraRecord(
        mode="bank",
        base="b",
        base_sha256="",
        modules=(),
        max_rank=8,
        slots=(Slot("x", "1"), Slot("y", "2"), Slot("free")),
    )
    model = BenchModel(path=Path("b.onnx"), label="b.onnx", kind="graph", inputs=(), exposed=record)
    assert model.slots == ("x", "y")
    assert Contender("b", model, model.slots).choice(4) == {"adapters": ["x", "y", None, "x"]}


# --- files and text ----------------------------------------------------------------------------------------


def test_report_plot_and_page(tmp_path, capsys):
    path = session_graphs.base(tmp_path)
    outputs = {kind: tmp_path / f"out.{kind}" for kind in ("json", "png", "html")}
    flags = ["--report", outputs["json"], "--plot", outputs["png"], "--html", outputs["html"]]
    code, out, err = bench(capsys, path, "--against", path, *flags)
    assert code == 0, err
    assert re.search(r"^run +1 +base\.onnx #2 .* \d\.\d+ \[\d+\.\d+, \d+\.\d+\]$", out, re.MULTILINE)
    assert json.loads(outputs["json"].read_text())["kind"] == "lora_export.bench"

    from matplotlib import pyplot

    picture = pyplot.imread(outputs["png"])
    assert picture.std() > 0.05
    page = outputs["html"].read_text(encoding="utf-8")
    assert not re.search(r"https?:|//|\bsrc=|\bhref=|@import|url\(|<script", page)
    drawings = [ET.fromstring(drawing) for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    (drawing,) = drawings
    widths = [float(bar.get("width")) for bar in drawing.iter("rect")]
    assert len(widths) == 2
    assert min(widths) > 0
    assert "base.onnx #2" in page
    assert sha256_of(path) in page

    code, _, err = bench(capsys, path, *flags)
    assert code == 1
    assert err.count("exists already") == 3
    code, _, err = bench(capsys, path, "--plot", tmp_path / "out.svg", "--html", outputs["html"], "--force")
    assert code == 0, err
    assert ET.parse(tmp_path / "out.svg").getroot().tag.endswith("svg")
    assert "base.onnx #2" not in outputs["html"].read_text(encoding="utf-8")


def test_names_are_escaped_in_the_page(tmp_path, capsys):
    path = session_graphs.base(tmp_path).rename(tmp_path / "a<b>&.onnx")
    code, _, err = bench(capsys, path, "--html", tmp_path / "o.html")
    assert code == 0, err
    page = (tmp_path / "o.html").read_text(encoding="utf-8")
    assert "a<b>" not in page
    assert "a&lt;b&gt;&amp;.onnx" in page


def test_progress_is_a_line_for_each_stage(tmp_path, capsys):
    path = session_graphs.base(tmp_path)
    code, _, err = bench(capsys, path, "--batch", "1,2", "--seconds", "0.2", quick=False)
    assert code == 0
    lines = err.strip().splitlines()
    assert all(re.match(r"\[ *\d+%\] ", line) for line in lines)
    assert [line.split("] ")[1] for line in lines if "run " in line] == ["run 1", "run 2"]
    _, _, quiet = bench(capsys, path)
    assert quiet == ""


@cached_llama
def test_a_dry_run_opens_nothing(capsys, monkeypatch):
    files = decoders()
    monkeypatch.setattr(load_probe.subprocess, "run", lambda *a, **k: pytest.fail("a process was started"))
    arguments = [files["swap"], "--adapter", f"one={files['one']}", "--sequence", "7", "--dry-run"]
    code, out, _ = bench(capsys, *arguments)
    assert code == 0
    for wanted in ("swap.onnx + one", "swap.onnx, no adapter", "prefill 1×7", "decode 1×1 after 7"):
        assert wanted in out


def test_a_dry_run_says_one_or_several(tmp_path, capsys):
    path = session_graphs.base(tmp_path)
    _, alone, _ = bench(capsys, path, "--dry-run")
    assert "would time one contender:\n  base.onnx\nin one workload: run 1\n" in alone
    assert "until its time's interval is narrower than" in alone
    assert "ratio" not in alone
    _, two, _ = bench(capsys, path, "--against", path, "--batch", "1,2", "--dry-run")
    assert "would time 2 contenders, compared with the first:" in two
    assert "in 2 workloads: run 1, run 2\nuntil the ratio's interval" in two
    _, three, _ = bench(capsys, path, "--against", path, "--against", path, "--dry-run")
    assert "until every ratio's interval" in three


def test_a_folder_that_is_missing_is_made(tmp_path, capsys):
    out = tmp_path / "new" / "deeper" / "out.json"
    path = session_graphs.base(tmp_path)
    code, _, err = bench(capsys, path, "--report", out, "--dry-run")
    assert code == 0, err
    assert not out.parent.exists()
    code, _, err = bench(capsys, path, "--report", out)
    assert code == 0, err
    assert json.loads(out.read_text())["kind"] == "lora_export.bench"


def test_a_report_beside_the_model_is_fine(tmp_path, capsys):
    path = session_graphs.base(tmp_path)
    flags = ["--report", tmp_path / "base.json", "--html", tmp_path / "base.html"]
    code, _, err = bench(capsys, path, *flags, "--dry-run")
    assert code == 0, err


def test_runs_in_a_block_are_said_for_each_contender_in_the_page():
    latency = Latency(count=1, median_ms=1.0, p95_ms=1.0, iqr_ms=0.0, min_ms=1.0)
    rows = [
        Row(
            contender=str(count),
            runs_per_block=count,
            latency=latency,
            rows_per_s=1.0,
            tokens_per_s=None,
            ratio=None,
        )
        for count in (7, 1, 3)
    ]
    assert WorkloadTable(Workload("run", 1, 0), 4, "time", tuple(rows)).runs_per_block == "1 to 7"
    assert WorkloadTable(Workload("run", 1, 0), 4, "time", tuple(rows[:1])).runs_per_block == "7"


def test_a_process_that_dies_is_a_note(tmp_path, monkeypatch, capsys):
    path = session_graphs.base(tmp_path)
    monkeypatch.setattr(load_probe.sys, "executable", shutil.which("false"))
    code, out, err = bench(capsys, path)
    assert code == 0, err
    assert "opening it alone was not measured: the process ended with exit code 1" in out


def test_what_goes_wrong_in_the_process_is_said(tmp_path, monkeypatch, capsys):
    path = session_graphs.base(tmp_path)
    seen = []

    def broken(job):
        seen.append(job)
        return load_probe.Loaded(problem="no memory")

    monkeypatch.setattr("lora_export.bench.run.measure_loading", broken)
    code, out, _ = bench(capsys, path)
    assert code == 0
    assert len(seen) == 1
    assert "not measured: no memory" in out


@pytest.mark.parametrize(
    ("before", "after", "busy"),
    [(0.1, 1.9, False), (1.2, 1.9, True), (0.1, 3.5, True), (None, None, False)],
)
def test_a_busy_machine_is_said(tmp_path, monkeypatch, before, after, busy):
    monkeypatch.setattr("lora_export.bench.run.measure_loading", lambda job: load_probe.Loaded())
    found = run_bench(session_graphs.base(tmp_path), seconds=0.05)
    load = tuple(value if value is None else (value, 0.0, 0.0) for value in (before, after))
    machine = dataclasses.replace(found.environment, cores=2, cpu_quota=None)
    found = dataclasses.replace(found, load_average=load, environment=machine)
    assert found.was_busy is busy
    assert ("kept the processor busy" in "\n".join(report_lines(found))) is busy


# --- engines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_engines_run_by_their_sessions(machine, tmp_path, monkeypatch, cuda_graph):
    monkeypatch.setattr("lora_export.bench.run.measure_loading", lambda job: load_probe.Loaded())
    (tmp_path / "plain").mkdir()
    plain = engine_of(session_graphs.base(tmp_path / "plain"))
    swap = engine_of(session_graphs.swap(tmp_path, flavour="tensorrt"))
    adapters = {}
    for seed in (1, 2):
        save_adapter(session_graphs.both(seed), tmp_path / f"a{seed}", "peft")
        adapters[f"a{seed}"] = tmp_path / f"a{seed}"
    options = {"provider": "cuda", "cuda_graph": True} if cuda_graph else {}
    found = run_bench(plain, [swap], adapters=adapters, batches=(2,), seconds=0.2, **options)
    (table,) = found.tables
    assert [row.contender.split(".")[0] for row in table.rows] == ["base", "swap", "swap"]
    assert {facts.device for facts in found.models} == {"cuda"}
    assert [entry.adapter for entry in found.adapters] == ["a1", "a2"]
    assert [swapping.adapters for swapping in found.swapping] == [2]


def test_an_engine_that_takes_no_such_batch_says_so_before_anything_is_timed(machine, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_export.bench.run.measure_loading", lambda job: load_probe.Loaded())
    monkeypatch.setattr("lora_export.bench.run.measure", lambda *a, **k: pytest.fail("it was timed"))
    engine = engine_of(session_graphs.base(tmp_path))
    with pytest.raises(LoraExportError, match="99"):
        run_bench(engine, batches=(1, 99), seconds=0.2)


def test_an_engine_where_there_is_no_gpu_is_the_runtimes_own_error(tmp_path, capsys):
    engine = engine_of(session_graphs.base(tmp_path))
    code, _, err = bench(capsys, engine)
    assert code == 1
    assert "can't be opened" in err
    assert "Traceback" not in err


# --- a GPU -------------------------------------------------------------------------------------------------


def _has_cuda():
    import onnxruntime as ort

    return "CUDAExecutionProvider" in ort.get_available_providers()


@pytest.mark.gpu
@pytest.mark.skipif(not _has_cuda(), reason="this onnxruntime has no CUDA provider")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_on_a_gpu(tmp_path, capsys, cuda_graph):
    save_adapter(session_graphs.both(1), tmp_path / "a", "peft")
    save_adapter(session_graphs.both(2), tmp_path / "b", "peft")
    swap, base = session_graphs.swap(tmp_path), session_graphs.base(tmp_path)
    flags = ["--provider", "cuda", *(["--cuda-graph"] if cuda_graph else [])]
    adapters = ["--adapter", f"a={tmp_path / 'a'}", "--adapter", f"b={tmp_path / 'b'}"]
    found = measured(capsys, base, "--against", swap, *adapters, "--batch", "1,64", *flags)
    assert len(found["tables"]) == 2
    assert found["environment"]["gpus"]
    for model in found["models"]:
        assert model["loaded"]["problem"] == ""
        assert model["loaded"]["gpu_running_bytes"] > 0


@cached_llama
@pytest.mark.gpu
@pytest.mark.skipif(not _has_cuda(), reason="this onnxruntime has no CUDA provider")
def test_a_cache_on_a_gpu(capsys):
    files = decoders()
    sizes = ["--sequence", "8", "--provider", "cuda"]
    found = measured(capsys, files["merged"], "--against", files["bank"], *sizes)
    assert [table["workload"]["phase"] for table in found["tables"]] == ["prefill", "decode"]
