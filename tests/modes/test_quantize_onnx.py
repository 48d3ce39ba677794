"""Quantised graphs: ONNX Runtime's own tool and arithmetic say which codes and results there must be."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys

import dequantised
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny
from small_graphs import graph, random
from tiny_models import build

from lora_export import quantize_onnx, verify
from lora_export.cli import _run
from lora_export.errors import CheckpointError, GraphError, OutputError
from lora_export.graph.quantised import KEY as QUANTISED
from lora_export.graph.quantised import quantised_in
from lora_export.modes.quantising import weight as weights
from lora_export.reports.artefact import read_artefact
from lora_export.storage.manifest import Manifest

ALL = {"head": True, "embeddings": True, "block_size": 16}
EXPORTS = [
    *(
        ("llama", name)
        for name in ("dynamo", "dynamo_noopt", "torchscript", "genai", "ort_fusions", "mobius")
    ),
    ("gpt2", "dynamo"),
    ("bert", "dynamo_noopt"),
    ("t5", "torchscript"),
    ("vit", "dynamo"),
]


def saved(folder, text, held, **more):
    path = folder / "base.onnx"
    ir.save(graph(text, held, **more), path)
    return path


def run(path, **feeds):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds)


@pytest.mark.parametrize("to", ["int4", "int8"])
@pytest.mark.parametrize(("arch", "exporter"), EXPORTS)
def test_a_graph_computes_with_the_values_of_its_codes(arch, exporter, to, tmp_path):
    base, out = tiny.base_onnx(arch, exporter), tmp_path / "q.onnx"
    report = quantize_onnx(base, out, to=to, **ALL)
    floats = dequantised.as_floats(out, tmp_path / "floats.onnx")
    feeds = tiny.feeds(arch, base)
    # ONNX Runtime's kernels for packed codes add up in another order.
    assert tiny.relative_error(tiny.run(out, feeds), tiny.run(floats, feeds)) < 1e-5
    assert len(dequantised.decoded(out)) == sum(row.action == "quantise" for row in report.quantised.rows)
    step = {"int4": 0.5, "int8": 0.05}[to]
    assert tiny.relative_error(tiny.run(out, feeds), tiny.run(base, feeds)) < step


@pytest.mark.parametrize("exporter", ["dynamo", "dynamo_noopt", "torchscript"])
def test_every_linear_of_a_capture_is_found(exporter, tmp_path):
    """Also behind a Transpose, where ONNX Runtime's own tool leaves it out."""
    out = tmp_path / "q.onnx"
    quantize_onnx(tiny.base_onnx("llama", exporter), out, block_size=16)
    model = build("llama")
    state = {name: value.detach().double().numpy() for name, value in model.named_parameters()}
    record = quantised_in(onnx_metadata(out))[0]
    linear = {name.removesuffix(".weight") for name in state if "proj" in name}
    assert {weight.module for weight in record.weights} == linear
    found = dequantised.decoded(out)
    for weight in record.weights:
        wanted, got = state[f"{weight.module}.weight"], found[weight.codes]
        # Rounded to the nearest code; the largest value of a block may be cut off by one step.
        assert (np.abs(got.values - wanted) <= got.steps * (1 + 1e-5)).all()
        lost = np.linalg.norm(got.values - wanted) / np.linalg.norm(wanted)
        assert weight.relative == pytest.approx(lost, rel=1e-4)
        assert weight.norm == pytest.approx(np.linalg.norm(wanted), rel=1e-4)


def onnx_metadata(path):
    return {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("to", "bits"), [("int4", 4), ("int8", 8)])
def test_codes_are_those_of_onnxruntimes_own_tool(to, bits, symmetric, tmp_path):
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    base, out = tiny.base_onnx("llama", "torchscript"), tmp_path / "q.onnx"
    quantize_onnx(base, out, to=to, symmetric=symmetric, head=True, accuracy_level=4)
    tool = MatMulNBitsQuantizer(
        onnx.load(base), bits=bits, block_size=32, is_symmetric=symmetric, accuracy_level=4
    )
    tool.process()
    assert_same_codes(onnx.load(out), tool.model.model)


def assert_same_codes(own, other):
    held = [dequantised.constants(model) for model in (own, other)]
    nodes = [
        {node.output[0]: node for node in model.graph.node if node.op_type == "MatMulNBits"}
        for model in (own, other)
    ]
    assert nodes[0].keys() == nodes[1].keys()
    assert len(nodes[0]) == 15
    for output, one in nodes[0].items():
        two = nodes[1][output]
        assert sorted(map(str, one.attribute)) == sorted(map(str, two.attribute))
        for name, wanted in zip(one.input[1:], two.input[1:], strict=True):
            np.testing.assert_array_equal(held[0][name].ravel(), held[1][wanted].ravel())


@pytest.mark.parametrize("method", ["k-quant", "hqq"])
def test_searched_codes_are_those_of_onnxruntimes_own_tool(method, tmp_path):
    from onnxruntime.quantization import matmul_nbits_quantizer as tools

    base, out = tiny.base_onnx("llama", "torchscript"), tmp_path / "q.onnx"
    quantize_onnx(base, out, method=method, head=True)
    config = tools.HQQWeightOnlyQuantConfig(32) if method == "hqq" else tools.KQuantWeightOnlyQuantConfig()
    tool = tools.MatMulNBitsQuantizer(onnx.load(base), block_size=32, algo_config=config)
    tool.process()
    other = tool.model.model
    assert_same_codes(onnx.load(out), other)
    floats = dequantised.as_floats(out, tmp_path / "floats.onnx")
    feeds = tiny.feeds("llama", base)
    assert tiny.relative_error(tiny.run(out, feeds), tiny.run(floats, feeds)) < 1e-5


def test_8_bits_with_searched_scales(tmp_path):
    base, out = tiny.base_onnx("llama", "torchscript"), tmp_path / "q.onnx"
    report = quantize_onnx(base, out, to="int8", method="k-quant")
    floats, feeds = dequantised.as_floats(out, tmp_path / "floats.onnx"), tiny.feeds("llama", base)
    assert tiny.relative_error(tiny.run(out, feeds), tiny.run(floats, feeds)) < 1e-5
    assert report.quantised.record.worst.relative < 0.01


TEXT = """
g (float[b, 40] x, float[40, b] z)
  => (float[b, 24] y, float[b, 24] u, float[b, 24] v, float[b, 24] w, float[24, b] l) {
  turned = Transpose<perm = [1, 0]>(a_weight)
  y = MatMul(x, turned)
  u = Gemm<transB = 1>(x, b_weight, b_bias)
  half = Cast<to = 1>(c_weight)
  v = MatMul(x, half)
  w = com.microsoft.FusedMatMul<transB = 1, alpha = 1.0>(x, a_weight)
  l = MatMul(d_weight, z)
}
"""


def weights_of_text():
    held = {f"{name}.weight": random(24, 40, seed=number) for number, name in enumerate("abd")}
    held |= {"c.weight": random(40, 24, seed=4).astype(np.float16), "b.bias": random(24, seed=5)}
    return held


def test_weights_behind_operators_and_in_gemm(tmp_path):
    """40 inputs are no whole number of blocks: the last one is padded, as ONNX Runtime pads it."""
    held, out = weights_of_text(), tmp_path / "q.onnx"
    base = saved(tmp_path, TEXT, held)
    report = quantize_onnx(base, out, symmetric=False)
    found = {name: decoded.values for name, decoded in dequantised.decoded(out).items()}
    assert sorted(found) == ["a.weight_Q4", "b.weight_Q4", "c.weight_Q4"]
    x, z = random(3, 40, seed=9), random(40, 3, seed=8)
    y, u, v, w, left = run(out, x=x, z=z)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(y, wide @ found["a.weight_Q4"].T, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(w, y)
    np.testing.assert_allclose(u, wide @ found["b.weight_Q4"].T + held["b.bias"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(v, wide @ found["c.weight_Q4"].T, rtol=0, atol=1e-4)
    np.testing.assert_allclose(left, held["d.weight"] @ z.astype(np.float64), rtol=0, atol=1e-4)
    for name in "abc":
        wanted = held[f"{name}.weight"].astype(np.float64)
        wanted = wanted.T if name == "c" else wanted
        assert np.linalg.norm(found[f"{name}.weight_Q4"] - wanted) < 0.15 * np.linalg.norm(wanted)
    (row,) = report.quantised.left
    assert (row.weight, row.reason) == ("d.weight", "the weight stands on the left (W @ x)")


CONSTANT = """
g (float[b, 32] x, float[32] v) => (float[b, 32] y, float[32] u) {
  a_weight = Constant<value = float[32, 32] {WEIGHT}>()
  y = MatMul(x, a_weight)
  u = MatMul(v, b_weight)
}
"""


def test_constants_of_nodes_and_vectors(tmp_path):
    values, held = random(32, 32, seed=6), {"b.weight": random(32, 32, seed=7)}
    text = CONSTANT.replace("WEIGHT", ", ".join(map(repr, values.ravel().tolist())))
    out = tmp_path / "q.onnx"
    report = quantize_onnx(saved(tmp_path, text, held), out, to="int8")
    (row,) = report.quantised.left
    assert (row.weight, "vector" in row.reason) == ("b.weight", True)
    assert not [node for node in onnx.load(out).graph.node if node.op_type == "Constant"]
    (decoded,) = dequantised.decoded(out).values()
    x, v = random(4, 32, seed=3), random(32, seed=4)
    y, u = run(out, x=x, v=v)
    np.testing.assert_allclose(y, x.astype(np.float64) @ decoded.values.T, rtol=0, atol=1e-4)
    np.testing.assert_allclose(u, v.astype(np.float64) @ held["b.weight"], rtol=0, atol=1e-4)
    assert np.linalg.norm(decoded.values - values.T) < 0.01 * np.linalg.norm(values)


BODY = """
g (float[b, 32] x, bool c) => (float[b, 32] y) {
  y = If (c) <
    then_branch = t () => (float[b, 32] p) { p = MatMul(x, a_weight) },
    else_branch = e () => (float[b, 32] q) { k = Transpose<perm = [1, 0]>(a_weight)  q = MatMul(x, k) }
  >
}
"""


def test_weights_in_bodies(tmp_path):
    """One weight is read as it is and turned: each reader gets codes along its own inputs."""
    held, out = {"a.weight": random(32, 32)}, tmp_path / "q.onnx"
    quantize_onnx(saved(tmp_path, BODY, held), out, to="int8")
    values = [decoded.values for decoded in dequantised.decoded(out).values()]
    assert len(values) == 2
    x = random(4, 32, seed=3)
    for condition, near in ((True, held["a.weight"].T), (False, held["a.weight"])):
        (y,) = run(out, x=x, c=np.array(condition))
        best = min(values, key=lambda one: float(np.abs(one - near).max()))
        np.testing.assert_allclose(y, x.astype(np.float64) @ best.T, rtol=0, atol=1e-4)
        assert np.linalg.norm(best - near) < 0.01 * np.linalg.norm(near)


def test_what_is_not_quantised_is_said(tmp_path):
    base, out = tiny.base_onnx("llama", "dynamo"), tmp_path / "q.onnx"
    report = quantize_onnx(base, out, keep=["down_proj", "layers.0.self_attn.q_proj"])
    left = {row.module: row.reason for row in report.quantised.left}
    assert "--head" in left.pop("lm_head")
    assert "--embeddings" in left.pop("model.embed_tokens")
    kept = {f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)}
    assert {name for name, reason in left.items() if "--keep" in reason} == (
        kept | {"model.layers.0.self_attn.q_proj"}
    )
    graph_of = onnx.load(base)
    matrices = {t.name for t in graph_of.graph.initializer if len(t.dims) > 1 and t.data_type == 1}
    read = {name for node in graph_of.graph.node for name in node.input}
    assert {row.weight for row in report.quantised.rows} >= matrices & read
    manifest = Manifest.read(out.with_suffix(".lora.json"))
    assert manifest.quantised == json.loads(json.dumps(report.quantised.as_dict()))
    assert manifest.mode == "quantize-onnx"


def test_the_head_can_follow_with_other_bits(tmp_path):
    first, second = tmp_path / "4.onnx", tmp_path / "48.onnx"
    quantize_onnx(tiny.base_onnx("llama", "dynamo"), first, block_size=16)
    report = quantize_onnx(first, second, to="int8", head=True)
    assert [row.module for row in report.quantised.rows if row.action == "quantise"] == ["lm_head"]
    assert any("quantised already" in row.reason for row in report.quantised.left)
    assert [record.to for record in quantised_in(onnx_metadata(second))] == ["int4", "int8"]


def test_a_large_weight_is_quantised_in_parts(tmp_path, monkeypatch):
    held = {"a.weight": random(512, 2048)}
    text = "g (float[b, 512] x) => (float[b, 2048] y) { y = MatMul(x, a_weight) }"
    base = saved(tmp_path, text, held)
    report = quantize_onnx(base, tmp_path / "whole.onnx", symmetric=False)
    assert (
        dequantised.constants(onnx.load(tmp_path / "whole.onnx"))["a.weight_Q4"].nbytes > weights.EAGER_BYTES
    )
    monkeypatch.setattr(weights, "_CHUNK", 1 << 15)
    parts = quantize_onnx(base, tmp_path / "parts.onnx", symmetric=False)
    one, two = ((tmp_path / name).with_suffix(".onnx.data").read_bytes() for name in ("whole", "parts"))
    assert one == two
    assert parts.quantised.record.relative == pytest.approx(report.quantised.record.relative, rel=1e-4)


def test_a_module_to_keep_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(GraphError, match="no such modules to leave in float: q_projj, down") as caught:
        quantize_onnx(
            tiny.base_onnx("llama", "dynamo"), tmp_path / "o.onnx", keep=["q_projj", "v_proj", "down"]
        )
    assert "model.layers.0.self_attn.q_proj" in str(caught.value.problems)
    assert not list(tmp_path.iterdir())


def test_half_precision_keeps_its_type(tmp_path):
    text = "g (float16[b, 64] x) => (float16[b, 32] y) { y = MatMul(x, a_weight) }"
    held = {"a.weight": random(64, 32).astype(np.float16)}
    out = tmp_path / "q.onnx"
    quantize_onnx(saved(tmp_path, text, held), out)
    (decoded,) = dequantised.decoded(out).values()
    x = random(4, 64, seed=2).astype(np.float16)
    (y,) = run(out, x=x)
    assert y.dtype == np.float16
    np.testing.assert_allclose(y, x.astype(np.float64) @ decoded.values.T, rtol=2e-3, atol=2e-2)


def test_genai_runs_the_quantised_graph_of_its_folder(tmp_path):
    """Greedy tokens are those of the codes' values in float."""
    og = pytest.importorskip("onnxruntime_genai")
    base, out = tiny.base_onnx("llama", "genai"), tmp_path / "int8" / "model.onnx"
    assert _run(["quantize-onnx", str(base), "--to", "int8", "-o", str(out), "--quiet"], False) == 0
    assert sorted(path.name for path in out.parent.iterdir()) == [
        *("genai_config.json", "model.lora.json", "model.onnx", "model.onnx.data"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    assert all(state.state == "ok" for state in verify(out.parent).files)
    floats = dequantised.as_floats(out, tmp_path / "floats.onnx")
    model = og.Model(str(out.parent))
    settings = og.GeneratorParams(model)
    settings.set_search_options(max_length=16, do_sample=False)
    generator = og.Generator(model, settings)
    ids = [[5, 17, 33, 8]]
    generator.append_tokens(np.array(ids, np.int32))
    wanted = list(ids[0])
    while not generator.is_done():
        generator.generate_next_token()
        feeds = tiny.feeds("llama", floats)
        feeds = {name: values[:1] for name, values in feeds.items()}
        feeds |= {"input_ids": np.array([wanted]), "attention_mask": np.ones((1, len(wanted)), np.int64)}
        wanted.append(int(tiny.run(floats, feeds)[0, -1].argmax()))
    if wanted[-1] == 2:  # the end of the text, which genai doesn't append
        wanted.pop()
    assert len(wanted) > len(ids[0])
    assert generator.get_sequence(0).tolist() == wanted


# --- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"to": "int3"}, "int4 or int8"),
        ({"method": "gptq"}, "rtn, k-quant, hqq"),
        ({"block_size": 48}, "16, 32, 64, 128"),
        ({"accuracy_level": 7}, "0 to 4"),
        ({"method": "hqq", "symmetric": True}, "can't quantise symmetrically"),
        ({"method": "hqq", "to": "int8"}, "int4 only"),
        ({"method": "hqq", "embeddings": True}, "GatherBlockQuantized"),
    ],
)
def test_choices_that_there_are_not(options, said, tmp_path):
    with pytest.raises(GraphError) as caught:
        quantize_onnx(tiny.base_onnx("llama", "dynamo"), tmp_path / "q.onnx", **options)
    assert any(said in problem for problem in caught.value.problems)
    assert not list(tmp_path.iterdir())


def test_nothing_to_quantise(tmp_path):
    base = saved(
        tmp_path, "g (float[b, 8] x) => (float[b, 8] y) { y = Add(x, a_bias) }", {"a.bias": random(8)}
    )
    with pytest.raises(GraphError, match="no weight that can be quantised"):
        quantize_onnx(base, tmp_path / "q.onnx")
    small = {"a.weight": random(8, 8)}
    base = saved(tmp_path, "g (float[b, 8] x) => (float[b, 8] y) { y = MatMul(x, a_weight) }", small)
    with pytest.raises(GraphError) as caught:
        quantize_onnx(base, tmp_path / "q.onnx", block_size=128)
    assert "would not be smaller" in caught.value.problems[0]


def test_a_quantised_graph_is_not_quantised_again(tmp_path):
    quantize_onnx(tiny.base_onnx("llama", "dynamo"), tmp_path / "1.onnx", block_size=16)
    with pytest.raises(GraphError) as caught:
        quantize_onnx(tmp_path / "1.onnx", tmp_path / "2.onnx")
    assert any("quantised already (MatMulNBits)" in problem for problem in caught.value.problems)


def test_a_weight_with_nan(tmp_path):
    values = random(64, 64)
    values[3, 5] = np.nan
    base = saved(
        tmp_path, "g (float[b, 64] x) => (float[b, 64] y) { y = MatMul(x, a_weight) }", {"a.weight": values}
    )
    with pytest.raises(CheckpointError, match=r"a\.weight can't be quantised"):
        quantize_onnx(base, tmp_path / "q.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["base.onnx"]


@pytest.mark.parametrize(("to", "size"), [("int8", 1e-24), ("int4", 1e-30)])
def test_the_loss_of_tiny_weights_is_measured(to, size, tmp_path):
    values, losses = random(64, 64).astype(np.float32), []
    for factor in (1, size):
        base = saved(
            tmp_path,
            "g (float[b, 64] x) => (float[b, 64] y) { y = MatMul(x, a_weight) }",
            {"a.weight": values * np.float32(factor)},
        )
        report = quantize_onnx(base, tmp_path / f"{factor}.onnx", to=to)
        losses.append(report.quantised.record.relative)
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_a_weight_that_codes_do_not_stand_for(tmp_path):
    values = (random(64, 64) * 1e-7).astype(np.float16)
    base = saved(
        tmp_path,
        "g (float16[b, 64] x) => (float16[b, 64] y) { y = MatMul(x, a_weight) }",
        {"a.weight": values},
    )
    with pytest.raises(CheckpointError, match=r"a\.weight can't be quantised: its codes lose \d+% of it"):
        quantize_onnx(base, tmp_path / "q.onnx", to="int8")


def test_files_that_must_not_be_replaced(tmp_path):
    base = tiny.base_onnx("llama", "dynamo")
    (tmp_path / "q.onnx").write_text("old")
    with pytest.raises(OutputError, match="exists already"):
        quantize_onnx(base, tmp_path / "q.onnx")
    assert quantize_onnx(base, tmp_path / "q.onnx", block_size=16, dry_run=True).dry_run
    assert (tmp_path / "q.onnx").read_text() == "old"
    with pytest.raises(OutputError, match="would replace a file that is read"):
        quantize_onnx(base, base, force=True)


def test_a_full_disk_leaves_the_old_files(tmp_path, monkeypatch):
    base, out = tiny.base_onnx("llama", "dynamo"), tmp_path / "q.onnx"
    quantize_onnx(base, out)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(handle, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="No space left on device"):
        quantize_onnx(base, out, to="int8", force=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_equal_inputs_give_equal_bytes(tmp_path):
    base = tiny.base_onnx("llama", "dynamo")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder in "ab":
        quantize_onnx(base, tmp_path / folder / "q.onnx", method="k-quant")
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()} for folder in "ab")
    assert one == two


def test_logging_stays_as_it_was(tmp_path):
    """ONNX Runtime's module makes a handler for all libraries' messages when it is imported."""
    code = (
        "import logging, sys; from lora_export import quantize_onnx;"
        "quantize_onnx(*sys.argv[1:]); print(logging.getLogger().handlers, logging.getLogger().level)"
    )
    base = str(tiny.base_onnx("llama", "dynamo"))
    done = subprocess.run(
        [sys.executable, "-c", code, base, str(tmp_path / "q.onnx")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout.strip(), done.stderr) == (f"[] {logging.WARNING}", "")


def test_a_folder_is_captured_first(tmp_path):
    with pytest.raises(GraphError) as caught:
        quantize_onnx(tiny.checkpoint("llama"), tmp_path / "q.onnx")
    assert "capture-onnx" in caught.value.hint


def test_a_damaged_record_is_refused(tmp_path):
    out = tmp_path / "q.onnx"
    quantize_onnx(tiny.base_onnx("llama", "dynamo"), out, block_size=16)
    text = onnx_metadata(out)["lora_export.quantised"]
    for wrong in ("{}", text.replace("int4", "int4", 1)[:-9], text.replace('"norm": ', '"norm": -', 1)):
        with pytest.raises(GraphError):
            quantised_in({"lora_export.quantised": wrong})


def test_inspect_says_what_was_quantised(tmp_path):
    out = tmp_path / "q.onnx"
    report = quantize_onnx(tiny.base_onnx("llama", "dynamo"), out, block_size=16)
    found = read_artefact(out)
    (entry,) = found.facts["quantised"]
    assert (entry["to"], entry["weights"], entry["block_size"]) == ("int4", 14, 16)
    assert entry["relative_error"] == pytest.approx(report.quantised.record.relative)
    assert any(line.startswith("quantised 14 weights to int4 (rtn, blocks of 16") for line in found.lines)


@pytest.mark.parametrize("value", [1e200, -1.0, float("nan"), float("inf")])
def test_a_record_with_a_norm_that_no_weights_have_is_damaged(value, tmp_path):
    out = tmp_path / "q.onnx"
    quantize_onnx(tiny.base_onnx("llama", "dynamo"), out)
    model = onnx.load(out, load_external_data=False)
    (entry,) = [entry for entry in model.metadata_props if entry.key == QUANTISED]
    data = json.loads(entry.value)
    data[0]["weights"][0]["norm"] = value
    entry.value = json.dumps(data)
    onnx.save(model, out)
    assert _run(["inspect", str(out)], False) == 1


def test_the_command_says_what_it_does(tmp_path, capsys):
    base, out = str(tiny.base_onnx("llama", "dynamo")), tmp_path / "q.onnx"
    words = ["quantize-onnx", base, "--to", "int4", "--asymmetric", "--keep", "v_proj", "-o", str(out)]
    assert _run([*words, "--dry-run"], False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("model.layers.1.self_attn.v_proj ") and "--keep" in line for line in lines)
    assert any(line.split()[0] == "model.layers.1.mlp.up_proj" and line.endswith("int4") for line in lines)
    assert not list(tmp_path.iterdir())
    assert _run([*words, "--json"], False) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["quantised"]["choice"]["symmetric"] is False
    assert len(found["quantised"]["weights"]) == 12
    assert found["size_bytes"] < found["before_bytes"]
    assert _run([*words, "--force"], False) == 0
    printed = capsys.readouterr()
    assert "int4: 12 weights by rtn, blocks of 32, with zero points" in printed.out
    assert f"next: lora-export parity --reference {base} --candidate {out}" in printed.err
    assert _run([*words, "--force", "--method", "hqq", "--to", "int8"], False) == 1
    assert "int4 only" in capsys.readouterr().err
