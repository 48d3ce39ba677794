"""Merging into float8 and int8 bases: arithmetic in float64 says what must come out; the rest is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.quantised import find_quantised, refuse_bare_codes
from lora_export.base.checkpoint.weights import CheckpointWeights
from lora_export.errors import CheckpointError, SiteError
from lora_export.modes.merge_checkpoint import merge_checkpoint
from lora_export.sites.target import Target
from lora_export.storage.scales import grid_of

E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
END = {E4M3: 448.0, E5M2: 57344.0, INT8: 127.0}
# Relative step of each type at its coarsest: half of the last bit, or half a step of the largest.
STEP = {E4M3: 2**-4, E5M2: 2**-3, INT8: 0.5 / 127}
PATH = "model.layers.0.mlp.up_proj"


def expand(scales, shape, block):
    if scales.numel() == 1:
        return scales.reshape(()).double()
    if scales.ndim == 1:
        scales = scales[:, None]
    spread = scales.double().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return spread[: shape[0], : shape[1]]


def quantise(values, kind, block, power_of_two=False, dtype=torch.float32):
    """Quantise by blocks of rows × columns; the scale is the largest value divided by the largest code."""
    rows, cols = (-(-size // b) for size, b in zip(values.shape, block, strict=True))
    padded = torch.zeros(rows * block[0], cols * block[1], dtype=torch.float64)
    padded[: values.shape[0], : values.shape[1]] = values
    largest = padded.reshape(rows, block[0], cols, block[1]).abs().amax((1, 3))
    scales = (largest / END[kind]).to(dtype)
    if power_of_two:
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    ratio = values / expand(scales, values.shape, block)
    ratio = (ratio.round() if kind == INT8 else ratio).clamp(-END[kind], END[kind])
    return ratio.to(torch.float32).to(kind), scales


def save(folder, tensors, **config):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16"} | config))
    return folder


def adapter(folder, shape, path=PATH, size=0.3, extra=None):
    generator = torch.Generator().manual_seed(1)
    folder.mkdir()
    a = torch.randn(4, shape[1], generator=generator) * size
    b = torch.randn(shape[0], 4, generator=generator) * size
    prefix = f"base_model.model.{path}.lora_"
    save_file(
        {f"{prefix}A.weight": a, f"{prefix}B.weight": b, **(extra or {})},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": bool(extra)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return 2.0 * b.double() @ a.double()


LAYOUTS = {
    # kind, name of the scale, block (rows, columns), shape of the stored scale, block size in the config
    "mistral": (E4M3, f"{PATH}.qscale_weight", None, (), None),
    "comfy": (E4M3, f"{PATH}.scale_weight", None, (1,), None),
    "tensor": (E4M3, f"{PATH}.weight_scale", None, (), None),
    "fbgemm": (E4M3, f"{PATH}.weight_scale", (1, 48), (40, 1), None),
    "channel-1d": (E5M2, f"{PATH}.weight_scale", (1, 48), (40,), None),
    "deepseek": (E4M3, f"{PATH}.weight_scale_inv", (16, 32), (3, 2), [16, 32]),
    "groups": (E4M3, f"{PATH}.weight_scale", (1, 16), (40, 3), None),
    "int8": (INT8, f"{PATH}.weight_scale", (1, 48), (40, 1), None),
}


def base_of(folder, layout, power_of_two=False, dtype=torch.float32):
    kind, name, block, shape, size = LAYOUTS[layout]
    values = torch.randn(40, 48, generator=torch.Generator().manual_seed(0)).double()
    codes, scales = quantise(values, kind, block or (40, 48), power_of_two, dtype)
    method = {"quant_method": "fp8", "weight_block_size": size} if size else None
    tensors = {
        f"{PATH}.weight": codes,
        name: scales.reshape(shape).contiguous(),
        "model.norm.weight": torch.ones(48, dtype=torch.bfloat16),
    }
    config = {"quantization_config": method} if method else {}
    save(folder, tensors, **config)
    return codes.double() * expand(scales, codes.shape, block or (40, 48))


def read(folder, layout):
    _, name, block, _, _ = LAYOUTS[layout]
    out = load_file(folder / "model.safetensors")
    codes, scales = out[f"{PATH}.weight"], out[name]
    return codes.double() * expand(scales, codes.shape, block or codes.shape), codes, scales


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_are_added_to_and_quantised_again(tmp_path, layout):
    kind, _, block, shape, _ = LAYOUTS[layout]
    exact = base_of(tmp_path / "base", layout) + adapter(tmp_path / "ad", (40, 48))
    report = merge_checkpoint(tmp_path / "base", tmp_path / "ad", tmp_path / "out")
    found, codes, scales = read(tmp_path / "out", layout)
    assert codes.dtype == kind
    assert scales.shape == shape
    # No error above half a step of the type, and the scale is the one that quantising anew would give.
    bound = exact.abs() * STEP[kind] + expand(scales, codes.shape, block or codes.shape) * END[kind] * 2**-17
    bound = bound if kind != INT8 else expand(scales, codes.shape, block) * 0.5001
    assert ((found - exact).abs() <= bound).all()
    wanted, _ = quantise(exact, kind, block or (40, 48))
    assert (codes.double() != wanted.double()).double().mean() < 0.01
    cost = report.roundings[PATH]
    assert cost.measured == 40 * 48
    change = exact - read(tmp_path / "base", layout)[0]
    assert cost.relative == pytest.approx(float((found - exact).norm() / change.norm()), rel=1e-3)
    before = load_file(tmp_path / "base/model.safetensors")
    after = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == json.loads((tmp_path / "base/config.json").read_text())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtype_writes_values_and_drops_scales(tmp_path, layout, dtype):
    exact = base_of(tmp_path / "base", layout) + adapter(tmp_path / "ad", (40, 48))
    merge_checkpoint(tmp_path / "base", tmp_path / "ad", tmp_path / "out", dtype=dtype)
    out = load_file(tmp_path / "out/model.safetensors")
    assert set(out) == {f"{PATH}.weight", "model.norm.weight"}
    kind = getattr(torch, dtype)
    assert out[f"{PATH}.weight"].dtype == kind
    assert torch.allclose(
        out[f"{PATH}.weight"].double(), exact, rtol=2**-8 if dtype == "bfloat16" else 1e-6, atol=1e-6
    )
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == dtype


@pytest.mark.parametrize("layout", ["deepseek", "groups"])
def test_scales_that_are_powers_of_two_stay_so(tmp_path, layout):
    kind, _, block, _, _ = LAYOUTS[layout]
    exact = base_of(tmp_path / "base", layout, power_of_two=True) + adapter(tmp_path / "ad", (40, 48))
    merge_checkpoint(tmp_path / "base", tmp_path / "ad", tmp_path / "out")
    _, _, scales = read(tmp_path / "out", layout)
    _, wanted = quantise(exact, kind, block, power_of_two=True)
    assert torch.equal(scales, wanted)


def test_scales_of_half_precision(tmp_path):
    exact = base_of(tmp_path / "base", "fbgemm", dtype=torch.bfloat16) + adapter(tmp_path / "ad", (40, 48))
    merge_checkpoint(tmp_path / "base", tmp_path / "ad", tmp_path / "out")
    found, _, scales = read(tmp_path / "out", "fbgemm")
    assert scales.dtype == torch.bfloat16
    assert (found - exact).norm() / exact.norm() < 0.03


def test_a_scale_that_was_not_fitted_stays_while_values_fit(tmp_path):
    values = torch.randn(40, 48, generator=torch.Generator().manual_seed(0))
    tensors = {f"{PATH}.weight": values.to(E4M3), f"{PATH}.weight_scale": torch.tensor(1.0)}
    save(tmp_path / "base", tensors)
    exact = values.to(E4M3).double() + adapter(tmp_path / "ad", (40, 48))
    merge_checkpoint(tmp_path / "base", tmp_path / "ad", tmp_path / "out")
    out = load_file(tmp_path / "out/model.safetensors")
    assert out[f"{PATH}.weight_scale"] == 1.0
    assert torch.equal(out[f"{PATH}.weight"].double(), exact.float().to(E4M3).double())


def test_untouched_blocks_keep_codes_and_scale(tmp_path):
    """Rows that B leaves alone are not rounded a second time."""
    base_of(tmp_path / "base", "deepseek")
    adapter(tmp_path / "ad", (40, 48))
    file = tmp_path / "ad/adapter_model.safetensors"
    values = load_file(file)
    values[f"base_model.model.{PATH}.lora_B.weight"][:16] = 0
    save_file(values, file)
    merge_checkpoint(tmp_path / "base", tmp_path / "ad", tmp_path / "out")
    _, codes, scales = read(tmp_path / "out", "deepseek")
    _, old, old_scales = read(tmp_path / "base", "deepseek")
    assert torch.equal(codes[:16].view(torch.uint8), old[:16].view(torch.uint8))
    assert torch.equal(scales[0], old_scales[0])
    assert not torch.equal(scales[1:], old_scales[1:])


def test_dora_on_codes(tmp_path):
    magnitude = torch.rand(40, generator=torch.Generator().manual_seed(3)) + 1
    start = base_of(tmp_path / "base", "fbgemm")
    extra = {f"base_model.model.{PATH}.lora_magnitude_vector": magnitude}
    directions = start + adapter(tmp_path / "ad", (40, 48), extra=extra)
    exact = directions / directions.norm(dim=1, keepdim=True) * magnitude.double()[:, None]
    merge_checkpoint(tmp_path / "base", tmp_path / "ad", tmp_path / "out", dtype="float32")
    merge_checkpoint(tmp_path / "base", tmp_path / "ad", tmp_path / "codes")
    out = load_file(tmp_path / "out/model.safetensors")[f"{PATH}.weight"]
    assert (out.double() - exact).norm() / exact.norm() < 1e-6
    assert (read(tmp_path / "codes", "fbgemm")[0] - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize("first", ["codes", "scales"])
def test_codes_and_scales_in_different_files(tmp_path, first):
    exact = base_of(tmp_path / "one", "deepseek") + adapter(tmp_path / "ad", (40, 48))
    whole = load_file(tmp_path / "one/model.safetensors")
    names = sorted(whole, key=lambda name: name.endswith("scale_inv") == (first == "codes"))
    save(tmp_path / "base", {}, **json.loads((tmp_path / "one/config.json").read_text()))
    (tmp_path / "base/model.safetensors").unlink()
    files = {name: f"model-0000{i + 1}-of-00003.safetensors" for i, name in enumerate(names)}
    for name, file in files.items():
        save_file({name: whole[name]}, tmp_path / "base" / file)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (tmp_path / "base/model.safetensors.index.json").write_text(json.dumps(index))
    merge_checkpoint(tmp_path / "base", tmp_path / "ad", tmp_path / "out")
    merge_checkpoint(tmp_path / "one", tmp_path / "ad", tmp_path / "whole")
    expected = load_file(tmp_path / "whole/model.safetensors")
    for name, file in files.items():
        found = load_file(tmp_path / "out" / file)[name]
        assert torch.equal(found.view(torch.uint8), expected[name].view(torch.uint8))
    report = merge_checkpoint(tmp_path / "base", tmp_path / "ad", tmp_path / "plain", dtype="float32")
    weight_map = json.loads((tmp_path / "plain/model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map) == set(files) - {f"{PATH}.weight_scale_inv"}
    values = load_file(tmp_path / "plain" / weight_map[f"{PATH}.weight"])[f"{PATH}.weight"]
    assert (values.double() - exact).norm() / exact.norm() < 1e-6
    assert not report.plan.refused


def test_stacked_experts_with_block_scales(tmp_path):
    """FineGrainedFP8's experts: ``gate_up_proj`` (experts, rows, columns) and ``gate_up_proj_scale_inv``."""
    path, generator = "model.layers.0.mlp.experts", torch.Generator().manual_seed(0)
    values = torch.randn(3, 32, 16, generator=generator).double()
    both = [quantise(expert, E4M3, (8, 8)) for expert in values]
    codes = torch.stack([c.view(torch.uint8) for c, _ in both]).view(E4M3)
    scales = torch.stack([s for _, s in both])
    method = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    save(tmp_path / "base", {f"{path}.gate_up_proj": codes, f"{path}.gate_up_proj_scale_inv": scales},
         quantization_config=method)  # fmt: skip
    a, b = torch.randn(3 * 2, 16, generator=generator), torch.randn(32, 2 * 3, generator=generator)
    prefix = f"base_model.model.{path}.lora_"
    (tmp_path / "ad").mkdir()
    save_file({f"{prefix}A.weight": a, f"{prefix}B.weight": b}, tmp_path / "ad/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["gate_up_proj"],
              "peft_version": "0.21.2"}  # fmt: skip
    (tmp_path / "ad/adapter_config.json").write_text(json.dumps(config))
    merge_checkpoint(tmp_path / "base", tmp_path / "ad", tmp_path / "out", dtype="float32")
    out = load_file(tmp_path / "out/model.safetensors")[f"{path}.gate_up_proj"]
    plain = {
        f"{path}.gate_up_proj": torch.stack([c.float() * expand(s, c.shape, (8, 8)).float() for c, s in both])
    }
    save(tmp_path / "plain", plain)
    merge_checkpoint(tmp_path / "plain", tmp_path / "ad", tmp_path / "expected")
    expected = load_file(tmp_path / "expected/model.safetensors")[f"{path}.gate_up_proj"]
    assert torch.allclose(out, expected, atol=1e-6)
    assert not torch.allclose(out, plain[f"{path}.gate_up_proj"], atol=1e-2)


# --- float8 without a scale --------------------------------------------------------------------------


def test_plain_float8_is_merged_with_a_note(tmp_path):
    values = torch.randn(40, 48, generator=torch.Generator().manual_seed(0)).to(E4M3)
    save(tmp_path / "base", {f"{PATH}.weight": values})
    exact = values.double() + adapter(tmp_path / "ad", (40, 48))
    report = merge_checkpoint(tmp_path / "base", tmp_path / "ad", tmp_path / "out")
    out = load_file(tmp_path / "out/model.safetensors")[f"{PATH}.weight"]
    assert torch.equal(out.double(), exact.float().to(E4M3).double())
    assert any("float8 without a scale" in note for note in report.plan.notes)


def test_codes_whose_scale_is_missing_are_refused(tmp_path):
    codes, _ = quantise(torch.randn(40, 48).double(), E4M3, (40, 48))
    save(tmp_path / "base", {f"{PATH}.weight": codes})
    adapter(tmp_path / "ad", (40, 48))
    with pytest.raises(SiteError, match="there is no scale for it"):
        merge_checkpoint(tmp_path / "base", tmp_path / "ad", tmp_path / "out")
    file = tmp_path / "base/model.safetensors"
    save_file(load_file(file) | {"model.other.weight": torch.zeros(40, 48)}, file)
    adapter(tmp_path / "ad2", (40, 48), path="model.other")
    merge_checkpoint(tmp_path / "base", tmp_path / "ad2", tmp_path / "out")
    with pytest.raises(CheckpointError, match="can't be made float32"):
        merge_checkpoint(tmp_path / "base", tmp_path / "ad2", tmp_path / "wide", dtype="float32")


# --- refused by name ---------------------------------------------------------------------------------

U8, I32, F32 = torch.uint8, torch.int32, torch.float32
Q = f"{PATH}."
FOREIGN = {
    "GPTQ: qweight, qzeros, g_idx, scales": {
        f"{Q}qweight": (5, 40, I32), f"{Q}qzeros": (1, 5, I32), f"{Q}scales": (1, 40, torch.half),
        f"{Q}g_idx": (40, 1, I32),
    },
    "AWQ: qweight, qzeros, scales": {
        f"{Q}qweight": (5, 40, I32), f"{Q}qzeros": (1, 5, I32), f"{Q}scales": (1, 40, torch.half),
    },
    "bitsandbytes, 4 bits: weight.absmax": {
        f"{Q}weight": (960, 1, U8), f"{Q}weight.absmax": (30, 1, F32),
        f"{Q}weight.quant_map": (16, 1, F32),
        f"{Q}weight.quant_state.bitsandbytes__nf4": (8, 1, U8),
    },
    "bitsandbytes, 8 bits: SCB": {f"{Q}weight": (40, 48, INT8), f"{Q}SCB": (40, 1, torch.float32)},
    "compressed-tensors: weight_packed": {
        f"{Q}weight_packed": (40, 6, I32), f"{Q}weight_scale": (40, 1, torch.half),
        f"{Q}weight_shape": (2, 1, torch.int64),
    },
    "NVFP4: weight_scale_2": {
        f"{Q}weight": (40, 24, U8), f"{Q}weight_scale": (40, 3, E4M3),
        f"{Q}weight_scale_2": (1, 1, F32),
    },
    "torchao: _weight_qdata": {
        f"{Q}_weight_qdata": (40, 48, INT8), f"{Q}_weight_scale": (40, 1, F32),
    },
    "HQQ: W_q, scale, zero": {
        f"{Q}W_q": (40, 24, U8), f"{Q}scale": (40, 1, F32), f"{Q}zero": (40, 1, F32),
    },
    "EETQ: weight_scales": {f"{Q}weight": (40, 48, INT8), f"{Q}weight_scales": (40, 1, F32)},
    "F8_E4M3 with model.layers.0.mlp.up_proj.weight.scale": {
        f"{Q}weight": (40, 48, E4M3), f"{Q}weight.scale": (1, 1, F32),
    },
    "weight_zero_point": {
        f"{Q}weight": (40, 48, INT8), f"{Q}weight_scale": (40, 1, F32),
        f"{Q}weight_zero_point": (40, 1, INT8),
    },
    # The order of the columns: group g_idx[c] has the scale of column c.
    "weight_g_idx": {
        f"{Q}weight": (40, 48, INT8), f"{Q}weight_scale": (40, 3, F32),
        f"{Q}weight_g_idx": (48, 1, I32),
    },
    "hadamard_signs": {
        f"{Q}weight": (40, 48, E4M3), f"{Q}weight_scale": (40, 1, F32), f"{Q}hadamard_signs": (48, 1, F32),
    },
    "divided by model.layers.0.mlp.up_proj.pre_quant_scale": {
        f"{Q}weight": (40, 48, torch.bfloat16), f"{Q}pre_quant_scale": (48, 1, torch.bfloat16),
    },
    "compressed-tensors, sparse: compressed, bitmask": {
        f"{Q}compressed": (40, 24, F32), f"{Q}bitmask": (40, 6, U8), f"{Q}shape": (2, 1, torch.int64),
    },
    "how many values share a scale is unknown": {
        f"{Q}weight": (40, 48, E4M3), f"{Q}weight_scale": (7, 5, torch.float32),
    },
    "is beside BF16": {f"{Q}weight": (40, 48, torch.bfloat16), f"{Q}weight_scale": (40, 1, torch.float32)},
    "stored as I8": {f"{Q}weight": (40, 48, INT8)},
}  # fmt: skip


@pytest.mark.parametrize("says", FOREIGN)
def test_other_formats_are_refused_by_name(tmp_path, says):
    tensors = {name: torch.ones(r, c).to(kind) for name, (r, c, kind) in FOREIGN[says].items()}
    save(tmp_path / "base", tensors | {"model.norm.weight": torch.ones(3)})
    adapter(tmp_path / "ad", (40, 48))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SiteError) as caught:
        merge_checkpoint(tmp_path / "base", tmp_path / "ad", tmp_path / "out")
    assert says in caught.value.problems[0]
    assert sorted(tmp_path.iterdir()) == before
    if says == "stored as I8":
        return
    assert "unquantised base" in caught.value.hint
    with pytest.raises(CheckpointError, match="can't be compared"):
        looked_up(tmp_path / "base")
    with pytest.raises(CheckpointError, match="doesn't say so"):
        refuse_bare_codes(tmp_path / "base")


def looked_up(base):
    """Return what a graph's weight is compared with."""
    target = Target(key=f"{PATH}.weight", kind="linear", shape=(40, 48), action="merge", tensor_names=())
    weights = CheckpointWeights(Checkpoint.open(base))
    return weights.for_adapter([target.named], flattened=False, scope=None)(target)


def test_attention_beside_mxfp4_experts_is_merged(tmp_path):
    """gpt-oss: only the experts are quantised, and most adapters leave them alone."""
    q, experts = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts"
    start = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensors = {
        f"{q}.weight": start,
        f"{experts}.gate_up_proj_blocks": torch.ones(2, 8, 1, 16, dtype=U8),
        f"{experts}.gate_up_proj_scales": torch.ones(2, 8, 1, dtype=U8),
    }
    save(tmp_path / "base", tensors, quantization_config={"quant_method": "mxfp4"}, model_type="none")
    exact = start.double() + adapter(tmp_path / "ad", (24, 16), path=q)
    merge_checkpoint(tmp_path / "base", tmp_path / "ad", tmp_path / "out")
    out = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(out[f"{q}.weight"], exact.float().bfloat16())
    assert torch.equal(out[f"{experts}.gate_up_proj_blocks"], tensors[f"{experts}.gate_up_proj_blocks"])
    with pytest.raises(CheckpointError, match="can't be made float32"):
        merge_checkpoint(tmp_path / "base", tmp_path / "ad", tmp_path / "wide", dtype="float32")
    assert find_quantised(Checkpoint.open(tmp_path / "base")).packed_at(f"{experts}.gate_up_proj")


@pytest.mark.parametrize("where", ["top", "text_config"])
def test_a_method_that_the_tensors_do_not_explain(tmp_path, where):
    method = {"quantization_config": {"quant_method": "bitnet"}}
    config = method if where == "top" else {"text_config": method}
    save(tmp_path / "base", {f"{PATH}.weight": torch.zeros(40, 48)}, **config)
    adapter(tmp_path / "ad", (40, 48))
    with pytest.raises(CheckpointError, match=r"quantised \(bitnet\)"):
        merge_checkpoint(tmp_path / "base", tmp_path / "ad", tmp_path / "out")


def test_rotated_weights_are_refused(tmp_path):
    """compressed-tensors' transforms: W·H is stored, and H multiplies the inputs."""
    config = {"v": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "weight_input"}]}}
    method = {"quant_method": "compressed-tensors", "transform_config": {"config_groups": config}}
    save(tmp_path / "base", {f"{PATH}.weight": torch.zeros(40, 48)}, quantization_config=method)
    adapter(tmp_path / "ad", (40, 48))
    with pytest.raises(CheckpointError, match="has weights that are rotated"):
        merge_checkpoint(tmp_path / "base", tmp_path / "ad", tmp_path / "out")


# --- values for a graph ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["comfy", "deepseek", "int8"])
def test_values_compared_with_a_graph_are_dequantised(tmp_path, layout):
    exact = base_of(tmp_path / "base", layout)
    found = looked_up(tmp_path / "base")
    assert np.allclose(found, exact.numpy(), rtol=1e-6)


def test_marks_and_input_scales_go_with_the_scales(tmp_path):
    exact = base_of(tmp_path / "base", "comfy") + adapter(tmp_path / "ad", (40, 48))
    file = tmp_path / "base/model.safetensors"
    marks = {"scaled_fp8": torch.zeros(2).to(E4M3), f"{PATH}.scale_input": torch.ones(1)}
    save_file(load_file(file) | marks, file)
    report = merge_checkpoint(tmp_path / "base", tmp_path / "ad", tmp_path / "codes")
    assert any("scale of their inputs" in note for note in report.plan.notes)
    assert set(load_file(tmp_path / "codes/model.safetensors")) == set(load_file(file))
    merge_checkpoint(tmp_path / "base", tmp_path / "ad", tmp_path / "out", dtype="float32")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as opened:
        assert set(opened.keys()) == {f"{PATH}.weight", "model.norm.weight"}
        assert torch.allclose(opened.get_tensor(f"{PATH}.weight").double(), exact, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "scales", "blocks", "grid"),
    [
        ((256, 384), (2, 3), (), (128, 128)),
        ((200, 384), (2, 3), (128, 128), (128, 128)),
        ((200, 384), (2, 3), (), None),
        ((64, 64), (1,), (), (64, 64)),
        ((4, 64, 64), (4, 1, 1), (), (1, 64, 64)),
        ((64, 64), (7, 7), (), None),
        ((64, 64), (4, 4, 4), (), None),
        ((64, 64), (0,), (), None),
        ((0, 64), (0, 2), (), None),
    ],
)
def test_how_many_values_share_a_scale(shape, scales, blocks, grid):
    assert grid_of(shape, scales, blocks) == grid


# --- what transformers itself loads ------------------------------------------------------------------


def test_transformers_loads_the_merged_codes(tmp_path):
    """A Llama in DeepSeek's format (FineGrainedFP8): merged codes answer like PEFT on the loaded base."""
    from peft import LoraConfig, get_peft_model
    from transformers import FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    with tiny.quiet():
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    stored = {}
    for name, values in load_file(file).items():
        stored[name] = values
        if name.endswith("proj.weight"):
            stored[name], stored[f"{name}_scale_inv"] = quantise(values.double(), E4M3, (128, 128))
    save_file(stored, file, metadata={"format": "pt"})
    said = json.loads((tmp_path / "base/config.json").read_text())
    said["quantization_config"] = {
        "quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    (tmp_path / "base/config.json").write_text(json.dumps(said))

    def loaded(folder):
        with tiny.quiet():
            plain = FineGrainedFP8Config(weight_block_size=(128, 128), dequantize=True)
            model = LlamaForCausalLM.from_pretrained(folder, quantization_config=plain, dtype=torch.float32)
        return model.eval().float()

    with tiny.quiet():
        peft = get_peft_model(
            loaded(tmp_path / "base"), LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
        )
    for name, values in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(values, std=0.1)
    with tiny.quiet():
        peft.save_pretrained(tmp_path / "ad")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = peft.eval()(ids).logits
        before = loaded(tmp_path / "base")(ids).logits
        merge_checkpoint(tmp_path / "base", tmp_path / "ad", tmp_path / "out")
        merge_checkpoint(tmp_path / "base", tmp_path / "ad", tmp_path / "plain", dtype="float32")
        codes = loaded(tmp_path / "out")(ids).logits
        with tiny.quiet():
            plain = LlamaForCausalLM.from_pretrained(tmp_path / "plain").eval()(ids).logits
    effect = (expected - before).norm()
    assert (plain - expected).norm() / effect < 1e-4
    assert (codes - expected).norm() / effect < 0.1
