"""Norms that genai's builder adds 1 to: the oracle is the builder itself, on the base that PEFT merged."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_graphs import constants

from lora_export import SiteError, merge_onnx

SIZES = {
    "vocab_size": 100, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
# Class, and whether the builder adds 1.
MODELS = {"GemmaForCausalLM": 1, "Gemma2ForCausalLM": 1, "NemotronForCausalLM": 1, "MistralForCausalLM": 0}
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]


def build(folder: Path, precision: str = "fp32") -> Path:
    """Let genai's builder write the graph of a checkpoint."""
    pytest.importorskip("onnxruntime_genai")
    from onnxruntime_genai.models import builder

    for path in tiny.checkpoint("llama").glob("*token*"):
        shutil.copy(path, folder)
    out, cache = str(folder / "graph"), str(folder / "cache")
    with tiny.quiet():
        options = builder.parse_extra_options(None, str(folder), out, precision, "cpu", cache, [])
        builder.create_model(None, str(folder), out, precision, "cpu", cache, **options)
    return folder / "graph" / "model.onnx"


def made(name: str, folder: Path) -> tuple[Path, Path]:
    """Return a base with random norms, and an adapter that has trained some of them."""
    config = getattr(transformers, name.replace("ForCausalLM", "Config"))(**SIZES)
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    with tiny.quiet(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
        model.save_pretrained(folder / "base")
        lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=NORMS)
        adapted = get_peft_model(model, lora)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
        adapted.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def merged_by_peft(name: str, base: Path, adapter: Path, folder: Path) -> Path:
    with tiny.quiet():
        model = getattr(transformers, name).from_pretrained(base)
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_a_trained_norm_is_written_as_the_builder_writes_it(name: str, tmp_path: Path) -> None:
    base, adapter = made(name, tmp_path)
    graph = build(base)
    report = merge_onnx(graph, adapter, tmp_path / "m.onnx", checkpoint=base)
    norms = [row for row in report.plan.rows if "norm.weight" in row.parameter]
    assert len(norms) >= 5
    assert all(("plus 1" in row.layout) == bool(MODELS[name]) for row in norms)
    got = constants(tmp_path / "m.onnx")
    wanted = constants(build(merged_by_peft(name, base, adapter, tmp_path / "merged")))
    before = constants(graph)
    assert got.keys() == wanted.keys()
    for key, values in wanted.items():
        np.testing.assert_allclose(got[key], values, rtol=1e-5, atol=1e-6, err_msg=key)
    assert sum(not np.array_equal(before[key], values) for key, values in got.items()) >= 5 + 2


@pytest.mark.parametrize("name", MODELS)
def test_without_values_it_is_refused(name: str, tmp_path: Path) -> None:
    base, adapter = made(name, tmp_path)
    with pytest.raises(SiteError) as refused:
        merge_onnx(build(base), adapter, tmp_path / "m.onnx", checkpoint=False)
    lines = [line for line in refused.value.problems if "norm.weight" in line.split()[0]]
    # The last norm has another name in the graph.
    named = [line for line in lines if not line.startswith("model.norm.")]
    assert len(named) >= 4
    assert all("adds 1 to the weights of some models' norms" in line for line in named)
    assert "--checkpoint" in refused.value.hint
    assert not list(tmp_path.glob("m.*"))


@pytest.mark.parametrize("name", ["GemmaForCausalLM", "MistralForCausalLM"])
@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0])
def test_another_number_than_the_builders_is_refused(name: str, shift: float, tmp_path: Path) -> None:
    """What is neither w nor w + 1 was not written by the builder."""
    base, adapter = made(name, tmp_path)
    graph = build(base)
    stored: dict[str, Any] = load_file(base / "model.safetensors")
    key = "model.layers.1.input_layernorm.weight"
    stored[key] = stored[key] - shift
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    if name == "MistralForCausalLM" and shift == 1.0:
        # That is the builder's own form, of another model: it is written back in it.
        plan = merge_onnx(graph, adapter, tmp_path / "m.onnx", checkpoint=base).plan
        assert [row.parameter for row in plan.rows if "plus 1" in row.layout] == [key]
        return
    with pytest.raises(SiteError) as refused:
        merge_onnx(graph, adapter, tmp_path / "m.onnx", checkpoint=base)
    assert [line.split()[0] for line in refused.value.problems] == [key]
