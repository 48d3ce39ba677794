"""A refusal that proposes ``--component``: each of them, given, places the adapter where it belongs."""

import re

import onnxruntime as ort
import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_graphs import adapter, graph, linear, random, save
from torch import nn

from lora_export import SiteError, merge_onnx
from lora_export.cli import _run
from lora_export.modes.merge_checkpoint import merge_checkpoint

TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = {"image_size": 8, "patch_size": 4, "num_channels": 3}
TEXT = {**TOWER, "num_key_value_heads": 2, "vocab_size": 32, "pad_token_id": 0}


def mllama():
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [0],
    }
    config = transformers.MllamaConfig(
        text_config={**TEXT, "cross_attention_layers": [1]}, vision_config=vision
    )
    return transformers.MllamaForConditionalGeneration(config)


def clipseg():
    config = transformers.CLIPSegConfig(
        text_config={**TOWER, "vocab_size": 32},
        vision_config={**TOWER, **IMAGES},
        projection_dim=8,
        reduce_dim=8,
        extract_layers=[0, 1],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=12,
    )
    return transformers.CLIPSegForImageSegmentation(config)


def vitmae():
    decoder = {f"decoder_{key}": 8 for key in ("hidden_size", "intermediate_size")}
    decoder |= {"decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    return transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**TOWER, **IMAGES, **decoder))


# (model, path of the part that the adapter was trained on alone).
PARTS = {
    "mllama": (mllama, "model.vision_model"),
    "clipseg's text": (clipseg, "clip.text_model"),
    "clipseg's decoder": (clipseg, "decoder"),
    "one of its layers": (clipseg, "decoder.layers.1"),
    "vitmae's decoder": (vitmae, "decoder"),
    "one of its layers, too": (vitmae, "decoder.decoder_layers.0"),
}


def linears(model):
    return [path for path, module in model.named_modules() if type(module) is nn.Linear]


@pytest.fixture(params=PARTS)
def case(request, tmp_path):
    """Save a base, return the part's path, its adapter in two formats, and the changes that it makes."""
    make, part = PARTS[request.param]
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "base")
    tower = model.get_submodule(part)
    paths = linears(tower)
    changes, kohya = {}, {}
    with torch.no_grad():
        peft = get_peft_model(
            tower, LoraConfig(r=2, lora_alpha=6, target_modules=paths, init_lora_weights=False)
        )
        peft.save_pretrained(tmp_path / "peft")
        for path in paths:
            layer = peft.base_model.model.get_submodule(path)
            changes[f"{part}.{path}.weight"] = layer.get_delta_weight("default").clone()
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            flat = f"lora_{path.replace('.', '_')}"
            kohya |= {f"{flat}.lora_down.weight": a.clone(), f"{flat}.lora_up.weight": b.clone()}
            kohya[f"{flat}.alpha"] = torch.tensor(6.0)
    save_file(kohya, tmp_path / "kohya.safetensors")
    return make, part, changes


@pytest.mark.parametrize("adapter", ["peft", "kohya.safetensors"])
def test_each_that_is_offered_is_followed(case, adapter, tmp_path, capsys):
    make, part, changes = case
    command = ["merge", "--base", "base", "--adapter", adapter, "--force", "-o", "out"]
    command = [str(tmp_path / word) if word in ("base", adapter, "out") else word for word in command]
    assert _run(command, False) == 1
    offered = re.findall(r"--component ([\w.:]+)", capsys.readouterr().err)
    assert any(part.endswith(one) for one in offered)
    for one in offered:
        assert _run([*command, "--component", one], False) == 0, (one, capsys.readouterr().err)
        if part.endswith(one):
            before, after = (loaded(make, tmp_path / folder) for folder in ("base", "out"))
            for name, values in before.items():
                expected = values + changes.get(name, 0)
                assert torch.allclose(after[name], expected, atol=1e-5), name


def loaded(make, folder):
    return type(make()).from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.mark.parametrize("in_front", ["lora_", "lora_unet_"])
@pytest.mark.parametrize("make", [mllama, clipseg], ids=["mllama", "clipseg"])
def test_kohya_files_of_a_whole_model(make, in_front, tmp_path):
    torch.manual_seed(0)
    model, tensors, changes = make().eval(), {}, {}
    model.save_pretrained(tmp_path / "base")
    for path in linears(model):
        a, b = torch.randn(2, model.get_submodule(path).in_features), None
        b = torch.randn(model.get_submodule(path).out_features, 2)
        flat = in_front + path.replace(".", "_")
        tensors |= {
            f"{flat}.lora_down.weight": a,
            f"{flat}.lora_up.weight": b,
            f"{flat}.alpha": torch.tensor(2.0),
        }
        changes[f"{path}.weight"] = b @ a
    save_file(tensors, tmp_path / "a.safetensors")
    command = [
        "merge",
        "--base",
        tmp_path / "base",
        "--adapter",
        tmp_path / "a.safetensors",
        "-o",
        tmp_path / "out",
    ]
    assert _run([str(word) for word in command], False) == 0
    before, after = (loaded(make, tmp_path / folder) for folder in ("base", "out"))
    assert all(
        torch.allclose(after[name], values + changes.get(name, 0), atol=1e-4)
        for name, values in before.items()
    )


def siglip():
    text = {**TOWER, "vocab_size": 32, "max_position_embeddings": 16, "projection_size": 16}
    vision = {**TOWER, "image_size": 8, "patch_size": 4}
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))


class Hidden(nn.Module):
    """A tower's last hidden state, under the tower's own paths."""

    def __init__(self, tower):
        super().__init__()
        self.tower = tower

    def forward(self, x):
        """Return it."""
        return self.tower(x)[0]


@pytest.mark.parametrize(
    ("make", "part", "other"),
    [(clipseg, "clip.text_model", "clip.vision_model"), (siglip, "text_model", "vision_model")],
    ids=["clipseg", "siglip"],
)
def test_a_graph_of_a_part_that_the_checkpoint_has_below_a_path(make, part, other, tmp_path):
    torch.manual_seed(0)
    model, x = make().eval(), torch.arange(1, 9).view(2, 4)
    model.save_pretrained(tmp_path / "base")
    tower = model.get_submodule(part).eval()
    with torch.no_grad(), tiny.quiet():
        torch.onnx.export(Hidden(tower).eval(), (x,), tmp_path / "part.onnx", input_names=["x"], dynamo=False)
        targets = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
        peft = get_peft_model(tower, LoraConfig(**targets)).eval()
        peft.save_pretrained(tmp_path / "peft")
        expected = peft(x)[0].numpy()
    given = {"adapters": tmp_path / "peft", "checkpoint": tmp_path / "base", "output": tmp_path / "m.onnx"}
    with pytest.raises(SiteError) as caught:
        merge_onnx(tmp_path / "part.onnx", **given)
    assert set(re.findall(r"--component ([\w.:]+)", caught.value.hint)) == {part, other}
    with pytest.raises(SiteError, match="not exported from this checkpoint") as caught:
        merge_onnx(tmp_path / "part.onnx", component=other, **given)
    assert "--component" in caught.value.hint
    report = merge_onnx(tmp_path / "part.onnx", component=part, **given)
    assert {row.proof for row in report.plan.rows} == {"values"}
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    torch.testing.assert_close(torch.tensor(session.run(None, {"x": x.numpy()})[0]), torch.tensor(expected))


def seq2seq(kind, **more):
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return getattr(transformers, f"{kind}ForConditionalGeneration")(
        getattr(transformers, f"{kind}Config")(**sizes, **more, tie_word_embeddings=True)
    )


@pytest.mark.parametrize("kind", ["T5", "SwitchTransformers"])
def test_a_head_that_can_only_be_the_embedding(kind, tmp_path, capsys):
    """Neither the base that was given, nor leaving out all that the adapter changes, is proposed."""
    more = {"num_experts": 2, "num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 0}
    model = seq2seq(kind, **(more if kind == "SwitchTransformers" else {}))
    model.save_pretrained(tmp_path / "base")
    again = type(model).from_pretrained(tmp_path / "base")
    get_peft_model(
        again, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    ).save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    assert load_file(tmp_path / "peft" / "adapter_model.safetensors")
    command = ["merge", "--base", tmp_path / "base", "--adapter", tmp_path / "peft", "-o", tmp_path / "out"]
    assert _run([str(word) for word in command], False) == 1
    hint = capsys.readouterr().err.partition("hint: ")[2]
    assert "ensure_weight_tying" in hint
    assert str(tmp_path / "base") not in hint
    assert "trained on" not in hint
    assert "--allow-unmatched" not in hint


# --- single rows of an embedding ---------------------------------------------------------------------


def llava():
    config = transformers.LlavaConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**TOWER, **IMAGES, "model_type": "clip_vision_model", "projection_dim": 16},
        image_token_index=31,
    )
    return transformers.LlavaForConditionalGeneration(config)


def idefics3():
    config = transformers.Idefics3Config(
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**TOWER, **IMAGES},
        scale_factor=1,
        image_token_id=31,
    )
    return transformers.Idefics3ForConditionalGeneration(config)


# (model, its vision tower, its language model).
TOWERS = {
    "llava": (llava, "model.vision_tower", "model.language_model"),
    "idefics3": (idefics3, "model.vision_model", "model.text_model"),
}


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("part", [1, 2], ids=["vision", "language"])
def test_rows_of_an_embedding_belong_to_a_part_as_modules_do(tmp_path, name, part):
    """Below the path: as PEFT merges it; elsewhere: the base, with the rows left aside by name."""
    make, *parts = TOWERS[name]
    torch.manual_seed(0)
    model = make().eval()
    before = {key: values.clone() for key, values in model.state_dict().items()}
    with tiny.quiet():
        model.save_pretrained(tmp_path / "base")
        given = {"trainable_token_indices": [5, 9], "init_lora_weights": False}
        config = LoraConfig(r=2, target_modules=["q_proj"], **given)
        adapted = get_peft_model(model, config)
        for key, values in adapted.named_parameters():
            if "trainable_tokens_delta" in key:
                values.data += 1
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        merged = adapted.merge_and_unload().state_dict()
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", component=parts[part - 1])
        result = type(model).from_pretrained(tmp_path / "out").state_dict()
    changed = {key for key in before if not torch.equal(before[key], merged[key])}
    assert any("embed" in key for key in changed)
    for key, values in result.items():
        below = key.startswith(f"{parts[part - 1]}.")
        assert torch.allclose(values, merged[key] if below else before[key], atol=1e-6), key
    assert changed == {key for key in changed if key.startswith((f"{parts[0]}.", f"{parts[1]}."))}


LAYER = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.out_proj", "fc1"]


@pytest.mark.parametrize("known", [LAYER[:2], LAYER])
def test_half_of_each_layer_is_no_part_of_a_model(known, tmp_path):
    """Where the graph has other names for the rest of a layer, a part of it would be left out."""
    keys = [f"model.decoder.layers.{n}.{name}" for n in range(2) for name in LAYER]
    found = [f"model.h.{n}.{name}" for n in range(2) for name in known]
    lines = [f"y{n} = MatMul (x, {name.replace('.', '_')}_weight)" for n, name in enumerate(found)]
    text = f"g (float[b,4] x) => (float[b,4] y{len(found) - 1}) {{ {' '.join(lines)} }}"
    model = graph(text, {f"{name}.weight": random(4, 4, seed=n) for n, name in enumerate(found)})
    base = save(model, tmp_path)
    with pytest.raises(SiteError) as caught:
        merge_onnx(base, adapter(*(linear(key, 4, 4) for key in keys)), tmp_path / "m.onnx")
    offered = "--component" in caught.value.hint
    assert offered == (known == LAYER)
    if not offered:
        assert caught.value.hint.startswith("give --checkpoint BASE_DIR")


# --- several parts, each with a prefix of its own ----------------------------------------------------

# (model, the adapter's paths of a part → the base's, for each part that was renamed).
RENAMED = {
    "one part, the smaller": (mllama, {"model.vision_model.inner.": "model.vision_model."}),
    "one part, the larger": (clipseg, {"clip.vision_model.inner.": "clip.vision_model."}),
    "two parts": (
        clipseg,
        {"clip.text_model.inner.": "clip.text_model.", "clip.vision_model.inner.": "clip.vision_model."},
    ),
}


@pytest.mark.parametrize("name", RENAMED)
def test_parts_that_have_sites_only_one_by_one_are_offered_in_turn(name, tmp_path, capsys):
    torch.manual_seed(0)
    make, renamed = RENAMED[name]
    model = make().eval()
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, lora_alpha=6, target_modules=linears(model), init_lora_weights=False)
    peft = get_peft_model(model, config)
    peft.save_pretrained(tmp_path / "adapter")
    expected = peft.merge_and_unload().state_dict()
    file, front = tmp_path / "adapter" / "adapter_model.safetensors", "base_model.model."
    tensors = load_file(file)
    for new, old in renamed.items():
        tensors = {key.replace(front + old, front + new): value for key, value in tensors.items()}
    save_file(tensors, file)

    def merge(base, out, *more):
        command = ["merge", "--base", str(base), "--adapter", str(tmp_path / "adapter"), "-o", str(out)]
        return _run([*command, *more], False)

    base = tmp_path / "base"
    assert merge(base, tmp_path / "none") == 1
    parts = re.findall(r"--component ([\w.]+)", capsys.readouterr().err.partition("to merge all of it")[2])
    assert len(parts) > 1
    for number, part in enumerate(parts):
        assert merge(base, tmp_path / f"out{number}", "--component", part) == 0, capsys.readouterr().err
        base = tmp_path / f"out{number}"
    found = loaded(make, base)
    for path, values in expected.items():
        assert torch.allclose(found[path], values, atol=1e-5), path


def test_parts_with_one_site_are_not_offered_in_turn(tmp_path):
    """Two towers of the same names for one of them."""
    weights = {f"tower.layers.{n}.fc.weight": random(4, 4, seed=n) for n in range(2)}
    text = "g (float[n, 4] x) => (float[n, 4] y) { h = Gemm <transB = 1> (x, tower_layers_0_fc_weight) "
    base = save(graph(f"{text} y = Gemm <transB = 1> (h, tower_layers_1_fc_weight) }}", weights), tmp_path)
    paths = [f"{tower}.layers.{n}.fc" for tower in ("a_tower", "b_tower") for n in range(2)]
    with pytest.raises(SiteError) as refused:
        merge_onnx(base, adapter(*(linear(path, 4, 4) for path in paths)), tmp_path / "out.onnx")
    assert "one part after the other" not in str(refused.value)


def encoder_decoder(family):
    sizes = {**TOWER, "vocab_size": 32, "max_position_embeddings": 16, "pad_token_id": 0}
    config_class = getattr(transformers, f"{family}Config")
    configs = config_class(**sizes), config_class(**sizes, is_decoder=True, add_cross_attention=True)
    join = transformers.EncoderDecoderConfig.from_encoder_decoder_configs
    return transformers.EncoderDecoderModel(join(*configs)), configs[0]


@pytest.mark.parametrize("kind", ["Model", "ForMaskedLM"])
@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_an_encoder_whose_paths_begin_like_the_part_of_the_base(family, kind, tmp_path, capsys):
    """Of an encoder and a decoder of the same class either is meant: both are offered, and taken."""
    torch.manual_seed(0)
    whole, config = encoder_decoder(family)
    single = getattr(transformers, f"{family}{kind}")(config)
    whole.save_pretrained(tmp_path / "base")
    peft = get_peft_model(single, LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    peft.save_pretrained(tmp_path / "adapter")
    command = ["merge", "--base", "base", "--adapter", "adapter", "--force", "-o", "out"]
    command = [str(tmp_path / word) if word in ("base", "adapter", "out") else word for word in command]
    assert _run(command, False) == 1
    offered = re.findall(r"--component ([\w.]+)", capsys.readouterr().err)
    assert {one.partition(".")[0] for one in offered} == {"encoder", "decoder"}
    front = f"{family.lower()}."
    changes = {}
    for path, layer in peft.base_model.model.named_modules():
        if path.endswith("query"):
            changes[path.removeprefix(front)] = layer.get_delta_weight("default").detach()
    for one in offered:
        assert _run([*command, "--component", one], False) == 0
        inner = "encoder." if one == "encoder" else f"decoder.{front}"
        before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("base", "out"))
        for name, values in before.items():
            change = changes.get(name.removeprefix(inner).removesuffix(".weight"), 0)
            assert torch.allclose(after[name], values + change, atol=1e-6), name
