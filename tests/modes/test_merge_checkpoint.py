"""lora_export.modes.merge_checkpoint and `lora-export merge`: PEFT is the oracle."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
import transformers
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, build

from lora_export.adapter import Adapter, LoraModule
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.families import CONV1D_FAMILIES, source_folder
from lora_export.commands import merge as command
from lora_export.commands.merge import merge
from lora_export.errors import AdapterError, CheckpointError, OutputError, SiteError
from lora_export.modes.merge_checkpoint import merge_checkpoint
from lora_export.modes.merging.into_checkpoint import DTYPES

CASES = [(arch, feature) for arch, spec in ARCHITECTURES.items() for feature in spec.features]


def answer(arch, folder):
    """Return the main output of a saved checkpoint, loaded by its own library."""
    model = build(arch)
    with tiny.quiet():
        if hasattr(model, "save_pretrained"):
            model, info = type(model).from_pretrained(folder, output_loading_info=True)
            assert not info["missing_keys"]
            assert not info["unexpected_keys"]
        else:
            model.load_state_dict(load_file(folder / "model.safetensors"))
    return tiny._answer(model.float().eval(), arch)


def linear(path, out_dim, in_dim, rank=2, seed=0, scale=0.05, **more):
    rng = np.random.default_rng(seed)
    a = (rng.standard_normal((rank, in_dim)) * scale).astype(np.float32)
    b = (rng.standard_normal((out_dim, rank)) * scale).astype(np.float32)
    names = (f"{path}.lora_A.weight", f"{path}.lora_B.weight")
    return LoraModule(path, "linear", a, b, alpha=4.0, rank=rank, tensor_names=names, **more)


def adapter_of(*modules, name="task", **more):
    names = tuple(n for m in modules for n in m.tensor_names)
    return Adapter(name, f"/nowhere/{name}", "peft", {m.key: m for m in modules}, tensor_names=names, **more)


def small_base(folder, dtype=torch.float32, shards=1, config=None, **tensors):
    """Save ``up`` and ``down`` of shapes (6, 4) and (4, 6) in one or two shards."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    values = {
        "model.up.weight": torch.randn(6, 4, generator=generator).to(dtype),
        "model.down.weight": torch.randn(4, 6, generator=generator).to(dtype),
        "model.steps": torch.arange(3),
        **tensors,
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "dtype": "float32"} | (config or {})))
    if shards == 1:
        save_file(values, folder / "model.safetensors", metadata={"format": "pt", "note": "kept"})
        return folder
    names = list(values)
    weight_map = {}
    for i, part in enumerate((names[:1], names[1:])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({n: values[n] for n in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


UP = linear("model.up", 6, 4)


# --- agrees with PEFT --------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "feature"), CASES, ids=lambda v: v)
def test_output_loads_and_answers_like_peft(tmp_path, arch, feature):
    path = tiny.adapter(arch, feature)
    report = merge_checkpoint(tiny.checkpoint(arch), path, tmp_path / "out")
    assert not report.plan.refused
    got = answer(arch, tmp_path / "out")
    assert tiny.relative_error(got, tiny.reference(arch, path, merged=False)) <= 2e-6
    assert tiny.relative_error(got, tiny.base_reference(arch)) > 1e-3


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_blend_is_the_sum_of_deltas(tmp_path, arch):
    from peft import PeftModel

    paths, weights = [tiny.adapter(arch), tiny.adapter(arch, seed=1)], [0.7, -0.3]
    merge_checkpoint(tiny.checkpoint(arch), paths, tmp_path / "out", weights=weights)
    with tiny.quiet():
        model = PeftModel.from_pretrained(build(arch), paths[0], adapter_name="a")
        model.load_adapter(paths[1], adapter_name="b")
        # PEFT's own "cat" takes the root of negative weights away; its merge of scaled adapters doesn't.
        for layer in model.modules():
            if hasattr(layer, "scale_layer") and hasattr(layer, "scaling"):
                layer.set_scale("a", 0.7)
                layer.set_scale("b", -0.3)
        merged = model.merge_and_unload(adapter_names=["a", "b"])
    expected = tiny._answer(merged, arch)
    assert tiny.relative_error(answer(arch, tmp_path / "out"), expected) <= 2e-6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_the_float32_sum_rounded_once(tmp_path, dtype):
    kind = getattr(torch, dtype)
    base = tmp_path / "base"
    shutil.copytree(tiny.checkpoint("llama"), base)
    stored = {name: value.to(kind) for name, value in load_file(base / "model.safetensors").items()}
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    path = tiny.adapter("llama")
    merge_checkpoint(base, path, tmp_path / "wide", dtype="float32")
    report = merge_checkpoint(base, path, tmp_path / "out", rounding="exact")
    exact = load_file(tmp_path / "wide" / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in found.items():
        assert value.dtype == kind
        assert torch.equal(value, exact[name].to(kind)), name
    assert 0 < report.total.relative < 0.5


def test_dtype_is_said_in_header_config_and_index(tmp_path):
    base = small_base(tmp_path / "base", shards=2)
    merge_checkpoint(base, adapter_of(UP), tmp_path / "out", dtype="bfloat16")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * 48 + 3 * 8
    found = {}
    for file in sorted(set(index["weight_map"].values())):
        found |= load_file(tmp_path / "out" / file)
    assert found["model.down.weight"].dtype == torch.bfloat16
    assert torch.equal(found["model.steps"], torch.arange(3))
    exact = load_file(base / "model-00001-of-00002.safetensors")["model.up.weight"].numpy()
    left, right = UP.factors()
    assert torch.equal(found["model.up.weight"], torch.from_numpy(exact + left @ right).bfloat16())


def test_everything_else_stays_as_it_was(tmp_path):
    base = small_base(tmp_path / "base", torch.bfloat16)
    (base / "tokenizer.json").write_text("{}")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling/config.json").write_text("{}")
    for name in ("adapter_model.safetensors", "pytorch_model.bin", "adapter_config.json", ".hidden"):
        (base / name).write_bytes(b"x")
    report = merge_checkpoint(base, adapter_of(UP), tmp_path / "out")
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "1_Pooling", "config.json", "lora.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert report.left_out == ("adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin")
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    before, after = Checkpoint.open(base).shards[0], Checkpoint.open(out).shards[0]
    start = before.data_start
    assert after.path.read_bytes()[:start] == before.path.read_bytes()[:start]
    for name in ("model.down.weight", "model.steps"):
        assert np.array_equal(Checkpoint.open(out).read(name), Checkpoint.open(base).read(name))
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "kept"}


def test_same_input_same_bytes(tmp_path):
    for out in ("a", "b"):
        merge_checkpoint(tiny.checkpoint("llama"), tiny.adapter("llama"), tmp_path / out)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


# --- tied heads --------------------------------------------------------------------------------------


def tied_llama(folder, target, store_head=False, **options):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with tiny.quiet():
        model = LlamaForCausalLM(config).eval()
        model.save_pretrained(folder / "base")
        if store_head:
            stored = load_file(folder / "base/model.safetensors")
            stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
            save_file(stored, folder / "base/model.safetensors", metadata={"format": "pt"})
        lora = LoraConfig(r=2, target_modules=target, init_lora_weights=False, **options)
        peft = get_peft_model(model, lora)
        torch.nn.init.normal_(next(p for n, p in peft.named_parameters() if "_B" in n), std=0.1)
        peft.save_pretrained(folder / "adapter", save_embedding_layers=False)
        ids = torch.arange(12).reshape(2, 6)
        expected = peft(ids).logits.detach()
        merge_checkpoint(folder / "base", folder / "adapter", folder / "out")
        merged = LlamaForCausalLM.from_pretrained(folder / "out")
    return tiny.relative_error(merged(ids).logits.detach().numpy(), expected.numpy()), merged


@pytest.mark.parametrize("store_head", [False, True])
@pytest.mark.parametrize("target", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens", "q_proj"]])
def test_a_tied_head_is_untied_and_nothing_else_changes(tmp_path, target, store_head):
    error, merged = tied_llama(tmp_path, target, store_head)
    assert error <= 2e-6
    assert merged.config.tie_word_embeddings is False
    before = load_file(tmp_path / "base/model.safetensors")["model.embed_tokens.weight"]
    same = torch.equal(merged.model.embed_tokens.weight, before)
    assert same == ("embed_tokens" not in target)


@pytest.mark.parametrize("store_head", [False, True])
def test_an_adapter_trained_tied_stays_tied(tmp_path, store_head):
    error, merged = tied_llama(tmp_path, ["embed_tokens"], store_head, ensure_weight_tying=True)
    assert error <= 2e-6
    assert merged.config.tie_word_embeddings is True


def test_a_head_tied_in_another_way_is_refused(tmp_path):
    table = {"bert.embeddings.word_embeddings.weight": torch.zeros(9, 4)}
    base = small_base(
        tmp_path / "base", config={"architectures": ["BertForMaskedLM"], "tie_word_embeddings": True}, **table
    )
    module = linear("bert.embeddings.word_embeddings", 9, 4)
    with pytest.raises(SiteError, match="head are tied"):
        merge_checkpoint(base, adapter_of(module, UP), tmp_path / "out")


@pytest.mark.parametrize("rows", [{"vocab_size": 9}, {"input_vocab_size": 9, "output_vocab_size": 9}, {}])
@pytest.mark.parametrize("kinds", [["FooForCausalLM"], ["FooModel"], []])
@pytest.mark.parametrize("table", ["emb", "input_embeds_layers.1"])
def test_a_tie_of_an_unknown_class_is_never_a_guess(tmp_path, table, kinds, rows):
    """The config says that something is tied, and nobody knows what to what."""
    config = {"model_type": "foo", "tie_word_embeddings": True, "architectures": kinds, **rows}
    tensors = {f"{table}.weight": torch.zeros(9, 4), "layers.0.up.weight": torch.zeros(6, 4)}
    base = small_base(tmp_path / "base", config=config, **tensors)
    with pytest.raises(SiteError, match="tied"):
        merge_checkpoint(base, adapter_of(linear(table, 9, 4)), tmp_path / "out")
    merge_checkpoint(base, adapter_of(linear("layers.0.up", 6, 4)), tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors")["layers.0.up.weight"].any()


# --- orientation -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "path", "flag", "transposed"),
    [
        ({"model_type": "gpt2"}, "h.c_proj", False, True),
        ({"model_type": "gpt2"}, "h.score", True, False),
        ({"model_type": "own"}, "h.c_proj", True, True),
        ({"model_type": "own"}, "h.c_proj", False, False),
        # PEFT ignores the flag on an nn.Linear.
        ({"model_type": "llama"}, "model.q_proj", True, False),
        (
            {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}},
            "h.c_proj",
            False,
            True,
        ),
        ({"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}, "e.query", True, False),
    ],
)
def test_square_weights(tmp_path, config, path, flag, transposed):
    base = small_base(tmp_path / "base", config=config, **{f"{path}.weight": torch.zeros(5, 5)})
    module = linear(path, 5, 5)
    merge_checkpoint(base, adapter_of(module, fan_in_fan_out=flag), tmp_path / "out")
    left, right = module.factors()
    found = load_file(tmp_path / "out/model.safetensors")[f"{path}.weight"].numpy()
    assert np.allclose(found, (left @ right).T if transposed else left @ right, atol=1e-7)


@pytest.mark.parametrize("family", ["ResNet", "RegNet"])
def test_norms_with_a_count_of_batches(tmp_path, family):
    """PEFT saves the count of a batch norm, an integer, with the norm: inference doesn't read it."""
    torch.manual_seed(0)
    kind = getattr(transformers, f"{family}ForImageClassification")
    config = getattr(transformers, f"{family}Config")(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]
    )
    model = kind(config).eval()
    model.save_pretrained(tmp_path / "base")
    lora = LoraConfig(
        r=2, target_modules=["classifier.1"], modules_to_save=["normalization"], init_lora_weights=False
    )
    adapted = get_peft_model(model, lora).eval()
    for name, values in adapted.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.uniform_(values, 0.5, 1.5)
    adapted.save_pretrained(tmp_path / "adapter")
    images = torch.randn(2, 3, 32, 32)
    expected = adapted(images).logits.detach()
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = kind.from_pretrained(tmp_path / "out").eval()
    assert tiny.relative_error(merged(images).logits.detach().numpy(), expected.numpy()) <= 1e-5


def test_families_with_conv1d_are_those_of_transformers():
    models = source_folder("gpt2").parent
    using = {
        file.parent for file in models.glob("*/modeling_*.py") if re.search(r"\bConv1D\(", file.read_text())
    }
    assert {source_folder(family) for family in CONV1D_FAMILIES} == using


@pytest.mark.parametrize(
    ("options", "encoder"),
    [
        ({"target_modules": "all-linear"}, "ViT"),
        ({"target_modules": ["q_proj", "v_proj", "c_attn"], "use_dora": True}, "ViT"),
        ({"target_modules": ["query", "value", "c_proj"]}, "Bert"),
    ],
)
def test_linear_and_conv1d_in_one_model(tmp_path, options, encoder):
    """PEFT writes the ``fan_in_fan_out`` of the module that it replaced last."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    if encoder == "ViT":
        own, kind = transformers.ViTConfig(image_size=16, patch_size=8, **sizes), "VisionEncoderDecoder"
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    else:
        own, kind = transformers.BertConfig(vocab_size=64, **sizes), "EncoderDecoder"
        inputs = {"input_ids": torch.randint(3, 64, (2, 5))}
    other = transformers.GPT2Config(
        n_embd=32,
        n_head=4,
        n_layer=1,
        vocab_size=64,
        n_positions=32,
        add_cross_attention=True,
        is_decoder=True,
    )
    config = getattr(transformers, f"{kind}Config").from_encoder_decoder_configs(own, other)
    kind = getattr(transformers, f"{kind}Model")
    model = kind(config).eval()
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **options)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.randint(3, 64, (2, 6))
    expected = adapted(**inputs, decoder_input_ids=ids).logits.detach()
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = kind.from_pretrained(tmp_path / "out").eval()
    got = merged(**inputs, decoder_input_ids=ids).logits.detach()
    assert tiny.relative_error(got.numpy(), expected.numpy()) <= 1e-5


# --- bad input ---------------------------------------------------------------------------------------


def refused(error, base, adapter, out, **options):
    """Return the error of a merge that must leave nothing behind."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(error) as caught:
        merge_checkpoint(base, adapter, out, **options)
    assert sorted(out.parent.iterdir()) == before
    assert caught.value.hint
    return caught.value


def test_wrong_base_lists_every_shape(tmp_path):
    base = small_base(tmp_path / "base")
    modules = [linear("model.up", 8, 4), linear("model.down", 4, 8)]
    error = refused(SiteError, base, adapter_of(*modules, base_model="org/other"), tmp_path / "out")
    assert len(error.problems) == 2
    assert "(6, 4)" in error.problems[0]
    assert "(8, 4)" in error.problems[0]
    assert "org/other" in error.hint


def test_another_architecture(tmp_path):
    base = small_base(tmp_path / "base")
    for options in ({}, {"allow_unmatched": True}):
        error = refused(
            AdapterError, base, adapter_of(linear("h.0.c_attn", 7, 5)), tmp_path / "out", **options
        )
        assert "another architecture" in error.message
        assert any("h.0.c_attn" in line for line in error.problems)
        assert any("model.up.weight" in line for line in error.problems)


def test_unmatched_modules(tmp_path):
    base = small_base(tmp_path / "base")
    adapter = adapter_of(UP, linear("model.gone", 6, 4), linear("model.lost", 6, 4))
    error = refused(SiteError, base, adapter, tmp_path / "out")
    assert [line.split()[0] for line in error.problems] == ["model.gone.weight", "model.lost.weight"]
    report = merge_checkpoint(base, adapter, tmp_path / "out", allow_unmatched=True)
    assert len(report.plan.refused) == 2
    manifest = json.loads((tmp_path / "out/lora.json").read_text())
    assert [row["action"] for row in manifest["plan"]["rows"]] == ["merge", "refused", "refused"]


def test_a_tensor_without_a_module_is_a_problem(tmp_path):
    adapter = Adapter("t", "/nowhere/t", "peft", {UP.key: UP}, tensor_names=(*UP.tensor_names, "stray"))
    error = refused(SiteError, small_base(tmp_path / "base"), adapter, tmp_path / "out")
    assert error.problems == ("stray   no rule for it",)


def test_ambiguous_names(tmp_path):
    twice = {"vision.up.weight": torch.zeros(6, 4)}
    base = small_base(tmp_path / "base", **twice)
    error = refused(SiteError, base, adapter_of(linear("up", 6, 4)), tmp_path / "out")
    assert "may be model.up.weight, vision.up.weight" in error.problems[0]


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (linear("model.up", 6, 4, lora_bias=np.ones(6, np.float32)), "the base has none"),
        (linear("model.up", 6, 4, groups=2), "2 groups"),
        (linear("model.steps_", 6, 4, parameter="weight"), "stored as I64"),
    ],
)
def test_what_cannot_be_merged(tmp_path, module, says):
    base = small_base(tmp_path / "base", **{"model.steps_.weight": torch.zeros(6, 4, dtype=torch.int64)})
    assert says in refused(SiteError, base, adapter_of(module), tmp_path / "out").problems[0]


def test_dora_and_replacements_cannot_be_blended(tmp_path):
    base = small_base(tmp_path / "base")
    dora = adapter_of(linear("model.up", 6, 4, magnitude=np.ones(6, np.float32)))
    assert "DoRA" in refused(AdapterError, base, dora, tmp_path / "out", weights=[0.5]).problems[0]
    assert "DoRA" in refused(AdapterError, base, [dora, adapter_of(UP)], tmp_path / "out").problems[0]


def test_an_adapter_is_not_merged_twice(tmp_path):
    base, adapter = small_base(tmp_path / "base"), adapter_of(UP, sha256="ab")
    merge_checkpoint(base, adapter, tmp_path / "out")
    error = refused(AdapterError, tmp_path / "out", adapter, tmp_path / "again")
    assert error.problems == ("task (as 'task')",)


def test_quantised_base(tmp_path):
    base = small_base(tmp_path / "base", config={"quantization_config": {"quant_method": "gptq"}})
    assert "gptq" in refused(CheckpointError, base, adapter_of(UP), tmp_path / "out").message


def test_overflow_names_modules_of_all_shards(tmp_path):
    base = small_base(tmp_path / "base", shards=2)
    big = [linear("model.up", 6, 4, scale=300), linear("model.down", 4, 6, scale=300)]
    error = refused(CheckpointError, base, adapter_of(*big), tmp_path / "out", dtype="float16")
    assert [line.split()[0] for line in error.problems] == ["model.up", "model.down"]


def test_output_rules(tmp_path):
    base, adapter = small_base(tmp_path / "base"), adapter_of(UP)
    out = tmp_path / "out"
    for target, force in itertools.product((base, base.parent), (False, True)):
        error = refused(OutputError, base, adapter, target, force=force)
        assert "would replace a file that is read" in error.message
    assert "is in the base" in refused(OutputError, base, adapter, base / "merged").message
    assert "dtype" in refused(OutputError, base, adapter, out, dtype="int8").message
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("x")
    model = small_base(tmp_path / "model")
    for precious in (tmp_path / "thesis", model):
        before = sorted(path.name for path in precious.iterdir())
        assert "no merge has written it" in refused(OutputError, base, adapter, precious, force=True).message
        assert sorted(path.name for path in precious.iterdir()) == before
    merge_checkpoint(base, adapter, out)
    assert "exists" in refused(OutputError, base, adapter, out).message
    (out / "stale.txt").write_text("x")
    assert refused(OutputError, base, adapter, out, force=True).problems == ("stale.txt",)
    (out / "stale.txt").unlink()
    merge_checkpoint(base, adapter, out, force=True)


def test_unwritable_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert (
        "cannot write"
        in refused(OutputError, small_base(tmp_path / "b"), adapter_of(UP), tmp_path / "out").message
    )


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_full_disk_keeps_the_old_output(tmp_path, monkeypatch, call):
    base, out = small_base(tmp_path / "base"), tmp_path / "out"
    merge_checkpoint(base, adapter_of(UP), out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    error = refused(OutputError, base, adapter_of(UP), out, force=True)
    assert "nothing was replaced" in error.message
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_too_small_disk_is_seen_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    error = refused(OutputError, small_base(tmp_path / "base"), adapter_of(UP), tmp_path / "out")
    assert "needs" in error.message
    assert "0 MB free" in error.message


# --- the command -------------------------------------------------------------------------------------


def test_command(tmp_path):
    assert tuple(DTYPES) == command.DTYPES
    args = ["--base", str(tiny.checkpoint("llama")), "--adapter", str(tiny.adapter("llama"))]
    plan = CliRunner().invoke(merge, [*args, "-o", str(tmp_path / "out"), "--dry-run"])
    assert plan.exit_code == 0
    assert "model.layers.0.self_attn.q_proj.weight" in plan.stdout
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(merge, [*args, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0
    assert "rounding: nothing of the adapter's change was lost" in done.stdout
    as_json = CliRunner().invoke(merge, [*args, "-o", str(tmp_path / "out"), "--force", "--json"])
    assert json.loads(as_json.stdout)["rounding"]["total"]["relative_error"] == 0
    quiet = CliRunner().invoke(merge, [*args, "-o", str(tmp_path / "out"), "--force", "--quiet"])
    assert quiet.stdout == ""


def test_command_warns_where_rounding_eats_the_adapter(tmp_path):
    base = small_base(tmp_path / "base", torch.bfloat16)
    faint = linear("model.up", 6, 4, scale=0.01)
    save = tmp_path / "adapter"
    from lora_export.formats import save_adapter

    save_adapter(adapter_of(faint), save)
    result = CliRunner().invoke(
        merge, ["--base", str(base), "--adapter", str(save), "-o", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    assert "lost much of the adapter" in result.stderr
    assert "--dtype float32" in result.stderr


# --- processes ---------------------------------------------------------------------------------------

RUN = "import sys; from lora_export.cli import main; main(sys.argv[1:])"


def large_base(folder, blocks):
    """Write ``blocks`` bfloat16 weights of (2048, 8192), 33.5 MB each, and a PEFT adapter for all."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    weight = torch.randn(2048, 8192, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.05
    save_file({f"l.{i}.w.weight": weight.clone() for i in range(blocks)}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    from lora_export.formats import save_adapter

    save_adapter(adapter_of(*(linear(f"l.{i}.w", 2048, 8192, 16, i) for i in range(blocks))), adapter)
    return ["merge", "--base", str(base), "--adapter", str(adapter), "-o", str(folder / "out")]


# A small process between pytest and the command: a child's peak counts what its parent held at the fork.
MEASURE = """
import os, subprocess, sys
run = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, text=True)
said = run.stdout.read()
_, status, usage = os.wait4(run.pid, 0)
print(said.splitlines()[-1], status, usage.ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_is_small_and_torch_is_not_imported(tmp_path):
    arguments = large_base(tmp_path, 10)
    said = "print('torch' in sys.modules, 'onnx_ir' in sys.modules, 'rich' in sys.modules)"
    code = RUN.replace("main(sys.argv[1:])", f"\ntry: main(sys.argv[1:])\nfinally: {said}")
    command = [sys.executable, "-c", MEASURE, sys.executable, "-c", code, *arguments]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert found[:4] == ["False", "False", "False", "0"]
    # 335 MB of weights, 6.5 MB of adapter.
    assert int(found[4]) <= 75


@pytest.mark.slow
def test_killed_while_writing(tmp_path):
    arguments = large_base(tmp_path, 10)
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    (out / "lora.json").write_text('{"files": {"config.json": {}}}')
    with subprocess.Popen([sys.executable, "-c", RUN, *arguments, "--force", "--quiet"]) as run:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("out.tmp-*/model.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.001)
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "lora.json"]
    assert (out / "config.json").read_text() == "old"


def test_bfloat16_agrees_with_peft_in_place(tmp_path):
    """PEFT adds the float32 product to the bfloat16 weight in place, which rounds once as well."""
    base = small_base(tmp_path / "base", torch.bfloat16)
    weight = load_file(base / "model.safetensors")["model.up.weight"]
    merge_checkpoint(base, adapter_of(UP), tmp_path / "out")
    delta = torch.from_numpy(UP.lora_b) @ torch.from_numpy(UP.lora_a) * UP.scaling
    expected = (weight.float() + delta).bfloat16()
    found = Checkpoint.open(tmp_path / "out").read("model.up.weight")
    assert found.dtype == np.dtype(ml_dtypes.bfloat16)
    assert np.array_equal(found.astype(np.float32), expected.float().numpy())


def test_paths_may_be_given(tmp_path):
    report = merge_checkpoint(str(small_base(tmp_path / "base")), [adapter_of(UP)], Path(tmp_path / "out"))
    assert report.as_dict()["plan"]["rows"][0]["place"] == "model.up.weight"


@pytest.mark.parametrize(
    ("stored", "kernel"), [((6, 4), (2,)), ((6, 4), (2, 2)), ((6, 4, 1), (2,)), ((6, 4, 1, 1), (1, 4))]
)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_kernel_that_is_not_of_ones_has_no_place_in_a_linear(tmp_path, stored, kernel, rows):
    """Flattened it has as many columns as the weight."""
    size = int(np.prod(kernel))
    a = np.ones((rows, 4 // size, *kernel), np.float32)
    b = np.ones((6, rows, *(1 for _ in kernel)), np.float32)
    names = ("model.mix.lora_A.weight", "model.mix.lora_B.weight")
    conv = LoraModule("model.mix", "conv", a, b, alpha=4.0, rank=rows, tensor_names=names)
    base = small_base(tmp_path / "base", **{"model.mix.weight": torch.ones(stored)})
    with pytest.raises(SiteError) as caught:
        merge_checkpoint(base, adapter_of(conv), tmp_path / "out")
    assert f"stored with shape {stored}" in str(caught.value.problems)
    ones = (1,) * len(kernel)
    a, b = np.ones((rows, 4, *ones), np.float32), np.ones((6, rows, *ones), np.float32)
    merge_checkpoint(base, adapter_of(dataclasses.replace(conv, lora_a=a, lora_b=b)), tmp_path / "pointwise")
    merged = load_file(tmp_path / "pointwise" / "model.safetensors")["model.mix.weight"]
    np.testing.assert_array_equal(merged, np.full(stored, 1 + conv.scaling * rows))
