"""Models that read an image and go on with text: TrOCR, Donut."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.base.kinds.images import images
from lora_export.base.kinds.model_kind import (
    DECODER_TOKENS,
    TokenKind,
    longest_of,
    parameters_of,
    token_ids,
)
from lora_export.graph.captured import BATCH, DECODER_SEQUENCE, Kind


class ImageToText(TokenKind):
    """Encoder and decoder in one graph, without caches: scores of a given text."""

    def takes(self, model: Any) -> bool:
        """Return whether a transformers model is of this kind."""
        return model.main_input_name == "pixel_values" and "decoder_input_ids" in parameters_of(model)

    def example_inputs(self, model: Any, folder: Path) -> dict[str, Any]:
        """Return images, and ids of the decoder."""
        config = getattr(model.config, "encoder", model.config)
        return {
            "pixel_values": images(model, config, folder),
            "decoder_input_ids": token_ids(model, tokens=DECODER_TOKENS),
        }

    def axes(self, name: str) -> dict[int, str]:
        """Return the batch and the decoder's tokens: the size of the images is fixed."""
        return {0: BATCH} if name == "pixel_values" else {0: BATCH, 1: DECODER_SEQUENCE}

    def word(self, outputs: Mapping[str, Any]) -> Kind:
        """Return the word for it."""
        return "encoder-decoder"

    def largest(self, model: Any) -> dict[str, int]:
        """Return the number of positions of the decoder."""
        longest = longest_of(model, model.config.get_text_config(decoder=True))
        return {DECODER_SEQUENCE: longest} if longest else {}
