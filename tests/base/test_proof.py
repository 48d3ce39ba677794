"""A captured graph is compared with PyTorch before it is written, its own or a small twin's."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import save_file

from lora_export import GraphError, LoraExportError, OutputError, capture_onnx, verify
from lora_export.base.capture import capture, gap, kept, prove, twin
from lora_export.base.capture.outline import CannotCopy, Stack, build_outline, cut, find_stacks
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.kinds import kind_of
from lora_export.cli import root
from lora_export.graph.onnx_file import load_graph
from lora_export.graph.proof import PROOF_KEY, Proof
from lora_export.storage import hashes

pytestmark = pytest.mark.proven

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 200,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 600,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama whose every number counts."""
    path = tmp_path_factory.mktemp("proof") / "llama"
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def no_other_graph(monkeypatch, tmp_path_factory):
    """Let no test find a graph that another has left in the cache."""
    monkeypatch.setenv("LORA_EXPORT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def large(monkeypatch):
    """Let no model be small enough to be compared itself."""
    monkeypatch.setattr(prove, "_OWN_BYTES", 0)


def proof_of(graph):
    return json.loads(ir.load(graph).metadata_props[PROOF_KEY])


def test_a_small_model_is_compared_itself(folder, tmp_path):
    graph, _ = capture_onnx(folder, tmp_path / "m.onnx", kv_cache=True)
    proof = proof_of(graph)
    assert proof["of"] == "model"
    assert 0 < proof["error"] <= proof["limit"]
    assert proof["runs"] == 5


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("trace", ["loaded", "outline"])
def test_a_large_model_is_compared_by_its_twin(trace, fused, folder, large, tmp_path):
    graph, _ = capture_onnx(folder, tmp_path / "m.onnx", kv_cache=True, trace=trace, fused=fused)
    proof = proof_of(graph)
    assert proof["of"] == "twin"
    assert 0 < proof["error"] <= proof["limit"]
    assert [path.name for path in tmp_path.iterdir() if "twin" in path.name] == []


def test_a_twin_in_float32_stands_for_bfloat16(folder, tmp_path):
    graph, _ = capture_onnx(folder, tmp_path / "m.onnx", dtype="bfloat16")
    assert proof_of(graph)["of"] == "twin"
    assert proof_of(graph)["dtype"] == "float32"


def _scaled(graph):
    """Attention that scales its scores otherwise."""
    for node in graph:
        if node.op_type == "Attention":
            node.attributes["scale"] = ir.AttrFloat32("scale", 0.3)


def _unmasked(graph):
    """Attention that sees padding, and what comes later."""
    for node in graph:
        if node.op_type == "Attention":
            node.replace_input_with(3, None)


def _rotated(graph):
    """Rotary embeddings of pairs that are interleaved."""
    for node in graph:
        if node.op_type == "RotaryEmbedding":
            node.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)


def _normed(graph):
    """A norm with another epsilon."""
    for node in graph:
        if node.op_type == "RMSNormalization":
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.01)


def _of_the_layer_before(graph):
    """A layer with the weights of another one."""
    for node in graph:
        for place, value in enumerate(node.inputs):
            if value is not None and value.name == "model.layers.2.self_attn.q_proj.weight":
                other = graph.initializers["model.layers.1.self_attn.q_proj.weight"]
                node.replace_input_with(place, other)


CHANGES = [_scaled, _unmasked, _rotated, _normed, _of_the_layer_before]


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
def test_a_wrong_graph_is_not_written(change, size, folder, monkeypatch, tmp_path):
    if size == "large":
        monkeypatch.setattr(prove, "_OWN_BYTES", 0)
    saved = capture._save

    def spoilt(graph, *where):
        before = [str(node) for node in graph.graph]
        change(graph.graph)
        assert [str(node) for node in graph.graph] != before
        return saved(graph, *where)

    monkeypatch.setattr(capture, "_save", spoilt)
    with pytest.raises(GraphError, match="answers otherwise than PyTorch"):
        capture_onnx(folder, tmp_path / "m.onnx", kv_cache=True, fused=True)
    assert list(tmp_path.iterdir()) == []


def test_without_a_twin_the_graph_says_so(folder, large, monkeypatch, tmp_path):
    def fail(*_):
        raise ValueError("head_dim must be even")

    monkeypatch.setattr(prove, "small_config", fail)
    graph, _ = capture_onnx(folder, tmp_path / "m.onnx")
    proof = proof_of(graph)
    assert proof["of"] == "nothing"
    assert "head_dim must be even" in proof["reason"]


def test_without_a_twin_attention_as_a_node_is_tried_with_the_weights(folder, large, monkeypatch, tmp_path):
    tried = []
    monkeypatch.setattr(prove, "small_config", lambda *_: 1 / 0)
    loaded = capture.load_model
    monkeypatch.setattr(capture, "load_model", lambda *given: tried.append(given) or loaded(*given))
    capture_onnx(folder, tmp_path / "m.onnx", fused=True)
    assert tried


def test_the_verb(folder, large, tmp_path):
    arguments = ["capture-onnx", str(folder), "-o", str(tmp_path / "m.onnx")]
    result = CliRunner().invoke(root, arguments)
    assert result.exit_code == 0, result.output
    assert "a small twin of it compared with PyTorch in float32 on 8 inputs" in result.output
    result = CliRunner().invoke(root, [*arguments, "--force", "--no-twin"])
    assert result.exit_code == 0, result.output
    assert "not compared with PyTorch: it was not asked for" in result.output
    result = CliRunner().invoke(root, ["inspect", str(tmp_path / "m.onnx")])
    assert "proof     not compared with PyTorch" in result.output
    assert proof_of(tmp_path / "m.onnx") == {"of": "nothing", "reason": "it was not asked for"}


def test_a_damaged_record():
    with pytest.raises(GraphError, match="proof"):
        Proof.from_metadata({PROOF_KEY: '{"of": "everything"}'})
    assert Proof.from_metadata({}) is None


def test_a_second_folder_of_the_config_is_not_traced(folder, large, monkeypatch, tmp_path):
    """From the cache its graph has its own weights, and is the one that a trace gives."""
    monkeypatch.setenv("LORA_EXPORT_CACHE", str(tmp_path / "cache"))
    capture_onnx(folder, tmp_path / "first.onnx", kv_cache=True)
    config = transformers.LlamaConfig.from_pretrained(folder)
    torch.manual_seed(5)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    capture_onnx(tmp_path / "other", tmp_path / "traced.onnx", kv_cache=True, trace="loaded", twin=False)
    with monkeypatch.context() as patch:
        patch.setattr(capture, "look_at", None)
        patch.setattr(capture, "graph_without_weights", None)
        graph, _ = capture_onnx(tmp_path / "other", tmp_path / "second.onnx", kv_cache=True)
    assert proof_of(graph) == proof_of(tmp_path / "first.onnx")
    ids = np.arange(10).reshape(2, 5)
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.tile(np.arange(5), (2, 1)),
    }
    answers = []
    for path in (graph, tmp_path / "traced.onnx"):
        session = onnxruntime.InferenceSession(path)
        past = {port.name: port.shape for port in session.get_inputs() if port.name not in feeds}
        empty = {name: np.zeros((2, shape[1], 0, shape[3]), np.float32) for name, shape in past.items()}
        answers.append(session.run(["logits"], feeds | empty)[0])
    np.testing.assert_allclose(*answers, atol=1e-6)
    # What has another config, other sizes or other options is traced.
    monkeypatch.setattr(capture, "look_at", None)
    with pytest.raises(TypeError):
        capture_onnx(tmp_path / "other", tmp_path / "third.onnx", kv_cache=False)


@pytest.mark.parametrize("place", [100, -100])
def test_a_damaged_entry_is_not_used(place, folder, large, monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_EXPORT_CACHE", str(tmp_path / "cache"))
    capture_onnx(folder, tmp_path / "first.onnx")
    (entry,) = (tmp_path / "cache" / "captures").glob("*.onnx")
    content = bytearray(entry.read_bytes())
    content[place] ^= 1
    entry.write_bytes(content)
    capture_onnx(folder, tmp_path / "second.onnx")
    assert entry.read_bytes() != content
    assert (tmp_path / "first.onnx.data").read_bytes() == (tmp_path / "second.onnx.data").read_bytes()


@pytest.mark.parametrize("changed", ["checkpoint/names.py", "capture/twin.py", "kinds/text.py"])
def test_another_state_of_the_code_has_other_entries(changed, folder, monkeypatch, tmp_path):
    """Where each weight comes from is kept, too, and is found by the code for checkpoints."""
    checkpoint, room = Checkpoint.open(folder), Path(kept.lora_export.base.__path__[0])
    keys = []
    for change in ("", "# another\n"):
        copy = tmp_path / f"base{len(keys)}"
        shutil.copytree(room, copy, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / changed).write_text((copy / changed).read_text() + change)
        with monkeypatch.context() as patch:
            patch.setattr(kept.lora_export.base, "__path__", [str(copy)])
            kept._versions.cache_clear()
            keys.append(kept.key_of(checkpoint, {}))
    kept._versions.cache_clear()
    assert keys[0] != keys[1]
    assert keys[0] == kept.key_of(checkpoint, {})


def test_an_entry_under_another_name_is_not_used(folder, large, monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_EXPORT_CACHE", str(tmp_path / "cache"))
    for cached in (False, True):
        capture_onnx(folder, tmp_path / f"{cached}.onnx", kv_cache=cached)
    one, other = (tmp_path / "cache" / "captures").glob("*.onnx")
    one.write_bytes(other.read_bytes())
    for cached in (False, True):
        graph, _ = capture_onnx(folder, tmp_path / f"{cached}.onnx", kv_cache=cached, force=True)
        assert any(value.name.startswith("past") for value in ir.load(graph).graph.inputs) == cached


def test_files_of_the_users_stay_in_the_cache(folder, large, monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_EXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "_MOST", 1)
    (tmp_path / "cache" / "captures").mkdir(parents=True)
    mine = tmp_path / "cache" / "captures" / "mine.onnx"
    mine.write_bytes(b"mine")
    for cached in (False, True):
        capture_onnx(folder, tmp_path / f"{cached}.onnx", kv_cache=cached)
    assert mine.read_bytes() == b"mine"
    assert len(list(mine.parent.glob("*.onnx"))) == 2


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX's owners")
def test_a_cache_that_others_can_write_to_is_not_used(folder, large, monkeypatch, tmp_path):
    """An entry says which weights go where, and a twin's proof says nothing of that."""
    monkeypatch.setenv("LORA_EXPORT_CACHE", str(tmp_path / "cache"))
    capture_onnx(folder, tmp_path / "m.onnx")
    captures = tmp_path / "cache" / "captures"
    (entry,) = captures.glob("*.onnx")
    key, tensors = entry.stem, Checkpoint.open(folder).tensors
    assert captures.stat().st_mode & 0o777 == 0o700
    assert kept.find(key, tensors) is not None
    captures.chmod(0o777)
    assert kept.find(key, tensors) is None
    captures.chmod(0o700)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: captures.stat().st_uid + 1)
        assert kept.find(key, tensors) is None
    assert kept.find(key, tensors) is not None


def test_a_folder_without_weights_is_refused_before_a_twin_is_made(folder, large, monkeypatch, tmp_path):
    shutil.copytree(folder, tmp_path / "base")
    save_file({"x": torch.zeros(4)}, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(prove, "save_twin", lambda *_: pytest.fail("a twin was made"))
    with pytest.raises(LoraExportError, match="lacks"):
        capture_onnx(tmp_path / "base", tmp_path / "m.onnx")


def test_a_twin_that_is_still_large_is_not_made(folder, large, monkeypatch, tmp_path):
    monkeypatch.setattr(prove, "_MOST_VALUES", 1000)
    monkeypatch.setattr(prove, "save_twin", lambda *_: pytest.fail("a twin was made"))
    with pytest.raises(LoraExportError, match=r"a small model of its config still has \d+,\d+ values"):
        capture_onnx(folder, tmp_path / "m.onnx", trace="outline")


def test_why_there_is_no_twin_is_not_kept(folder, large, monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_EXPORT_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(prove, "small_config", lambda *_: 1 / 0)
        graph, _ = capture_onnx(folder, tmp_path / "m.onnx")
        assert proof_of(graph)["of"] == "nothing"
    graph, _ = capture_onnx(folder, tmp_path / "m.onnx", force=True)
    assert proof_of(graph)["of"] == "twin"


def test_a_model_that_goes_another_way_for_long_texts(tmp_path):
    """BigBird attends in blocks from some length on; what was traced of it attends in full."""
    config = transformers.BigBirdConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=99
    )
    transformers.BigBirdForMaskedLM(config).save_pretrained(tmp_path / "base")
    with pytest.raises(GraphError, match="answers otherwise than PyTorch"):
        capture_onnx(tmp_path / "base", tmp_path / "m.onnx")


# Blocks of which 1040 tokens are too few: BigBird attends in them from (5 + 2 · 3) · 128 tokens on.
@pytest.mark.parametrize(
    ("name", "settings", "turn"),
    [
        ("BigBirdForMaskedLM", {"block_size": 128}, 1408),
        ("MiniMaxForCausalLM", {"block_size": 1500, "num_key_value_heads": 2}, 1500),
        ("T5ForConditionalGeneration", {}, 1000),
        ("LongT5ForConditionalGeneration", {"local_radius": 200}, 1000),
    ],
)
def test_a_long_run_is_longer_than_what_a_model_does_at_once(name, settings, turn):
    """Also where the config states no number of positions."""
    made = getattr(transformers, name)
    config = made.config_class(
        **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99} | settings
    )
    with torch.device("meta"):
        model = made(config)
    runs = gap._plain_runs(kind_of(model), model, {"input_ids": torch.ones(2, 7, dtype=torch.int64)})
    assert next(runs)["input_ids"].shape[1] > turn


# Graph, what ONNX Runtime says last, a part of the hint.
FAILING = {
    "one size": (
        "(int64[2, 7] input_ids) => (int64[2, 7] y) { y = Identity (input_ids) }",
        "index: 1 Got: 8",
    ),
    "a reshape": (
        "(int64[b, s] input_ids) => (int64[b, 7] y) <int64[2] to = {-1, 7}> { y = Reshape (input_ids, to) }",
        "requested shape:{-1,7}",
    ),
}


@pytest.mark.parametrize("name", FAILING)
def test_why_a_graph_does_not_run_is_said_to_the_end(name, tmp_path):
    text, said = FAILING[name]
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> g {text}')
    onnx.save(model, tmp_path / "m.onnx")
    run = {"input_ids": torch.ones(1, 8, dtype=torch.int64)}
    with pytest.raises(GraphError) as caught:
        gap._of_graph(gap._opened(tmp_path / "m.onnx"), [run], [{"y": run["input_ids"]}], False)
    assert said in str(caught.value)
    assert "onnxruntime_src" not in str(caught.value)
    assert ("in steps or pieces" in caught.value.hint) == (name == "one size")


def test_a_graph_that_the_cpu_can_not_load_may_be_for_another_runtime(tmp_path):
    text = "(float[b] x) => (float[b] y) { y = other.Nothing (x) }"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18, "other" : 1]> g {text}')
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(GraphError, match="other:Nothing") as caught:
        gap._opened(tmp_path / "m.onnx")
    assert "--no-twin" in caught.value.hint


def test_a_model_of_larger_blocks_goes_another_way_too(tmp_path):
    config = transformers.BigBirdConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=99,
        block_size=128,
    )
    transformers.BigBirdForMaskedLM(config).save_pretrained(tmp_path / "base")
    with pytest.raises(GraphError, match="answers otherwise than PyTorch"):
        capture_onnx(tmp_path / "base", tmp_path / "m.onnx")


def test_weights_that_are_links_are_not_shared(folder, tmp_path):
    """As in Hugging Face's cache, where a snapshot's files are links to blobs beside it."""
    base, blobs = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "models--a--b" / "blobs"
    base.mkdir(parents=True)
    shutil.copytree(folder, blobs)
    for file in blobs.iterdir():
        (base / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    with pytest.raises(LoraExportError, match=r"links out of"):
        capture_onnx(base, base / "m.onnx", share_base=True)
    assert not (base / "m.onnx").exists()


def test_weights_that_stay_in_the_folder(folder, monkeypatch, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "base")
    graph, data = capture_onnx(tmp_path / "base", tmp_path / "base" / "m.onnx", share_base=True)
    assert not data.exists()
    assert proof_of(graph)["of"] == "twin"
    ids = torch.arange(10).reshape(2, 5)
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((2, 5), np.int64)}
    got = onnxruntime.InferenceSession(graph).run(["logits"], feeds)[0]
    with torch.no_grad():
        wanted = model(ids).logits.numpy()
    np.testing.assert_allclose(got, wanted, atol=2e-6 * np.abs(wanted).max())
    # Another model's weights in the same place are refused.
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(GraphError, match="weights beside it have changed"):
        load_graph(graph)


@pytest.mark.parametrize(("limit", "state"), [(1 << 30, "ok"), (0, "sampled")])
def test_a_large_base_in_its_place_is_hashed_whole_up_to_a_limit(limit, state, folder, monkeypatch, tmp_path):
    shutil.copytree(folder, tmp_path / "base")
    monkeypatch.setattr(hashes, "_WHOLE_BYTES", 0)  # as if it had more than 64 MiB
    monkeypatch.setattr(hashes, "_SHARED_BYTES", limit)
    graph, _ = capture_onnx(tmp_path / "base", tmp_path / "base" / "m.onnx", share_base=True, twin=False)
    found = {file.path.name: file for file in verify(graph).files}
    assert found["model.safetensors"].state == state
    if state == "sampled":
        assert "captured in its place" in str(found["model.safetensors"].details)
    else:
        weights = tmp_path / "base" / "model.safetensors"
        changed = bytearray(weights.read_bytes())
        changed[-9] ^= 1
        weights.write_bytes(changed)
        assert {file.state for file in verify(graph).files if file.path == weights} == {"changed"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dtype": "float16"}, "no weight can stay"),
        ({"trace": "loaded"}, "do not stay in the checkpoint's files"),
        ({}, "can't be shared from"),
    ],
)
def test_weights_that_can_not_stay_there(options, text, folder, tmp_path):
    where = tmp_path if not options else folder
    with pytest.raises(OutputError, match=text):
        capture_onnx(folder, where / "m.onnx", share_base=True, **options)
    assert not (where / "m.onnx").exists()


def test_stacks_of_one_depth_have_each_of_their_kinds():
    """An encoder's and a decoder's twelve layers: only one of them has a kind that comes late."""
    config = transformers.BartConfig(encoder_layers=12, decoder_layers=12)
    templates = {"encoder.layers": (0, 1, *[1] * 9, 2), "decoder.layers": (0, *[1] * 7, 2, *[1] * 2, 3)}
    stacks = [
        Stack(path=path, depth=12, chosen=(0,), template=kinds, alike=()) for path, kinds in templates.items()
    ]
    for order in (stacks, stacks[::-1]):
        small = twin.small_config(config, order)
        for stack, depth in zip(stacks, (small.encoder_layers, small.decoder_layers), strict=True):
            assert set(stack.template[:depth]) == set(stack.template)


# Class, config, and what of it the twin has to keep.
FAMILIES = {
    "LlamaForCausalLM": ("LlamaConfig", {"num_key_value_heads": 8}, ["head_dim", "rope_parameters"]),
    "GPT2LMHeadModel": ("GPT2Config", {}, ["activation_function", "scale_attn_weights"]),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {}, ["head_dim", "query_pre_attn_scalar", "rope_parameters"]),
    "Qwen3ForCausalLM": ("Qwen3Config", {}, ["head_dim", "attention_bias"]),
    # A router whose groups have experts enough to choose from.
    "DeepseekV3ForCausalLM": (
        *("DeepseekV3Config", {"num_hidden_layers": 5}),
        ["n_group", "topk_group", "num_experts_per_tok", "kv_lora_rank"],
    ),
    "OPTForCausalLM": ("OPTConfig", {}, ["do_layer_norm_before", "activation_function"]),
    "BertForSequenceClassification": ("BertConfig", {}, ["type_vocab_size", "hidden_act"]),
    "T5ForConditionalGeneration": ("T5Config", {}, ["d_kv", "relative_attention_num_buckets"]),
    "ViTForImageClassification": ("ViTConfig", {}, ["image_size", "patch_size"]),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_twin_is_small_and_of_the_same_kind(name, tmp_path):
    config_name, settings, kept = FAMILIES[name]
    kind, config = getattr(transformers, name), getattr(transformers, config_name)(**settings)
    stacks = find_stacks(*build_outline(kind, getattr(transformers, config_name)(**settings), torch.float32))
    small = twin.small_config(config, stacks)
    assert [getattr(small, key) for key in kept] == [getattr(config, key) for key in kept]
    twin.save_twin(kind, small, tmp_path / "twin", tmp_path)
    made = kind.from_pretrained(tmp_path / "twin")
    if made.main_input_name == "input_ids" and made.can_generate() and not small.is_encoder_decoder:
        assert made(torch.arange(7)[None]).logits.shape == (1, 7, small.vocab_size)
    assert sum(parameter.numel() for parameter in made.parameters()) < 16e6
    layers = find_stacks(*build_outline(kind, small, torch.float32))
    assert len(layers) == len(stacks)
    for stack, own in zip(stacks, layers, strict=True):
        assert own.depth <= stack.depth
        # Each kind of layer, and one that is copied.
        assert {*map(type, made.get_submodule(own.path))}
        assert len(own.chosen) >= 3 or own.depth < 3
        assert np.ptp(own.template) == len(own.chosen) - 1


def a_llama_that(asks):
    """Return a class of Llamas whose code outside the layers asks something about their numbers."""

    class Asking(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            asks(self)

        def forward(self, input_ids, attention_mask=None, **more):
            scale = sum(2.0 for number in range(len(self.model.layers)) if number in self.config.special)
            return super().forward(input_ids, attention_mask=attention_mask, **more).logits * (1 + scale)

    return Asking


def run_cut(model):
    cut(model, find_stacks(model, {}))
    with torch.no_grad():
        model(torch.ones(1, 3, dtype=torch.long))


def test_layers_that_are_known_by_their_numbers_are_not_cut(monkeypatch):
    config = transformers.LlamaConfig(**SIZES)
    plain = transformers.LlamaForCausalLM(config)
    stacks = find_stacks(plain, {})
    assert len(stacks[0].chosen) < stacks[0].depth
    cut(plain, stacks)

    def refused(config, asks=lambda model: None):
        model = a_llama_that(asks)(config).eval()
        with pytest.raises(CannotCopy) as caught:
            run_cut(model)
        return str(caught.value)

    def marked(model):
        model.marks = ["a", "b", *"aaaa"]

    def sparse(model):
        model.marks = {2: "a"}

    assert "numbers of layers in special" in refused(transformers.LlamaConfig(**SIZES, special=[2, 4]))
    assert "an entry for each layer" in refused(transformers.LlamaConfig(**SIZES, special=[]), marked)
    assert "entries for single layers" in refused(transformers.LlamaConfig(**SIZES, special=[]), sparse)

    def uneven(model):
        monkeypatch.setattr(transformers.LlamaConfig, "is_heterogeneous", True)

    assert "per_layer_config" in refused(transformers.LlamaConfig(**SIZES, special=[]), uneven)


def test_an_outline_without_a_twin_is_not_written(folder, large, monkeypatch, tmp_path):
    def fails(*_):
        raise RuntimeError("too small")

    monkeypatch.setattr(prove, "small_config", fails)
    shutil.copytree(folder, tmp_path / "base")
    with pytest.raises(LoraExportError, match="no small model of its config can be made") as caught:
        capture_onnx(tmp_path / "base", tmp_path / "m.onnx", trace="outline")
    assert "--no-twin" in caught.value.hint
    with pytest.raises(LoraExportError) as caught:
        capture_onnx(tmp_path / "base", tmp_path / "base" / "m.onnx", share_base=True)
    assert "omit --share-base; or --no-twin" in caught.value.hint
    assert not (tmp_path / "m.onnx").exists()
    capture_onnx(tmp_path / "base", tmp_path / "m.onnx", trace="outline", twin=False)
    assert proof_of(tmp_path / "m.onnx")["of"] == "nothing"
