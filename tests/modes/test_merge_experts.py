"""Mixtures of experts merged into checkpoints and graphs: PEFT's unmerged forward is the oracle."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_export.errors import SiteError
from lora_export.modes.merge_checkpoint import merge_checkpoint
from lora_export.modes.merge_onnx import merge_onnx

HIDDEN, EXPERTS, RANK = 16, 4, 2
COMMON = {
    "vocab_size": 40,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
DEEPSEEK = {
    "n_routed_experts": EXPERTS,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "intermediate_size": 24,
}
# Class, config class, key of the experts' width, further settings.
FAMILIES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", "moe_intermediate_size",
                  {"num_experts": EXPERTS, "head_dim": 8, "intermediate_size": 24}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", "intermediate_size", {"num_local_experts": EXPERTS}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", "intermediate_size", {"num_experts": EXPERTS}),
    "glm4_moe": ("Glm4MoeForCausalLM", "Glm4MoeConfig", "moe_intermediate_size", {**DEEPSEEK, "head_dim": 8}),
    "minimax_m2": ("MiniMaxM2ForCausalLM", "MiniMaxM2Config", "intermediate_size",
                   {"num_local_experts": EXPERTS, "head_dim": 8}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", "intermediate_size",
                {"num_local_experts": EXPERTS, "head_dim": 8, "layer_types": ["full_attention"] * 2}),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", "intermediate_size",
                   {"num_local_experts": EXPERTS}),
    "jetmoe": ("JetMoeForCausalLM", "JetMoeConfig", "intermediate_size",
               {"num_local_experts": EXPERTS, "kv_channels": 8, "num_key_value_heads": 1}),
    "llama4": ("Llama4ForCausalLM", "Llama4TextConfig", "intermediate_size",
               {"num_local_experts": EXPERTS, "head_dim": 8, "intermediate_size_mlp": 24,
                "interleave_moe_layer_step": 1, "num_experts_per_tok": 1}),
    # Two of its experts compute nothing, and have no down_proj.
    "longcat_flash": ("LongcatFlashForCausalLM", "LongcatFlashConfig", "expert_ffn_hidden_size",
                      {"n_routed_experts": EXPERTS, "zero_expert_num": 2, "moe_topk": 2, "num_layers": 2,
                       "ffn_hidden_size": 24, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
                       "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4}),
    "aria_text": ("AriaTextForCausalLM", "AriaTextConfig", "intermediate_size",
                  {"moe_num_experts": EXPERTS, "moe_topk": 2, "moe_num_shared_experts": 1}),
}  # fmt: skip
ALL_LINEAR = ["qwen3_moe", "mixtral", "olmoe", "glm4_moe", "minimax_m2"]
UP = {"jetmoe": "input_linear.weight"}
DOWN = {"jetmoe": "output_linear.weight"}
IDS = torch.arange(3, 15)[None]


def build(family: str, width: int, dtype: torch.dtype = torch.float64) -> Any:
    name, config, key, settings = FAMILIES[family]
    made = getattr(transformers, config)(**{**COMMON, **settings, key: width})
    torch.manual_seed(0)
    return getattr(transformers, name)(made).to(dtype).eval()


def plain(model: Any) -> Any:
    """Let experts and attention run as PyTorch code that takes every dtype and can be traced."""
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    return model


def trained(model: Any, folder: Path, **config: Any) -> torch.Tensor:
    """Save the model as ``base`` and an adapter on it as ``adapter``; return PEFT's unmerged logits."""
    from peft import LoraConfig, get_peft_model

    with tiny.quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder / "base")
        adapted = get_peft_model(plain(model), LoraConfig(r=RANK, lora_alpha=4, **config))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, dtype=model.dtype) * 0.3
        adapted.save_pretrained(folder / "adapter")
        return adapted(IDS).logits


def logits(folder: Path, like: Any) -> torch.Tensor:
    with tiny.quiet(), torch.no_grad():
        loaded = type(like).from_pretrained(folder, dtype=like.dtype).eval()
        return plain(loaded)(IDS).logits


def error(got: Any, wanted: Any, base: Any) -> float:
    """Return ‖got − wanted‖ against what the adapter does."""
    got, wanted, base = (np.asarray(values, np.float64) for values in (got, wanted, base))
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted - base))


@pytest.mark.parametrize("width", [6, 8], ids=["rectangular", "square"])
@pytest.mark.parametrize("family", ALL_LINEAR)
def test_all_linear(family: str, width: int, tmp_path: Path) -> None:
    model = build(family, width)
    wanted = trained(model, tmp_path, target_modules="all-linear")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert sorted(config["target_parameters"]) == ["down_proj", "gate.weight", "gate_up_proj"]
    merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    base = logits(tmp_path / "base", model)
    assert error(logits(tmp_path / "merged", model), wanted, base) < 1e-6


# A width that makes the first or the second of the two square.
@pytest.mark.parametrize(
    ("family", "names", "width"),
    [
        (family, names, width)
        for family in FAMILIES
        for names, width in (("up", 8), ("down", 16), ("both", 6))
    ],
)
def test_target_parameters(family: str, names: str, width: int, tmp_path: Path) -> None:
    model = build(family, width)
    up, down = UP.get(family, "experts.gate_up_proj"), DOWN.get(family, "experts.down_proj")
    targets = {"up": [up], "down": [down], "both": [up, down]}[names]
    wanted = trained(model, tmp_path, target_modules=[], target_parameters=targets)
    report = merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    assert not report.plan.notes
    base = logits(tmp_path / "base", model)
    assert error(logits(tmp_path / "merged", model), wanted, base) < 1e-6


@pytest.mark.parametrize("version", ["0.18.1", None, "0.19.0"])
@pytest.mark.parametrize("width", [6, 8], ids=["rectangular", "square"])
@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "gpt_oss"])
def test_files_of_older_peft(family: str, width: int, version: str | None, tmp_path: Path) -> None:
    """ΔW is ``B·A`` of each expert, laid over the parameter as that PEFT laid it."""
    model = build(family, width, torch.float32)
    path = "model.layers.0." + {"granitemoe": "block_sparse_moe."}.get(family, "mlp.") + "experts"
    parameter = model.get_parameter(f"{path}.gate_up_proj").detach()
    on_columns = version == "0.19.0" and family == "gpt_oss"
    _, rows, cols = parameter.shape
    takes, gives = (cols, rows) if on_columns else (rows, cols)
    torch.manual_seed(2)
    a, b = torch.randn(EXPERTS * RANK, takes), torch.randn(gives, RANK * EXPERTS)
    product = "o r e, e r i -> e o i" if on_columns else "o r e, e r i -> e i o"
    change = 2 * torch.einsum(product, b.reshape(gives, RANK, -1), a.reshape(EXPERTS, RANK, -1))
    with tiny.quiet():
        model.save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    names = {part: f"base_model.model.{path}.lora_{part}.weight" for part in "AB"}
    save_file({names["A"]: a, names["B"]: b}, tmp_path / "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": [],
              "target_parameters": ["experts.gate_up_proj"]}  # fmt: skip
    config |= {"peft_version": version} if version else {}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    with tiny.quiet():
        merged = type(model).from_pretrained(tmp_path / "merged").get_parameter(f"{path}.gate_up_proj")
    torch.testing.assert_close(merged.detach() - parameter, change, rtol=1e-4, atol=1e-4)


def test_each_adapter_of_a_blend_has_its_own_layout(tmp_path: Path) -> None:
    """The same file of square experts, as today's PEFT and as 0.18.1 would have written it."""
    trained(build("mixtral", 8), tmp_path, target_modules=[], target_parameters=["experts.gate_up_proj"])
    new, old = tmp_path / "adapter", tmp_path / "old"
    shutil.copytree(new, old)
    config = json.loads((old / "adapter_config.json").read_text())
    (old / "adapter_config.json").write_text(json.dumps({**config, "peft_version": "0.18.1"}))
    stored = {"base": load_file(tmp_path / "base/model.safetensors")}
    for name, adapters in {"new": [new], "old": [old], "both": [old, new]}.items():
        merge_checkpoint(tmp_path / "base", adapters, tmp_path / f"out-{name}")
        stored[name] = load_file(tmp_path / f"out-{name}/model.safetensors")
    assert any(not torch.allclose(stored["new"][name], stored["old"][name]) for name in stored["base"])
    for name, before in stored["base"].items():
        wanted = stored["new"][name] + stored["old"][name] - before
        torch.testing.assert_close(stored["both"][name], wanted, rtol=1e-9, atol=1e-9)


def test_a_class_that_is_not_known_is_refused(tmp_path: Path) -> None:
    """Square experts of a model that transformers can't build: nobody says whether they lie transposed."""
    model = build("olmoe", 8, torch.float32)
    trained(model, tmp_path, target_modules=[], target_parameters=["experts.gate_up_proj"])
    stored = load_file(tmp_path / "base/model.safetensors")
    halves = ("gate_proj", "up_proj")
    for layer in range(2):
        path = f"model.layers.{layer}.mlp.experts"
        stored[f"{path}.gate_up_proj"] = torch.stack(
            [torch.cat([stored.pop(f"{path}.{e}.{half}.weight") for half in halves]) for e in range(EXPERTS)]
        )
    save_file(stored, tmp_path / "base/model.safetensors")
    (tmp_path / "base/config.json").write_text(json.dumps({"model_type": "homemade"}))
    with pytest.raises(SiteError) as raised:
        merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    assert "its class is not known" in str(raised.value.problems)
    assert not (tmp_path / "merged").exists()


# --- graphs -------------------------------------------------------------------------------------------


def export(model: Any, exporter: str, path: Path) -> None:
    """Export with the expert code that a graph can hold."""
    model.set_experts_implementation("batched_mm")
    mask, forward = torch.ones_like(IDS), model.forward
    try:
        with tiny.quiet(), torch.no_grad():
            if exporter == "dynamo":
                given = {"input_ids": IDS, "attention_mask": mask, "use_cache": False}
                torch.onnx.export(
                    model, (), str(path), kwargs=given, dynamo=True, verbose=False, output_names=["logits"]
                )
                return
            model.forward = lambda ids, mask: (
                forward(input_ids=ids, attention_mask=mask, use_cache=False).logits,
            )
            torch.onnx.export(
                model,
                (IDS, mask),
                str(path),
                input_names=["input_ids", "attention_mask"],
                output_names=["logits"],
                dynamo=False,
                opset_version=17,
            )
    finally:
        model.forward = forward


def run(path: Path) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(str(path))
    given = {"input_ids": IDS.numpy(), "attention_mask": np.ones_like(IDS.numpy())}
    feeds = {port.name: given[port.name] for port in session.get_inputs()}
    return np.asarray(session.run(["logits"], feeds)[0])


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize(("family", "width"), [("qwen3_moe", 8), ("gpt_oss", 16)])
def test_square_experts_in_graphs(family: str, width: int, exporter: str, tmp_path: Path) -> None:
    """Values say which way round they lie; without values they are refused."""
    square = "experts.gate_up_proj" if family == "qwen3_moe" else "experts.down_proj"
    model = build(family, width, torch.float32)
    export(model, exporter, tmp_path / "base.onnx")
    wanted = trained(model, tmp_path, target_modules=[], target_parameters=[square])
    adapter = [tmp_path / "adapter"]
    with pytest.raises(SiteError) as raised:
        merge_onnx(tmp_path / "base.onnx", adapter, tmp_path / "refused.onnx")
    assert all("square" in line and "--checkpoint" in line for line in raised.value.problems)
    merge_onnx(tmp_path / "base.onnx", adapter, tmp_path / "merged.onnx", checkpoint=tmp_path / "base")
    assert error(run(tmp_path / "merged.onnx"), wanted, run(tmp_path / "base.onnx")) < 1e-5
