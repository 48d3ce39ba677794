"""Models that read images: ViT, DINOv2, SigLIP's and CLIP's vision towers, Swin, ConvNeXt, Segformer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.base.kinds.images import images
from lora_export.base.kinds.model_kind import ModelKind
from lora_export.graph.captured import BATCH, Kind


class Vision(ModelKind):
    """A model of one image a row."""

    def takes(self, model: Any) -> bool:
        """Return whether a transformers model is of this kind."""
        return bool(model.main_input_name == "pixel_values")

    def example_inputs(self, model: Any, folder: Path) -> dict[str, Any]:
        """Return images of the size that the config or the image processor states."""
        return {"pixel_values": images(model, model.config, folder)}

    def axes(self, name: str) -> dict[int, str]:
        """Return the batch: the size of the images is fixed."""
        return {0: BATCH}

    def word(self, outputs: Mapping[str, Any]) -> Kind:
        """Return the word for it."""
        return "vision"
