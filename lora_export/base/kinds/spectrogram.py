"""Models that read a spectrogram of a fixed size as an image: AST."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.base.kinds.model_kind import ROWS, ModelKind, noise
from lora_export.graph.captured import BATCH, Kind


class Spectrogram(ModelKind):
    """A model of one spectrogram a row."""

    def takes(self, model: Any) -> bool:
        """Return whether a transformers model is of this kind."""
        config = model.config
        sizes = (getattr(config, name, None) for name in ("max_length", "num_mel_bins", "patch_size"))
        return model.main_input_name == "input_values" and all(isinstance(size, int) for size in sizes)

    def example_inputs(self, model: Any, folder: Path) -> dict[str, Any]:
        """Return noise ``[rows, max_length, num_mel_bins]``."""
        config = model.config
        return {"input_values": noise(model, (ROWS, config.max_length, config.num_mel_bins), folder)}

    def axes(self, name: str) -> dict[int, str]:
        """Return the batch: the size is fixed."""
        return {0: BATCH}

    def word(self, outputs: Mapping[str, Any]) -> Kind:
        """Return the word for it."""
        return "audio"
