"""Sizes that a graph leaves open: from genai_config.json beside it, and from --shape."""

from __future__ import annotations

import contextlib
import io
import json
import shutil

import numpy as np
import onnx_ir as ir
import pytest
import tiny
from small_graphs import graph, random

from lora_export import check_parity, merge_onnx, quantize_onnx, run_bench
from lora_export.bench.plan import BenchRequest, plan_bench
from lora_export.cli import _run
from lora_export.errors import BackendError, LoraExportError
from lora_export.graph.told_sizes import ToldSizes, parse_sizes, told_sizes

CALL = {"samples": 4, "localise": False}
WIDTH = 16


@pytest.fixture
def genai(tmp_path):
    return shutil.copytree(tiny.base_onnx("llama", "genai").parent, tmp_path / "genai")


@pytest.fixture(scope="module")
def int4(tmp_path_factory):
    from onnxruntime_genai.models import builder

    source, out = str(tiny.checkpoint("llama")), tmp_path_factory.mktemp("int4")
    cache = str(out / "cache")
    with tiny.quiet(), contextlib.redirect_stderr(io.StringIO()):
        options = builder.parse_extra_options(None, source, str(out), "int4", "cpu", cache, [])
        builder.create_model(None, source, str(out), "int4", "cpu", cache, **options)
    return out / "model.onnx"


def change_config(folder, **decoder):
    path = folder / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"] |= decoder
    path.write_text(json.dumps(config))


def test_genais_graph_is_compared_with_its_checkpoint(genai):
    report = check_parity(tiny.checkpoint("llama"), genai / "model.onnx", generate=4, **CALL)
    assert report.passed, report.failed
    assert any("GroupQueryAttention" in note for note in report.notes)
    shapes = [feed["shapes"] for feed in report.feeds]
    assert {tuple(each["past_key_values.0.key"])[1::2] for each in shapes} == {(2, WIDTH)}
    assert any(each["past_key_values.0.key"][2] for each in shapes)


def test_an_adapter_in_genais_graph(genai, tmp_path):
    """What is merged goes beside a config of its own, or its sizes are given."""
    adapter, out = tiny.adapter("llama"), tmp_path / "merged" / "model.onnx"
    merge_onnx(genai / "model.onnx", adapter, out, checkpoint=tiny.checkpoint("llama"))
    with pytest.raises(BackendError) as caught:
        check_parity(tiny.checkpoint("llama"), out, adapter, **CALL)
    assert "kv_cache_dim" in caught.value.problems[0]
    assert "--shape" in caught.value.hint
    given = check_parity(tiny.checkpoint("llama"), out, adapter, shapes={"kv_cache_dim": (WIDTH,)}, **CALL)
    shutil.copy(genai / "genai_config.json", out.parent)
    told = check_parity(tiny.checkpoint("llama"), out, adapter, **CALL)
    assert given.passed
    assert told.passed
    assert not check_parity(tiny.checkpoint("llama"), genai / "model.onnx", adapter, **CALL).passed


def test_genais_int4_graph_has_a_gate(int4):
    with pytest.raises(BackendError, match="no dtype tells how much that loses"):
        check_parity(tiny.checkpoint("llama"), int4, **CALL)
    assert check_parity(tiny.checkpoint("llama"), int4, tolerance=(0.5, 1.0), **CALL).passed
    assert not check_parity(tiny.checkpoint("llama"), int4, tolerance=(1e-3, 1e-3), **CALL).passed


def test_genais_graph_quantised_here(genai):
    quantize_onnx(genai / "model.onnx", genai / "int8.onnx", to="int8")
    change_config(genai, filename="int8.onnx")
    report = check_parity(tiny.checkpoint("llama"), genai / "int8.onnx", **CALL)
    assert report.passed, report.failed


def test_a_config_that_is_not_the_graphs(genai):
    change_config(genai, filename="other.onnx")
    with pytest.raises(BackendError, match="can't make feeds"):
        check_parity(tiny.checkpoint("llama"), genai / "model.onnx", **CALL)


@pytest.mark.parametrize(
    "wrong", ['{"model": {"decoder": 3}}', "[", '{"model": {"decoder": {"filename": 1}}}']
)
def test_a_damaged_config_is_an_error_where_it_is_needed(genai, wrong):
    (genai / "genai_config.json").write_text(wrong)
    with pytest.raises(BackendError) as caught:
        check_parity(tiny.checkpoint("llama"), genai / "model.onnx", **CALL)
    assert "genai_config.json" in caught.value.message
    shapes = {"kv_cache_dim": (WIDTH,)}
    assert check_parity(tiny.checkpoint("llama"), genai / "model.onnx", shapes=shapes, **CALL).passed


def test_a_config_that_is_a_link_out_of_the_folder(genai, tmp_path):
    path = genai / "genai_config.json"
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(BackendError, match="link out of the folder"):
        check_parity(tiny.checkpoint("llama"), genai / "model.onnx", **CALL)


def test_bench_times_genais_graph(genai):
    request = BenchRequest(models=(genai / "model.onnx",), sequences=(4,))
    (model,) = plan_bench(request).models
    assert {port.dims[3] for port in model.inputs if len(port.dims) == 4} == {WIDTH}
    assert model.vocab_size == 100
    (genai / "genai_config.json").unlink()
    with pytest.raises(LoraExportError) as caught:
        plan_bench(request)
    assert any("kv_cache_dim) is unknown: give --shape" in problem for problem in caught.value.problems)
    told = BenchRequest(models=request.models, sequences=(4,), shapes={"kv_cache_dim": (WIDTH,)})
    assert plan_bench(told).workloads


TEXT = """
g (float[batch, 4, height, width] sample, int64[steps] timestep) => (float[batch, 4, height, width] y) {
  t = Cast<to = 1>(timestep)
  s = Mul(t, a_weight)
  u = ReduceSum(s)
  m = MatMul(sample, b_weight)
  y = Add(m, u)
}
"""


def images(folder, factor=1.0):
    path = folder / f"unet{factor}.onnx"
    held = {"a.weight": 1e-3 * random(1), "b.weight": np.float32(factor) * random(8, 8, seed=2)}
    ir.save(graph(TEXT, held), path)
    return path


def test_shapes_of_images_and_steps(tmp_path):
    one, same, other = images(tmp_path), images(tmp_path, 1.00000001), images(tmp_path, 1.5)
    with pytest.raises(BackendError) as caught:
        check_parity(one, same)
    assert any("size of axis 2 is unknown" in problem for problem in caught.value.problems)
    shapes = {"height": (6,), "sample": (2, 4, 6, 8), "timestep": (1,)}
    report = check_parity(one, same, shapes=shapes, **CALL)
    assert report.passed
    assert report.feeds[0]["shapes"] == {"sample": [2, 4, 6, 8], "timestep": [1]}
    assert not check_parity(one, other, shapes=shapes, **CALL).passed
    words = [
        word for name, sizes in shapes.items() for word in ("--shape", f"{name}={'x'.join(map(str, sizes))}")
    ]
    assert _run(["parity", "--reference", str(one), "--candidate", str(same), *words, "--quiet"], False) == 0
    assert _run(["parity", "--reference", str(one), "--candidate", str(other), *words, "--quiet"], False) == 3


def test_bench_takes_shapes(tmp_path):
    with pytest.raises(LoraExportError) as caught:
        run_bench(images(tmp_path), seconds=0.2)
    assert any("sample: the size of axis 2 (height) is unknown" in line for line in caught.value.problems)
    report = run_bench(images(tmp_path), shapes=["height=6", "width=8", "timestep=1"], seconds=0.2)
    assert [table.workload.label for table in report.tables] == ["run 1"]
    assert all(row.latency for table in report.tables for row in table.rows)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"depth": (3,)}, "no dimension and no input has this name"),
        ({"height": (3, 4)}, "a dimension has one size"),
        ({"sample": (1, 4)}, "the input has 4 axes"),
        ({"sample": (1, 3, 6, 8)}, "the graph fixes 4, not 3"),
    ],
)
def test_sizes_that_do_not_fit(shapes, said, tmp_path):
    with pytest.raises(BackendError) as caught:
        check_parity(images(tmp_path), images(tmp_path, 2.0), shapes=shapes)
    assert any(said in problem for problem in caught.value.problems)
    assert "height" in caught.value.hint


@pytest.mark.parametrize(
    "word", ["height", "height=", "=3", "height=0", "height=3x", "height=-1", "h=" + "9" * 30]
)
def test_words_that_are_no_sizes(word):
    with pytest.raises(BackendError, match="can't be read"):
        parse_sizes([word])


def test_a_name_given_twice():
    with pytest.raises(BackendError) as caught:
        parse_sizes(["height=3", "height=4"])
    assert caught.value.problems == ("height: given twice",)


def test_sizes_of_a_graph_stay(tmp_path):
    """What a graph fixes is not overwritten; other dimensions keep their names."""
    told = ToldSizes(shapes={"height": (6,)}, heads=2, head_size=8, caches=("past.%d.key",))
    assert told.dims("x", ("batch", 4, "height", 7)) == ("batch", 4, 6, 7)
    assert told.dims("past.0.key", ("b", 3, "p", "d")) == ("b", 3, "p", 8)
    assert told.dims("past.x.key", ("b", 3, "p", "d")) == ("b", 3, "p", "d")
    assert told_sizes(tmp_path / "m.onnx", [("past.0.key", ("b", 3, "p", "d"))]) == ToldSizes()
