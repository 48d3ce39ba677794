"""Translate OpenCLIP's names of a text model to transformers' CLIPTextModel.

Source: https://github.com/mlfoundations/open_clip ``transformer.py`` and diffusers
``loaders/single_file_utils.py``, ``convert_open_clip_checkpoint``. A base that also has a vision tower has
blocks of the same names twice, and is not translated.
"""

from __future__ import annotations

from lora_export.formats.schemes.rules import TableScheme, thirds

_BLOCK, _LAYER = "transformer.resblocks.{}", "encoder.layers.{}"

SCHEME = TableScheme(
    name="OpenCLIP's text model",
    table={
        f"{_BLOCK}.attn.in_proj": thirds(*(f"{_LAYER}.self_attn.{x}_proj" for x in "qkv")),
        f"{_BLOCK}.attn.out_proj": f"{_LAYER}.self_attn.out_proj",
        f"{_BLOCK}.mlp.c_fc": f"{_LAYER}.mlp.fc1",
        f"{_BLOCK}.mlp.c_proj": f"{_LAYER}.mlp.fc2",
        "token_embedding": "embeddings.token_embedding",
    },
    mark=r"transformer_resblocks_\d+_",
    anchors=(("embeddings.token_embedding",),),
    components=(None, "text_encoder", "text_encoder_2", "text_encoder_3"),
    rivals=("embeddings.patch_embedding",),
)
