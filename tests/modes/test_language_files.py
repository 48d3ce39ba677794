"""Files of one language beside the weights (Wav2Vec2, MMS) are copied, unless the merge changes theirs."""

import copy

import numpy as np
import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from lora_export.cli import _run

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 32, "conv_dim": (32, 32), "conv_kernel": (10, 3), "conv_stride": (5, 2),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    "adapter_attn_dim": 8, "do_stable_layer_norm": True, "feat_extract_norm": "layer",
}  # fmt: skip
SOUND = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 800)).astype(np.float32))


@pytest.fixture
def speech(tmp_path):
    """Save a model with a file for French; return a way to train an adapter, and to load for a language."""
    torch.manual_seed(0)
    with tiny.quiet():
        model = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**SIZES)).eval()
        model.save_pretrained(tmp_path / "base")
    french = {
        name: torch.randn_like(values) * 0.1
        for name, values in model.state_dict().items()
        if name.startswith("lm_head") or "adapter_layer" in name
    }
    assert len(french) > 2
    save_file(french, tmp_path / "base" / "adapter.fra.safetensors")

    def train(*targets):
        with tiny.quiet():
            config = LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)
            tuned = get_peft_model(copy.deepcopy(model), config).eval()
            tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return tuned

    return tmp_path, train


def load(folder):
    with tiny.quiet():
        return transformers.Wav2Vec2ForCTC.from_pretrained(folder, target_lang="fra").eval()


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("intermediate_dense",)])
def test_a_language_is_there_in_the_merged_folder(speech, targets, capsys):
    folder, train = speech
    train(*targets)
    arguments = ["merge", "--base", folder / "base", "--adapter", folder / "adapter", "-o", folder / "m"]
    assert _run([str(word) for word in arguments], False) == 0
    assert "not copied" not in capsys.readouterr().err
    # The language is loaded over the base, and PEFT's adapter put onto that.
    import peft

    with torch.no_grad(), tiny.quiet():
        base = load(folder / "base")
        before = base(SOUND).logits
        wanted = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()(SOUND).logits
        got = load(folder / "m")(SOUND).logits
    assert tiny.relative_error(got.numpy(), wanted.numpy()) < 2e-6
    assert tiny.relative_error(before.numpy(), wanted.numpy()) > 1e-3


def test_a_language_whose_weights_the_merge_changes_is_left_out_aloud(speech, capsys):
    folder, train = speech
    train("q_proj", "lm_head")
    arguments = ["merge", "--base", folder / "base", "--adapter", folder / "adapter", "-o", folder / "m"]
    assert _run([str(word) for word in arguments], False) == 0
    said = capsys.readouterr()
    assert "unmerged weights: adapter.fra.safetensors" in said.err + said.out
    assert not (folder / "m" / "adapter.fra.safetensors").exists()


@pytest.mark.parametrize("count", [1, 2])
def test_the_folder_of_a_cached_model_is_called_so(count, tmp_path, capsys):
    place = tmp_path / "models--org--name"
    for number in range(count):
        tiny.save_checkpoint("llama", place / "snapshots" / f"{number}")
    adapter = str(tiny.adapter("llama"))
    assert _run(["merge", "--base", str(place), "--adapter", adapter, "-o", str(tmp_path / "m")], False) == 1
    said = capsys.readouterr().err
    assert "above its snapshots" in said
    for number in range(count):
        assert str(place / "snapshots" / f"{number}") in said
