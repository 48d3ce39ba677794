"""Translate Alibaba's names of Wan 2.1 and 2.2 to diffusers' Wan(VACE)Transformer3DModel.

Source: diffusers ``loaders/single_file_utils.py``, ``convert_wan_transformer_to_diffusers``.
"""

from __future__ import annotations

from collections.abc import Iterator

from lora_export.formats.schemes.rules import TableScheme

_EMBED = "condition_embedder"
_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
}


def _blocks() -> Iterator[tuple[str, str]]:
    for blocks in ("blocks.{}", "vace_blocks.{}"):
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2")):
            for leaf, name in _ATTENTION.items():
                yield f"{blocks}.{theirs}.{leaf}", f"{blocks}.{ours}.{name}"
        yield f"{blocks}.ffn.0", f"{blocks}.ffn.net.0.proj"
        yield f"{blocks}.ffn.2", f"{blocks}.ffn.net.2"
    yield "vace_blocks.{}.before_proj", "vace_blocks.{}.proj_in"
    yield "vace_blocks.{}.after_proj", "vace_blocks.{}.proj_out"


SCHEME = TableScheme(
    name="Alibaba's Wan",
    table={
        **dict(_blocks()),
        "time_embedding.0": f"{_EMBED}.time_embedder.linear_1",
        "time_embedding.2": f"{_EMBED}.time_embedder.linear_2",
        "text_embedding.0": f"{_EMBED}.text_embedder.linear_1",
        "text_embedding.2": f"{_EMBED}.text_embedder.linear_2",
        "time_projection.1": f"{_EMBED}.time_proj",
        "img_emb.proj.1": f"{_EMBED}.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": f"{_EMBED}.image_embedder.ff.net.2",
        "head.head": "proj_out",
    },
    mark=r"(?:vace_)?blocks_\d+_(?:self_attn|cross_attn|ffn)_",
    anchors=(("patch_embedding",), (f"{_EMBED}.time_proj",)),
)
