"""Translate Tongyi's fused names of Z-Image, as in ComfyUI, to diffusers' ZImageTransformer2DModel.

Source: diffusers ``loaders/single_file_utils.py``, ``convert_z_image_transformer_checkpoint_to_diffusers``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_export.formats.schemes.rules import Counterpart, TableScheme, thirds


def _blocks() -> Iterator[tuple[str, str | Sequence[Counterpart]]]:
    for blocks in ("layers.{}", "noise_refiner.{}", "context_refiner.{}"):
        yield f"{blocks}.attention.qkv", thirds(*(f"{blocks}.attention.to_{x}" for x in "qkv"))
        yield f"{blocks}.attention.out", f"{blocks}.attention.to_out.0"
        # Lumina 2, which these blocks come from, has other names for these in diffusers.
        for same in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0"):
            yield f"{blocks}.{same}", f"{blocks}.{same}"


SCHEME = TableScheme(
    name="ComfyUI's Z-Image",
    table={
        **dict(_blocks()),
        **{same: same for same in ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1")},
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    },
    mark=r"(?:layers|noise_refiner|context_refiner)_\d+_attention_(?:qkv|out)$",
    anchors=(("all_x_embedder.2-1",), ("cap_embedder.1",)),
)
