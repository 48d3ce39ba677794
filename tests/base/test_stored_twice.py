"""A checkpoint that stores a parameter under two names is refused: transformers loads only one of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import build

from lora_export.base.checkpoint import names
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.names import Names, refuse_stored_twice
from lora_export.errors import CheckpointError, install_line
from lora_export.modes.bank_onnx import bank_onnx
from lora_export.modes.capture_onnx import capture_onnx
from lora_export.modes.merge_checkpoint import merge_checkpoint
from lora_export.modes.merge_onnx import merge_onnx
from lora_export.modes.swap_onnx import swap_onnx

PREFIX = {"llama": "model.", "gpt2": "transformer."}


def saved(folder: Path, arch: str, second: Callable[[str], str | None]) -> Path:
    """Save a model whose tensors have a second copy, with other values, under another name."""
    build(arch).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    again = {new: v + 0.5 for name, v in tensors.items() if (new := second(name)) and new != name}
    assert again
    save_file({**tensors, **again}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(params=sorted(PREFIX))
def twice(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    prefix = PREFIX[request.param]
    inner = "layers." if request.param == "llama" else "h."

    def second(name: str) -> str | None:
        return name.removeprefix(prefix) if name.startswith(prefix + inner) else None

    return request.param, saved(tmp_path / "base", request.param, second)


def test_transformers_loads_one_of_them(twice: tuple[str, Path]) -> None:
    """The reason: of two tensors with other values, one is not in the model."""
    arch, base = twice
    stored = load_file(base / "model.safetensors")
    with tiny.quiet():
        loaded = transformers.AutoModelForCausalLM.from_pretrained(base).state_dict()
    for name in (n for n in stored if n.startswith(PREFIX[arch]) and n in loaded):
        second = stored.get(name.removeprefix(PREFIX[arch]))
        if second is not None:
            assert torch.equal(loaded[name], stored[name]) != torch.equal(loaded[name], second)


def test_every_verb(twice: tuple[str, Path], tmp_path: Path) -> None:
    arch, base = twice
    adapter, graph, out = tiny.adapter(arch), tiny.base_onnx(arch, "dynamo"), tmp_path / "o/m.onnx"
    calls: list[Callable[[], Any]] = [
        lambda: merge_checkpoint(base, adapter, tmp_path / "merged"),
        lambda: merge_onnx(base, adapter, out),
        lambda: swap_onnx(base, out, adapter=adapter),
        lambda: bank_onnx(base, {"a": adapter}, out),
        lambda: capture_onnx(base, out),
        lambda: merge_onnx(graph, adapter, out, checkpoint=base),
    ]
    for call in calls:
        with pytest.raises(CheckpointError) as raised:
            call()
        assert "twice" in raised.value.message
        assert any(
            "'model.layers.0." in line or "'transformer.h.0." in line for line in raised.value.problems
        )
        assert all("model.safetensors" in line for line in raised.value.problems if "loaded as" in line)
        assert "save_pretrained" in (raised.value.hint or "")
    assert not out.parent.exists() or not list(out.parent.iterdir())
    assert not (tmp_path / "merged").exists()


def test_equal_values_do_no_harm_where_they_are_read(tmp_path: Path) -> None:
    """Whichever is loaded, a graph has these values; a merge would change one of the two."""
    base, adapter, out = tmp_path / "base", tiny.adapter("llama"), tmp_path / "m.onnx"
    build("llama").save_pretrained(base)
    stored = load_file(base / "model.safetensors")
    again = {n.removeprefix("model."): v.clone() for n, v in stored.items() if ".layers." in n}
    save_file({**stored, **again}, base / "model.safetensors", metadata={"format": "pt"})
    merge_onnx(tiny.base_onnx("llama", "dynamo"), adapter, out, checkpoint=base)
    got = tiny.run(out, tiny.feeds("llama", out))
    assert tiny.relative_error(got, tiny.reference("llama", adapter)) < 2e-6
    with pytest.raises(CheckpointError, match="twice"):
        merge_checkpoint(base, adapter, tmp_path / "merged")


def test_older_names(tmp_path: Path) -> None:
    def second(name: str) -> str | None:
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        return old if old != name else None

    base = saved(tmp_path / "base", "bert", second)
    with pytest.raises(CheckpointError, match="twice"):
        Names(Checkpoint.open(base))


def test_names_of_two_versions(tmp_path: Path) -> None:
    """A model of several parts, whose older and newer names differ in front of the layer and begin alike."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8).to_dict(),
        text_config=transformers.LlamaConfig(**sizes, vocab_size=64).to_dict(),
        image_token_index=5,
    )
    model, base = transformers.LlavaForConditionalGeneration(config), tmp_path / "base"
    model.save_pretrained(base)
    refuse_stored_twice(base)
    stored = load_file(base / "model.safetensors")
    newer = {name: v + 0.5 for name, v in model.state_dict().items() if "layers." in name}
    assert not set(newer) <= set(stored)
    save_file({**stored, **newer}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="twice") as raised:
        refuse_stored_twice(base)
    assert any("language_model" in line for line in raised.value.problems)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5", "vit", "qwen2_moe"])
def test_honest_models(arch: str) -> None:
    refuse_stored_twice(tiny.checkpoint(arch))


def test_a_tied_head_is_a_parameter_of_its_own(tmp_path: Path) -> None:
    base = tmp_path / "base"
    build("gpt2").save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    head = {"lm_head.weight": tensors["transformer.wte.weight"].clone()}
    save_file({**tensors, **head}, base / "model.safetensors", metadata={"format": "pt"})
    refuse_stored_twice(base)
    merge_checkpoint(base, tiny.adapter("gpt2"), tmp_path / "merged")


def test_names_without_the_prefix_alone(tmp_path: Path) -> None:
    """A file of the inner model, as AutoModel saves it."""
    build("llama").model.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    refuse_stored_twice(tmp_path / "base")


def test_modules_whose_paths_end_alike(tmp_path: Path) -> None:
    """Names alone only make one ask: two parameters for transformers, or of a model it doesn't know."""
    base = tmp_path / "base"
    base.mkdir()
    values = {"encoder.proj.weight": torch.zeros(4, 4), "teacher.encoder.proj.weight": torch.ones(4, 4)}
    save_file(values, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "unknown to transformers"}))
    refuse_stored_twice(base)


def test_without_transformers(twice: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise ImportError("transformers")

    monkeypatch.setattr(names, "build_model", missing)
    with pytest.raises(CheckpointError) as raised:
        Names(Checkpoint.open(twice[1]))
    assert "may store parameters twice" in raised.value.message
    assert raised.value.hint == install_line("hf")
