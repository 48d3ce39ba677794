"""PEFT's stored copies of a tied weight in graphs: every reader of the tie gets them, or they are refused."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from lora_export import SiteError, merge_onnx

V, H = 30, 16
PLAIN = {
    "vocab_size": V, "hidden_size": H, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0,
    "max_position_embeddings": 32, "intermediate_size": 24,
}  # fmt: skip
# Class → config, input embedding, output head, a linear layer.
KINDS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "Olmo2ForCausalLM": (PLAIN, "embed_tokens", "lm_head", "q_proj"),
    "GPTNeoXForCausalLM": (PLAIN, "embed_in", "lm_head", "dense_h_to_4h"),
    "GraniteForCausalLM": (PLAIN, "embed_tokens", "lm_head", "q_proj"),
}
IDS = torch.arange(2, 12)[None]
FEEDS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
# Tools: the exporter as it is, without its optimiser, and the one before.
EXPORTERS: dict[str, dict[str, Any]] = {
    "dynamo": {"dynamo": True, "optimize": True},
    "plain": {"dynamo": True, "optimize": False},
    "TorchScript": {"dynamo": False},
}


def loaded(kind: str, folder: Path) -> Any:
    with tiny.quiet():
        model = getattr(transformers, kind).from_pretrained(folder).eval()
    model.set_attn_implementation("eager")
    return model


def base_of(kind: str, folder: Path, tied: bool = True) -> Path:
    """Save a base; one that is not tied has equal values in both, as where they were parted only now."""
    config = getattr(transformers, kind).config_class(**KINDS[kind][0], tie_word_embeddings=tied)
    torch.manual_seed(0)
    with tiny.quiet():
        model = getattr(transformers, kind)(config).eval()
        if not tied:
            model.get_output_embeddings().weight.data = model.get_input_embeddings().weight.data.clone()
        model.save_pretrained(folder)
    return folder


def stored(kind: str, base: Path, folder: Path, case: str, both: bool = False) -> Path:
    """Save an adapter with PEFT's copies of a shared weight that is another than the base's."""
    _, embedding, head, linear = KINDS[kind]
    options: dict[str, Any] = {
        "linear": {"target_modules": [linear]},
        "embedding": {"target_modules": [linear, embedding]},
        "head": {"target_modules": [linear, head]},
        "trained head": {"target_modules": [linear], "modules_to_save": [head]},
    }[case]
    model = loaded(kind, base)
    generator = torch.Generator().manual_seed(3)
    model.get_input_embeddings().weight.data += torch.randn(V, H, generator=generator)
    with tiny.quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, **options))
        for values in peft.parameters():
            if values.requires_grad:
                values.data.copy_(0.2 * torch.randn(values.shape, generator=generator))
        peft.save_pretrained(folder, save_embedding_layers=True)
    if case == "linear" and not both:
        # Of one end alone, as where only that was resized or targeted.
        file = folder / "adapter_model.safetensors"
        save_file({k: v for k, v in load_file(file).items() if f".{head}." not in k}, file)
    return folder


def answer(model: Any) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(**FEEDS).logits.numpy())


def by_peft(kind: str, base: Path, adapter: Path) -> np.ndarray:
    with tiny.quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return answer(PeftModel.from_pretrained(loaded(kind, base), adapter).eval())


def graph_of(kind: str, base: Path, path: Path, exporter: str) -> Path:
    with tiny.quiet(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = loaded(kind, base)
        model.config.use_cache = False
        options = EXPORTERS[exporter]
        given = {"kwargs": FEEDS} if options["dynamo"] else {"input_names": list(FEEDS)}
        args = () if options["dynamo"] else tuple(FEEDS.values())
        if not options["dynamo"]:
            model.forward = functools.partial(_two, model.forward)
        torch.onnx.export(model, args, str(path), output_names=["logits"], verbose=False, **given, **options)
    return path


def _two(forward: Any, input_ids: Any, attention_mask: Any) -> Any:
    """Run a model with two inputs: TorchScript makes inputs of the others' defaults, too."""
    return forward(input_ids=input_ids, attention_mask=attention_mask, return_dict=False)[0]


def ran(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path))
    feeds = {port.name: FEEDS[port.name].numpy() for port in session.get_inputs()}
    return np.asarray(session.run(["logits"], feeds)[0])


@pytest.mark.parametrize("case", ["linear", "embedding", "head", "trained head"])
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_reader_of_the_tie_gets_the_copy(tmp_path: Path, kind: str, exporter: str, case: str) -> None:
    base = base_of(kind, tmp_path / "base")
    adapter = stored(kind, base, tmp_path / "adapter", case)
    graph = graph_of(kind, base, tmp_path / "base.onnx", exporter)
    expected = by_peft(kind, base, adapter)
    merge_onnx(graph, adapter, tmp_path / "out.onnx", checkpoint=base)
    assert tiny.relative_error(ran(tmp_path / "out.onnx"), expected) <= 2e-6
    # Without the checkpoint: where the exporter keeps one constant, or the adapter has the head's as well.
    heads = any(f".{KINDS[kind][2]}." in name for name in load_file(adapter / "adapter_model.safetensors"))
    known = exporter == "plain" or (heads and case != "head")
    if not known:
        with pytest.raises(SiteError) as refused:
            merge_onnx(graph, adapter, tmp_path / "named.onnx", checkpoint=False)
        assert "--checkpoint" in refused.value.hint
        return
    merge_onnx(graph, adapter, tmp_path / "named.onnx", checkpoint=False)
    assert tiny.relative_error(ran(tmp_path / "named.onnx"), expected) <= 2e-6


@pytest.mark.parametrize("exporter", ["dynamo", "plain"])
@pytest.mark.parametrize("kind", ["Olmo2ForCausalLM", "GPTNeoXForCausalLM"])
def test_a_weight_of_its_own_with_the_same_values_stays(tmp_path: Path, kind: str, exporter: str) -> None:
    """The base's config ties nothing: PEFT loads the copy into the embedding alone."""
    base = base_of(kind, tmp_path / "base", tied=False)
    adapter = stored(kind, base, tmp_path / "adapter", "linear")
    graph = graph_of(kind, base, tmp_path / "base.onnx", exporter)
    merge_onnx(graph, adapter, tmp_path / "out.onnx", checkpoint=base)
    assert tiny.relative_error(ran(tmp_path / "out.onnx"), by_peft(kind, base, adapter)) <= 2e-6
    with pytest.raises(SiteError, match="holds the same values") as refused:
        merge_onnx(graph, adapter, tmp_path / "named.onnx", checkpoint=False)
    assert "--checkpoint" in refused.value.hint


@pytest.mark.parametrize("kind", ["Olmo2ForCausalLM", "GPTNeoXForCausalLM"])
def test_two_copies_of_the_one_weight_are_refused(tmp_path: Path, kind: str) -> None:
    base = base_of(kind, tmp_path / "base")
    adapter = stored(kind, base, tmp_path / "adapter", "linear", both=True)
    graph = graph_of(kind, base, tmp_path / "base.onnx", "plain")
    merge_onnx(graph, adapter, tmp_path / "out.onnx", checkpoint=base)
    assert tiny.relative_error(ran(tmp_path / "out.onnx"), by_peft(kind, base, adapter)) <= 2e-6
    file = adapter / "adapter_model.safetensors"
    save_file({k: v + 1 if KINDS[kind][2] in k else v for k, v in load_file(file).items()}, file)
    with pytest.raises(SiteError, match="copies with other values"):
        merge_onnx(graph, adapter, tmp_path / "no.onnx", checkpoint=base)


@pytest.mark.parametrize("case", ["linear", "embedding", "head", "trained head"])
@pytest.mark.parametrize("kind", ["GPTNeoXForCausalLM", "GraniteForCausalLM"])
def test_a_folder_is_merged_before_it_is_captured(tmp_path: Path, kind: str, case: str) -> None:
    base = base_of(kind, tmp_path / "base")
    adapter = stored(kind, base, tmp_path / "adapter", case)
    merge_onnx(base, adapter, tmp_path / "out.onnx")
    assert tiny.relative_error(ran(tmp_path / "out.onnx"), by_peft(kind, base, adapter)) <= 2e-6
