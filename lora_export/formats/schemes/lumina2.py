"""Translate Alpha-VLLM's names of Lumina-Image 2.0 to diffusers' Lumina2Transformer2DModel.

Source: diffusers ``loaders/single_file_utils.py``, ``convert_lumina2_to_diffusers``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_export.formats.schemes.rules import Counterpart, RowsOf, Spans, TableScheme

_EMBED = "time_caption_embed"


def _grouped(*paths: str) -> tuple[Counterpart, ...]:
    """Return the counterparts of a query as wide as the input, and of keys and values in equal groups."""

    def part(number: int) -> RowsOf:
        def rows_of(rows: int, cols: int) -> Spans:
            if rows <= cols or (rows - cols) % 2:
                return ()
            ends = (0, cols, (rows + cols) // 2, rows)
            return ((ends[number], ends[number + 1]),)

        return rows_of

    return tuple(Counterpart(path, part(number)) for number, path in enumerate(paths))


def _blocks() -> Iterator[tuple[str, str | Sequence[Counterpart]]]:
    for blocks in ("layers.{}", "noise_refiner.{}", "context_refiner.{}"):
        yield f"{blocks}.attention.qkv", _grouped(*(f"{blocks}.attn.to_{x}" for x in "qkv"))
        yield f"{blocks}.attention.out", f"{blocks}.attn.to_out.0"
        for number in (1, 2, 3):
            yield f"{blocks}.feed_forward.w{number}", f"{blocks}.feed_forward.linear_{number}"
        yield f"{blocks}.adaLN_modulation.1", f"{blocks}.norm1.linear"


SCHEME = TableScheme(
    name="Alpha-VLLM's Lumina 2",
    table={
        **dict(_blocks()),
        "t_embedder.mlp.0": f"{_EMBED}.timestep_embedder.linear_1",
        "t_embedder.mlp.2": f"{_EMBED}.timestep_embedder.linear_2",
        "cap_embedder.1": f"{_EMBED}.caption_embedder.1",
        "final_layer.adaLN_modulation.1": "norm_out.linear_1",
        "final_layer.linear": "norm_out.linear_2",
    },
    mark=r"(?:layers|noise_refiner|context_refiner)_\d+_(?:attention_(?:qkv|out)|feed_forward_w[123])$",
    anchors=(("x_embedder",), (f"{_EMBED}.caption_embedder.1",)),
)
