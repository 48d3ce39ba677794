"""A file that names one part of a pipeline never lands in another part that is built alike."""

import copy
import json
import logging
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_export import AdapterError, AdapterSession, bank_onnx, capture_onnx, convert_adapter, swap_onnx
from lora_export.cli import _run

diffusers = pytest.importorskip("diffusers")
RANK, ALPHA = 2, 5.0
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def wan():
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=16,
    )


def flux():
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 4),
    )


def clip():
    config = transformers.CLIPTextConfig(**TEXT, vocab_size=40, max_position_embeddings=12)
    return transformers.CLIPTextModel(config)


def t5():
    sizes = {"d_model": 8, "d_ff": 16, "d_kv": 4, "num_heads": 2, "num_layers": 2, "vocab_size": 30}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes))


# (model, its folder, another part of the same class, ends of the modules that an adapter changes).
PARTS = {
    "wan": (wan, "transformer", "transformer_2", ("to_q", "ffn.net.2")),
    "flux": (flux, "transformer", "transformer_2", ("to_k", "proj_mlp")),
    "clip": (clip, "text_encoder", "text_encoder_2", ("q_proj", "fc2")),
    "t5": (t5, "text_encoder_2", "text_encoder_3", ("SelfAttention.q", "wo")),
}
KOHYA = {
    "transformer": "lora_transformer_",
    "text_encoder": "lora_te1_",
    "text_encoder_2": "lora_te2_",
    "text_encoder_3": "lora_te3_",
}


@pytest.fixture(params=PARTS)
def case(request, tmp_path):
    """Save a model as both parts of a pipeline; return it, the parts, and factors for some of its modules."""
    make, own, other, ends = PARTS[request.param]
    torch.manual_seed(0)
    model = make().eval()
    for part in (own, other):
        model.save_pretrained(tmp_path / "pipe" / part)
    index = {"_class_name": "X", "vae": [None, None]} | {part: ["x", "X"] for part in (own, other)}
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    factors = {}
    for path, module in model.named_modules():
        if path.endswith(ends):
            rows, cols = module.weight.shape
            factors[path] = torch.randn(RANK, cols), torch.randn(rows, RANK)
    return model, own, other, factors


def written(path, factors, component, kohya=False):
    """Write a file in diffusers' names or in kohya's, scaling ``ALPHA / RANK``."""
    tensors = {}
    for module, (a, b) in factors.items():
        if kohya:
            name = KOHYA[component] + module.replace(".", "_")
            tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
            tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
        else:
            name = f"{component}.{module}"
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b * (ALPHA / RANK)}
    save_file(tensors, path)
    return path


def merge(base, adapter, out, *more):
    return _run(["merge", "--base", str(base), "--adapter", str(adapter), "-o", str(out), *more], False)


def weights_of(folder):
    return load_file(next(folder.glob("*.safetensors")))


def check(folder, base, factors):
    """Compare what was written with W + alpha / rank · B·A in float64; all else is the base's."""
    stored, found = weights_of(base), weights_of(folder)
    assert stored.keys() == found.keys()
    changed = {f"{path}.weight".removeprefix("text_model."): pair for path, pair in factors.items()}
    changed |= {f"{path}.weight": pair for path, pair in factors.items()}
    assert len(changed.keys() & stored.keys()) == len(factors)
    for name, values in stored.items():
        expected = values.double()
        if name in changed:
            a, b = changed[name]
            expected = expected + ALPHA / RANK * b.double() @ a.double()
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kohya", [False, True], ids=["diffusers", "kohya"])
def test_another_part_is_refused_and_the_own_one_merged(case, kohya, tmp_path, capsys):
    _, own, other, factors = case
    if kohya and other not in KOHYA:
        pytest.skip("kohya has no second transformer")
    pipe, out = tmp_path / "pipe", tmp_path / "out"
    file = written(tmp_path / "a.safetensors", factors, other, kohya)
    assert merge(pipe / own, file, out) == 1
    error = capsys.readouterr().err
    assert f"'{other}'" in error
    assert f"'{own}'" in error
    assert str(pipe / other) in error
    assert not out.exists()
    # What the hint says, done: the folder that is meant; or this one after all, said.
    assert merge(pipe / other, file, out) == 0
    check(out, pipe / other, factors)
    assert merge(pipe / own, file, tmp_path / "out2", "--component", other) == 0
    check(tmp_path / "out2", pipe / own, factors)
    assert "as --component says" in "".join(capsys.readouterr())


@pytest.mark.parametrize("make", [wan, flux])
def test_diffusers_loads_nothing_of_the_other_part(make, tmp_path):
    """The oracle of the refusal: a prefix that is not the component's loads no tensor."""
    model = make()
    path = next(path for path, _ in model.named_modules() if path.endswith("to_q"))
    a, b = torch.randn(2, 24), torch.randn(24, 2)
    for component, expected in (("transformer", 2), ("transformer_2", 0)):
        tensors = {f"{component}.{path}.lora_A.weight": a, f"{component}.{path}.lora_B.weight": b}
        loaded = copy.deepcopy(model)
        logging.disable(logging.WARNING)
        loaded.load_lora_adapter(dict(tensors), prefix="transformer")
        logging.disable(logging.NOTSET)
        assert sum("lora_" in name for name, _ in loaded.named_parameters()) == expected
        save_file(tensors, tmp_path / "a.safetensors")
        model.save_pretrained(tmp_path / "transformer")
        code = merge(tmp_path / "transformer", tmp_path / "a.safetensors", tmp_path / f"out_{component}")
        assert (code == 0) == (expected > 0)


def test_a_lone_folder_takes_a_further_part_only_where_that_is_said(case, tmp_path, capsys):
    model, own, _, factors = case
    base = tmp_path / "mine"
    model.save_pretrained(base)
    first, further = own.removesuffix("_2"), f"{own.removesuffix('_2')}_2"
    file = written(tmp_path / "a.safetensors", factors, further)
    assert merge(base, file, tmp_path / "out") == 1
    assert f"--component {further}" in capsys.readouterr().err
    assert merge(base, file, tmp_path / "out", "--component", further) == 0
    check(tmp_path / "out", base, factors)
    assert merge(base, written(file, factors, first), tmp_path / "out2") == 0
    check(tmp_path / "out2", base, factors)


@pytest.mark.parametrize("name", ["diffusion_model.{}.lora_{}.weight", "lora_unet_{}.lora_{}.weight"])
@pytest.mark.parametrize(("folder", "code"), [("transformer", 0), ("transformer_2", 0), ("text_encoder", 1)])
def test_names_of_any_denoiser_belong_to_each(name, folder, code, tmp_path):
    model = wan()
    model.save_pretrained(tmp_path / folder)
    factors = {"blocks.0.attn1.to_q": (torch.randn(RANK, 24), torch.randn(24, RANK) * (RANK / ALPHA))}
    is_kohya = name.startswith("lora_")
    tensors = {}
    for path, (a, b) in factors.items():
        path = path.replace(".", "_") if is_kohya else path
        tensors[name.format(path, "down" if is_kohya else "A")] = a
        tensors[name.format(path, "up" if is_kohya else "B")] = b * (ALPHA / RANK)
    save_file(tensors, tmp_path / "a.safetensors")
    assert merge(tmp_path / folder, tmp_path / "a.safetensors", tmp_path / "out") == code
    if code == 0:
        check(tmp_path / "out", tmp_path / folder, factors)


def test_fluxs_t5_is_called_te3_by_kohya(tmp_path):
    model = t5()
    model.save_pretrained(tmp_path / "pipe" / "text_encoder_2")
    index = {"text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_2": ["transformers", "T5"]}
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    factors = {
        path: (torch.randn(RANK, module.in_features), torch.randn(module.out_features, RANK))
        for path, module in model.named_modules()
        if path.endswith("SelfAttention.q")
    }
    file = written(tmp_path / "a.safetensors", factors, "text_encoder_3", kohya=True)
    assert merge(tmp_path / "pipe" / "text_encoder_2", file, tmp_path / "out") == 0
    check(tmp_path / "out", tmp_path / "pipe" / "text_encoder_2", factors)


def test_a_file_of_several_parts_says_which_to_give(tmp_path, capsys):
    clip().save_pretrained(tmp_path / "pipe" / "text_encoder")
    (tmp_path / "pipe" / "model_index.json").write_text('{"text_encoder": ["transformers", "CLIPTextModel"]}')
    tensors, factors = {}, {}
    # Disjoint modules: all of them would have a place.
    for number, component in enumerate(("text_encoder", "text_encoder_2")):
        path = f"text_model.encoder.layers.{number}.self_attn.q_proj"
        pair = {path: (torch.randn(RANK, 16), torch.randn(16, RANK))}
        factors[component] = pair
        tensors |= load_file(written(tmp_path / "one.safetensors", pair, component))
    save_file(tensors, tmp_path / "a.safetensors")
    base = tmp_path / "pipe" / "text_encoder"
    assert merge(base, tmp_path / "a.safetensors", tmp_path / "out", "--allow-unmatched") == 1
    assert "--component text_encoder takes" in capsys.readouterr().err
    more = ("--component", "text_encoder")
    assert merge(base, tmp_path / "a.safetensors", tmp_path / "out", *more) == 0
    check(tmp_path / "out", base, factors["text_encoder"])


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """Return a text encoder's folder, and beside it in a folder of another name its graph."""
    part = tmp_path_factory.mktemp("pipe") / "text_encoder"
    clip().save_pretrained(part)
    return part, capture_onnx(part, part.parent / "model.onnx")[0]


def pair_file(path, component):
    pair = {"encoder.layers.0.self_attn.q_proj": (torch.randn(RANK, 16), torch.randn(16, RANK))}
    return written(path / f"{component}.safetensors", pair, component)


@pytest.mark.parametrize("verb", ["merge-onnx", "swap-onnx", "bank-onnx"])
@pytest.mark.parametrize("how", ["folder", "checkpoint", "beside", "unknown"])
def test_graphs_have_the_same_rule(verb, how, captured, tmp_path, capsys):
    part, graph = captured
    if how == "beside":
        (tmp_path / "text_encoder").mkdir()
        for file in graph.parent.glob("model.onnx*"):
            shutil.copy(file, tmp_path / "text_encoder" / file.name)
        graph = tmp_path / "text_encoder" / graph.name
    command = [verb, "--base", str(part if how == "folder" else graph), "-o", str(tmp_path / "out.onnx")]
    if how != "folder":
        command += ["--checkpoint", str(part)] if how == "checkpoint" else ["--no-checkpoint"]
    second, first = (pair_file(tmp_path, component) for component in ("text_encoder_2", "text_encoder"))
    named = "a={}" if verb == "bank-onnx" else "{}"
    assert _run([*command, "--adapter", named.format(second)], False) == 1
    assert "--component text_encoder_2" in capsys.readouterr().err
    if how == "folder":
        return  # refused before a capture; what is not is captured in other tests
    assert _run([*command, "--adapter", named.format(first)], False) == 0
    said = [*command, "--force", "--adapter", named.format(second), "--component", "text_encoder_2"]
    assert _run(said, False) == 0


def test_converting_has_the_same_rule(captured, tmp_path):
    _, graph = captured
    second, first = (pair_file(tmp_path, component) for component in ("text_encoder_2", "text_encoder"))
    (tmp_path / "text_encoder").mkdir()
    swap = tmp_path / "text_encoder" / "swap.onnx"
    swap_onnx(graph, swap, adapter=first)
    convert_adapter(first, swap, tmp_path / "first.onnx_adapter")
    with pytest.raises(AdapterError, match="the pipeline's 'text_encoder_2'"):
        convert_adapter(second, swap, tmp_path / "second.onnx_adapter")
    convert_adapter(second, swap, tmp_path / "second.onnx_adapter", component="text_encoder_2")


@pytest.mark.parametrize("verb", ["swap", "bank"])
def test_a_session_has_the_same_rule(verb, captured, tmp_path):
    _, graph = captured
    second, first = (pair_file(tmp_path, component) for component in ("text_encoder_2", "text_encoder"))
    made = tmp_path / "text_encoder" / "model.onnx"
    made.parent.mkdir()
    if verb == "swap":
        swap_onnx(graph, made, adapter=first)
    else:
        bank_onnx(graph, {"first": first}, made, resident="inputs")
    place = {"slot": "first", "replace": True} if verb == "bank" else {}
    with AdapterSession(made) as session:
        session.load_adapter("first", first, **place)
        with pytest.raises(AdapterError, match="the pipeline's 'text_encoder_2'"):
            session.load_adapter("second", second, **place)
        session.load_adapter("second", second, component="text_encoder_2", **place)
