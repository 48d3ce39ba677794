"""Tiny random models of diffusers, and pipelines made from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

TEXT = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 60,
    "max_position_embeddings": 14,
    "eos_token_id": 59,
    "bos_token_id": 58,
    "pad_token_id": 59,
}
T5 = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 20, "d_kv": 8, "vocab_size": 60}
UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "sample_size": 8,
}
# The second text encoder's projection has 14 outputs; six sizes of 4 each.
XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 14 + 6 * 4,
    "use_linear_projection": True,
    "cross_attention_dim": 24,
    "transformer_layers_per_block": (1, 1),
}
BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (4, 8),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "sample_size": 16,
}


def unet(**more: Any) -> Any:
    return diffusers.UNet2DConditionModel(**UNET | more)


def unet_xl(**more: Any) -> Any:
    return unet(**XL | more)


def sd3(**more: Any) -> Any:
    config = {
        "sample_size": 32,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 28,
        "pos_embed_max_size": 24,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    return diffusers.SD3Transformer2DModel(**config | more)


def flux(**more: Any) -> Any:
    config = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 12,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 12,
        "axes_dims_rope": (4, 4, 4),
        "guidance_embeds": True,
    }
    return diffusers.FluxTransformer2DModel(**config | more)


def wan(**more: Any) -> Any:
    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 1,
        "rope_max_seq_len": 16,
    }
    return diffusers.WanTransformer3DModel(**config | more)


def vae(**more: Any) -> Any:
    return diffusers.AutoencoderKL(**BLOCKS | {"latent_channels": 4} | more)


def clip() -> Any:
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT, projection_dim=12))


def clip_projected() -> Any:
    config = transformers.CLIPTextConfig(**TEXT, projection_dim=14, hidden_act="gelu")
    return transformers.CLIPTextModelWithProjection(config)


def t5() -> Any:
    return transformers.T5EncoderModel(transformers.T5Config(**T5))


def tokenizer(folder: Path) -> Any:
    """Return CLIP's tokenizer of single letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += [f"<{number}>" for number in range(58 - len(words))] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=14
    )


def sd15_pipeline(folder: Path) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=tokenizer(folder),
        unet=unet(),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_pipeline(folder: Path) -> Any:
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(),
        text_encoder_2=clip_projected(),
        tokenizer=tokenizer(folder),
        tokenizer_2=tokenizer(folder),
        unet=unet_xl(),
        scheduler=diffusers.EulerDiscreteScheduler(),
    )


def sd3_pipeline(folder: Path) -> Any:
    return diffusers.StableDiffusion3Pipeline(
        transformer=sd3(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=clip_projected(),
        tokenizer=tokenizer(folder),
        text_encoder_2=clip_projected(),
        tokenizer_2=tokenizer(folder),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def flux_pipeline(folder: Path) -> Any:
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(),
        tokenizer=tokenizer(folder),
        text_encoder_2=t5(),
        tokenizer_2=None,
        transformer=flux(),
    )


PIPELINES: dict[str, Callable[[Path], Any]] = {
    "sd15": sd15_pipeline,
    "sdxl": sdxl_pipeline,
    "sd3": sd3_pipeline,
    "flux": flux_pipeline,
}


def saved(make: Callable[[], Any], folder: Path, seed: int = 0) -> Any:
    """Return a model in eval mode after saving it."""
    torch.manual_seed(seed)
    model = make().eval()
    model.save_pretrained(folder)
    return model


def saved_pipeline(name: str, folder: Path) -> Any:
    """Return a pipeline after saving it."""
    torch.manual_seed(0)
    pipeline = PIPELINES[name](folder.parent / "vocabulary")
    pipeline.save_pretrained(folder)
    for model in pipeline.components.values():
        if isinstance(model, torch.nn.Module):
            model.eval()
    return pipeline


def pairs_of(model: Any, ends: Iterable[str], rank: int = 2) -> dict[str, tuple[Any, Any]]:
    """Return a path → (A, B) for the Linears and convolutions whose paths have one of the ends."""
    found = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if path.endswith(tuple(ends)) and weight is not None and weight.ndim in (2, 4):
            a = torch.randn(rank, *weight.shape[1:]) / weight[0].numel() ** 0.5
            b = torch.randn(weight.shape[0], rank, *(1,) * (weight.ndim - 2)) * 0.5
            found[path] = (a, b)
    return found
