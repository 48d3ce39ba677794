"""With --fused a layer's attention is one node of ONNX, and the graph answers as PyTorch does."""

from __future__ import annotations

from collections import Counter

import onnx
import pytest
import torch
import transformers
from engine_graphs import run
from peft import LoraConfig, get_peft_model

from lora_export import (
    CheckpointError,
    bank_onnx,
    capture_onnx,
    check_parity,
    merge_onnx,
    swap_onnx,
)
from lora_export.base.capture import attention

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))


def gemma2():
    """Soft capping, and every second layer with a sliding window shorter than the tests' texts."""
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**GROUPED, head_dim=8, sliding_window=4))


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT))


def vit():
    sizes = {key: TEXT[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
    config = transformers.ViTConfig(**sizes, num_hidden_layers=2, image_size=16, patch_size=4)
    return transformers.ViTForImageClassification(config)


def bart():
    halves = {
        f"{half}_{key}": size
        for half in ("encoder", "decoder")
        for key, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
    }
    config = transformers.BartConfig(d_model=32, **halves, vocab_size=99, max_position_embeddings=64)
    return transformers.BartForConditionalGeneration(config)


def t5():
    config = transformers.T5Config(
        d_model=32, num_layers=2, num_heads=4, d_ff=48, d_kv=8, vocab_size=99, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def trained(make, folder, targets):
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(folder / "base")
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=targets))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    peft.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


LARGE = ("Attention", "RMSNormalization", "RotaryEmbedding")


def large_nodes(path):
    proto = onnx.load(path, load_external_data=False)
    assert proto.opset_import[0].version == attention.OPSET
    found = Counter(node.op_type for node in proto.graph.node if not node.domain)
    return tuple(found[name] for name in LARGE)


@pytest.mark.parametrize(
    ("make", "kv_cache", "targets", "count"),
    [
        pytest.param(llama, True, ["q_proj", "k_proj", "v_proj", "o_proj"], (2, 5, 4), id="llama, cache"),
        pytest.param(gemma2, True, ["q_proj", "o_proj"], (2, 9, 4), id="gemma2, cache"),
        pytest.param(bert, False, ["query", "value"], (2, 0, 0), id="bert"),
        pytest.param(vit, False, ["q_proj", "v_proj"], (2, 0, 0), id="vit"),
        pytest.param(bart, False, ["k_proj", "out_proj"], (6, 0, 0), id="bart"),
        pytest.param(t5, False, ["q", "o"], (6, 12, 0), id="t5, with a bias of positions"),
    ],
)
def test_the_graph_computes_what_the_model_does(make, kv_cache, targets, count, tmp_path):
    """Parity compares with padding on both sides, and decoders in several calls as well."""
    base, adapter = trained(make, tmp_path, targets)
    graph, _ = capture_onnx(base, tmp_path / "base.onnx", kv_cache=kv_cache, fused=True)
    assert large_nodes(graph) == count
    swap_onnx(graph, tmp_path / "swap.onnx", adapter=adapter)
    assert large_nodes(tmp_path / "swap.onnx") == count
    report = check_parity(base, tmp_path / "swap.onnx", adapter, samples=4)
    assert report.passed, report


def test_merged_and_in_a_bank(tmp_path):
    base, adapter = trained(llama, tmp_path, ["q_proj", "v_proj", "o_proj"])
    graph, _ = capture_onnx(base, tmp_path / "base.onnx", kv_cache=True, fused=True)
    merge_onnx(graph, adapter, tmp_path / "merged.onnx")
    bank_onnx(graph, {"a": adapter}, tmp_path / "bank.onnx")
    assert check_parity(base, tmp_path / "merged.onnx", adapter, samples=3).passed
    assert check_parity(base, tmp_path / "bank.onnx", {"a": adapter}, samples=3).passed


def test_halves(tmp_path):
    """Norms are computed in float32 between two casts, as transformers does."""
    base, adapter = trained(llama, tmp_path, ["q_proj", "down_proj"])
    graph, _ = capture_onnx(base, tmp_path / "base.onnx", dtype="float16", kv_cache=True, fused=True)
    assert large_nodes(graph) == (2, 5, 4)
    swap_onnx(graph, tmp_path / "swap.onnx", adapter=adapter)
    assert check_parity(base, tmp_path / "swap.onnx", adapter, samples=3).passed


def bloom():
    """It never calls the interface, but makes its mask for it."""
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=99)
    )


def gpt_oss():
    """Its softmax has a sink: one more score, which is of no token."""
    sizes = {**GROUPED, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, rope_scaling=None))


@pytest.mark.parametrize(
    ("make", "text"),
    [(bloom, "does not attend through transformers' interface"), (gpt_oss, "takes s_aux")],
)
def test_models_that_attend_in_a_way_of_their_own_are_refused(make, text, tmp_path):
    make().save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=text) as refused:
        capture_onnx(tmp_path / "base", tmp_path / "m.onnx", fused=True)
    assert "omit --fused" in refused.value.hint
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("fault", ["scaling", "mask"])
def test_another_result_is_refused(fault, tmp_path, monkeypatch):
    """A model that means something else by an argument than the operator does is told by its answers."""
    real = attention._attend

    def wrong(module, query, key, value, mask, **named):
        if fault == "scaling":
            named["scaling"] = 20 * named["scaling"]
        elif mask is not None:
            mask = torch.ones_like(mask)
        return real(module, query, key, value, mask, **named)

    monkeypatch.setattr(attention, "_attend", wrong)
    torch.manual_seed(0)
    bert().save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="computes something else with ONNX's Attention"):
        capture_onnx(tmp_path / "base", tmp_path / "m.onnx", fused=True, trace="loaded")


def test_a_folder_is_captured_so_by_the_verbs_that_take_one(tmp_path, capsys):
    base, adapter = trained(llama, tmp_path, ["q_proj", "v_proj"])
    merge_onnx(base, adapter, tmp_path / "merged.onnx", kv_cache=True, fused=True)
    assert large_nodes(tmp_path / "merged.onnx") == (2, 5, 4)
    assert check_parity(base, tmp_path / "merged.onnx", adapter, samples=3).passed
    given = ["--adapter", str(adapter), "--fused", "-o"]
    assert run(capsys, "swap-onnx", "--base", str(base), *given, str(tmp_path / "s.onnx"))[0] == 0
    # Without a cache the graph has no positions as an input: one table of angles is for all rows.
    assert large_nodes(tmp_path / "s.onnx") == (2, 5, 0)
    assert check_parity(base, tmp_path / "s.onnx", adapter, samples=3).passed
    for verb in ("swap-onnx", "merge-onnx"):
        code, _, said = run(
            capsys, verb, "--base", str(tmp_path / "s.onnx"), *given, str(tmp_path / "t.onnx")
        )
        assert code == 1
        assert "is a graph already: --fused" in said
