"""Float weights that the graph rounds (QAT, ModelOpt): a merge adds to the float, a branch goes beside."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import tiny
import torch
from branch_graphs import bind, unoptimised
from quantised_graphs import fake_quantised, replaced
from small_graphs import HEAD, adapter, constants, delta, graph, linear, random, run, save
from tiny_models import build

from lora_export import SiteError, bank_onnx, load_adapter, merge_onnx, swap_onnx

GRIDS = {
    "int8": {},
    "int8 per channel": {"channel": True},
    "int8 behind the Transpose": {"stored": False, "channel": True},
    "float8": {"code": "float8"},
}
# A branch or a merge may come out on the other side of a step here and there.
STEPS = 2.0


def state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def merged_state(arch, folder):
    from peft import PeftModel

    return state(PeftModel.from_pretrained(build(arch), folder).merge_and_unload())


CASES = [
    *(("bert", "dynamo", grid) for grid in GRIDS),
    *(("vit", "dynamo_noopt", grid) for grid in GRIDS),
    ("llama", "dynamo", "int8 per channel"),
    ("conv", "dynamo_noopt", "int8 per channel"),
    ("conv", "dynamo_noopt", "float8"),
]


@pytest.mark.parametrize(("arch", "exporter", "grid"), CASES)
def test_merged_and_exposed(arch, exporter, grid, tmp_path):
    given = tiny.adapter(arch)
    base = fake_quantised(tiny.base_onnx(arch, exporter), tmp_path / "base.onnx", **GRIDS[grid])
    feeds = tiny.feeds(arch, base)
    wanted, plain = tiny.reference(arch, given), tiny.base_reference(arch)
    lost = tiny.relative_error(tiny.run(base, feeds), plain)
    checkpoint = tiny.checkpoint(arch) if arch == "conv" else None

    # The grid of the base is four times too wide: what it loses is what the merged model may lose.
    out = tmp_path / "merged.onnx"
    merge_onnx(base, given, out, checkpoint=checkpoint)
    assert tiny.relative_error(tiny.run(out, feeds), wanted) < STEPS * lost
    by_hand, count = replaced(base, tmp_path / "hand.onnx", state(build(arch)), merged_state(arch, given))
    if arch != "conv":
        assert count >= len(load_adapter(given).modules)
        got, answer = tiny.run(out, feeds), tiny.run(by_hand, feeds)
        assert tiny.relative_error(got, answer) < 0.1 * lost + 1e-6

    report = swap_onnx(base, tmp_path / "swap.onnx", adapter=given, checkpoint=checkpoint)
    swap = report.outputs["graph"]
    # ONNX Runtime's own fusions of DequantizeLinear, MatMul and Add differ, see test_branches_quantised.
    assert np.array_equal(unoptimised(swap, **feeds)[0], unoptimised(base, **feeds)[0])
    tensors = dict(bind(load_adapter(given), report, base).tensors)
    assert tiny.relative_error(tiny.run(swap, feeds | tensors), wanted) < STEPS * lost


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_a_bank_beside_rounded_weights(arch, tmp_path):
    first, second = (tiny.adapter(arch, seed=seed) for seed in (0, 1))
    base = fake_quantised(tiny.base_onnx(arch, "torchscript"), tmp_path / "base.onnx", channel=True)
    report = bank_onnx(base, {"first": first, "second": second}, tmp_path / "bank.onnx")
    bank = report.outputs["graph"]
    feeds = tiny.feeds(arch, base)
    lost = tiny.relative_error(tiny.run(base, feeds), tiny.base_reference(arch))
    got = tiny.run(bank, feeds | {"lora.adapter_weights": np.eye(2, dtype=np.float32)})
    for row, folder in enumerate((first, second)):
        wanted = tiny.reference(arch, folder)[row]
        assert tiny.relative_error(got[row], wanted) < STEPS * lost


# --- what the grid cuts off ------------------------------------------------------------------------------

OUT, IN = 12, 16
ROUNDED = (
    f"g (float[b,{IN}] x) => (float[b,{OUT}] y) "
    "{ q = QuantizeLinear <axis = 0> (fc_weight, scale, zero) "
    "r = DequantizeLinear <axis = 0> (q, scale, zero) t = Transpose <perm = [1, 0]> (r) y = MatMul (x, t) }"
)


def rounded_base(folder, room, code=np.int8):
    weight = random(OUT, IN, seed=3)
    scale = (np.abs(weight).max(1) * room / 127).astype(np.float32)
    return (
        weight,
        scale,
        save(graph(ROUNDED, {"fc.weight": weight, "scale": scale, "zero": np.zeros(OUT, code)}), folder),
    )


def cut_share(weight, change, scale):
    """How much of the change the range [-128, 127] · scale leaves out, by plain arithmetic."""
    inside = np.clip(weight + change, -128 * scale[:, None], 127 * scale[:, None])
    return np.linalg.norm(weight + change - inside) / np.linalg.norm(change)


def sized(factor):
    return replace(linear("fc", OUT, IN), alpha=3.0 * factor)


def test_a_change_beyond_the_range_is_refused_with_its_share(tmp_path):
    weight, scale, base = rounded_base(tmp_path, room=1.0)
    module = sized(1.0)
    share = cut_share(weight, delta(module), scale)
    assert share > 0.1
    with pytest.raises(SiteError, match="ranges that were calibrated without the adapter") as caught:
        merge_onnx(base, adapter(module), tmp_path / "out.onnx")
    assert f"cuts off {share:.1%} of ‖ΔW‖" in caught.value.problems[0]
    assert "swap-onnx" in caught.value.hint
    assert "merge-onnx" not in caught.value.hint
    assert not (tmp_path / "out.onnx").exists()
    # And the branch beside it loses nothing.
    report = swap_onnx(base, tmp_path / "swap.onnx", adapter=adapter(module))
    x = random(5, IN, seed=4)
    codes = np.clip(np.rint(weight / scale[:, None]), -128, 127) * scale[:, None]
    (got,) = run(tmp_path / "swap.onnx", x=x, **bind(adapter(module), report, base).tensors)
    np.testing.assert_allclose(got, x @ (codes + delta(module)).T, rtol=1e-4, atol=1e-4)


def test_a_change_that_is_cut_a_little_is_merged_with_a_warning(tmp_path):
    weight, scale, base = rounded_base(tmp_path, room=1.5)
    module = next(
        found
        for factor in np.linspace(0.02, 1, 50)
        if 0.01 < cut_share(weight, delta(found := sized(factor)), scale) < 0.1
    )
    share = cut_share(weight, delta(module), scale)
    report = merge_onnx(base, adapter(module), tmp_path / "out.onnx")
    assert any(f"cuts off {share:.1%} of ‖ΔW‖" in warning for warning in report.plan.warnings)
    np.testing.assert_allclose(
        constants(tmp_path / "out.onnx")["fc.weight"], weight + delta(module), rtol=1e-5, atol=1e-6
    )


def test_a_change_smaller_than_a_step_is_warned_of(tmp_path):
    _, _, base = rounded_base(tmp_path, room=8.0)
    report = merge_onnx(base, adapter(sized(0.002)), tmp_path / "out.onnx")
    (warning,) = report.plan.warnings
    assert "rounds it to the grid" in warning


def test_a_scale_that_the_graph_computes_is_refused_for_a_merge(tmp_path):
    text = (
        f"g (float[b,{IN}] x) => (float[b,{OUT}] y) "
        "{ m = ReduceMax <keepdims = 0> (fc_weight) s = Div (m, top) q = QuantizeLinear (fc_weight, s, zero) "
        "r = DequantizeLinear (q, s, zero) y = MatMul (x, r) }"
    )
    weights = {"fc.weight": random(IN, OUT), "top": np.float32(127), "zero": np.int8(0)}
    base = save(graph(text, weights), tmp_path)
    with pytest.raises(SiteError) as caught:
        merge_onnx(base, adapter(linear("fc", OUT, IN)), tmp_path / "out.onnx")
    assert "scale the graph computes" in str(caught.value)


def test_a_rounded_weight_that_two_modules_share_gets_a_copy(tmp_path):
    text = (
        f"g (float[b,{IN}] x) => (float[b,{OUT}] y, float[b,{OUT}] z) "
        "{ q = QuantizeLinear (fc_weight, scale, zero) r = DequantizeLinear (q, scale, zero) "
        "[n1] y = MatMul (x, r) [n2] z = MatMul (x, r) }"
    )
    weight = random(IN, OUT, seed=5)
    scale = np.float32(np.abs(weight).max() * 4 / 127)
    base = save(
        graph(text, {"fc.weight": weight, "scale": scale, "zero": np.int8(0)}, {"n1": "fc", "n2": "other"}),
        tmp_path,
    )
    module, x = linear("fc", OUT, IN), random(3, IN, seed=6)
    merge_onnx(base, adapter(module), tmp_path / "out.onnx")
    y, z = run(tmp_path / "out.onnx", x=x)

    def grid(values):
        return np.rint(values / scale) * scale

    np.testing.assert_allclose(z, x @ grid(weight), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(y, x @ grid(weight + delta(module).T), rtol=1e-4, atol=1e-4)


def test_modelopts_own_float8_operators(tmp_path):
    """ONNX Runtime doesn't run them: the float constant is what can be looked at."""
    text = (
        f"g (float[b,{IN}] x) => (float[b,{OUT}] y) "
        "{ q = trt.TRT_FP8QuantizeLinear (fc_weight, scale) r = trt.TRT_FP8DequantizeLinear (q, scale) "
        "t = Transpose <perm = [1, 0]> (r) y = MatMul (x, t) }"
    )
    weight = random(OUT, IN, seed=7)
    head = HEAD.replace('"" : 20', '"" : 20, "trt" : 1')
    base = save(graph(text, {"fc.weight": weight, "scale": np.float32(0.02)}, head=head), tmp_path)
    module = linear("fc", OUT, IN)
    merge_onnx(base, adapter(module), tmp_path / "out.onnx")
    np.testing.assert_allclose(
        constants(tmp_path / "out.onnx")["fc.weight"], weight + delta(module), rtol=1e-5, atol=1e-6
    )
    swap_onnx(base, tmp_path / "swap.onnx", adapter=adapter(module))
    assert "fc.lora.down.MatMul" in {node.name for node in ir.load(tmp_path / "swap.onnx").graph}
