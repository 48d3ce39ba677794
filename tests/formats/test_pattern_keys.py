"""Keys of patterns that fit modules but for how their paths begin: refused, and right when corrected."""

import json
import re

import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from lora_export.cli import _run

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
WEIGHTS = "adapter_model.safetensors"


def qwen():
    config = transformers.Qwen2Config(**SIZES, num_key_value_heads=2, vocab_size=40)
    return transformers.Qwen2ForCausalLM(config), "model", "model.layers.1.self_attn.v_proj"


def roberta():
    config = transformers.RobertaConfig(**SIZES, vocab_size=40)
    return transformers.RobertaForMaskedLM(config), "roberta", "roberta.encoder.layer.0.attention.self.value"


@pytest.fixture(params=[qwen, roberta])
def trained(request, tmp_path):
    """Save a base and return a way to save an adapter with a pattern of one key."""
    torch.manual_seed(0)
    model, outer, path = request.param()
    with tiny.quiet():
        model.save_pretrained(tmp_path / "base")

    def save(kind, key):
        leaf = path.rpartition(".")[2]
        config = LoraConfig(
            r=2, lora_alpha=3, target_modules=[leaf], init_lora_weights=False, **{kind: {key(path): 5}}
        )
        with tiny.quiet():
            get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
            again = type(model).from_pretrained(tmp_path / "base")
            merged = PeftModel.from_pretrained(again, tmp_path / "adapter").merge_and_unload()
        return merged.state_dict(), outer, path

    return tmp_path, save


def merge(folder):
    arguments = ["merge", "--base", folder / "base", "--adapter", folder / "adapter", "-o", folder / "out"]
    return _run([str(word) for word in arguments], False)


# How a file's names begin, by what PEFT writes: the inner model's, twice the outer one's, PEFT's half prefix.
BEGINNINGS = {
    "inner": lambda name, outer: name.replace(f"base_model.model.{outer}.", "base_model.model."),
    "doubled": lambda name, outer: name.replace("base_model.model.", f"base_model.model.{outer}."),
}
KEYS = {
    "anchored": lambda path: f"^{path}",
    "escaped": lambda path: "^" + re.escape(path) + "$",
    "whole": lambda path: path,
}


@pytest.mark.parametrize("kind", ["alpha_pattern", "rank_pattern"])
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_a_key_with_another_beginning_than_the_file(trained, kind, key, beginning, capsys):
    folder, save = trained
    expected, outer, _ = save(kind, KEYS[key])
    file = folder / "adapter" / WEIGHTS
    tensors = {BEGINNINGS[beginning](name, outer): values for name, values in load_file(file).items()}
    save_file(tensors, file)
    status = merge(folder)
    error = capsys.readouterr().err
    if status:
        assert f"config {kind}" in error
        # The hint, followed.
        wanted = re.search(r"it would fit (\S+) with another", error)
        assert wanted is not None
        place = folder / "adapter" / "adapter_config.json"
        config = json.loads(place.read_text())
        config[kind] = {"^" + re.escape(wanted[1]): 5}
        place.write_text(json.dumps(config))
        assert merge(folder) == 0
    else:  # PEFT lets a key fit the end of a path.
        assert (key, beginning) == ("whole", "doubled")
    with tiny.quiet():
        found = type_of(folder).from_pretrained(folder / "out").state_dict()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=1e-6)


def type_of(folder):
    (name,) = json.loads((folder / "base" / "config.json").read_text())["architectures"]
    return getattr(transformers, name)


@pytest.mark.parametrize("key", ["^decoder.v_proj", "decoder.layers.7.self_attn.v_proj", r".*\.experts\.w1"])
def test_keys_of_modules_that_the_file_has_not_are_none_of_its_business(trained, key):
    folder, save = trained
    expected, _, _ = save("alpha_pattern", lambda path: key)
    assert merge(folder) == 0
    with tiny.quiet():
        found = type_of(folder).from_pretrained(folder / "out").state_dict()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=1e-6)
