"""Tiny UNets in Stability's sgm names, with the block structures of published models."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers.loaders import single_file_utils
from scheme_bases import Family, State


def unet(kind: str) -> Family:
    """A UNet in Stability's sgm names, with the block structure of a published model."""
    from diffusers import UNet2DConditionModel

    config = UNETS[kind]
    with torch.device("meta"):
        shapes = {name: tuple(v.shape) for name, v in UNet2DConditionModel(**config).state_dict().items()}

    def convert(state: State) -> State:
        prefixed = {f"{single_file_utils.LDM_UNET_KEY}{name}": values for name, values in state.items()}
        return single_file_utils.convert_ldm_unet_checkpoint(prefixed, dict(defaults, **config))

    defaults = {"class_embed_type": None, "addition_embed_type": None, "num_class_embeds": None}
    # The conversion moves values as they are: asked with names in place of values it tells the names.
    names = convert({name: name for name in sgm_names(config)})
    assert {name for name, value in names.items() if value is not None} >= set(shapes)
    originals = {original: shapes[name] for name, original in names.items() if name in shapes}
    return Family(f"unet-{kind}", originals, convert, lambda: UNet2DConditionModel(**config))


def sgm_names(config: dict) -> Iterator[str]:
    """Yield the parameter names that sgm's ``openaimodel.UNetModel`` makes when built, and some more."""
    yield from (
        f"{name}.{leaf}" for name in ("time_embed.0", "time_embed.2", "out.0", "out.2") for leaf in LEAVES
    )
    yield from (
        f"{name}.{leaf}" for name in ("label_emb.0.0", "label_emb.0.2", "input_blocks.0.0") for leaf in LEAVES
    )
    kinds, depth = config["down_block_types"], config["layers_per_block"]
    layers = config.get("transformer_layers_per_block", 1)
    layers = [layers] * len(kinds) if isinstance(layers, int) else list(layers)
    index = 1
    for level, kind in enumerate(kinds):
        for _ in range(depth):
            yield from _resnet(f"input_blocks.{index}.0")
            if "Attn" in kind:
                yield from _transformer(f"input_blocks.{index}.1", layers[level])
            index += 1
        if level < len(kinds) - 1:
            yield from (f"input_blocks.{index}.0.op.{leaf}" for leaf in LEAVES)
            index += 1
    yield from _resnet("middle_block.0")
    yield from _transformer("middle_block.1", layers[-1])
    yield from _resnet("middle_block.2")
    index = 0
    for level, kind in reversed(list(enumerate(kinds))):
        for layer in range(depth + 1):
            yield from _resnet(f"output_blocks.{index}.0")
            if "Attn" in kind:
                yield from _transformer(f"output_blocks.{index}.1", layers[level])
            if level and layer == depth:
                place = 2 if "Attn" in kind else 1
                yield from (f"output_blocks.{index}.{place}.conv.{leaf}" for leaf in LEAVES)
            index += 1


LEAVES = ("weight", "bias")


def _resnet(name: str) -> Iterator[str]:
    parts = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
    yield from (f"{name}.{part}.{leaf}" for part in parts for leaf in LEAVES)


def _transformer(name: str, layers: int) -> Iterator[str]:
    yield from (f"{name}.{part}.{leaf}" for part in ("norm", "proj_in", "proj_out") for leaf in LEAVES)
    attention = [f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")]
    for layer in range(layers):
        for part in (*attention, "ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"):
            yield from (f"{name}.transformer_blocks.{layer}.{part}.{leaf}" for leaf in LEAVES)


def _unet(down: str, **more: object) -> dict:
    """``D`` is a block without attention, ``A`` one with it."""
    names = {"D": "DownBlock2D", "A": "CrossAttnDownBlock2D"}
    up = {"D": "UpBlock2D", "A": "CrossAttnUpBlock2D"}
    common = {
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "block_out_channels": (8, 16, 24, 24)[: len(down)],
        "down_block_types": tuple(names[kind] for kind in down),
        "up_block_types": tuple(up[kind] for kind in reversed(down)),
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
        "sample_size": 8,
    }
    return {**common, **more}


_ADDED = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 34,
    "use_linear_projection": True,
}
UNETS = {
    "sd15": _unet("AAAD"),
    "sd2": _unet("AAAD", use_linear_projection=True),
    "sdxl": _unet("DAA", transformer_layers_per_block=(1, 2, 3), **_ADDED),
    "refiner": _unet("DAAD", transformer_layers_per_block=2, **_ADDED),
    "sdxl-small": _unet("DA", transformer_layers_per_block=(1, 2), layers_per_block=1, **_ADDED),
    "one-layer": _unet("DAA", layers_per_block=1),
    "three-layers": _unet("AD", layers_per_block=3),
}
