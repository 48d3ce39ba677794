"""Models that compare texts with images: CLIP, SigLIP, ALIGN, Chinese-CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.base.kinds.images import images
from lora_export.base.kinds.model_kind import TokenKind, text_inputs
from lora_export.graph.captured import IMAGE_BATCH, SEQUENCE, TEXT_BATCH, Kind


class TextImage(TokenKind):
    """Two towers and the scores of every text with every image."""

    def takes(self, model: Any) -> bool:
        """Return whether a transformers model is of this kind."""
        towers = hasattr(model, "get_text_features") and hasattr(model, "get_image_features")
        return towers and model.main_input_name == "input_ids"

    def example_inputs(self, model: Any, folder: Path) -> dict[str, Any]:
        """Return texts and images."""
        return text_inputs(model) | {"pixel_values": images(model, model.config.vision_config, folder)}

    def axes(self, name: str) -> dict[int, str]:
        """Return the number of images, or the number of texts and their tokens."""
        return {0: IMAGE_BATCH} if name == "pixel_values" else {0: TEXT_BATCH, 1: SEQUENCE}

    def word(self, outputs: Mapping[str, Any]) -> Kind:
        """Return the word for it."""
        return "text-image"
