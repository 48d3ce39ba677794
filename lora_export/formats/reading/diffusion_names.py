"""Recognise the names of diffusion models, and the part of a pipeline that a name belongs to.

diffusers puts the component in front (``unet.``, ``transformer.``, ``text_encoder_2.``); ai-toolkit,
diffusion-pipe and ComfyUI call every denoiser ``diffusion_model.``. All of their readers use scaling 1 if a
file states nothing, so a language model's names must not be mistaken for these.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from lora_export.formats.reading.wrappers import PREFIX

METADATA_KEY = "lora_adapter_metadata"
COMPONENT = re.compile(
    r"^(unet|transformer(?:_\d)?|text_encoder(?:_\d)?|prior|controlnet|text_conditioner)\."
)
_DENOISER = re.compile(r"^(?:model\.)?diffusion_model\.")
_UNET = re.compile(r"^(?:input|middle|output|down|mid|up)_blocks?\.")
# Language models that also hold their layers in a submodule called `transformer`: GPT-2, Falcon, DistilBERT,
# XLNet, XLM, ChatGLM, MPT, DBRX, CLIP's text tower; in `transformer.layers`, all names that diffusers lacks.
_LANGUAGE = re.compile(
    r"^transformer\.(?:(?:h|layer|encoder|wte|wpe|word_embeddings?|attentions|ffns|resblocks)\."
    r"|blocks\.\d+\.(?:attn\.(?:Wqkv|out_proj)|ffn\.(?:up_proj|down_proj|experts|router)|norm_attn_norm)\."
    r"|layers\.\d+\.(?!(?:attn|attention|self_attn)\.to_|feed_forward\.|adaLN))"
)
_BLOCKS = re.compile(
    r"(?:^|\.)(?:(?:down|up|single|double|joint|input|output|transformer|single_transformer)_blocks"
    r"|(?:mid|middle)_block)\."
)
# Wan's blocks have an ordinary name: they are known by their modules, in its own spelling and in diffusers'.
_WAN = re.compile(
    r"^blocks\.\d+\.(?:(?:self|cross)_attn\.(?:[qkvo]|[kv]_img)|attn[12]\.to_\w+|ffn\.(?:0|2|net))\."
)
_ATTENTION = re.compile(r"\.(?:attn\d?|attention)\.(?:to_[qkv]|to_out\.0)\.")


# XLabs' processors of FLUX.1: two streams in a double block, one in a single one.
_XLABS = re.compile(r"^(?P<block>(?P<kind>double|single)_blocks\.\d+)\.processor\.(?P<leaf>qkv|proj)$")


def xlabs_path(path: str, stream: str) -> str | None:
    """Return Black Forest Labs' name of a module that an XLabs adapter of FLUX.1 changes; None for others.

    Source: https://github.com/XLabs-AI/x-flux ``src/flux/modules/layers.py``. In a single block's fused
    ``linear1``, ``qkv`` are the rows before the MLP's.

    Args:
        path: The name up to ``_lora``.
        stream: The number after it: ``1`` (image) or ``2`` (text) in a double block, else "".
    """
    match = _XLABS.match(path)
    if match is None or (match["kind"] == "double") != bool(stream):
        return None
    if match["kind"] == "double":
        return f"{match['block']}.{'img' if stream == '1' else 'txt'}_attn.{match['leaf']}"
    return f"{match['block']}.{'qkv' if match['leaf'] == 'qkv' else 'linear2'}"


def strip_denoiser(path: str) -> tuple[str | None, str]:
    """Return ``unet`` or ``transformer`` and the path after ``diffusion_model.``; None without that."""
    match = _DENOISER.match(path)
    if not match:
        return None, path
    rest = path[match.end() :]
    return ("unet" if _UNET.match(rest) else "transformer"), rest


class Components:
    """Split the paths of one file into component and module.

    Args:
        paths: All paths of the file; together they show whether ``transformer.`` is a pipeline's or a
            language model's own.
    """

    def __init__(self, paths: Collection[str]) -> None:
        self._is_language = any(_LANGUAGE.match(path) for path in paths) and not any(
            path.startswith("transformer.") and (_BLOCKS.search(path) or _ATTENTION.search(path))
            for path in paths
        )

    def split(self, path: str) -> tuple[str | None, str]:
        """Return the component in front of a path, or None, and the rest of the path."""
        denoiser, rest = strip_denoiser(path)
        if denoiser:
            return denoiser, rest
        match = COMPONENT.match(path)
        if match is None or (self._is_language and match[1] == "transformer"):
            return None, path
        return match[1], path[match.end() :]


def follows_diffusers(paths: Collection[str], metadata: Mapping[str, str]) -> bool:
    """Return whether diffusers' rules apply to names in PEFT's spelling.

    The signs are a component in front, diffusers' own metadata, ``.alpha`` tensors (PEFT writes none), and
    names that only diffusion models have; none of them counts for names after ``base_model.model.``.

    Args:
        paths: All paths of a file, without wrappers.
        metadata: The file's metadata.
    """
    lora = [path for path in paths if ".lora_A." in path or ".lora_B." in path]
    if not lora or any(path.startswith(PREFIX) for path in lora):
        return False
    if METADATA_KEY in metadata or any(path.endswith(".alpha") for path in paths):
        return True
    components = Components(lora)
    return any(
        components.split(path)[0] or _BLOCKS.search(path) or _WAN.match(path) or _ATTENTION.search(path)
        for path in lora
    )
