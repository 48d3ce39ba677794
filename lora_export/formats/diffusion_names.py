"""Which names only a diffusion model has, and which part of a pipeline a name belongs to.

diffusers puts the component in front (``unet.``, ``transformer.``, ``text_encoder_2.``); ai-toolkit,
diffusion-pipe and ComfyUI call the denoiser ``diffusion_model.`` whatever it is. All of their readers take
scaling 1 where a file says nothing, so it matters that no language model's names pass for these.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from lora_export.formats.wrappers import PREFIX

METADATA_KEY = "lora_adapter_metadata"
COMPONENT = re.compile(
    r"^(unet|transformer(?:_\d)?|text_encoder(?:_\d)?|prior|controlnet|text_conditioner)\."
)
_DENOISER = re.compile(r"^(?:model\.)?diffusion_model\.")
_UNET = re.compile(r"^(?:input|middle|output|down|mid|up)_blocks?\.")
# GPT-2, Falcon, DistilBERT, ChatGLM and MPT hold their layers in a submodule called `transformer` too.
_LANGUAGE = re.compile(
    r"^transformer\.(?:(?:h|layer|encoder|wte|wpe|word_embeddings?)\."
    r"|blocks\.\d+\.(?:attn\.(?:Wqkv|out_proj)|ffn\.(?:up|down)_proj)\.)"
)
_BLOCKS = re.compile(
    r"(?:^|\.)(?:(?:down|up|single|double|joint|input|output|transformer|single_transformer)_blocks"
    r"|(?:mid|middle)_block)\."
)
# Wan's blocks have no name of their own: known by what is in them, in its own spelling and in diffusers'.
_WAN = re.compile(
    r"^blocks\.\d+\.(?:(?:self|cross)_attn\.(?:[qkvo]|[kv]_img)|attn[12]\.to_\w+|ffn\.(?:0|2|net))\."
)


def strip_denoiser(path: str) -> tuple[str | None, str]:
    """Return ``unet`` or ``transformer`` and the path behind ``diffusion_model.``; None without that."""
    match = _DENOISER.match(path)
    if not match:
        return None, path
    rest = path[match.end() :]
    return ("unet" if _UNET.match(rest) else "transformer"), rest


def split_component(path: str) -> tuple[str | None, str]:
    """Return the component in front of a path, or None, and the path behind it."""
    denoiser, rest = strip_denoiser(path)
    if denoiser or _LANGUAGE.match(path):
        return denoiser, rest
    match = COMPONENT.match(path)
    return (match[1], path[match.end() :]) if match else (None, path)


def follows_diffusers(paths: Collection[str], metadata: Mapping[str, str]) -> bool:
    """Whether names in PEFT's spelling are to be read by diffusers' rules.

    Signs are a component in front, diffusers' own metadata, ``.alpha`` tensors (PEFT writes none), and names
    that only diffusion models have; none of it holds for names behind ``base_model.model.``.

    Args:
        paths: All paths of a file, wrappers removed.
        metadata: Of its header.
    """
    lora = [path for path in paths if ".lora_A." in path or ".lora_B." in path]
    if not lora or any(path.startswith(PREFIX) for path in lora):
        return False
    if METADATA_KEY in metadata or any(path.endswith(".alpha") for path in paths):
        return True
    return any(split_component(path)[0] or _BLOCKS.search(path) or _WAN.match(path) for path in lora)
