"""Checkpoints captured with a key-value cache: calls that share a cache give what one call gives."""

import functools
import inspect

import exposed_models as exposed
import numpy as np
import onnx
import pytest
import tiny
from cached_runs import BATCH, CHAINS, TOKENS, CachedGraph, reference
from peft import PeftModel

from lora_export import CheckpointError, GraphError, bank_onnx, merge_onnx, swap_onnx
from lora_export.base.capture.capture import capture_checkpoint
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.cli import _run
from lora_export.graph.captured import DIMS_KEY, MODEL_KEY, Captured
from lora_export.graph.exposed import WEIGHTS_INPUT
from lora_export.graph.onnx_file import load_graph

TOLERANCE = 2e-6
DECODERS = ("llama", "qwen2", "gpt2", "phi3")

pytestmark = pytest.mark.slow


def each_decoder(*archs):
    return pytest.mark.parametrize(
        "arch", [pytest.param(arch, marks=pytest.mark.xdist_group(arch)) for arch in archs or DECODERS]
    )


@functools.cache
def captured(arch):
    folder = tiny.cache_folder() / arch / "cached"
    folder.mkdir(parents=True)
    return capture_checkpoint(tiny.checkpoint(arch), folder / "model.onnx", kv_cache=True)


def with_adapter(arch, adapter):
    with tiny.quiet():
        return PeftModel.from_pretrained(tiny.build(arch), adapter)


def error(got, wanted):
    return tiny.relative_error(got, wanted)


@each_decoder()
def test_a_chain_of_calls_equals_one_call_without_a_cache(arch):
    graph, wanted = CachedGraph(captured(arch)), reference(tiny.build(arch))
    for chain in CHAINS:
        assert error(graph.run(chain), wanted) < TOLERANCE, chain
    # The cache counts: without the past, the tokens that follow are far off.
    _, past = graph.call(0, 5, graph.empty_past(), {}, TOKENS)
    followed, _ = graph.call(5, TOKENS, past, {}, TOKENS)
    zeros = {name: np.zeros_like(value) for name, value in past.items()}
    assert error(graph.call(5, TOKENS, zeros, {}, TOKENS)[0], followed) > 1e3 * TOLERANCE


@each_decoder()
def test_names_and_dims_are_those_that_servers_expect(arch):
    proto = onnx.load(captured(arch), load_external_data=False).graph
    config = tiny.build(arch).config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = config.hidden_size // config.num_attention_heads
    cache = [f"{layer}.{part}" for layer in range(config.num_hidden_layers) for part in ("key", "value")]
    assert {value.name: dims(value) for value in proto.input} == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total_sequence"],
        "position_ids": ["batch", "sequence"],
        **{f"past_key_values.{name}": ["batch", heads, "past_sequence", size] for name in cache},
    }
    assert {value.name: dims(value) for value in proto.output} == {
        "logits": ["batch", "sequence", tiny.VOCAB],
        **{f"present.{name}": ["batch", heads, "total_sequence", size] for name in cache},
    }


def dims(value):
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


@each_decoder()
def test_weights_have_the_checkpoints_names(arch):
    """So that merged and swapped graphs can leave them in its own ``.safetensors``."""
    stored = set(Checkpoint.open(tiny.checkpoint(arch)).tensors)
    model = load_graph(captured(arch)).model
    matrices = {name for name, value in model.graph.initializers.items() if len(value.shape) == 2}
    large = {name for name in matrices if model.graph.initializers[name].const_value.size >= 1024}
    assert len(large) >= 8
    # A tied head is the embedding, under one of its two names.
    assert large <= stored | {"lm_head.weight"}


@each_decoder()
def test_merge_agrees_with_peft(arch, tmp_path):
    adapter = tiny.adapter(arch)
    merge_onnx(captured(arch), adapter, tmp_path / "m.onnx", checkpoint=tiny.checkpoint(arch))
    wanted = reference(with_adapter(arch, adapter))
    for chain in CHAINS[:2]:
        assert error(CachedGraph(tmp_path / "m.onnx").run(chain), wanted) < TOLERANCE
    assert error(reference(tiny.build(arch)), wanted) > 1e3 * TOLERANCE


@each_decoder()
def test_swap_agrees_with_peft_and_without_an_adapter_is_the_base(arch, tmp_path):
    adapter = tiny.adapter(arch, "patterns")
    swap_onnx(captured(arch), tmp_path / "m.onnx", adapter=adapter)
    graph, fed = CachedGraph(tmp_path / "m.onnx"), exposed.tensors(tmp_path / "m.onnx", adapter)
    wanted = reference(with_adapter(arch, adapter))
    for chain in CHAINS:
        assert error(graph.run(chain, fed), wanted) < TOLERANCE
        assert np.array_equal(graph.run(chain), CachedGraph(captured(arch)).run(chain))


@each_decoder()
def test_each_row_of_a_bank_agrees_with_peft(arch, tmp_path):
    named = {"a": tiny.adapter(arch), "b": tiny.adapter(arch, "rslora", 1)}
    bank_onnx(captured(arch), named, tmp_path / "m.onnx")
    weights = np.array([[1, 0], [0, 0], [0, 1]], np.float32)
    models = [with_adapter(arch, named["a"]), tiny.build(arch), with_adapter(arch, named["b"])]
    # Tokens that are no padding, row by row.
    bounds = [0, *np.cumsum([TOKENS - 3, TOKENS - 1, TOKENS])]
    for chain in CHAINS[:2]:
        got = CachedGraph(tmp_path / "m.onnx").run(chain, {WEIGHTS_INPUT: weights})
        for row, model in enumerate(models):
            rows = slice(bounds[row], bounds[row + 1])
            assert error(got[rows], reference(model)[rows]) < TOLERANCE
    assert len(models) == BATCH


@pytest.mark.xdist_group("llama")
def test_verbs_capture_a_folder_with_its_cache_and_keep_its_record(tmp_path, capsys):
    base, adapter = tiny.checkpoint("llama"), tiny.adapter("llama")
    common = ["--base", str(base), "--kv-cache", "--quiet"]
    verbs = {
        "merge-onnx": ["--adapter", str(adapter)],
        "swap-onnx": ["--adapter", str(adapter)],
        "bank-onnx": ["--adapter", f"a={adapter}"],
    }
    wanted = reference(with_adapter("llama", adapter))
    for verb, arguments in verbs.items():
        output = tmp_path / f"{verb}.onnx"
        assert _run([verb, *common, *arguments, "-o", str(output)], False) == 0, capsys.readouterr().err
        graph = CachedGraph(output)
        more = {
            "merge-onnx": lambda _: {},
            "swap-onnx": lambda path: exposed.tensors(path, adapter),
            "bank-onnx": lambda _: {WEIGHTS_INPUT: np.ones((BATCH, 1), np.float32)},
        }[verb](output)
        assert error(graph.run((5, 1, 3), more), wanted) < TOLERANCE
        metadata = graph.session.get_modelmeta().custom_metadata_map
        sizes = dict.fromkeys(("sequence", "past_sequence", "total_sequence"), 64)
        assert Captured.from_metadata(metadata) == Captured(
            kind="decoder", kv_cache=True, dtype="float32", vocab_size=tiny.VOCAB, largest=sizes
        )


def small(kind, **more):
    """Return a model of transformers' with random weights, two layers."""
    import torch
    import transformers

    sizes = {
        "vocab_size": tiny.VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**sizes | more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


# Windows that are shorter than the prompt; positions that are no input; keys and values of different sizes.
OTHERS = {
    "MistralForCausalLM": {"num_key_value_heads": 2, "sliding_window": 4},
    "Gemma3ForCausalLM": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 4},
    "BloomForCausalLM": {},
    "DeepseekV3ForCausalLM": {
        "num_key_value_heads": 4,
        "first_k_dense_replace": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    },
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_decoders(kind, tmp_path):
    model = small(kind, **OTHERS[kind])
    with tiny.quiet():
        model.save_pretrained(tmp_path / "checkpoint")
    path = capture_checkpoint(tmp_path / "checkpoint", tmp_path / "m.onnx", kv_cache=True)
    wanted = reference(model, 20)
    for chain in ((20,), (8, 1, 11), (1,) * 20):
        assert error(CachedGraph(path).run(chain, tokens=20), wanted) < TOLERANCE
    inputs = {value.name for value in CachedGraph(path).session.get_inputs()}
    assert ("position_ids" in inputs) == ("position_ids" in inspect.signature(model.forward).parameters)


@pytest.mark.parametrize("arch", [pytest.param(a, marks=pytest.mark.xdist_group(a)) for a in ("bert", "vit")])
def test_models_without_a_cache_are_refused(arch, tmp_path, capsys):
    arguments = ["--base", str(tiny.checkpoint(arch)), "--adapter", str(tiny.adapter(arch)), "--kv-cache"]
    assert _run(["swap-onnx", *arguments, "-o", str(tmp_path / "m.onnx")], False) == 1
    said = capsys.readouterr().err
    assert "no key-value cache" in said
    assert "omit --kv-cache" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("LlamaForSequenceClassification", {}, "no logits for each token"),
        (
            "Lfm2ForCausalLM",
            {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
            "LinearAttentionLayer",
        ),
    ],
)
def test_a_state_that_is_more_than_keys_and_values_is_refused(kind, more, said, tmp_path):
    with tiny.quiet():
        small(kind, **more).save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=said):
        capture_checkpoint(tmp_path / "checkpoint", tmp_path / "m.onnx", kv_cache=True)


@pytest.mark.xdist_group("llama")
def test_a_graph_keeps_its_own_cache(tmp_path, capsys):
    base, adapter = str(tiny.base_onnx("llama", "dynamo")), str(tiny.adapter("llama"))
    for verb, given in (("merge-onnx", adapter), ("swap-onnx", adapter), ("bank-onnx", f"a={adapter}")):
        arguments = [verb, "--base", base, "--adapter", given, "--kv-cache", "-o", str(tmp_path / "m.onnx")]
        assert _run(arguments, False) == 1
        assert "is a graph already: --kv-cache" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# Name of the model → how many positions it says it has; RoBERTa counts from behind its padding's id.
@pytest.mark.parametrize(
    ("kind", "more", "wanted"),
    [
        ("RobertaForSequenceClassification", {"pad_token_id": 1}, {"sequence": 62}),
        ("BertForSequenceClassification", {}, {"sequence": 64}),
        ("BloomForCausalLM", {"max_position_embeddings": None}, {}),
        ("GPT2LMHeadModel", {"max_position_embeddings": 32}, {"sequence": 32}),
    ],
)
def test_the_largest_sizes_are_those_that_the_model_has_positions_for(kind, more, wanted, tmp_path):
    with tiny.quiet():
        small(kind, **more).save_pretrained(tmp_path / "checkpoint")
    path = capture_checkpoint(tmp_path / "checkpoint", tmp_path / "m.onnx")
    found = Captured.from_metadata(load_graph(path).model.metadata_props)
    assert found.largest == wanted


@pytest.mark.parametrize("arch", [pytest.param(a, marks=pytest.mark.xdist_group(a)) for a in ("t5", "vit")])
def test_the_record_of_other_kinds(arch, tmp_path):
    path = capture_checkpoint(tiny.checkpoint(arch), tmp_path / "m.onnx")
    found = Captured.from_metadata(load_graph(path).model.metadata_props)
    assert (
        found
        == {
            "t5": Captured(kind="encoder-decoder", kv_cache=False, dtype="float32", vocab_size=tiny.VOCAB),
            "vit": Captured(kind="vision", kv_cache=False, dtype="float32"),
        }[arch]
    )


def test_a_damaged_record_is_refused_and_none_is_none():
    record = Captured(
        kind="decoder", kv_cache=True, dtype="bfloat16", vocab_size=100, largest={"sequence": 64}
    )
    metadata = record.to_metadata()
    assert Captured.from_metadata(metadata) == record
    assert Captured.from_metadata({}) is None
    for key, text in ((MODEL_KEY, "{"), (MODEL_KEY, '{"kind": "other"}'), (DIMS_KEY, '{"sequence": 3}')):
        with pytest.raises(GraphError, match=r"damaged|read as JSON"):
            Captured.from_metadata(metadata | {key: text})
