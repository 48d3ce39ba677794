"""A parameter of two names, stored whole under both, goes once into a graph; two that differ don't."""

import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lora_export import LoraExportError, capture_onnx, merge_onnx

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 40, "embedding_size": 32, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# Family → the head's module; the names that its bias has below it.
HEADS = {
    "Bert": ("cls", "predictions.bias", "predictions.decoder.bias"),
    "Roberta": ("lm_head", "bias", "decoder.bias"),
    "Camembert": ("lm_head", "bias", "decoder.bias"),
}
_TOKENS = torch.tensor([[5, 7, 11, 60, 9, 1]])
IDS = {
    "input_ids": _TOKENS,
    "token_type_ids": torch.zeros_like(_TOKENS),
    "attention_mask": torch.ones_like(_TOKENS),
}


@pytest.fixture(params=[(family, filled) for family in HEADS for filled in (False, True)], ids=str)
def trained(request, tmp_path):
    """Return a base, an adapter whose trainer stored its head whole, and the tuned model."""
    family, filled = request.param
    torch.manual_seed(0)
    with tiny.quiet():
        config = getattr(transformers, f"{family}Config")(**SIZES)
        model = getattr(transformers, f"{family}ForMaskedLM")(config).eval()
        if filled:  # Else the base's bias is all zeros, which no value finds.
            nn.init.normal_(model.get_output_embeddings().bias)
        model.save_pretrained(tmp_path / "base")
        head = HEADS[family][0]
        tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], modules_to_save=[head]))
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                nn.init.normal_(parameter, std=0.3)
        tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return family, tuned.eval(), tmp_path


def merge_graph(folder, known):
    graph, merged = folder / "g" / "model.onnx", folder / "m" / "model.onnx"
    checkpoint = folder / "base" if known else False
    return merge_onnx(graph, folder / "adapter", merged, checkpoint=checkpoint)


@pytest.mark.parametrize("known", [True, False], ids=["checkpoint", "names"])
def test_equal_copies_of_one_parameter_go_in_once(trained, known):
    family, tuned, folder = trained
    _, one, other = HEADS[family]
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    pair = [next(v for k, v in stored.items() if k.endswith(f"{HEADS[family][0]}.{n}")) for n in (one, other)]
    assert torch.equal(*pair)
    with tiny.quiet():
        capture_onnx(folder / "base", folder / "g" / "model.onnx")
        merge_graph(folder, known)
        with torch.no_grad():
            wanted = tuned(**IDS).logits.numpy()
    got = tiny.run(folder / "m" / "model.onnx", {name: ids.numpy() for name, ids in IDS.items()})
    assert tiny.relative_error(got, wanted) < 2e-6


@pytest.mark.parametrize("known", [True, False], ids=["checkpoint", "names"])
def test_copies_that_differ_are_refused(trained, known):
    family, _, folder = trained
    head, one, _ = HEADS[family]
    file = folder / "adapter" / "adapter_model.safetensors"
    stored = load_file(file)
    name = next(name for name in stored if name.endswith("decoder.bias"))
    save_file({**stored, name: stored[name] + 1}, file, {"format": "pt"})
    with tiny.quiet():
        capture_onnx(folder / "base", folder / "g" / "model.onnx")
    with pytest.raises(LoraExportError, match="no place") as caught:
        merge_graph(folder, known)
    assert any(problem.startswith(f"{head}.{one} ") for problem in caught.value.problems)
    assert not (folder / "m" / "model.onnx").exists()
