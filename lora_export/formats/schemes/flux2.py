"""Translate Black Forest Labs' names of FLUX.2 to diffusers' Flux2Transformer2DModel.

Source: diffusers ``loaders/single_file_utils.py``, ``convert_flux2_transformer_checkpoint_to_diffusers``.
"""

from __future__ import annotations

from lora_export.formats.schemes.rules import Counterpart, TableScheme, swapped_halves, thirds

_DOUBLE, _SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"
_EMBED = "time_guidance_embed"

SCHEME = TableScheme(
    name="Black Forest Labs' FLUX.2",
    table={
        "double_blocks.{}.img_attn.qkv": thirds(*(f"{_DOUBLE}.attn.to_{x}" for x in "qkv")),
        "double_blocks.{}.txt_attn.qkv": thirds(*(f"{_DOUBLE}.attn.add_{x}_proj" for x in "qkv")),
        "double_blocks.{}.img_attn.proj": f"{_DOUBLE}.attn.to_out.0",
        "double_blocks.{}.txt_attn.proj": f"{_DOUBLE}.attn.to_add_out",
        "double_blocks.{}.img_mlp.0": f"{_DOUBLE}.ff.linear_in",
        "double_blocks.{}.img_mlp.2": f"{_DOUBLE}.ff.linear_out",
        "double_blocks.{}.txt_mlp.0": f"{_DOUBLE}.ff_context.linear_in",
        "double_blocks.{}.txt_mlp.2": f"{_DOUBLE}.ff_context.linear_out",
        "single_blocks.{}.linear1": f"{_SINGLE}.attn.to_qkv_mlp_proj",
        "single_blocks.{}.linear2": f"{_SINGLE}.attn.to_out",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": f"{_EMBED}.timestep_embedder.linear_1",
        "time_in.out_layer": f"{_EMBED}.timestep_embedder.linear_2",
        "guidance_in.in_layer": f"{_EMBED}.guidance_embedder.linear_1",
        "guidance_in.out_layer": f"{_EMBED}.guidance_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": (Counterpart("norm_out.linear", swapped_halves),),
    },
    mark=r"(?:double|single)_blocks_\d+_",
    anchors=(("x_embedder",), (f"{_EMBED}.timestep_embedder.linear_1",)),
)
