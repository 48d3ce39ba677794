"""Refusals whose hint, followed to the letter, leads to the right result."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lora_export import load_adapter
from lora_export.cli import _run
from lora_export.modes.merge_checkpoint import merge_checkpoint

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = {**SIZES, "image_size": 8, "patch_size": 4}


def run(*words: object) -> int:
    return _run([str(word) for word in words], False)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, vocab_size=40, num_key_value_heads=2, use_cache=False)
    return transformers.LlamaForCausalLM(config).eval()


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, vocab_size=40)).eval()


# (model, what is trained).
MODELS = {"llama": (llama, ["q_proj", "v_proj"]), "bert": (bert, ["query", "value"])}


def trained(model: nn.Module, targets: list[str], folder: Path, **more: Any) -> dict[str, torch.Tensor]:
    """Write an adapter; return the state that PEFT merges."""
    with tiny.quiet():
        config = LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False, **more)
        adapted = get_peft_model(model, config)
        adapted.save_pretrained(folder)
        return adapted.merge_and_unload().state_dict()


def exported(model: nn.Module, path: Path) -> None:
    ids = {"input_ids": torch.ones(2, 5, dtype=torch.int64)}
    with torch.no_grad(), tiny.quiet():
        torch.onnx.export(model, (), path, kwargs=ids, dynamo=True, optimize=False)


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """Save a base, its graph and an adapter."""
    make, targets = MODELS[request.param]
    torch.manual_seed(0)
    model = make()
    with tiny.quiet():
        model.save_pretrained(tmp_path / "base")
    exported(model, tmp_path / "base.onnx")
    return request.param, trained(model, targets, tmp_path / "adapter")


# --- quantised bases of graphs ------------------------------------------------------------------------


def quantised(base: Path, folder: Path, method: str) -> None:
    """Write a folder as a quantiser leaves it: what was quantised can't be told any more."""
    tensors, codes = {}, {}
    for name, values in load_file(base / "model.safetensors").items():
        if values.ndim < 2 or "embed" in name or not name.endswith("weight"):
            tensors[name] = values
        elif method == "bitsandbytes":
            codes[name] = torch.zeros(values.numel() // 2, 1, dtype=torch.uint8)
            codes |= {f"{name}.absmax": torch.ones(values.numel() // 8), f"{name}.quant_map": torch.ones(16)}
        elif method == "gptq":
            front = name.removesuffix(".weight")
            codes[f"{front}.qweight"] = torch.zeros(2, len(values), dtype=torch.int32)
            codes |= {f"{front}.scales": torch.ones(1, len(values)), f"{front}.g_idx": torch.zeros(16)}
        else:
            scale = values.abs().max() / 448
            codes |= {name: (values / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
    folder.mkdir()
    save_file({**tensors, **codes}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (folder / "config.json").write_text(json.dumps(config))


def same_graphs(one: Path, other: Path) -> bool:
    return one.with_suffix(".onnx.data").read_bytes() == other.with_suffix(".onnx.data").read_bytes()


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8"])
@pytest.mark.parametrize("verb", ["merge-onnx", "swap-onnx"])
def test_a_quantised_folder_that_the_adapter_names(case, method, verb, tmp_path, capsys):
    """Nobody gave it: a note. Where the user gave it, an error, and its hint leads on."""
    base = tmp_path / "base"
    quantised(base, tmp_path / "codes", method)
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "codes")}))
    command = [verb, "--base", tmp_path / "base.onnx", "--adapter", tmp_path / "adapter", "--force", "-o"]
    assert run(*command, tmp_path / "named.onnx") == 0
    said = capsys.readouterr()
    assert "values were not compared" in said.out + said.err
    assert run(*command, tmp_path / "right.onnx", "--checkpoint", base) == 0
    assert same_graphs(tmp_path / "named.onnx", tmp_path / "right.onnx")
    if method == "fp8":
        return
    assert run(*command, tmp_path / "none.onnx", "--checkpoint", tmp_path / "codes") == 1
    hint = capsys.readouterr().err.partition("hint: ")[2]
    assert "--no-checkpoint" in hint
    assert "quantise the result" not in hint
    assert run(*command, tmp_path / "followed.onnx", "--no-checkpoint") == 0
    assert same_graphs(tmp_path / "followed.onnx", tmp_path / "right.onnx")


# --- another model's adapter beside the graph's own checkpoint --------------------------------------


@pytest.mark.parametrize("verb", ["merge-onnx", "swap-onnx"])
def test_an_adapter_of_another_model_is_called_so(case, verb, tmp_path, capsys):
    name, _ = case
    (other,) = MODELS.keys() - {name}
    make, targets = MODELS[other]
    trained(make(), targets, tmp_path / "foreign")
    command = [verb, "--base", tmp_path / "base.onnx", "--checkpoint", tmp_path / "base", "--force"]
    assert run(*command, "--adapter", tmp_path / "foreign", "-o", tmp_path / "out.onnx") == 1
    error = capsys.readouterr().err
    assert "another model" in error or "in another way" in error
    assert "exported from" not in error
    assert run(*command, "--adapter", tmp_path / "adapter", "-o", tmp_path / "out.onnx") == 0


# --- heads ------------------------------------------------------------------------------------------


def wav2vec2(kind: str, **more: Any) -> nn.Module:
    config = transformers.Wav2Vec2Config(
        **SIZES,
        conv_dim=(8,),
        conv_stride=(2,),
        conv_kernel=(3,),
        num_feat_extract_layers=1,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=12,
        **more,
    )
    return getattr(transformers, f"Wav2Vec2{kind}")(config)


def of(family: str, sizes: dict[str, Any]) -> Any:
    def make(kind: str, **more: Any) -> nn.Module:
        config = getattr(transformers, f"{family}Config")(**sizes, **more)
        return getattr(transformers, f"{family}{kind}")(config)

    return make


TEXT = {**SIZES, "vocab_size": 40}
# (makes a class of the family, the bare class, the class that is trained, targets, head, task type).
HEADS = {
    "vit": (of("ViT", IMAGES), "Model", "ForImageClassification", ["q_proj", "query"], "classifier", None),
    "beit": (of("Beit", IMAGES), "Model", "ForImageClassification", ["q_proj", "query"], "classifier", None),
    "wav2vec2": (wav2vec2, "Model", "ForSequenceClassification", ["q_proj"], "classifier", None),
    "llama": (
        of("Llama", {**TEXT, "pad_token_id": 0}),
        "ForCausalLM",
        "ForSequenceClassification",
        ["q_proj"],
        "score",
        "SEQ_CLS",
    ),
    "bert": (of("Bert", TEXT), "Model", "ForTokenClassification", ["query"], "classifier", "TOKEN_CLS"),
    "electra": (
        of("Electra", TEXT),
        "Model",
        "ForQuestionAnswering",
        ["query"],
        "qa_outputs",
        "QUESTION_ANS",
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_base_gets_the_head_as_the_hint_says(name, tmp_path, capsys):
    make, bare, kind, targets, head, task = HEADS[name]
    torch.manual_seed(0)
    labels = 2 if task == "QUESTION_ANS" else 5
    with tiny.quiet():
        make(bare).save_pretrained(tmp_path / "bare")
        model = type(make(kind)).from_pretrained(tmp_path / "bare", num_labels=labels)
    merged = trained(model, targets, tmp_path / "adapter", modules_to_save=[head], task_type=task)
    command = ["merge", "--adapter", tmp_path / "adapter", "--force", "-o", tmp_path / "out", "--base"]
    assert run(*command, tmp_path / "bare") == 1
    hint = capsys.readouterr().err.partition("hint: ")[2]
    calls = set(re.findall(r"(AutoModelFor\w+)\.from_pretrained\(BASE, num_labels=(\d+)\)", hint))
    assert len(calls) == 1
    ((auto, number),) = calls
    with tiny.quiet():
        grown = getattr(transformers, auto).from_pretrained(tmp_path / "bare", num_labels=int(number))
        grown.save_pretrained(tmp_path / "base")
        assert run(*command, tmp_path / "base") == 0
        result = type(model).from_pretrained(tmp_path / "out").state_dict()
    new = {key for key in result if key.startswith(("projector", "pooler", "bert.pooler"))}
    for key in merged.keys() - new:
        torch.testing.assert_close(result[key], merged[key], rtol=1e-5, atol=1e-5, msg=key)


# --- options of a blend ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [".pt", ".safetensors"])
@pytest.mark.parametrize("given", [[], ["--alpha", "16"]], ids=["without", "with"])
def test_a_blend_of_what_states_its_alpha_and_what_does_not(case, form, given, tmp_path, capsys):
    """Per adapter what to give; one after the other, and as adapters loaded in Python: the same result."""
    _, merged = case
    base, plain = tmp_path / "base", tmp_path / f"plain{form}"
    name = next(n for n in merged if n.endswith(("down_proj.weight", "output.dense.weight")))
    rows, cols = merged[name].shape
    a, b = torch.randn(2, cols), torch.randn(rows, 2)
    path = name.removesuffix(".weight")
    tensors = {f"{path}.lora_A": a, f"{path}.lora_B": b}
    torch.save(tensors, plain) if form == ".pt" else save_file(tensors, plain)
    adapters = ["--adapter", tmp_path / "adapter", "--adapter", plain]
    assert run("merge", "--base", base, *adapters, *given, "-o", tmp_path / "none") == 1
    error = capsys.readouterr().err
    assert re.search(r"adapter: .*give it without --alpha", error)
    assert re.search(rf"plain\{form}: .*give it with --alpha", error)
    assert "one after the other" in error
    step, out, python = (tmp_path / leaf for leaf in ("step", "out", "python"))
    assert run("merge", "--base", base, "--adapter", tmp_path / "adapter", "-o", step) == 0
    assert run("merge", "--base", step, "--adapter", plain, "--alpha", "16", "-o", out) == 0
    merge_checkpoint(base, [load_adapter(tmp_path / "adapter"), load_adapter(plain, alpha=16)], python)
    merged[name] = merged[name] + 8 * b @ a
    for folder in (out, python):
        for key, values in load_file(folder / "model.safetensors").items():
            torch.testing.assert_close(values, merged[key], rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_a_blend_of_one_models_adapter_and_a_pipelines(kind, tmp_path, capsys):
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(**SIZES, vocab_size=40, max_position_embeddings=16)
    model = getattr(transformers, kind)(config)
    base = tmp_path / "text_encoder"
    with tiny.quiet():
        model.save_pretrained(base)
    merged = trained(model, ["q_proj"], tmp_path / "peft")
    kohya = {}
    for path in [n.removesuffix(".weight") for n in merged if n.endswith("v_proj.weight")]:
        inner = path.removeprefix("text_model.").replace(".", "_")
        for front in ("lora_te1_text_model_", "lora_te2_text_model_"):
            a, b = torch.randn(2, 16), torch.randn(16, 2)
            kohya |= {f"{front}{inner}.lora_down.weight": a, f"{front}{inner}.lora_up.weight": b}
            kohya[f"{front}{inner}.alpha"] = torch.tensor(2.0)
            if front == "lora_te1_text_model_":
                merged[f"{path}.weight"] = merged[f"{path}.weight"] + b @ a
    save_file(kohya, tmp_path / "kohya.safetensors")
    adapters = ["--adapter", tmp_path / "peft", "--adapter", tmp_path / "kohya.safetensors"]
    for more in ([], ["--component", "text_encoder"]):
        assert run("merge", "--base", base, *adapters, *more, "-o", tmp_path / "none") == 1
        assert "one after the other" in capsys.readouterr().err
    # The first step's folder lies in a pipeline's place as well.
    step = tmp_path / "step" / "text_encoder"
    step.parent.mkdir()
    assert run("merge", "--base", base, *adapters[:2], "-o", step) == 0
    last = [*adapters[2:], "--component", "text_encoder", "-o", tmp_path / "out"]
    assert run("merge", "--base", step, *last) == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for key, values in stored.items():
        right = merged.get(key, merged.get(f"text_model.{key}"))
        torch.testing.assert_close(values, right, rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize(
    ("base", "parts", "offered"),
    [
        ("CLIPTextModel", ("te1", "te2", "unet"), ["text_encoder", "text_encoder_2"]),
        ("T5EncoderModel", ("te2", "unet"), ["text_encoder_2"]),
        ("CLIPVisionModel", ("te1", "te2"), []),
    ],
)
def test_a_file_of_a_pipeline_and_a_lone_base(base, parts, offered, tmp_path, capsys):
    """Parts that the base's class can't be are not offered."""
    sizes = dict(IMAGES if "Vision" in base else TEXT)
    if base == "T5EncoderModel":
        sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 1, "vocab_size": 40}
    model_class = getattr(transformers, base)
    with tiny.quiet():
        model_class(model_class.config_class(**sizes)).save_pretrained(tmp_path / "mine")
    tensors = {}
    for part in parts:
        front = f"lora_{part}_text_model_encoder_layers_0_self_attn_q_proj"
        tensors |= {f"{front}.lora_down.weight": torch.ones(2, 16), f"{front}.alpha": torch.tensor(2.0)}
        tensors[f"{front}.lora_up.weight"] = torch.ones(16, 2)
    save_file(tensors, tmp_path / "a.safetensors")
    words = ["merge", "--base", tmp_path / "mine", "--adapter", tmp_path / "a.safetensors"]
    assert run(*words, "-o", tmp_path / "out") == 1
    assert re.findall(r"--component (\w+)", capsys.readouterr().err) == offered
