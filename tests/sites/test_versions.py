"""Adapters of one version of transformers for bases of another, whose parts were renamed one by one."""

import copy
import functools
import itertools
import re
import shutil
import tempfile
from pathlib import Path

import onnxruntime as ort
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_graphs import adapter, delta, error, graph, linear, random, run, save

from lora_export import convert_adapter, merge_onnx, swap_onnx
from lora_export.cli import _run
from lora_export.sites.naming.known_names import KnownNames
from lora_export.sites.naming.names import Named
from lora_export.sites.naming.renaming import rename

TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = {"image_size": 8, "patch_size": 4, "num_channels": 3}
# Both towers are of the same size, so that no shape tells them apart.
TEXT = {**TOWER, "num_key_value_heads": 2, "vocab_size": 40, "pad_token_id": 0}
CLIP = {**TOWER, **IMAGES, "model_type": "clip_vision_model", "projection_dim": 16}
SIGLIP = {**TOWER, **IMAGES, "model_type": "siglip_vision_model", "vision_use_head": False}


def llava():
    config = transformers.LlavaConfig(
        vision_config=CLIP, text_config={**TEXT, "model_type": "llama"}, image_token_index=31
    )
    return transformers.LlavaForConditionalGeneration(config)


def gemma3():
    text = {**TEXT, "head_dim": 8, "tie_word_embeddings": True}
    config = transformers.Gemma3Config(
        vision_config=SIGLIP, text_config=text, mm_tokens_per_image=4, image_token_index=31
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def video_llava():
    config = transformers.VideoLlavaConfig(
        vision_config=CLIP, text_config={**TEXT, "model_type": "llama"}, image_token_index=31
    )
    return transformers.VideoLlavaForConditionalGeneration(config)


def deepseek_vl():
    config = transformers.DeepseekVLConfig(
        vision_config=SIGLIP, text_config={**TEXT, "model_type": "llama"}, image_token_id=31
    )
    return transformers.DeepseekVLForConditionalGeneration(config)


def dual_encoder():
    vision, text = transformers.CLIPVisionConfig(**CLIP), transformers.BertConfig(**TEXT)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        vision, text, projection_dim=16
    )
    return transformers.VisionTextDualEncoderModel(config)


def qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision)
    return transformers.Qwen2VLForConditionalGeneration(config)


# Changes of names from those in memory of transformers 5 to those of each version.
_LANGUAGE = {r"^model\.language_model\.": "language_model.model.", r"^lm_head\.": "language_model.lm_head."}
_OUTER = {**_LANGUAGE, r"^model\.(?=\w+_tower|multi_modal)": ""}
_INNER = {r"(\w+_tower\.)": r"\1vision_model."}
MODELS = {
    "llava": (llava, {"5": {}, "4.57": _INNER, "4.51": {**_OUTER, **_INNER}, "a file of 5": _OUTER}),
    "gemma3": (gemma3, {"5": {}, "4.57": _INNER, "4.51": {**_OUTER, **_INNER}, "a file of 5": _OUTER}),
    "video_llava": (video_llava, {"5": {}, "4.57": _INNER, "4.51": {**_OUTER, **_INNER}}),
    "deepseek_vl": (deepseek_vl, {"5": {}, "4.57": {r"(vision_model\.)": r"\1vision_model."}}),
    "dual encoder": (dual_encoder, {"5": {}, "4.57": {r"^(vision_model\.)": r"\1vision_model."}}),
    "qwen2_vl": (
        qwen2_vl,
        {"5": {}, "4.51": {r"^model\.visual": "visual", r"^model\.language_model": "model"}},
    ),
}
CASES = [(name, *pair) for name, (_, all_) in MODELS.items() for pair in itertools.product(all_, repeat=2)]


def named(name, changes):
    for pattern, new in changes.items():
        name = re.sub(pattern, new, name)
    return name


def linears(model):
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
    paths = [path for path, module in model.named_modules() if isinstance(module, kinds)]
    return [path for path in paths if "lm_head" not in path]


def trained(model, targets, folder, changes, **options):
    """Save an adapter under the names of a version; return the model's values with it."""
    config = LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False, **options)
    peft = get_peft_model(copy.deepcopy(model), config)
    peft.save_pretrained(folder)
    rename_adapter(folder, changes)
    return peft.merge_and_unload().state_dict()


def rename_adapter(folder, changes):
    file, front = folder / "adapter_model.safetensors", "base_model.model."
    save_file({front + named(k[len(front) :], changes): v for k, v in load_file(file).items()}, file)


@functools.cache
def whole(name):
    """Return a model, the folder of an adapter of all its layers, and its values with it.

    The names are those of transformers 5. Tests share all three: do not change them.
    """
    torch.manual_seed(0)
    model, folder = MODELS[name][0]().eval(), Path(tempfile.mkdtemp()) / "adapter"
    return model, folder, trained(model, linears(model), folder, {})


def stored(model, folder, changes):
    """Save a base under the names of a version."""
    model.save_pretrained(folder)
    state = {named(name, changes): v.clone() for name, v in model.state_dict().items()}
    tied = getattr(model.config, "tie_word_embeddings", False)
    state = {name: v for name, v in state.items() if not (tied and "lm_head" in name)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def merge(folder, *more):
    command = ["merge", "--base", str(folder / "base"), "--adapter", str(folder / "adapter")]
    return _run([*command, "-o", str(folder / "out"), *more], False)


def is_equal(folder, expected, changes):
    found = load_file(folder / "out" / "model.safetensors")
    for name, values in expected.items():
        if named(name, changes) in found:
            torch.testing.assert_close(found.pop(named(name, changes)), values, rtol=1e-5, atol=1e-5)
    assert not found


@pytest.mark.parametrize(("name", "of_adapter", "of_base"), CASES)
def test_every_layer_of_a_whole_model(name, of_adapter, of_base, tmp_path, capsys):
    (model, saved, expected), versions = whole(name), MODELS[name][1]
    stored(model, tmp_path / "base", versions[of_base])
    shutil.copytree(saved, tmp_path / "adapter")
    rename_adapter(tmp_path / "adapter", versions[of_adapter])
    before = model.state_dict()
    assert any((v - before[n]).norm() > 0.01 * before[n].norm() for n, v in expected.items())
    assert merge(tmp_path) == 0, capsys.readouterr().err
    is_equal(tmp_path, expected, versions[of_base])


@pytest.mark.parametrize("name", ["llava", "gemma3"])
@pytest.mark.parametrize(("of_adapter", "of_base"), [("4.57", "4.51"), ("4.51", "a file of 5")])
def test_a_head_and_whole_layers_beside_them(name, of_adapter, of_base, tmp_path, capsys):
    torch.manual_seed(0)
    make, versions = MODELS[name]
    model = make().eval()
    stored(model, tmp_path / "base", versions[of_base])
    expected = trained(
        model,
        [*linears(model), "lm_head"],
        tmp_path / "adapter",
        versions[of_adapter],
        modules_to_save=["layer_norm1", "input_layernorm"],
    )
    assert merge(tmp_path) == 0, capsys.readouterr().err
    if model.config.tie_word_embeddings:
        # PEFT's merge changes the embedding, too, which its adapter does not: the weights are parted.
        saved = type(model).from_pretrained(tmp_path / "out").state_dict()
        expected["model.language_model.embed_tokens.weight"] = model.get_input_embeddings().weight
        torch.testing.assert_close(saved["lm_head.weight"], expected["lm_head.weight"], rtol=1e-5, atol=1e-5)
    is_equal(tmp_path, expected, versions[of_base])


# --- the same in a graph ----------------------------------------------------------------------------

PATHS = {
    "4.57": ("model.vision_tower.vision_model.encoder.layers.0.mlp.fc1", "model.language_model.layers.0.up"),
    "4.51": ("vision_tower.vision_model.encoder.layers.0.mlp.fc1", "language_model.model.layers.0.up"),
    "5": ("model.vision_tower.encoder.layers.0.mlp.fc1", "model.language_model.layers.0.up"),
}


def modules(version):
    return [linear(path, 4, 4, seed=seed) for seed, path in enumerate(PATHS[version], start=1)]


@pytest.fixture(params=[pair for pair in itertools.product(PATHS, repeat=2) if len(set(pair)) == 2])
def case(request, tmp_path):
    """Two layers of equal sizes, of the tower and of the language model, one behind the other."""
    of_adapter, of_base = request.param
    weights = {f"{path}.weight": random(4, 4, seed=seed) for seed, path in enumerate(PATHS[of_base])}
    first, second = (name.replace(".", "_") for name in weights)
    text = f"g (float[n, 4] x) => (float[n, 4] y) {{ h = Gemm <transB = 1> (x, {first}) "
    base = save(graph(f"{text} y = Gemm <transB = 1> (h, {second}) }}", weights), tmp_path)
    given, x = modules(of_adapter), random(3, 4, seed=9)
    expected = x.astype("float64")
    for module, weight in zip(given, weights.values(), strict=True):
        expected = expected @ (weight + delta(module)).T
    return base, adapter(*given), x, expected


def test_a_graph_of_another_version(case, tmp_path):
    base, given, x, expected = case
    merge_onnx(base, given, tmp_path / "merged.onnx")
    assert error(run(tmp_path / "merged.onnx", x=x)[0], expected) < 1e-5


def test_a_swap_graph_of_another_version(case, tmp_path):
    base, given, x, expected = case
    swap_onnx(base, tmp_path / "swap.onnx", adapter=given)
    convert_adapter(given, tmp_path / "swap.onnx", tmp_path / "a.onnx_adapter")
    options = ort.RunOptions()
    loaded = ort.LoraAdapter()
    loaded.Load(str(tmp_path / "a.onnx_adapter"))
    options.add_active_adapter(loaded)
    session = ort.InferenceSession(tmp_path / "swap.onnx", providers=["CPUExecutionProvider"])
    assert error(session.run(None, {"x": x}, options)[0], expected) < 1e-5


# --- what stays as it is ----------------------------------------------------------------------------

TOWER_LAYER, TEXT_LAYER = "encoder.layers.0.fc1.weight", "layers.0.fc1.weight"


def names_of(wanted, known):
    found = rename([Named(name) for name in wanted], KnownNames(known))
    return [name if n not in found.problems else None for n, name in enumerate(found.names)]


def test_two_parts_that_would_get_one_name_are_not_converted():
    known = [f"vision_tower.{TOWER_LAYER}", f"vision_tower.vision_model.{TOWER_LAYER}"]
    known.append(f"model.language_model.{TEXT_LAYER}")
    wanted = [f"model.vision_tower.{TOWER_LAYER}", f"model.language_model.{TEXT_LAYER}"]
    assert not {*known[:2]} & {*names_of(wanted, known)}


def test_a_tower_of_clip_itself_keeps_its_name():
    """``vision_model`` right below the model is the tower; the text model has layers of the same names."""
    known = [f"clip.vision_model.{TOWER_LAYER}", f"clip.text_model.{TOWER_LAYER}"]
    assert names_of([f"vision_tower.vision_model.{TOWER_LAYER}"], known) == [None]
    assert names_of([f"clip.{TOWER_LAYER}"], known) == [None]


def test_a_part_that_the_base_lacks_is_not_found():
    known = [f"vision_tower.{TOWER_LAYER}", "language_model.model.layers.1.fc1.weight"]
    wanted = [f"model.vision_tower.vision_model.{TOWER_LAYER}", f"model.language_model.{TEXT_LAYER}"]
    base = [known[0], f"language_model.model.{TEXT_LAYER}"]
    assert names_of(wanted, base) == base
    assert names_of(wanted, known)[1] not in known
