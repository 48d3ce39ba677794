"""Translate Stability's names of Stable Diffusion 3 and 3.5 to diffusers' SD3Transformer2DModel.

Source: diffusers ``loaders/single_file_utils.py``, ``convert_sd3_transformer_checkpoint_to_diffusers``.
"""

from __future__ import annotations

from lora_export.formats.schemes.rules import Counterpart, Spans, TableScheme, swapped_halves, thirds, whole

_BLOCK, _EMBED = "transformer_blocks.{}", "time_text_embed"


def _context_modulation(rows: int, cols: int) -> Spans:
    """Return the rows of a context block's modulation: the last block has only shift and scale."""
    return swapped_halves(rows, cols) if rows == 2 * cols else whole(rows, cols)


SCHEME = TableScheme(
    name="Stability's Stable Diffusion 3",
    table={
        "joint_blocks.{}.x_block.attn.qkv": thirds(*(f"{_BLOCK}.attn.to_{x}" for x in "qkv")),
        "joint_blocks.{}.x_block.attn2.qkv": thirds(*(f"{_BLOCK}.attn2.to_{x}" for x in "qkv")),
        "joint_blocks.{}.context_block.attn.qkv": thirds(*(f"{_BLOCK}.attn.add_{x}_proj" for x in "qkv")),
        "joint_blocks.{}.x_block.attn.proj": f"{_BLOCK}.attn.to_out.0",
        "joint_blocks.{}.x_block.attn2.proj": f"{_BLOCK}.attn2.to_out.0",
        "joint_blocks.{}.context_block.attn.proj": f"{_BLOCK}.attn.to_add_out",
        "joint_blocks.{}.x_block.mlp.fc1": f"{_BLOCK}.ff.net.0.proj",
        "joint_blocks.{}.x_block.mlp.fc2": f"{_BLOCK}.ff.net.2",
        "joint_blocks.{}.context_block.mlp.fc1": f"{_BLOCK}.ff_context.net.0.proj",
        "joint_blocks.{}.context_block.mlp.fc2": f"{_BLOCK}.ff_context.net.2",
        "joint_blocks.{}.x_block.adaLN_modulation.1": f"{_BLOCK}.norm1.linear",
        "joint_blocks.{}.context_block.adaLN_modulation.1": (
            Counterpart(f"{_BLOCK}.norm1_context.linear", _context_modulation),
        ),
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": f"{_EMBED}.timestep_embedder.linear_1",
        "t_embedder.mlp.2": f"{_EMBED}.timestep_embedder.linear_2",
        "y_embedder.mlp.0": f"{_EMBED}.text_embedder.linear_1",
        "y_embedder.mlp.2": f"{_EMBED}.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": (Counterpart("norm_out.linear", swapped_halves),),
    },
    mark=r"joint_blocks_\d+_",
    anchors=(("pos_embed.proj",), ("context_embedder",)),
)
