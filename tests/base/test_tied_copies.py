"""PEFT's stored copies of a weight that the base ties: every end gets them, as PEFT loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tied_models import BART, FAMILIES, base_of, config_of, gemma3, inputs_of, logits, reloaded

from lora_export.errors import AdapterError, SiteError
from lora_export.formats import load_adapter, save_adapter
from lora_export.modes.merge_checkpoint import merge_checkpoint
from lora_export.runtimes.torch.reference import TorchReference

# Class → config, input embedding, output head, a linear layer.
KINDS: dict[str, tuple[Any, str, str, str]] = {
    "OPTForCausalLM": (
        config_of("OPTForCausalLM", FAMILIES["OPTForCausalLM"][0]), "embed_tokens", "lm_head", "q_proj"),
    "Mamba2ForCausalLM": (
        config_of("Mamba2ForCausalLM", FAMILIES["Mamba2ForCausalLM"][0]), "embeddings", "lm_head", "in_proj"),
    "BartForConditionalGeneration": (
        config_of("BartForConditionalGeneration", BART), "model.shared", "lm_head", "q_proj"),
    "Gemma3ForConditionalGeneration": (
        gemma3(), "model.language_model.embed_tokens", "lm_head", r"q_proj"),
}  # fmt: skip


def stored(kind: str, folder: Path, adapter: Path, targets: list[str], **options: Any) -> None:
    """Save an adapter with PEFT's copies, trained on a base whose shared weight is another."""
    with tiny.quiet():
        model = getattr(transformers, kind).from_pretrained(folder)
        generator = torch.Generator().manual_seed(3)
        shared = model.get_input_embeddings().weight
        shared.data += 0.5 * torch.randn(shared.shape, generator=generator)
        peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules=targets, **options))
        for values in peft.parameters():
            if values.requires_grad:
                values.data.copy_(0.2 * torch.randn(values.shape, generator=generator))
        peft.save_pretrained(adapter, save_embedding_layers=True)


def by_peft(kind: str, folder: Path, adapter: Path) -> Any:
    """Return a base and what PEFT's reloaded, unmerged model answers on it."""
    with tiny.quiet():
        model = getattr(transformers, kind).from_pretrained(folder)
        peft = PeftModel.from_pretrained(model, adapter).eval()
    return model, logits(peft, inputs_of(model))


CASES = ["linear", "embedding", "head", "trained embedding", "trained head"]


def options_of(kind: str, case: str) -> dict[str, Any]:
    _, embedding, head, linear = KINDS[kind]
    return {
        "linear": {"targets": [linear]},
        "embedding": {"targets": [linear, embedding]},
        "head": {"targets": [linear, head]},
        "trained embedding": {"targets": [linear], "modules_to_save": [embedding]},
        "trained head": {"targets": [linear], "modules_to_save": [head]},
    }[case]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_end_gets_the_copy(tmp_path: Path, kind: str, case: str) -> None:
    base_of(kind, KINDS[kind][0], tmp_path / "base")
    stored(kind, tmp_path / "base", tmp_path / "adapter", **options_of(kind, case))
    model, expected = by_peft(kind, tmp_path / "base", tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert tiny.relative_error(reloaded(kind, tmp_path / "out", model), expected) <= 2e-6
    before, after = (load_file(tmp_path / f"{name}/model.safetensors") for name in ("base", "out"))
    # Only what changes differently is parted.
    assert (set(before) == set(after)) == (case == "linear")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["OPTForCausalLM", "BartForConditionalGeneration"])
def test_paritys_reference_does_as_peft(tmp_path: Path, kind: str, case: str) -> None:
    base_of(kind, KINDS[kind][0], tmp_path / "base")
    stored(kind, tmp_path / "base", tmp_path / "adapter", **options_of(kind, case))
    model, expected = by_peft(kind, tmp_path / "base", tmp_path / "adapter")
    with tiny.quiet():
        reference = TorchReference(tmp_path / "base", "float32", {"a": load_adapter(tmp_path / "adapter")})
        feeds = {name: values.numpy() for name, values in inputs_of(model).items()}
        actual = reference.run(feeds, (("a", 1.0),))["logits"]
    assert tiny.relative_error(actual, expected) <= 2e-6


@pytest.mark.parametrize("kind", ["OPTForCausalLM", "Mamba2ForCausalLM"])
def test_another_adapter_on_another_end_is_refused(tmp_path: Path, kind: str) -> None:
    """The one's copy replaces what the other was trained to change."""
    base_of(kind, KINDS[kind][0], tmp_path / "base")
    stored(kind, tmp_path / "base", tmp_path / "copy", **options_of(kind, "embedding"))
    adapted = getattr(transformers, kind).from_pretrained(tmp_path / "base")
    peft = get_peft_model(adapted, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    peft.save_pretrained(tmp_path / "head", save_embedding_layers=False)
    with pytest.raises(AdapterError) as refused:
        merge_checkpoint(tmp_path / "base", [tmp_path / "copy", tmp_path / "head"], tmp_path / "out")
    assert any("'copy' replaces it" in line and "'head'" in line for line in refused.value.problems)


@pytest.mark.parametrize("kind", ["OPTForCausalLM", "Mamba2ForCausalLM"])
def test_a_copy_over_the_other_end_of_an_earlier_merge_is_refused(tmp_path: Path, kind: str) -> None:
    base_of(kind, KINDS[kind][0], tmp_path / "base")
    for name, case in (("first", "linear"), ("second", "head")):
        stored(kind, tmp_path / "base", tmp_path / name, **options_of(kind, case))
    file = tmp_path / "second/adapter_model.safetensors"
    values = load_file(file)
    save_file({k: v + 1 if "base_layer" in k else v for k, v in values.items()}, file)
    merge_checkpoint(tmp_path / "base", tmp_path / "first", tmp_path / "merged")
    with pytest.raises(AdapterError, match="would undo an earlier merge"):
        merge_checkpoint(tmp_path / "merged", tmp_path / "second", tmp_path / "out")


@pytest.mark.parametrize("kind", ["OPTForCausalLM", "Mamba2ForCausalLM"])
def test_what_can_not_be_known_is_refused(tmp_path: Path, kind: str) -> None:
    """Two other values for the one weight; and a copy that no config speaks of."""
    base_of(kind, KINDS[kind][0], tmp_path / "base")
    stored(kind, tmp_path / "base", tmp_path / "adapter", **options_of(kind, "linear"))
    file = tmp_path / "adapter/adapter_model.safetensors"
    values = load_file(file)
    save_file({k: v + 1 if "lm_head" in k else v for k, v in values.items()}, file)
    with pytest.raises(SiteError) as refused:
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert any("PEFT would load the last over the others" in line for line in refused.value.problems)
    with pytest.raises(AdapterError, match="don't fit") as unfit:
        TorchReference(tmp_path / "base", "float32", {"a": load_adapter(tmp_path / "adapter")})
    assert any("with other values" in line for line in unfit.value.problems)
    bare = tmp_path / "bare.safetensors"
    save_file({k: v for k, v in values.items() if "lm_head" not in k}, bare)
    with pytest.raises(SiteError, match=r"adapter_config\.json") as refused:
        merge_checkpoint(tmp_path / "base", load_adapter(bare, alpha=4), tmp_path / "out")
    assert "no config says" in refused.value.problems[0]


@pytest.mark.parametrize("case", ["linear", "head", "trained head"])
@pytest.mark.parametrize("kind", ["OPTForCausalLM", "Mamba2ForCausalLM"])
def test_a_saved_adapter_means_the_same(tmp_path: Path, kind: str, case: str) -> None:
    base_of(kind, KINDS[kind][0], tmp_path / "base")
    stored(kind, tmp_path / "base", tmp_path / "adapter", **options_of(kind, case))
    save_adapter(load_adapter(tmp_path / "adapter"), tmp_path / "again")
    _, expected = by_peft(kind, tmp_path / "base", tmp_path / "adapter")
    _, actual = by_peft(kind, tmp_path / "base", tmp_path / "again")
    assert tiny.relative_error(actual, expected) <= 2e-6
