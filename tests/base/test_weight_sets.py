"""Which weights of a folder count: those that transformers and diffusers load, with a note on the others."""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from lora_export.base.capture.loading import load_model
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.meta_model import quiet_config
from lora_export.cli import _run
from lora_export.errors import CheckpointError

diffusers = pytest.importorskip("diffusers")


def vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=2, layers_per_block=1, latent_channels=2
    )


def sd3():
    return diffusers.SD3Transformer2DModel(
        sample_size=4,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
    )


def opt():
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.OPTConfig(**sizes, word_embed_proj_dim=16, vocab_size=40, pad_token_id=0)
    return transformers.OPTForCausalLM(config)


def bert():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=40))


MODELS = {"vae": vae, "sd3": sd3, "opt": opt, "bert": bert}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def shifted(model):
    """Return a copy with other values, so that it shows which file was read."""
    other = copy.deepcopy(model).half()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    return other


def loaded(model, folder, **options):
    """Return what the library itself reads of a folder."""
    return type(model).from_pretrained(folder, **options).state_dict()


def same(checkpoint, expected):
    for name in checkpoint.tensors:
        own = name if name in expected else next(n for n in expected if n.endswith(name) or name.endswith(n))
        assert torch.equal(torch.from_numpy(checkpoint.read(name).copy()), expected[own]), name


@pytest.mark.parametrize("size", ["10GB", "6KB"])
def test_a_variant_beside_the_plain_files_is_left_aside(model, size, tmp_path):
    shifted(model).save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    model.save_pretrained(tmp_path, max_shard_size=size)
    checkpoint = Checkpoint.open(tmp_path)
    same(checkpoint, loaded(model, tmp_path))
    assert "fp16" in checkpoint.notes[0]


@pytest.mark.parametrize("size", ["10GB", "6KB"])
def test_a_variant_alone_is_the_model(model, size, tmp_path):
    shifted(model).save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    checkpoint = Checkpoint.open(tmp_path)
    options = {"torch_dtype" if isinstance(model, diffusers.ModelMixin) else "dtype": torch.float16}
    same(checkpoint, loaded(model, tmp_path, variant="fp16", **options))
    shifted(model).save_pretrained(tmp_path, variant="other", max_shard_size=size)
    with pytest.raises(CheckpointError, match="several sets") as caught:
        Checkpoint.open(tmp_path)
    assert len(caught.value.problems) == 2


def test_another_programs_files_are_left_aside(model, tmp_path):
    """Mistral's repositories hold its own files beside transformers'."""
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    file = "consolidated-00001-of-00001.safetensors"
    values = {f"x.{name}": value.contiguous() + 1 for name, value in model.state_dict().items()}
    save_file(values, tmp_path / file)
    index = {"metadata": {}, "weight_map": dict.fromkeys(values, file)}
    (tmp_path / "consolidated.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint.open(tmp_path)
    same(checkpoint, loaded(model, tmp_path))
    assert "consolidated" in checkpoint.notes[0]


@pytest.mark.parametrize("make", [opt, sd3])
def test_what_was_left_aside_is_not_in_the_merged_folder(make, tmp_path, capsys):
    model = make()
    shifted(model).save_pretrained(tmp_path / "base", variant="fp16", max_shard_size="6KB")
    model.save_pretrained(tmp_path / "base", max_shard_size="6KB")
    path = next(n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m.in_features == 16)
    a, b = torch.randn(2, 16), torch.randn(model.get_submodule(path).out_features, 2)
    front = "transformer." if make is sd3 else "base_model.model."
    tensors = {f"{front}{path}.lora_A.weight": a, f"{front}{path}.lora_B.weight": b}
    save_file(tensors, tmp_path / "a.safetensors")
    command = ["merge", "--base", "base", "--adapter", "a.safetensors", "-o", "out", "--alpha", "2"]
    command = [
        str(tmp_path / word) if (tmp_path / word).exists() or word == "out" else word for word in command
    ]
    assert _run(command, False) == 0
    assert "fp16" in "".join(capsys.readouterr())
    assert not list((tmp_path / "out").glob("*fp16*"))
    before, after = model.state_dict(), loaded(model, tmp_path / "out")
    for name, values in before.items():
        expected = values + b @ a if name == f"{path}.weight" else values
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-5)


CHOSEN = {
    "in a subfolder": ({"transformers_weights": "sub/x.safetensors"}, "sub/x.safetensors"),
    "a pickle": ({"transformers_weights": "adapter_model.bin"}, "adapter_model.bin"),
    "outside": ({"transformers_weights": "../x.safetensors"}, "../x.safetensors"),
    "missing": ({"transformers_weights": "y.safetensors"}, "y.safetensors"),
    "no text": ({"transformers_weights": ["x.safetensors"]}, "transformers_weights"),
    "of a part": (
        {"text_config": {"transformers_weights": "x.safetensors"}},
        "text_config.transformers_weights",
    ),
    "distributed": ({}, "shard-00000-model-00001-of-00001.safetensors"),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_weights_that_the_config_chooses_elsewhere_are_refused_everywhere(case, tmp_path):
    """Transformers loads them in place of those of the usual names."""
    keys, named = CHOSEN[case]
    torch.manual_seed(0)
    model, base = opt(), tmp_path / "base"
    model.save_pretrained(base)
    for name in ("x.safetensors", "sub/x.safetensors", *[named] * (case == "distributed")):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes((base / "model.safetensors").read_bytes())
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | keys))
    for call in (Checkpoint.open, lambda folder: load_model(folder, "float32")):
        with pytest.raises(CheckpointError, match="other weights") as caught:
            call(base)
        assert named in "".join(caught.value.problems)


@pytest.mark.parametrize("size", ["10GB", "6KB"])
def test_weights_that_the_config_names_in_the_folder_are_the_models(size, tmp_path):
    torch.manual_seed(0)
    model, base = opt(), tmp_path / "base"
    shifted(model).save_pretrained(base)
    model.save_pretrained(tmp_path / "other", max_shard_size=size)
    name = "x.safetensors" if size == "10GB" else "x.safetensors.index.json"
    for file in (tmp_path / "other").glob("*.safetensors*"):
        own = "model.safetensors" + (".index.json" if size == "6KB" else "")
        (base / (name if file.name == own else file.name)).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
    checkpoint = Checkpoint.open(base)
    same(checkpoint, loaded(model, base, dtype=torch.float32))
    same(checkpoint, model.state_dict())
    assert "model.safetensors" in checkpoint.notes[0]


def test_weights_in_a_subfolder_that_nothing_is_merged_into_are_named(tmp_path, capsys):
    torch.manual_seed(0)
    model = opt()
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base/original").mkdir()
    (tmp_path / "base/original/x.safetensors").write_bytes((tmp_path / "base/model.safetensors").read_bytes())
    path = "model.decoder.layers.0.fc1"
    a, b = torch.randn(2, 16), torch.randn(24, 2)
    save_file({f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}, tmp_path / "a.safetensors")
    command = ["--base", tmp_path / "base", "--adapter", tmp_path / "a.safetensors", "--alpha", "2"]
    assert _run(["merge", *map(str, command), "-o", str(tmp_path / "out")], False) == 0
    assert "nothing merged into them: original/x.safetensors" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 100_000}, "num_hidden_layers: 100000"),
        ({"part": {"n_layer": 10**9}}, "part.n_layer: 1000000000"),
        ({"depths": [2, 10**6]}, "depths: 1000000"),
        ({"num_local_experts": 10**6}, "num_local_experts: 1000000, wanted at most 131072"),
        ({"inner_group_num": 10**6}, "inner_group_num: 1000000"),
        ({"num_labels": 10**8}, "num_labels: 100000000"),
        ({"part": {"num_classes": 10**8}}, "part.num_classes: 100000000"),
        ({"id2label": {str(n): "x" for n in range(140_000)}}, "id2label: an object of 140000"),
        ({"eos_token_id": list(range(140_000))}, "eos_token_id: an array of 140000"),
    ],
)
def test_a_config_of_more_than_any_model_has_is_refused_before_it_is_built(change, says, tmp_path):
    torch.manual_seed(0)
    opt().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match="more layers or labels than any model has") as caught:
        load_model(tmp_path, "float32")
    assert says in "".join(caught.value.problems)
    with (
        pytest.raises(CheckpointError, match="more layers or labels than any model has"),
        quiet_config(Checkpoint.open(tmp_path)),
    ):
        pass
