"""With a checkpoint every matched value is compared: one that differs, wherever it lies, is refused.

A graph is made with the checkpoint's values, merges, and one value of the checkpoint is changed after that.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file
from small_graphs import adapter, conv, embedding, graph, linear, random, refusals, save

from lora_export import Adapter, LoraModule, SiteError, bank_onnx, merge_onnx, swap_onnx

ROWS, COLS, EXPERTS = 200, 48, 5
# Operator: text of the graph, the adapter's module, the weight's shape, the stored form.
TRANSPOSED, STRAIGHT = (lambda w: w.T), (lambda w: w)
KINDS: dict[str, tuple[str, LoraModule, tuple[int, ...], Callable[[Any], Any]]] = {
    "MatMul": (
        f"g (float[n, {COLS}] x) => (float[n, {ROWS}] y) {{ y = MatMul (x, fc_weight) }}",
        linear("fc", ROWS, COLS), (ROWS, COLS), TRANSPOSED),
    "Gemm": (
        f"g (float[n, {COLS}] x) => (float[n, {ROWS}] y) {{ y = Gemm <transB = 1> (x, fc_weight) }}",
        linear("fc", ROWS, COLS), (ROWS, COLS), STRAIGHT),
    "Conv": (
        f"g (float[n, 4, 8, 8] x) => (float[n, {ROWS}, 6, 6] y) {{ y = Conv (x, fc_weight) }}",
        conv("fc", ROWS, 4, 3, 3), (ROWS, 4, 3, 3), STRAIGHT),
    "Gather": (
        f"g (int64[n] x) => (float[n, {COLS}] y) {{ y = Gather (fc_weight, x) }}",
        embedding("fc", ROWS, COLS), (ROWS, COLS), STRAIGHT),
}  # fmt: skip


def folder(path: Path, **tensors: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    contiguous = {name.replace("__", "."): np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(contiguous, path / "model.safetensors")
    return path


def changed(weight: Any, place: tuple[int, ...]) -> Any:
    """Return a copy with one value that is as large as before and has the other sign."""
    other = weight.copy()
    other[place] = -other[place] if other[place] else 1
    return other


@pytest.mark.parametrize("names", [True, False], ids=["named", "nameless"])
@pytest.mark.parametrize("saved", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_one_value_of_a_weight(kind: str, saved: Any, names: bool, tmp_path: Path) -> None:
    text, module, shape, form = KINDS[kind]
    weight = random(*shape).astype(saved)
    name = "fc.weight" if names else "c0"
    stored = np.ascontiguousarray(form(weight.astype(np.float32)))
    base = save(graph(text.replace("fc_weight", name.replace(".", "_")), {name: stored}), tmp_path)
    given = adapter(module)
    right = folder(tmp_path / "right", fc__weight=weight)
    plan = merge_onnx(base, given, tmp_path / "m.onnx", checkpoint=right).plan
    assert "content" in plan.rows[0].reason
    for place in (np.unravel_index(at, shape) for at in (1, weight.size // 3, weight.size - 2)):
        wrong = folder(tmp_path / "wrong", fc__weight=changed(weight, place))
        (reason,) = refusals(base, given, tmp_path, checkpoint=wrong).values()
        assert ("does not hold the checkpoint's values" if names else "not found") in reason


@pytest.mark.parametrize("verb", ["swap", "bank"])
def test_one_row_of_a_large_weight_in_the_verbs_that_expose(verb: str, tmp_path: Path) -> None:
    """A row of 20,000 is 1 % of the norm: the whole may not speak for it."""
    text = "g (float[n, 8] x) => (float[n, 20000] y) { y = MatMul (x, fc_weight) }"
    weight = random(20000, 8)
    base = save(graph(text, {"fc.weight": np.ascontiguousarray(weight.T)}), tmp_path)
    weight[777] = weight[777, ::-1].copy()
    options = {"checkpoint": folder(tmp_path / "c", fc__weight=weight)}
    given = adapter(linear("fc", 20000, 8))
    out = tmp_path / "o.onnx"
    run = {
        "swap": lambda: swap_onnx(base, out, adapter=given, **options),
        "bank": lambda: bank_onnx(base, {"a": given}, out, **options),
    }
    with pytest.raises(SiteError, match="not confirmed"):
        run[verb]()


def test_one_value_of_a_bias(tmp_path: Path) -> None:
    text = (
        f"g (float[n, {COLS}] x) => (float[n, {ROWS}] y) {{ p = MatMul (x, fc_weight) y = Add (p, fc_bias) }}"
    )
    weight, bias = random(ROWS, COLS), random(ROWS, seed=7)
    base = save(graph(text, {"fc.weight": np.ascontiguousarray(weight.T), "fc.bias": bias}), tmp_path)
    given = adapter(linear("fc", ROWS, COLS), extras={"fc.bias": random(ROWS, seed=8)})
    right = folder(tmp_path / "right", fc__weight=weight, fc__bias=bias)
    merge_onnx(base, given, tmp_path / "m.onnx", checkpoint=right)
    wrong = folder(tmp_path / "wrong", fc__weight=weight, fc__bias=changed(bias, (61,)))
    found = refusals(base, given, tmp_path, checkpoint=wrong)
    assert list(found) == ["fc.bias"]


# --- stacked experts ----------------------------------------------------------------------------------------


def stack_adapter() -> Adapter:
    """Return LoRA on the experts' own parameter, as PEFT 0.19 and later write it."""
    a, b = random(EXPERTS * 2, 8, seed=3), random(12, 2 * EXPERTS, seed=4)
    module = LoraModule("moe", "parameter", a, b, alpha=4.0, rank=2, parameter="up_proj", experts=EXPERTS)
    return adapter(module)


def stacked_base(form: str, weight: Any, tmp_path: Path) -> Path:
    """Make a graph that holds the stack whole, transposed, or each expert's matrix alone."""
    if form == "one by one":
        names = [f"moe.{expert}.up_proj.weight" for expert in range(EXPERTS)]
        nodes = " ".join(
            f"y{expert} = MatMul (x, {name.replace('.', '_')})" for expert, name in enumerate(names)
        )
        outputs = ", ".join(f"float[n, 12] y{expert}" for expert in range(EXPERTS))
        stored = {name: np.ascontiguousarray(matrix.T) for name, matrix in zip(names, weight, strict=True)}
        return save(graph(f"g (float[n, 8] x) => ({outputs}) {{ {nodes} }}", stored), tmp_path)
    turned = form == "transposed"
    stored = {"moe.up_proj": np.ascontiguousarray(weight.swapaxes(1, 2) if turned else weight)}
    width, height = (8, 12) if turned else (12, 8)
    text = f"g (float[{EXPERTS}, n, {width}] x) => (float[{EXPERTS}, n, {height}] y) {{"
    return save(graph(f"{text} y = MatMul (x, moe_up_proj) }}", stored), tmp_path)


@pytest.mark.parametrize("form", ["whole", "transposed", "one by one"])
@pytest.mark.parametrize("expert", range(EXPERTS))
def test_each_expert_of_a_stack(form: str, expert: int, tmp_path: Path) -> None:
    weight = random(EXPERTS, 12, 8)
    base, given = stacked_base(form, weight, tmp_path), stack_adapter()
    right = folder(tmp_path / "right", moe__up_proj=weight)
    plan = merge_onnx(base, given, tmp_path / "m.onnx", checkpoint=right).plan
    assert plan.rows[0].reason.endswith("content agrees")
    wrong = folder(tmp_path / "wrong", moe__up_proj=changed(weight, (expert, 5, 3)))
    (reason,) = refusals(base, given, tmp_path, checkpoint=wrong).values()
    assert f"does not hold the checkpoint's values of expert {expert}" in reason


MOE: dict[str, dict[str, Any]] = {
    "Qwen2MoeForCausalLM": {
        "num_experts": 4,
        "moe_intermediate_size": 6,
        "shared_expert_intermediate_size": 6,
    },
    "GraniteMoeForCausalLM": {"num_local_experts": 4, "intermediate_size": 6},
}


@pytest.mark.parametrize("name", MOE)
def test_experts_of_real_models(name: str, tmp_path: Path) -> None:
    """Qwen2-MoE's checkpoint stores experts one by one, Granite's all in one; graphs have them stacked."""
    import tiny
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from safetensors.torch import save_file as save_torch

    config = getattr(transformers, name.replace("ForCausalLM", "Config"))(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_experts_per_tok=2, pad_token_id=0, **MOE[name],
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("batched_mm")
    ids = torch.arange(3, 11)[None]
    with tiny.quiet(), torch.no_grad():
        model.save_pretrained(tmp_path / "base")
        feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        torch.onnx.export(model, (), str(tmp_path / "base.onnx"), kwargs=feeds, dynamo=True, verbose=False)
        lora = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
        get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    base, given, folder_ = tmp_path / "base.onnx", tmp_path / "adapter", tmp_path / "base"
    merge_onnx(base, given, tmp_path / "m.onnx", checkpoint=folder_)
    stored = load_file(tmp_path / "base/model.safetensors")
    for expert in range(4):
        values = {key: tensor.clone() for key, tensor in stored.items()}
        alone = [key for key in values if key.endswith(f"experts.{expert}.down_proj.weight")]
        whole = [key for key in values if key.endswith("output_linear.weight")]
        (matrix,) = [values[key] for key in alone] or [values[key][expert] for key in whole]
        matrix[3, 2] *= -1
        save_torch(values, tmp_path / "base/model.safetensors", {"format": "pt"})
        with pytest.raises(SiteError) as raised:
            merge_onnx(base, given, tmp_path / "r.onnx", checkpoint=folder_)
        assert f"of expert {expert}" in str(raised.value.problems)


def test_codes_of_a_quantised_checkpoint_count_as_values(tmp_path: Path) -> None:
    """A stack in float8 with scales: dequantised, each expert is compared."""
    import torch
    from safetensors.torch import save_file as save_torch

    codes = random(EXPERTS, 12, 8).astype(ml_dtypes.float8_e4m3fn)
    scales = np.full((EXPERTS, 1, 1), 0.5, np.float32)
    weight = codes.astype(np.float32) * scales
    base, given = stacked_base("whole", weight, tmp_path), stack_adapter()
    path = folder(tmp_path / "c")

    def write(values: Any) -> None:
        code = torch.from_numpy(values.view(np.uint8)).view(torch.float8_e4m3fn)
        tensors = {"moe.up_proj": code, "moe.up_proj_scale": torch.from_numpy(scales)}
        save_torch(tensors, path / "model.safetensors")

    write(codes)
    merge_onnx(base, given, tmp_path / "m.onnx", checkpoint=path)
    write(changed(codes, (2, 1, 1)))
    (reason,) = refusals(base, given, tmp_path, checkpoint=path).values()
    assert "of expert 2" in reason


def test_rounding_alone_is_no_difference(tmp_path: Path) -> None:
    """float32 → float16 → float32, and float16's converter, which lifts what is too small."""
    text, module, shape, _ = KINDS["Gemm"]
    weight = random(*shape) * 0.02
    weight[3, :5] = (1e-8, -3e-8, 6e-8, 0, 1e-9)
    lifted = np.where((weight != 0) & (np.abs(weight) < 1e-7), np.sign(weight) * 1e-7, weight)
    folder_ = folder(tmp_path / "c", fc__weight=weight)
    for number, stored in enumerate(
        (weight.astype(np.float16).astype(np.float32), weight.astype(ml_dtypes.bfloat16).astype(np.float32))
    ):
        base = save(graph(text, {"fc.weight": stored}), tmp_path, f"b{number}.onnx")
        merge_onnx(base, adapter(module), tmp_path / f"m{number}.onnx", checkpoint=folder_)
    half = text.replace("float[", "float16[")
    base = save(graph(half, {"fc.weight": ir.tensor(lifted.astype(np.float16))}), tmp_path, "half.onnx")
    merge_onnx(base, adapter(module), tmp_path / "half-m.onnx", checkpoint=folder_)
    assert json.loads((tmp_path / "half-m.lora.json").read_text())["mode"]
