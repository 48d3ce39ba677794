"""Translate Tencent's names of HunyuanVideo to diffusers' HunyuanVideoTransformer3DModel.

Source: diffusers ``loaders/single_file_utils.py``, ``convert_hunyuan_video_transformer_to_diffusers``.
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
_REFINER, _REFINED = (
    "txt_in.individual_token_refiner.blocks.{}",
    "context_embedder.token_refiner.refiner_blocks.{}",
)
_EMBED = "time_text_embed"

SCHEME = TableScheme(
    name="Tencent's HunyuanVideo",
    table={
        "double_blocks.{}.img_attn_qkv": thirds(*(f"{_DOUBLE}.attn.to_{x}" for x in "qkv")),
        "double_blocks.{}.txt_attn_qkv": thirds(*(f"{_DOUBLE}.attn.add_{x}_proj" for x in "qkv")),
        "double_blocks.{}.img_attn_proj": f"{_DOUBLE}.attn.to_out.0",
        "double_blocks.{}.txt_attn_proj": f"{_DOUBLE}.attn.to_add_out",
        "double_blocks.{}.img_mlp.fc1": f"{_DOUBLE}.ff.net.0.proj",
        "double_blocks.{}.img_mlp.fc2": f"{_DOUBLE}.ff.net.2",
        "double_blocks.{}.txt_mlp.fc1": f"{_DOUBLE}.ff_context.net.0.proj",
        "double_blocks.{}.txt_mlp.fc2": f"{_DOUBLE}.ff_context.net.2",
        "double_blocks.{}.img_mod.linear": f"{_DOUBLE}.norm1.linear",
        "double_blocks.{}.txt_mod.linear": f"{_DOUBLE}.norm1_context.linear",
        "single_blocks.{}.linear1": attention_and_mlp(
            *(f"{_SINGLE}.attn.to_{x}" for x in "qkv"), f"{_SINGLE}.proj_mlp"
        ),
        "single_blocks.{}.linear2": f"{_SINGLE}.proj_out",
        "single_blocks.{}.modulation.linear": f"{_SINGLE}.norm.linear",
        "img_in.proj": "x_embedder.proj",
        "txt_in.input_embedder": "context_embedder.proj_in",
        "txt_in.t_embedder.mlp.0": f"context_embedder.{_EMBED}.timestep_embedder.linear_1",
        "txt_in.t_embedder.mlp.2": f"context_embedder.{_EMBED}.timestep_embedder.linear_2",
        "txt_in.c_embedder.linear_1": f"context_embedder.{_EMBED}.text_embedder.linear_1",
        "txt_in.c_embedder.linear_2": f"context_embedder.{_EMBED}.text_embedder.linear_2",
        f"{_REFINER}.self_attn_qkv": thirds(*(f"{_REFINED}.attn.to_{x}" for x in "qkv")),
        f"{_REFINER}.self_attn_proj": f"{_REFINED}.attn.to_out.0",
        f"{_REFINER}.mlp.fc1": f"{_REFINED}.ff.net.0.proj",
        f"{_REFINER}.mlp.fc2": f"{_REFINED}.ff.net.2",
        f"{_REFINER}.adaLN_modulation.1": f"{_REFINED}.norm_out.linear",
        "time_in.mlp.0": f"{_EMBED}.timestep_embedder.linear_1",
        "time_in.mlp.2": f"{_EMBED}.timestep_embedder.linear_2",
        "vector_in.in_layer": f"{_EMBED}.text_embedder.linear_1",
        "vector_in.out_layer": f"{_EMBED}.text_embedder.linear_2",
        "guidance_in.mlp.0": f"{_EMBED}.guidance_embedder.linear_1",
        "guidance_in.mlp.2": f"{_EMBED}.guidance_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": (Counterpart("norm_out.linear", swapped_halves),),
    },
    mark=r"(?:double|single)_blocks_\d+_|txt_in_individual_token_refiner_",
    anchors=(("x_embedder.proj",), ("context_embedder.token_refiner.refiner_blocks.0.attn.to_q",)),
)
