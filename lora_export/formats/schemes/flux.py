"""Translate Black Forest Labs' names of FLUX.1 to diffusers' FluxTransformer2DModel.

Source: https://github.com/black-forest-labs/flux ``model.py`` and diffusers ``loaders/single_file_utils.py``,
``convert_flux_transformer_checkpoint_to_diffusers``. Chroma has the same blocks without modulation, which is
in other layers (``convert_chroma_transformer_checkpoint_to_diffusers``).
"""

from __future__ import annotations

from lora_export.formats.schemes.rules import (
    Counterpart,
    TableScheme,
    attention_and_mlp,
    swapped_halves,
    thirds,
)

_DOUBLE, _SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"
_EMBED = "time_text_embed"

SCHEME = TableScheme(
    name="Black Forest Labs' FLUX.1",
    table={
        "double_blocks.{}.img_attn.qkv": thirds(*(f"{_DOUBLE}.attn.to_{x}" for x in "qkv")),
        "double_blocks.{}.txt_attn.qkv": thirds(*(f"{_DOUBLE}.attn.add_{x}_proj" for x in "qkv")),
        "double_blocks.{}.img_attn.proj": f"{_DOUBLE}.attn.to_out.0",
        "double_blocks.{}.txt_attn.proj": f"{_DOUBLE}.attn.to_add_out",
        "double_blocks.{}.img_mlp.0": f"{_DOUBLE}.ff.net.0.proj",
        "double_blocks.{}.img_mlp.2": f"{_DOUBLE}.ff.net.2",
        "double_blocks.{}.txt_mlp.0": f"{_DOUBLE}.ff_context.net.0.proj",
        "double_blocks.{}.txt_mlp.2": f"{_DOUBLE}.ff_context.net.2",
        "double_blocks.{}.img_mod.lin": f"{_DOUBLE}.norm1.linear",
        "double_blocks.{}.txt_mod.lin": f"{_DOUBLE}.norm1_context.linear",
        "single_blocks.{}.linear1": attention_and_mlp(
            *(f"{_SINGLE}.attn.to_{x}" for x in "qkv"), f"{_SINGLE}.proj_mlp"
        ),
        "single_blocks.{}.linear2": f"{_SINGLE}.proj_out",
        # XLabs' adapters omit the MLP's rows of linear1 (`lora_export.formats.reading.diffusion_names`).
        "single_blocks.{}.qkv": thirds(*(f"{_SINGLE}.attn.to_{x}" for x in "qkv")),
        "single_blocks.{}.modulation.lin": f"{_SINGLE}.norm.linear",
        "distilled_guidance_layer.layers.{}.in_layer": "distilled_guidance_layer.layers.{}.linear_1",
        "distilled_guidance_layer.layers.{}.out_layer": "distilled_guidance_layer.layers.{}.linear_2",
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": f"{_EMBED}.timestep_embedder.linear_1",
        "time_in.out_layer": f"{_EMBED}.timestep_embedder.linear_2",
        "vector_in.in_layer": f"{_EMBED}.text_embedder.linear_1",
        "vector_in.out_layer": f"{_EMBED}.text_embedder.linear_2",
        "guidance_in.in_layer": f"{_EMBED}.guidance_embedder.linear_1",
        "guidance_in.out_layer": f"{_EMBED}.guidance_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": (Counterpart("norm_out.linear", swapped_halves),),
    },
    mark=r"(?:double|single)_blocks_\d+_",
    anchors=(
        ("x_embedder",),
        ("context_embedder",),
        (f"{_EMBED}.text_embedder.linear_1", "distilled_guidance_layer.in_proj"),
    ),
    families={
        "flux-1": (f"{_EMBED}.text_embedder.linear_1", "vector_in.in_layer"),
        "chroma": ("distilled_guidance_layer.in_proj",),
    },
)
