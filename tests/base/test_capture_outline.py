"""Graphs traced in outline, without weights, are those of the loaded model; what can't be so is refused."""

import collections
import json

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from lora_export import CheckpointError
from lora_export.base.capture import capture
from lora_export.base.capture.outline import build_outline, find_stacks
from lora_export.cli import root

WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 99}
LLAMA = {**WIDE, "num_key_value_heads": 2, "max_position_embeddings": 64}
T5 = {
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_heads": 4,
    "num_layers": 5,
    "vocab_size": 99,
    "use_cache": False,
}
# Of four layers one is copied, of five two.
FOUR = {**LLAMA, "num_hidden_layers": 4}
SLIDING, FULL = "sliding_attention", "full_attention"
# Class, config, whether it has a cache.
MODELS = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "num_hidden_layers": 5}, True),
    "tied Qwen2": (
        *("Qwen2ForCausalLM", "Qwen2Config"),
        *({**FOUR, "tie_word_embeddings": True}, True),
    ),
    "two kinds of layers": (
        *("Gemma3ForCausalLM", "Gemma3TextConfig"),
        *(
            {**LLAMA, "num_hidden_layers": 5, "head_dim": 8, "sliding_window": 3}
            | {"layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING]},
            True,
        ),
    ),
    "GPT-2": (
        *("GPT2LMHeadModel", "GPT2Config"),
        *({"n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 99, "n_positions": 64}, True),
    ),
    "experts": (
        *("Qwen2MoeForCausalLM", "Qwen2MoeConfig"),
        *(
            {**FOUR, "num_experts": 4, "num_experts_per_tok": 2}
            | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
            False,
        ),
    ),
    "BERT": ("BertForSequenceClassification", "BertConfig", {**WIDE, "num_hidden_layers": 4}, False),
    "an encoder whose last layer is the output": (
        *("BertModel", "BertConfig"),
        *({**WIDE, "num_hidden_layers": 4}, False),
    ),
    "ViT": (
        *("ViTForImageClassification", "ViTConfig"),
        *({**WIDE, "num_hidden_layers": 4, "image_size": 16, "patch_size": 8}, False),
    ),
}


def make(folder, kind, config, settings, dtype=torch.float32):
    """Save a model whose every number counts."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    model.to(dtype).save_pretrained(folder)
    return folder


def both(folder, out, **options):
    out.mkdir(exist_ok=True)
    for trace in ("loaded", "outline"):
        capture.capture_checkpoint(folder, out / f"{trace}.onnx", trace=trace, **options)
    return [out / f"{trace}.onnx" for trace in ("loaded", "outline")]


def answers(path):
    """Run a graph as it is on rows of which one begins with padding."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session, rng = ort.InferenceSession(str(path), options), np.random.default_rng(1)
    sizes = {"batch": 2, "sequence": 6, "past_sequence": 3, "total_sequence": 9, "decoder_sequence": 4}
    feeds = {}
    for port in session.get_inputs():
        shape = [sizes.get(size, size) for size in port.shape]
        if port.type != "tensor(int64)":
            feeds[port.name] = rng.standard_normal(shape).astype(np.float32)
            continue
        feeds[port.name] = rng.integers(1, 90, shape)
        if "mask" in port.name:
            feeds[port.name] = np.ones(shape, np.int64)
            feeds[port.name][1, :2] = 0
        elif "token_type" in port.name:
            feeds[port.name] = np.zeros(shape, np.int64)
        elif "position" in port.name:
            feeds[port.name] = np.tile(np.arange(3, 9), (2, 1))
    names = [output.name for output in session.get_outputs()]
    return feeds, names, dict(zip(names, session.run(None, feeds), strict=True))


# A decoder without its cache is copied as an encoder is: one of them shows it.
@pytest.mark.parametrize(
    ("name", "cached"),
    [("Llama", False), *((name, has_cache) for name, (*_, has_cache) in MODELS.items())],
)
def test_it_is_the_graph_of_the_loaded_model(name, cached, tmp_path):
    *made_of, _ = MODELS[name]
    loaded, outline = both(make(tmp_path / "folder", *made_of), tmp_path / "out", kv_cache=cached)
    (inputs, outputs, wanted), (own_inputs, own_outputs, got) = answers(loaded), answers(outline)
    assert ([*inputs], outputs) == ([*own_inputs], own_outputs)
    for key, values in wanted.items():
        np.testing.assert_allclose(got[key], values, rtol=1e-5, atol=1e-5 * np.abs(values).max())
    graphs = [ir.load(path).graph for path in (loaded, outline)]
    products, own = (collections.Counter(node.op_type for node in graph) for graph in graphs)
    assert own["MatMul"] == products["MatMul"]
    # The exporter's names of modules, on which everything else stands.
    scopes = [
        {node.metadata_props.get("pkg.torch.onnx.name_scopes", "").rpartition(", ")[0] for node in graph}
        for graph in graphs
    ]
    assert scopes[0] <= scopes[1] | {""}
    weights = [{n for n in graph.initializers if n.endswith((".weight", ".bias"))} for graph in graphs]
    assert weights[0] <= weights[1]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_cast_as_loading_casts_them(dtype, tmp_path):
    folder, out = make(tmp_path / "folder", *MODELS["Llama"][:2], FOUR), tmp_path / "m.onnx"
    capture.capture_checkpoint(folder, out, dtype=dtype, trace="outline")
    held = ir.load(out).graph.initializers
    loaded = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    compared = 0
    for name, value in loaded.items():
        if name.endswith(".weight"):
            assert held[name].const_value.dtype == getattr(ir.DataType, dtype.upper())
            assert held[name].const_value.tobytes() == value.view(torch.uint8).numpy().tobytes()
            compared += 1
    assert compared == 4 * 9 + 3  # seven projections and two norms of each layer; tokens, norm and head


def test_few_layers_are_traced(tmp_path):
    """Of 9 layers of two kinds the first, and of each kind the first and the last behind it."""
    kind, config, settings, _ = MODELS["two kinds of layers"]
    made = getattr(transformers, config)(**settings | {"num_hidden_layers": 9, "layer_types": None})
    model, buffers = build_outline(getattr(transformers, kind), made, torch.float32)
    (stack,) = find_stacks(model, buffers)
    kinds = made.layer_types
    assert stack.depth == 9
    assert stack.chosen[0] == 0
    assert {kinds[index] for index in stack.chosen[1:]} == set(kinds)
    assert all(kinds[stack.chosen[place]] == kinds[i] for i, place in enumerate(stack.template))
    assert len(stack.chosen) < stack.depth
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


def capture_error(folder, tmp_path, **options):
    with pytest.raises(CheckpointError) as caught:
        capture.capture_checkpoint(folder, tmp_path / "m.onnx", trace="outline", **options)
    assert caught.value.hint == "give --trace loaded"
    return str(caught.value)


def test_layers_that_ask_for_their_number(tmp_path):
    """GPT-2 may divide by it: it is in the code that runs, not in the module."""
    kind, config, settings, _ = MODELS["GPT-2"]
    more = {"scale_attn_by_inverse_layer_idx": True, "attn_implementation": "eager"}
    folder = make(tmp_path / "folder", kind, config, {**settings, **more})
    loaded = tmp_path / "loaded.onnx"
    capture.capture_checkpoint(folder, loaded)
    try:
        capture.capture_checkpoint(folder, tmp_path / "outline.onnx", trace="outline")
    except CheckpointError as error:
        assert "differ" in str(error)  # noqa: PT017 - refused, or right
    else:
        (_, _, wanted), (_, _, got) = answers(loaded), answers(tmp_path / "outline.onnx")
        np.testing.assert_allclose(got["logits"], wanted["logits"], rtol=1e-4, atol=1e-4)


LAYERS_THAT_HALVE = {
    "a sound": (
        *("Wav2Vec2Model", "Wav2Vec2Config"),
        {**WIDE, "num_hidden_layers": 1, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
        | {"conv_dim": (8,) * 4, "conv_stride": (2,) * 4, "conv_kernel": (3,) * 4}
        | {"num_feat_extract_layers": 4},
    ),
    "an image": (
        *("ConvNextModel", "ConvNextConfig"),
        {"hidden_sizes": [8] * 5, "depths": [1] * 5, "num_stages": 5, "image_size": 64, "patch_size": 2},
    ),
}


@pytest.mark.parametrize("name", LAYERS_THAT_HALVE)
def test_layers_whose_state_changes_its_size(name, tmp_path):
    """Copied, they left sizes of the cut model behind them: a graph that no runtime ran, and exit code 0."""
    folder = make(tmp_path / "base", *LAYERS_THAT_HALVE[name])
    assert "layer 1 makes [batch,8," in capture_error(folder, tmp_path)


def test_what_is_computed_with_the_number_of_layers(tmp_path, monkeypatch):
    """In code that runs, by a stand-in: a model that divides its result by it."""
    kind, config, settings, _ = MODELS["BERT"]
    forward = transformers.BertModel.forward

    def divided(self, *args, **more):
        result = forward(self, *args, **more)
        result["pooler_output"] = result["pooler_output"] / self.config.num_hidden_layers
        return result

    monkeypatch.setattr(transformers.BertModel, "forward", divided)
    # What another test has traced of this config is kept: by another forward.
    monkeypatch.setenv("LORA_EXPORT_CACHE", str(tmp_path / "cache"))
    folder, out = make(tmp_path / "folder", kind, config, settings), tmp_path / "m.onnx"
    capture.capture_checkpoint(folder, out, trace="outline")
    feeds, _, got = answers(out)
    model = transformers.BertForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        wanted = model(**{name: torch.tensor(values) for name, values in feeds.items()}).logits.numpy()
    np.testing.assert_allclose(got["logits"], wanted, rtol=1e-5, atol=1e-6)


def test_a_weight_that_is_missing(tmp_path):
    folder = make(tmp_path / "folder", *MODELS["Llama"][:3])
    stored = load_file(folder / "model.safetensors")
    del stored["model.layers.3.mlp.up_proj.weight"]
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    assert "model.layers.3.mlp.up_proj.weight" in capture_error(folder, tmp_path)


def test_a_model_of_which_parts_stay_in_float32(tmp_path):
    folder = make(tmp_path / "folder", "T5ForConditionalGeneration", "T5Config", {**T5, "use_cache": False})
    assert "float32" in capture_error(folder, tmp_path, dtype="float16")


def test_weights_that_are_quantised(tmp_path):
    folder = make(tmp_path / "folder", *MODELS["Llama"][:3])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq"}})
    )
    assert "quantised" in capture_error(folder, tmp_path)


@pytest.mark.parametrize("spoilt", [np.inf, np.nan])
def test_weights_that_are_not_finite(spoilt, tmp_path):
    folder = make(tmp_path / "folder", *MODELS["Llama"][:3])
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.3.mlp.up_proj.weight"][0, 0] = 1e30 if spoilt == np.inf else spoilt
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    said = []
    for trace in ("loaded", "outline"):
        with pytest.raises(CheckpointError) as caught:
            capture.capture_checkpoint(folder, tmp_path / "m.onnx", dtype="float16", trace=trace)
        said.append((str(caught.value), caught.value.problems))
    assert said[0] == said[1]


def test_the_verb(tmp_path):
    folder = make(tmp_path / "folder", *MODELS["Llama"][:3])
    arguments = [
        "capture-onnx",
        str(folder),
        "-o",
        str(tmp_path / "m.onnx"),
        "--kv-cache",
        "--trace",
        "outline",
    ]
    done = CliRunner().invoke(root, arguments)
    assert not done.exit_code, done.output
    model = getattr(transformers, MODELS["Llama"][0]).from_pretrained(folder)
    ids = np.random.default_rng(0).integers(1, 90, (2, 6))
    session = ort.InferenceSession(str(tmp_path / "m.onnx"))
    feeds = {"input_ids": ids, "attention_mask": np.ones((2, 6), np.int64)}
    feeds["position_ids"] = np.tile(np.arange(6), (2, 1))
    for port in session.get_inputs():
        if port.name.startswith("past"):
            feeds[port.name] = np.zeros((2, port.shape[1], 0, port.shape[3]), np.float32)
    with torch.no_grad():
        wanted = model(torch.tensor(ids)).logits.numpy()
    got = session.run(["logits"], feeds)[0]
    assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()
