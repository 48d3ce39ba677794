"""Bases that are one of two models built alike: the part of an adapter that is offered is theirs."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file
from torch import nn

from lora_export.cli import _run
from lora_export.runtimes.session import AdapterSession
from lora_export.sites.naming.towers import kinds_of_class, other_kind, telling_components

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 40, "max_position_embeddings": 16, "eos_token_id": 39}
IMAGES = {**SIZES, "image_size": 8, "patch_size": 4}


def clip() -> nn.Module:
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=IMAGES, projection_dim=16)
    return transformers.CLIPModel(config)


def siglip() -> nn.Module:
    text = {**TEXT, "projection_size": 16}
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=IMAGES))


def bart() -> nn.Module:
    sizes = {f"{end}_{name}": 2 for end in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes |= {f"{end}_ffn_dim": 24 for end in ("encoder", "decoder")}
    config = transformers.BartConfig(vocab_size=40, d_model=16, max_position_embeddings=32, **sizes)
    return transformers.BartForConditionalGeneration(config)


# (model, its part, the other one that is built alike, what of both is trained).
CASES = {
    "clip, vision": (clip, "vision_model", "text_model", ["q_proj", "fc1"]),
    "clip, text": (clip, "text_model", "vision_model", ["q_proj", "fc1"]),
    "siglip, vision": (siglip, "vision_model", "text_model", ["q_proj", "fc1"]),
    "siglip, text": (siglip, "text_model", "vision_model", ["q_proj", "fc1"]),
    "bart, encoder": (bart, "model.encoder", "model.decoder", ["fc1", "fc2"]),
    "bart, decoder": (bart, "model.decoder", "model.encoder", ["fc1", "fc2"]),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str, dict[str, torch.Tensor]]:
    """Save a part of a model and an adapter of the whole; return the parts' paths and PEFT's merged part."""
    make, part, other, targets = CASES[request.param]
    torch.manual_seed(0)
    model = make().eval()
    config = LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    with tiny.quiet():
        model.get_submodule(part).save_pretrained(tmp_path / "base")
        adapted = get_peft_model(model, config)
        adapted.save_pretrained(tmp_path / "whole")
        merged = adapted.merge_and_unload().get_submodule(part).state_dict()
    tensors = load_file(tmp_path / "whole/adapter_model.safetensors")
    (tmp_path / "others").mkdir()
    only = {name: values for name, values in tensors.items() if f".{other}." in name}
    save_file(only, tmp_path / "others/adapter_model.safetensors")
    text = (tmp_path / "whole/adapter_config.json").read_text()
    (tmp_path / "others/adapter_config.json").write_text(text)
    return part, other, merged


def command(verb: str, tmp_path: Path, adapter: str, *more: str) -> list[str]:
    base, out = (
        tmp_path / leaf for leaf in (("base", "out") if verb == "merge" else ("base.onnx", "out.onnx"))
    )
    words = [verb, "--base", base, "--adapter", tmp_path / adapter, "--force", *more, "-o", out]
    return [str(word) for word in words]


def test_the_own_tower_alone_is_offered(case, tmp_path, capsys):
    part, _, merged = case
    assert _run(command("merge", tmp_path, "whole"), False) == 1
    offered = re.findall(r"--component ([\w.:]+)", capsys.readouterr().err)
    assert offered
    assert all(part == one or part.startswith(f"{one}.") or one.startswith(part) for one in offered)
    for one in offered:
        assert _run(command("merge", tmp_path, "whole", "--component", one), False) == 0
        after = load_file(tmp_path / "out" / "model.safetensors")
        for name, values in after.items():
            torch.testing.assert_close(values, merged[name], rtol=1e-5, atol=1e-5, msg=name)


def test_what_is_for_the_other_tower_alone_is_offered_nothing(case, tmp_path, capsys):
    _, other, _ = case
    assert _run(command("merge", tmp_path, "others"), False) == 1
    error = capsys.readouterr().err
    assert "--component" not in error
    assert other in error.partition("hint: ")[2]
    assert "rename" not in error


def test_who_insists_on_the_other_tower_is_told_so(tmp_path, capsys):
    for number, (make, part, other) in enumerate(
        [(clip, "vision_model", "text_model"), (siglip, "text_model", "vision_model")]
    ):
        folder = tmp_path / str(number)
        model = make()
        with tiny.quiet():
            model.get_submodule(part).save_pretrained(folder / "base")
            config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
            get_peft_model(model, config).save_pretrained(folder / "whole")
        assert _run(command("merge", folder, "whole", "--component", other), False) == 0
        said = capsys.readouterr()
        assert f"it is for a model of the kind {other.partition('_')[0]}" in said.out + said.err


# A graph has no class: nothing tells Bart's encoder from its decoder.
@pytest.mark.parametrize("case", [name for name in CASES if "bart" not in name], indirect=True)
def test_a_graph_is_told_by_its_names(case, tmp_path, capsys):
    part, _, merged = case
    tower = getattr(transformers, tiny_class(tmp_path)).from_pretrained(tmp_path / "base").eval()
    x = torch.arange(1, 9).view(2, 4) if "text" in part else torch.randn(2, 3, 8, 8)
    with torch.no_grad(), tiny.quiet():
        export(tower, x, tmp_path / "base.onnx")
        tower.load_state_dict(merged)
        expected = tower(x)[0].numpy()
    for verb in ("merge-onnx", "swap-onnx"):
        assert _run(command(verb, tmp_path, "whole"), False) == 1
        offered = re.findall(r"--component ([\w.:]+)", capsys.readouterr().err)
        assert offered == [part]
        assert _run(command(verb, tmp_path, "whole", "--component", part), False) == 0
    # The swap graph is the last one that was written.
    capsys.readouterr()  # where the command that comes next is printed, with its --component
    convert = ["convert-adapter", str(tmp_path / "whole"), "--for", str(tmp_path / "out.onnx")]
    convert += ["-o", str(tmp_path / "a.safetensors")]
    assert _run(convert, False) == 1
    assert re.findall(r"--component ([\w.:]+)", capsys.readouterr().err) == [part]
    assert _run([*convert, "--component", part], False) == 0
    session = ort.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    actual, *_ = session.run(None, {"x": x.numpy(), **load_numpy(tmp_path / "a.safetensors")})
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def export(tower: nn.Module, x: torch.Tensor, path: Path) -> None:
    torch.onnx.export(tower, (x,), path, input_names=["x"], dynamo=True, optimize=False)


def tiny_class(folder: Path) -> str:
    config = transformers.AutoConfig.from_pretrained(folder / "base")
    return str(config.architectures[0])


# --- names of transformers 4, for graphs of transformers 5 ------------------------------------------

TOWERS = {
    "clip text": (clip, "text_model"),
    "clip vision": (clip, "vision_model"),
    "siglip text": (siglip, "text_model"),
    "siglip vision": (siglip, "vision_model"),
}


@pytest.mark.parametrize("form", ["kohya", "peft"])
@pytest.mark.parametrize("name", TOWERS)
def test_a_swap_graph_takes_the_adapter_that_it_was_made_with(name, form, tmp_path):
    make, part = TOWERS[name]
    torch.manual_seed(0)
    tower = make().eval().get_submodule(part)
    pairs = {}
    changed = copy.deepcopy(tower)
    for path, module in tower.named_modules():
        if path.endswith(("q_proj", "fc1")):
            a, b = torch.randn(2, module.in_features), torch.randn(module.out_features, 2)
            pairs[f"{part}.{path}"] = a, b
            changed.get_submodule(path).weight.data.add_(2.0 * b @ a)
    files = {side: write(tmp_path / side, form, pairs, side) for side in ("text_model", "vision_model")}
    adapter = files[part]
    x = torch.arange(1, 9).view(2, 4) if "text" in part else torch.randn(2, 3, 8, 8)
    base, swap, file = (tmp_path / leaf for leaf in ("base.onnx", "swap.onnx", "a.safetensors"))
    with torch.no_grad(), tiny.quiet():
        export(tower, x, base)
        expected = changed(x)[0].numpy()
    made = ["swap-onnx", "--base", base, "--adapter", adapter, "-o", swap]
    assert _run([str(word) for word in made], False) == 0
    convert = ["convert-adapter", adapter, "--for", swap, "-o", file]
    assert _run([str(word) for word in convert], False) == 0
    session = ort.InferenceSession(swap, providers=["CPUExecutionProvider"])
    actual, *_ = session.run(None, {"x": x.numpy(), **load_numpy(file)})
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    with AdapterSession(swap, threads=1) as running:
        running.load_adapter("a", adapter)
        actual, *_ = running.run({"x": x.numpy()}, adapter="a").values()
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    (other,) = (path for side, path in files.items() if side != part)
    convert = ["convert-adapter", other, "--for", swap, "--force", "-o", file]
    assert _run([str(word) for word in convert], False) == 1


def write(path: Path, form: str, pairs: dict, part: str) -> Path:
    """Write an adapter of scaling 2 for the tower of that name, whatever the pairs are called."""
    tensors = {}
    for name, (a, b) in pairs.items():
        inner = name.partition(".")[2]
        if form == "kohya":
            front = "lora_te_text_model" if part == "text_model" else "lora_vision_model"
            flat = f"{front}_{inner.replace('.', '_')}"
            tensors |= {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b}
            tensors[f"{flat}.alpha"] = torch.tensor(4.0)
        else:
            front = f"base_model.model.{part}.{inner}"
            tensors |= {f"{front}.lora_A.weight": a, f"{front}.lora_B.weight": b}
    if form == "kohya":
        save_file(tensors, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "fc1"]}'
    )
    return path


# --- what a class says ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        ({"architectures": ["SiglipVisionModel"]}, {"vision"}),
        ({"model_type": "clip_text_model"}, {"text"}),
        ({"architectures": ["CLIPForImageClassification"], "model_type": "clip"}, set()),
        ({"architectures": ["T5EncoderModel"], "model_type": "t5"}, {"encoder"}),
        ({"architectures": ["VisionEncoderDecoderModel"]}, {"vision", "encoder", "decoder"}),
        ({"architectures": ["DPRQuestionEncoder"]}, {"question", "encoder"}),
        ({"architectures": ["AutoencoderKL", "BertForQuestionAnswering"]}, set()),
        ({"architectures": None}, set()),
    ],
)
def test_kinds_of_a_class(config, kinds):
    assert kinds_of_class(config) == kinds


def test_a_part_that_the_base_has_inside_is_its_own():
    def other(part, name):
        return other_kind(part, frozenset({"vision"}), telling_components([name]))

    assert other("text_model", "encoder.layers.0.fc1.weight") == "text"
    assert other("clip_text_model", "encoder.layers.0.fc1.weight") == "text"
    assert other("text_model", "clip.text_model.layers.0.fc1.weight") == ""
    assert other("decoder", "encoder.layers.0.fc1.weight") == ""
