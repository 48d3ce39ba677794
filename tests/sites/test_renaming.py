"""One change of names for a whole adapter, the same in checkpoints, graphs and exposed graphs."""

import copy
import sys
import time
import tracemalloc

import numpy as np
import onnxruntime as ort
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lora_export import SiteError, export_onnx, load_adapter
from lora_export.cli import _run
from lora_export.formats.reading.wrappers import MOST_WORDS
from lora_export.sites.naming.known_names import KnownNames
from lora_export.sites.naming.names import Named, Prefix
from lora_export.sites.naming.renaming import rename


def layers(*prefixes, leaf="q.weight", count=2):
    return [f"{prefix}layers.{n}.{leaf}" for prefix in prefixes for n in range(count)]


def renamed(keys, known, **options):
    return rename([Named(key) for key in keys], KnownNames(known), **options)


# What fits, under which change: (adapter's paths, base's paths, strip, add).
FITS = {
    "as it is": (layers("model."), layers("model."), "", ""),
    "wrapper around the base": (layers("model."), layers("wrapper.net.model."), "", "wrapper.net"),
    "index in the wrapper": (layers("encoder."), layers("0.auto_model.encoder."), "", "0.auto_model"),
    "the base's inner model": (layers("bert."), layers(""), "bert", ""),
    "a head beside it": (
        [*layers("model."), "lm_head.weight"],
        [*layers("model.language_model."), "lm_head.weight"],
        "model",
        "model.language_model",
    ),
    "language model in a newer VLM": (
        layers("model."),
        layers("model.language_model.", "model.visual."),
        "model",
        "model.language_model",
    ),
    "language model in an older VLM": (
        [*layers("model."), "lm_head.weight"],
        [*layers("language_model.model.", "vision_tower.encoder."), "language_model.lm_head.weight"],
        "",
        "language_model",
    ),
    "language model called text_model": (
        layers("model."),
        layers("model.text_model.", "model.vision_model.encoder."),
        "model",
        "model.text_model",
    ),
    "back out of the VLM": (
        layers("model.language_model."),
        layers("model."),
        "model.language_model",
        "model",
    ),
    "a decoder without an encoder": (layers(""), layers("model.decoder."), "", "model.decoder"),
    "a pipeline's unet": (
        layers("down_blocks."),
        [*layers("unet.down_blocks."), "val_12", "a_1"],
        "",
        "unet",
    ),
    "a wrapper that lacks a module": ([*layers(""), "pooler.weight"], layers("net."), "", "net"),
}


def test_out_of_a_sequential():
    found = renamed(layers("0.auto_model.encoder."), layers("encoder."))
    assert list(found.names) == layers("encoder.")


@pytest.mark.parametrize(("keys", "known", "strip", "add"), FITS.values(), ids=FITS)
@pytest.mark.parametrize("flattened", [False, True], ids=["dotted", "flattened"])
def test_what_fits(keys, known, strip, add, flattened):
    change = Prefix(strip, add)
    wanted = [name if (name := change.apply(key) or key) in known else None for key in keys]
    if flattened:
        ends = [key.rpartition(".") for key in keys]
        keys = [f"{path.replace('.', '_')}.{leaf}" for path, _, leaf in ends]
    found = renamed(keys, known, flattened=flattened)
    names = [name if name in known else None for name in found.names]
    assert names == wanted
    assert {number for number, name in enumerate(names) if name} & set(found.problems) == set()


# What must not be taken for what the adapter means: (its paths, the base's, what --component could say).
REFUSED = {
    "decoder into an encoder": (layers("model.decoder."), layers(""), ["model.decoder"]),
    "decoder of another wrapper": (layers("model.decoder."), layers("net.encoder."), []),
    "both into one": (
        layers("model.encoder.", "model.decoder."),
        layers(""),
        ["model.encoder", "model.decoder"],
    ),
    "text tower into a vision tower": (layers("text_model.encoder."), layers("encoder."), ["text_model"]),
    "a tower into two": (
        layers("encoder."),
        layers("text_model.encoder.", "vision_model.encoder."),
        ["text_model", "vision_model"],
    ),
    "encoder or decoder": (layers(""), layers("encoder.", "decoder."), ["encoder", "decoder"]),
    "second transformer": (layers("transformer_2."), layers(""), ["transformer_2"]),
    "critic into an actor": (layers("actor.", "critic."), layers(""), ["actor", "critic"]),
    "names of the user's own": (layers("left.", "right."), layers(""), ["left", "right"]),
    "more layers than the base": (layers("bert.", count=4), layers("", count=2), ["bert"]),
    "another layer": (["layers.1.q.weight"], ["layers.0.q.weight"], []),
    "a name that is not known": (layers("left."), layers(""), ["left"]),
    "left into right": (layers("left."), layers("right."), []),
    "another embedder alone": (["embed.guidance.lin.weight"], ["embed.time.lin.weight"], []),
    "a module alone, somewhere": (["lin.weight"], ["embed.time.lin.weight", "blocks.0.x.weight"], []),
    "a vision tower's language model": (
        layers("model.language_model.", "model.vision_tower."),
        layers("model."),
        ["model.language_model"],
    ),
}


@pytest.mark.parametrize(("keys", "known", "scopes"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit(keys, known, scopes):
    found = renamed(keys, known)
    assert not any(name in known for name in found.names)
    if scopes:
        assert set(found.problems) == set(range(len(keys)))
    for scope in scopes:
        assert f"--component {scope}" in found.hint
        # What the hint says, done: the part below the scope is placed, each path in a place of its own.
        below = [key for key in keys if key.startswith(f"{scope}.")] or keys
        again = renamed(below, known, scope=scope)
        placed = [name for name in again.names if name in known]
        assert placed
        assert len(set(placed)) == len(placed)


def test_one_module_does_not_take_another_for_itself():
    """FLUX dev has an embedder of the guidance, schnell has none."""
    found = renamed(
        ["embed.guidance.lin.weight", "blocks.0.lin.weight"], ["embed.time.lin.weight", "blocks.0.lin.weight"]
    )
    assert found.names == ("embed.guidance.lin.weight", "blocks.0.lin.weight")


def test_two_of_one_adapter_never_become_one():
    for other in ("transformer_2", "text_encoder"):
        named = [Named("a.q.weight", component=part) for part in ("transformer", other)]
        found = rename(named, KnownNames(["a.q.weight"]))
        assert found.names == (None, None)
        assert {problem.kind for problem in found.problems.values()} == {"ambiguous"}
        assert f"--component {other}" in found.hint
    # First replaced, then changed: that is one parameter of one module.
    both = [Named("a.q.weight", "replace"), Named("a.q.weight")]
    assert rename(both, KnownNames(["a.q.weight"])).names == ("a.q.weight", "a.q.weight")


def test_flattened_paths_begin_at_components():
    known = ["unet.cross_attn.to_q.weight", "a.b_c.weight", "a_b.c.weight"]
    assert renamed(["attn_to_q.weight"], known, flattened=True).problems[0].kind == "not found"
    twice = renamed(["a_b_c.weight"], known, flattened=True)
    assert "a.b_c.weight, a_b.c.weight" in twice.problems[0].detail


def test_the_part_that_fits_under_its_own_path_is_named():
    found = renamed(layers("model.encoder.", "model.decoder."), layers("model.decoder."))
    assert found.names[2:] == tuple(layers("model.decoder."))
    assert "--component model.decoder takes the part that fits" in found.hint


def calls(function):
    """Return how many functions are called on the way, those of C included."""
    count = 0

    def counting(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counting)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("flattened", [False, True], ids=["dotted", "flattened"])
@pytest.mark.parametrize("front", ["", "q"], ids=["bare", "prefixed"])
def test_a_prefix_for_each_layer_costs_no_more_than_its_names(front, flattened):
    """As many changes fit as there are layers, none of them more than one; more than the parts tried."""

    def work(count):
        prefixes = [f"{front}{n}." if front else "" for n in range(count)]
        keys = [f"{prefix}layers.{n}.q.weight" for n, prefix in enumerate(prefixes)]
        if flattened:
            keys = [key.removesuffix(".weight").replace(".", "_") + ".weight" for key in keys]
        return calls(
            lambda: renamed(keys, [f"p{n}.layers.{n}.q.weight" for n in range(count)], flattened=flattened)
        )

    few, many = work(300), work(600)
    assert many < 2.5 * few


def test_names_alike_in_too_many_places_are_refused():
    count = 400
    found = renamed([f"a{n}.proj.weight" for n in range(count)], [f"b{n}.proj.weight" for n in range(count)])
    assert set(found.names) == {None}
    assert "too many" in found.problems[0].detail
    assert found.hint
    # Under their own paths they are no question.
    same = [f"a{n}.proj.weight" for n in range(count)]
    assert calls(lambda: renamed(same, same)) < 200 * count
    assert renamed(same, same).names == tuple(same)


def test_an_unknown_scope_is_refused():
    found = renamed(layers("model."), layers("model."), scope="model.encoder")
    assert found.names == (None, None)
    assert "neither the adapter nor the base" in found.problems[0].detail


# --- whole models, by the command line -----------------------------------------------------------------

SEQ2SEQ = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "attn_implementation": "eager",
}


def marian():
    from transformers import MarianConfig, MarianMTModel

    return MarianMTModel(MarianConfig(**SEQ2SEQ))


def blenderbot():
    from transformers import BlenderbotSmallConfig, BlenderbotSmallForConditionalGeneration

    return BlenderbotSmallForConditionalGeneration(BlenderbotSmallConfig(**SEQ2SEQ))


TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = {"image_size": 8, "patch_size": 4}


def clip():
    from transformers import CLIPConfig, CLIPModel

    text = {**TOWER, "vocab_size": 40, "max_position_embeddings": 16, "projection_dim": 8}
    vision = {**TOWER, **IMAGES, "projection_dim": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def siglip():
    from transformers import SiglipConfig, SiglipModel

    text = {**TOWER, "vocab_size": 40, "max_position_embeddings": 16, "projection_size": 16}
    return SiglipModel(SiglipConfig(text_config=text, vision_config={**TOWER, **IMAGES}))


# (whole model, its part, the part's path in it).
PARTS = {
    "marian": (marian, lambda model: model.get_encoder(), "model.encoder", r".*self_attn\.(q|v)_proj"),
    "blenderbot": (
        blenderbot,
        lambda model: model.get_decoder(),
        "model.decoder",
        r".*(fc1|self_attn\.q_proj)",
    ),
    "clip": (clip, lambda model: model.vision_model, "vision_model", r".*self_attn\.(q|k)_proj"),
    "siglip": (siglip, lambda model: model.text_model, "text_model", r".*mlp\.fc[12]"),
}


def trained(model, targets, folder, **options):
    """Save an adapter with random values, and return PEFT's model."""
    torch.manual_seed(1)
    peft = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=2, lora_alpha=6, target_modules=targets, **options)
    )
    for name, values in peft.named_parameters():
        if "lora_" in name:
            nn.init.normal_(values, std=0.3)
    peft.save_pretrained(folder, save_embedding_layers=False)
    return peft.eval()


def deltas(folder, below=""):
    """Return the change of each weight below a path, from the adapter's file alone."""
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, a in tensors.items():
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if name.endswith(".lora_A.weight") and path.startswith(below):
            found[path.removeprefix(below)] = 3 * tensors[name.replace("lora_A", "lora_B")] @ a
    return found


def lora_export(*arguments):
    return _run([str(argument) for argument in arguments], False)


def stored(folder):
    return {name: values for file in folder.glob("*.safetensors") for name, values in load_file(file).items()}


@pytest.mark.parametrize("name", PARTS)
def test_the_part_of_an_adapter_that_belongs_to_a_folder(name, tmp_path, capsys):
    make, part_of, scope, targets = PARTS[name]
    torch.manual_seed(0)
    model = make().eval()
    part_of(model).save_pretrained(tmp_path / "part")
    trained(model, targets, tmp_path / "adapter")
    command = [
        "merge",
        "--base",
        tmp_path / "part",
        "--adapter",
        tmp_path / "adapter",
        "-o",
        tmp_path / "out",
    ]
    for more in ([], ["--allow-unmatched"]):
        capsys.readouterr()
        assert lora_export(*command, *more) == 1
        assert f"--component {scope}" in capsys.readouterr().err
    assert lora_export(*command, "--component", scope) == 0
    before, after = stored(tmp_path / "part"), stored(tmp_path / "out")
    wanted = deltas(tmp_path / "adapter", f"{scope}.")
    assert wanted
    for key, values in before.items():
        change = wanted.pop(key.removeprefix(f"{scope}.").removesuffix(".weight"), torch.zeros_like(values))
        assert (after[key] - values - change).abs().max() < 1e-5, key
    assert not wanted


class Encoder(nn.Module):
    """An encoder alone, as a graph of its own: its paths don't say what it is."""

    def __init__(self, model):
        super().__init__()
        self.layers = model.layers
        self.embed = model.embed_tokens

    def forward(self, ids):
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden, None)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return hidden


def run(path, **feeds):
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("name", ["marian", "blenderbot"])
def test_the_part_of_an_adapter_that_belongs_to_a_graph(name, exporter, tmp_path, capsys):
    torch.manual_seed(0)
    model = PARTS[name][0]().eval()
    peft = trained(model, r".*self_attn\.(q|v)_proj", tmp_path / "adapter")
    ids = torch.randint(3, 40, (1, 6))
    encoder, adapted = (Encoder(whole.get_encoder()).eval() for whole in (model, peft.base_model.model))
    with torch.no_grad(), tiny.quiet():
        wanted = adapted(ids).numpy()
        options = {"dynamo": exporter == "dynamo", "input_names": ["ids"]}
        torch.onnx.export(encoder, (ids,), str(tmp_path / "base.onnx"), **options)
    for verb in ("merge-onnx", "swap-onnx", "bank-onnx"):
        out = tmp_path / verb / "m.onnx"
        name = "a=" if verb == "bank-onnx" else ""
        command = [
            verb,
            "--base",
            tmp_path / "base.onnx",
            "--adapter",
            f"{name}{tmp_path / 'adapter'}",
            "-o",
            out,
        ]
        for more in ([], ["--allow-unmatched"]):
            capsys.readouterr()
            assert lora_export(*command, *more) == 1
            assert "--component model.encoder" in capsys.readouterr().err
        assert lora_export(*command, "--component", "model.encoder") == 0
        feeds = {"ids": ids.numpy()}
        if verb == "swap-onnx":
            file = tmp_path / "a.safetensors"
            convert = ["convert-adapter", tmp_path / "adapter", "--for", out, "-o", file]
            assert lora_export(*convert, "--scope", "model.encoder") == 0
            feeds |= {name: values.numpy() for name, values in load_file(file).items()}
        if verb == "bank-onnx":
            feeds["lora.adapter_weights"] = np.ones((1, 1), np.float32)
        assert tiny.relative_error(run(out, **feeds), wanted) < 2e-6, verb


# (language model, vision–language model, its own path for the language model).
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(**TOWER, num_key_value_heads=2, vocab_size=40, tie_word_embeddings=False)
    )


def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(**TOWER, num_key_value_heads=2, vocab_size=40)
    vision = CLIPVisionConfig(**TOWER, **IMAGES)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=39,
            tie_word_embeddings=False,
            image_seq_length=4,
        )
    )


def smolvlm():
    from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration

    text = LlamaConfig(**TOWER, num_key_value_heads=2, vocab_size=40, pad_token_id=0)
    vision = {**TOWER, **IMAGES}
    return SmolVLMForConditionalGeneration(
        SmolVLMConfig(text_config=text, vision_config=vision, image_token_id=39, tie_word_embeddings=False)
    )


@pytest.mark.parametrize("make", [llava, smolvlm])
def test_a_language_model_and_its_vision_language_model(make, tmp_path, capsys):
    torch.manual_seed(0)
    small, large = llama().eval(), make().eval()
    inner = next(name for name, _ in large.named_modules() if name.endswith(("language_model", "text_model")))
    small.save_pretrained(tmp_path / "small")
    large.save_pretrained(tmp_path / "large")
    trained(small, ["q_proj", "up_proj", "lm_head"], tmp_path / "of-small")
    trained(large, rf"{inner}.*(k_proj|down_proj)", tmp_path / "of-language")
    trained(large, ["k_proj"], tmp_path / "of-both")

    def merged(base, adapter, *more):
        command = [
            "merge",
            "--base",
            tmp_path / base,
            "--adapter",
            tmp_path / adapter,
            "-o",
            tmp_path / "out",
        ]
        return lora_export(*command, "--force", *more)

    def changed(base):
        before, after = stored(tmp_path / base), stored(tmp_path / "out")
        found = {name: after[name] - values for name, values in before.items()}
        return {name: change for name, change in found.items() if change.any()}

    assert merged("large", "of-small") == 0
    wanted, found = deltas(tmp_path / "of-small"), changed("large")
    assert len(found) == len(wanted) == 5
    for path, change in wanted.items():
        end = path.removeprefix("model.")
        (name,) = (name for name in found if name.endswith(f"{end}.weight") and "vision" not in name)
        assert (found[name] - change).abs().max() < 1e-5
    assert merged("small", "of-language") == 0
    wanted, found = deltas(tmp_path / "of-language", f"{inner}."), changed("small")
    assert {name.removeprefix("model.").removesuffix(".weight") for name in found} == set(wanted)
    assert all((found[f"model.{path}.weight"] - change).abs().max() < 1e-5 for path, change in wanted.items())
    capsys.readouterr()
    assert merged("small", "of-both") == 1
    assert f"--component {inner}" in capsys.readouterr().err
    assert merged("small", "of-both", "--component", inner) == 0
    assert set(changed("small")) == {f"model.layers.{n}.self_attn.k_proj.weight" for n in (0, 1)}


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_one_of_the_models_that_a_file_serves(component, tmp_path, capsys):
    paths = {"unet": "down_blocks.0.to_q", "text_encoder": "text_model.encoder.layers.0.self_attn.q_proj"}
    weights = {name: torch.randn(8, 8) for name in paths.values()}
    tensors = {}
    for part, path in paths.items():
        tensors |= {
            f"{part}.{path}.lora_A.weight": torch.randn(2, 8),
            f"{part}.{path}.lora_B.weight": torch.randn(8, 2),
        }
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    (tmp_path / "base").mkdir()
    save_file({f"{paths[component]}.weight": weights[paths[component]]}, tmp_path / "base/model.safetensors")
    command = ["merge", "--base", tmp_path / "base", "-o", tmp_path / "out"]
    command += ["--adapter", tmp_path / "pytorch_lora_weights.safetensors"]
    assert lora_export(*command) == 1
    assert f"--component {component}" in capsys.readouterr().err
    assert lora_export(*command, "--component", component) == 0
    path = paths[component]
    a, b = (tensors[f"{component}.{path}.lora_{side}.weight"] for side in "AB")
    (change,) = (values - weights[path] for values in stored(tmp_path / "out").values())
    assert (change - b @ a).abs().max() < 1e-5


@pytest.mark.parametrize("given", [str, load_adapter], ids=["path", "value"])
def test_the_part_that_belongs_in_python(given, tmp_path):
    """`export_onnx` of an encoder, with the adapter of the whole model."""
    torch.manual_seed(0)
    model = marian().eval()
    peft = trained(model, r".*fc2", tmp_path / "adapter")
    ids = torch.randint(3, 40, (1, 6))
    encoder, adapted = (Encoder(whole.get_encoder()).eval() for whole in (model, peft.base_model.model))
    adapter = given(tmp_path / "adapter")
    with pytest.raises(SiteError, match=r"--component model\.encoder"), tiny.quiet():
        export_onnx(encoder, adapter, (ids,), tmp_path / "m.onnx")
    with tiny.quiet():
        export_onnx(encoder, adapter, (ids,), tmp_path / "m.onnx", component="model.encoder")
    with torch.no_grad():
        wanted = adapted(ids).numpy()
    assert tiny.relative_error(run(tmp_path / "m.onnx", ids=ids.numpy()), wanted) < 2e-6


def test_flattened_names_of_a_checkpoint(tmp_path):
    weights = {f"down_blocks.{n}.attn_1.to_q.weight": torch.randn(8, 8) for n in (0, 1)}
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base/model.safetensors")
    tensors = {}
    for name in weights:
        flat = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        tensors |= {
            f"{flat}.lora_down.weight": torch.randn(2, 8),
            f"{flat}.lora_up.weight": torch.randn(8, 2),
        }
    save_file(tensors, tmp_path / "k.safetensors")
    command = [
        "merge",
        "--base",
        tmp_path / "base",
        "--adapter",
        tmp_path / "k.safetensors",
        "-o",
        tmp_path / "out",
    ]
    assert lora_export(*command) == 0
    after = stored(tmp_path / "out")
    for name, values in weights.items():
        flat = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        change = tensors[f"{flat}.lora_up.weight"] @ tensors[f"{flat}.lora_down.weight"]
        assert (after[name] - values - change).abs().max() < 1e-5


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
        lambda name: f"_fsdp_wrapped_module.{name.replace('q_proj', '_fsdp_wrapped_module.q_proj')}",
    ],
)
def test_a_base_whose_names_have_wrappers(wrap, tmp_path):
    weights = {f"model.layers.{n}.q_proj.weight": torch.randn(8, 8) for n in (0, 1)}
    (tmp_path / "base").mkdir()
    save_file({wrap(name): values for name, values in weights.items()}, tmp_path / "base/model.safetensors")
    module = nn.ModuleDict({"model": nn.Module()})
    module.model.layers = nn.ModuleList(
        nn.ModuleDict({"q_proj": nn.Linear(8, 8, bias=False)}) for _ in (0, 1)
    )
    trained(module, ["q_proj"], tmp_path / "adapter")
    command = [
        "merge",
        "--base",
        tmp_path / "base",
        "--adapter",
        tmp_path / "adapter",
        "-o",
        tmp_path / "out",
    ]
    assert lora_export(*command) == 0
    after, wanted = stored(tmp_path / "out"), deltas(tmp_path / "adapter")
    for name, values in weights.items():
        assert (after[wrap(name)] - values - wanted[name.removesuffix(".weight")]).abs().max() < 1e-5


def test_another_naming_is_not_another_architecture(tmp_path, capsys):
    weights = {f"transformer.h.{n}.attn.query.weight": torch.randn(8, 4) for n in (0, 1)}
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base/model.safetensors")
    command = ["merge", "--base", tmp_path / "base", "-o", tmp_path / "out", "--alpha", "2"]
    for shape, said in (((8, 4), "names its modules in another way"), ((8, 5), "for another architecture")):
        tensors = {}
        for n in (0, 1):
            tensors[f"model.blocks.{n}.wq.A.weight"] = torch.randn(2, shape[1])
            tensors[f"model.blocks.{n}.wq.B.weight"] = torch.randn(shape[0], 2)
        save_file(tensors, tmp_path / "a.safetensors")
        capsys.readouterr()
        assert lora_export(*command, "--adapter", tmp_path / "a.safetensors") == 1
        error = capsys.readouterr().err
        assert said in error
        pairs = ("model.blocks.1.wq.weight", "transformer.h.1.attn.query.weight")
        assert any(all(name in line for name in pairs) for line in error.splitlines()) == (shape == (8, 4))


def test_a_wrong_adapter_is_refused_before_a_capture(tmp_path, monkeypatch, capsys):
    def slow(*arguments, **options):
        raise AssertionError("captured")

    monkeypatch.setattr("lora_export.base.capture.capture.capture_checkpoint", slow)
    for verb in ("merge-onnx", "swap-onnx"):
        command = [
            verb,
            "--base",
            tiny.checkpoint("bert"),
            "--adapter",
            tiny.adapter("llama"),
            "-o",
            tmp_path / "m.onnx",
        ]
        assert lora_export(*command) == 1
        assert "for another architecture" in capsys.readouterr().err


@pytest.mark.parametrize("flattened", [False, True])
@pytest.mark.parametrize("scope", [None, "lm_heads", "embeds"])
def test_an_index_alone_is_no_name(scope, flattened):
    """Two lists of modules have nothing in common but their numbers (Bark's heads and embeddings)."""
    keys = ["lm_heads_0.weight" if flattened else "lm_heads.0.weight"]
    found = renamed(keys, ["embeds.0.weight", "embeds.1.weight"], scope=scope, flattened=flattened)
    assert found.names == (None,) or found.problems
    assert not found.hint.startswith("say which")


@pytest.mark.parametrize("separator", [".", "_"])
@pytest.mark.parametrize("flattened", [True, False])
def test_a_name_of_ten_thousand_words_keeps_nothing_busy(separator, flattened):
    """Whoever compares paths takes the square of their words: what is deeper than any model is no path."""
    deep = separator.join(["b"] * 10_000) + ".q.weight"
    tracemalloc.start()
    started = time.process_time()
    known = KnownNames([deep, "a.q.weight", "c.q.weight"])
    change = rename([Named("c_q.weight" if flattened else "c.q.weight")], known, flattened=flattened)
    assert time.process_time() - started < 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 * len(deep)
    assert known.names == {"a.q.weight", "c.q.weight"}
    assert change.names[0] == "c.q.weight"


def test_a_name_as_deep_as_allowed_is_found():
    path = ".".join(f"m{n}" for n in range(MOST_WORDS - 1))
    known = KnownNames([f"{path}.weight", f"more.{path}.weight"])
    assert known.names == {f"{path}.weight"}
    assert rename([Named(f"{path}.weight")], known).names == (f"{path}.weight",)
