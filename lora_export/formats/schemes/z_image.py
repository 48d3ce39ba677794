"""Tongyi's fused names of Z-Image, as ComfyUI has them → diffusers' ZImageTransformer2DModel.

Source: diffusers ``loaders/single_file_utils.py``, ``convert_z_image_transformer_checkpoint_to_diffusers``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_export.formats.schemes.rules import Counterpart, TableScheme, thirds


def _blocks() -> Iterator[tuple[str, str | Sequence[Counterpart]]]:
    for blocks in ("layers.{}", "noise_refiner.{}", "context_refiner.{}"):
        yield f"{blocks}.attention.qkv", thirds(*(f"{blocks}.attention.to_{x}" for x in "qkv"))
        yield f"{blocks}.attention.out", f"{blocks}.attention.to_out.0"


SCHEME = TableScheme(
    "ComfyUI's Z-Image",
    {
        **dict(_blocks()),
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    },
    mark=r"(?:layers|noise_refiner|context_refiner)_\d+_attention_(?:qkv|out)$",
)
