"""Capture, merge and swap a small model of each architecture, and write the table of ``docs/results``.

Run: python tools/architectures.py --workdir DIR [--only Llama BERT …] [--output FILE]
Every model has three layers and random weights. Its folder is captured (with its cache, if it has one), which
compares the graph with PyTorch; a random PEFT adapter on all its linear layers is merged and exposed, and
both graphs are compared with PEFT by ``check_parity``. Each model runs in a process of its own; what was
measured stays in DIR, and is not measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

_SECONDS = 900
TEXT = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
SLIDING = {**GROUPED, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
SLIDING["layer_types"] = SLIDING["layer_types"][:3]
EXPERTS = {**GROUPED, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4}
EXPERTS |= {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
HALVES = {
    "vocab_size": 160,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5 = {"d_model": 32, "num_layers": 3, "num_heads": 4, "d_ff": 48, "d_kv": 8, "vocab_size": 160}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
SOUND = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "vocab_size": 20,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
STAGES = {"hidden_sizes": [16, 32], "depths": [2, 2], "num_labels": 5}

# Name: model's class, config's class, settings. In the order of the table.
DECODERS = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 4}),
    "Ministral": ("MinistralForCausalLM", "MinistralConfig", SLIDING),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", GROUPED),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", {**SLIDING, "query_pre_attn_scalar": 8}),
    "Gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**SLIDING, "query_pre_attn_scalar": 8}),
    "Phi": ("PhiForCausalLM", "PhiConfig", GROUPED),
    "Phi-3": ("Phi3ForCausalLM", "Phi3Config", GROUPED),
    "SmolLM3": ("SmolLM3ForCausalLM", "SmolLM3Config", GROUPED),
    "Granite": ("GraniteForCausalLM", "GraniteConfig", GROUPED),
    "OLMo": ("OlmoForCausalLM", "OlmoConfig", GROUPED),
    "OLMo 2": ("Olmo2ForCausalLM", "Olmo2Config", GROUPED),
    "OLMo 3": ("Olmo3ForCausalLM", "Olmo3Config", SLIDING),
    "Cohere": ("CohereForCausalLM", "CohereConfig", GROUPED),
    "Cohere 2": ("Cohere2ForCausalLM", "Cohere2Config", SLIDING),
    "StableLM": ("StableLmForCausalLM", "StableLmConfig", GROUPED),
    "StarCoder 2": ("Starcoder2ForCausalLM", "Starcoder2Config", GROUPED),
    "GLM": ("GlmForCausalLM", "GlmConfig", GROUPED),
    "GLM-4": ("Glm4ForCausalLM", "Glm4Config", GROUPED),
    "Nemotron": ("NemotronForCausalLM", "NemotronConfig", GROUPED),
    "Ernie 4.5": ("Ernie4_5ForCausalLM", "Ernie4_5Config", GROUPED),
    "Hunyuan": ("HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Config", GROUPED),
    "EXAONE 4": ("Exaone4ForCausalLM", "Exaone4Config", SLIDING),
    "Seed-OSS": ("SeedOssForCausalLM", "SeedOssConfig", GROUPED),
    "Arcee": ("ArceeForCausalLM", "ArceeConfig", GROUPED),
    "Helium": ("HeliumForCausalLM", "HeliumConfig", GROUPED),
    "Persimmon": ("PersimmonForCausalLM", "PersimmonConfig", GROUPED),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 3, "n_head": 4, **TEXT}),
    "GPT-Neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            **TEXT,
            "num_layers": 3,
            "num_heads": 4,
            "attention_types": [[["global", "local", "global"], 1]],
            "window_size": 4,
        },
    ),
    "GPT-J": (
        *("GPTJForCausalLM", "GPTJConfig"),
        {**TEXT, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "rotary_dim": 4, "n_positions": 64},
    ),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    "GPTBigCode": (
        *("GPTBigCodeForCausalLM", "GPTBigCodeConfig"),
        {**TEXT, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "n_positions": 64},
    ),
    "CodeGen": (
        *("CodeGenForCausalLM", "CodeGenConfig"),
        {**TEXT, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "rotary_dim": 4, "n_positions": 64},
    ),
    "OPT": ("OPTForCausalLM", "OPTConfig", {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "BLOOM": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": 160, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    ),
    "Falcon": ("FalconForCausalLM", "FalconConfig", TEXT),
    "MPT": (
        *("MptForCausalLM", "MptConfig"),
        {"vocab_size": 160, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64},
    ),
    "XGLM": (
        *("XGLMForCausalLM", "XGLMConfig"),
        {**TEXT, "d_model": 32, "num_layers": 3, "attention_heads": 4, "ffn_dim": 48},
    ),
    "BioGPT": ("BioGptForCausalLM", "BioGptConfig", TEXT),
    "DeepSeek-V3": (
        *("DeepseekV3ForCausalLM", "DeepseekV3Config"),
        {
            **EXPERTS,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", EXPERTS),
    "Qwen2-MoE": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", EXPERTS),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", EXPERTS),
    "OLMoE": ("OlmoeForCausalLM", "OlmoeConfig", EXPERTS),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {**EXPERTS, **SLIDING}),
    "Mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 160, "hidden_size": 32, "num_hidden_layers": 3},
    ),
    "RWKV": ("RwkvForCausalLM", "RwkvConfig", {**TEXT, "attention_hidden_size": 32}),
}
ENCODERS = {
    "BERT": ("BertForSequenceClassification", "BertConfig", TEXT),
    "BERT, masked words": ("BertForMaskedLM", "BertConfig", TEXT),
    "RoBERTa": ("RobertaForTokenClassification", "RobertaConfig", TEXT),
    "XLM-RoBERTa": ("XLMRobertaModel", "XLMRobertaConfig", TEXT),
    "DistilBERT": (
        *("DistilBertForSequenceClassification", "DistilBertConfig"),
        {"vocab_size": 160, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48},
    ),
    "ELECTRA": ("ElectraForSequenceClassification", "ElectraConfig", {**TEXT, "embedding_size": 16}),
    "ALBERT": ("AlbertForSequenceClassification", "AlbertConfig", {**TEXT, "embedding_size": 16}),
    "MPNet": ("MPNetModel", "MPNetConfig", TEXT),
    "DeBERTa": ("DebertaForSequenceClassification", "DebertaConfig", {**TEXT, "relative_attention": True}),
    "DeBERTa v2/v3": (
        *("DebertaV2ForSequenceClassification", "DebertaV2Config"),
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "ModernBERT": (
        *("ModernBertForSequenceClassification", "ModernBertConfig"),
        {**TEXT, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8},
    ),
    "Longformer": (
        "LongformerForSequenceClassification",
        "LongformerConfig",
        {**TEXT, "attention_window": [8] * 3},
    ),
}
HALVED = {
    "T5": ("T5ForConditionalGeneration", "T5Config", T5),
    "BART": ("BartForConditionalGeneration", "BartConfig", HALVES),
    "Marian": ("MarianMTModel", "MarianConfig", HALVES),
    "mBART": ("MBartForConditionalGeneration", "MBartConfig", HALVES),
    "Pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", HALVES),
    "Whisper": (
        *("WhisperForConditionalGeneration", "WhisperConfig"),
        {**HALVES, "max_source_positions": 24, "max_target_positions": 20, "num_mel_bins": 16},
    ),
}
SEEN = {
    "ViT": ("ViTForImageClassification", "ViTConfig", VISION),
    "DeiT": ("DeiTForImageClassification", "DeiTConfig", VISION),
    "DINOv2": ("Dinov2Model", "Dinov2Config", VISION),
    "BEiT": ("BeitForImageClassification", "BeitConfig", VISION),
    "Swin": (
        *("SwinForImageClassification", "SwinConfig"),
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
    ),
    "ConvNeXt": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {**STAGES, "num_stages": 2, "image_size": 32},
    ),
    "ResNet": (
        *("ResNetForImageClassification", "ResNetConfig"),
        {**STAGES, "embedding_size": 16, "layer_type": "basic"},
    ),
    "SegFormer": (
        *("SegformerForSemanticSegmentation", "SegformerConfig"),
        {
            **STAGES,
            "num_attention_heads": [1, 2],
            "sr_ratios": [4, 2],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
            "num_encoder_blocks": 2,
            "decoder_hidden_size": 32,
        },
    ),
    "CLIP": ("CLIPModel", "CLIPConfig", {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16}),
    "SigLIP": ("SiglipModel", "SiglipConfig", {"text_config": TEXT, "vision_config": VISION}),
    "wav2vec 2.0": ("Wav2Vec2ForCTC", "Wav2Vec2Config", SOUND),
    "HuBERT": ("HubertForCTC", "HubertConfig", SOUND),
    "AST": (
        *("ASTForAudioClassification", "ASTConfig"),
        {**VISION, "max_length": 24, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8},
    ),
}
ARCHITECTURES = DECODERS | ENCODERS | HALVED | SEEN
# Layers of which PEFT's choice of all linear ones can't be trained, or answers nothing.
_DENSE = ["intermediate_dense", "output_dense"]
TARGETS = {"WavLM": _DENSE, "wav2vec 2.0": _DENSE, "HuBERT": _DENSE, "Mamba": ["in_proj"]}
# Its pooling is torch's MultiheadAttention, in which PEFT's branch of ``out_proj`` is never called.
TARGETS |= {"SigLIP": ["q_proj", "k_proj", "v_proj", "fc1", "fc2"]}
# Of models whose config has no size of images.
_PROCESSOR = '{"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}'
_HEAD = "| architecture | class | cache | captured | merged | swapped |\n|---|---|---|---|---|---|\n"
_HEADING = """# Architectures

A small model of each (three layers, random weights, float32), captured from its folder, with a random adapter
on all its linear layers. The errors are relative: of the captured graph the largest over outputs and inputs
(padded on either side, longer ones, several steps behind a cache), as `capture-onnx` measures it; of the
merged graph and of the one with exposed LoRA ‖candidate − PEFT‖ ÷ ‖PEFT‖ of the worst output, as
`lora-export parity` measures it. *refused* stands for an error that says why, in short.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument(
        "--only", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES), metavar="NAME"
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.workdir.mkdir(parents=True, exist_ok=True)
    if options.child:
        measure(options.child, options.workdir)
        return
    found = {}
    for name in options.only:
        found[name] = measured(name, options.workdir)
        print(row(name, found[name]), flush=True)
    if options.output:
        options.output.write_text(table(found), encoding="utf-8")


def measured(name: str, workdir: Path) -> dict[str, Any]:
    """Return what was measured of an architecture, now or before."""
    kept = workdir / f"{name.replace(' ', '_').replace('/', '-')}.json"
    if not kept.exists():
        again = [sys.executable, __file__, "--workdir", str(workdir), "--child", name]
        done = subprocess.run(again, capture_output=True, text=True, check=False, timeout=_SECONDS)
        kept.write_text(done.stdout if done.returncode == 0 else json.dumps({"fault": done.stderr[-2000:]}))
    found: dict[str, Any] = json.loads(kept.read_text().splitlines()[-1])
    return found


def measure(name: str, workdir: Path) -> None:
    """Print, as a line of JSON, what capturing, merging and swapping a model gives."""
    from lora_export import LoraExportError, check_parity, merge_onnx, swap_onnx
    from lora_export.graph.captured import Captured

    work = workdir / "work"
    shutil.rmtree(work, ignore_errors=True)
    found: dict[str, Any] = {}
    make(name, work)
    graph = work / "base" / "model.onnx"
    graph.parent.mkdir()
    try:
        found["cache"], metadata = capture(work / "model", graph, has_cache=name in DECODERS)
        found["proof"] = json.loads(metadata["lora_export.proof"])
        captured = Captured.from_metadata(metadata)
        found["kind"] = captured.kind if captured else ""
        for verb, way in (("merged", merge_onnx), ("swapped", swap_onnx)):
            out = work / verb / "model.onnx"
            try:
                if verb == "merged":
                    way(graph, work / "adapter", out)
                else:
                    way(graph, out, adapter=work / "adapter")
                report = check_parity(work / "model", out, work / "adapter", localise=False)
                found[verb] = max(entry.relative for entry in report.metrics)
                found[f"{verb} failed"] = [str(verdict) for verdict in report.failed]
            except LoraExportError as error:
                found[verb] = str(error)
    except LoraExportError as error:
        found["refused"] = str(error)
    print(json.dumps(found))


def capture(folder: Path, graph: Path, *, has_cache: bool) -> tuple[bool | str, dict[str, str]]:
    """Capture a folder, with a cache if that can be; return whether it has one, and the metadata."""
    import onnx

    from lora_export import LoraExportError, capture_onnx

    cache: bool | str = has_cache
    try:
        capture_onnx(folder, graph, kv_cache=has_cache)
    except LoraExportError as error:
        if not has_cache:
            raise
        cache = str(error)
        capture_onnx(folder, graph)
    props = onnx.load(graph, load_external_data=False).metadata_props
    return cache, {entry.key: entry.value for entry in props}


def make(name: str, work: Path) -> None:
    """Write a model whose every number counts, and an adapter of it."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    kind, config, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(work / "model")
    if name in ("ResNet", "SegFormer"):
        (work / "model" / "preprocessor_config.json").write_text(_PROCESSOR)
    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS.get(name, "all-linear"))
    )
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_B" in path:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(work / "adapter")


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the page."""
    text = _HEADING
    for title, names in (
        ("Decoders", DECODERS),
        ("Encoders", ENCODERS),
        ("Encoder–decoders", HALVED),
        ("Images and sound", SEEN),
    ):
        text += f"## {title}\n\n{_HEAD}"
        text += "".join(row(name, found[name]) + "\n" for name in names if name in found) + "\n"
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "onnxruntime")
    )
    return text + f"Measured by `python tools/architectures.py --workdir DIR` with {versions}, on a CPU.\n"


def row(name: str, found: dict[str, Any]) -> str:
    """Return an architecture's line of the table."""
    kind = f"`{ARCHITECTURES[name][0]}`"
    if "fault" in found or "refused" in found:
        return f"| {name} | {kind} | – | {_short(found.get('refused', found.get('fault', '')))} | – | – |"
    proof = found["proof"]
    cells = [f"{proof['error']:.1e}" if proof["of"] != "nothing" else _short(proof["reason"])]
    for verb in ("merged", "swapped"):
        value = found.get(verb)
        cells.append(_short(value) if isinstance(value, str) else f"{value:.1e}")
        if found.get(f"{verb} failed"):
            cells[-1] += " **failed**"
    cache = {True: "yes", False: "–"}.get(found["cache"]) if isinstance(found["cache"], bool) else "refused"
    return f"| {name} | {kind} | {cache} | " + " | ".join(cells) + " |"


def _short(error: str) -> str:
    first = error.strip().splitlines()[0] if error.strip() else "?"
    return f"*refused*: {first[:120]}".replace("|", "\\|")


if __name__ == "__main__":
    main()
