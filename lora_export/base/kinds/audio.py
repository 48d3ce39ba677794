"""Models that read the samples of a sound: wav2vec 2.0, HuBERT, WavLM, data2vec, SEW, UniSpeech."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.base.kinds.model_kind import ROWS, ModelKind, noise
from lora_export.graph.captured import BATCH, SAMPLES, Kind

# Frames of the example: a convolution over their positions looks at neighbours.
_FRAMES = 20


class Audio(ModelKind):
    """A model of one sound a row, all of one length."""

    def takes(self, model: Any) -> bool:
        """Return whether a transformers model is of this kind."""
        return model.main_input_name == "input_values" and bool(getattr(model.config, "conv_kernel", None))

    def example_inputs(self, model: Any, folder: Path) -> dict[str, Any]:
        """Return noise that makes some frames."""
        return {"input_values": noise(model, (ROWS, _samples(model.config, _FRAMES) + 1), folder)}

    def axes(self, name: str) -> dict[int, str]:
        """Return the batch and the number of samples."""
        return {0: BATCH, 1: SAMPLES}

    def word(self, outputs: Mapping[str, Any]) -> Kind:
        """Return the word for it."""
        return "audio"

    def largest(self, model: Any) -> dict[str, int]:
        """Return the number of samples that a table of relative positions is for; none without one."""
        # Wav2Vec2-Conformer makes its table longer when it has to; a graph can't.
        config = model.config
        frames = getattr(config, "max_source_positions", None)
        if getattr(config, "position_embeddings_type", None) != "relative" or not isinstance(frames, int):
            return {}
        return {SAMPLES: _samples(config, frames + 1) - 1}

    def rests(self, model: Any) -> dict[str, int]:
        """Return a number of samples that is one short of another frame."""
        return {SAMPLES: _samples(model.config, _FRAMES + 2) - 1}

    def smallest(self, model: Any) -> dict[str, int]:
        """Return the number of samples that make two frames."""
        return {SAMPLES: _samples(model.config, 2)}


def _samples(config: Any, frames: int) -> int:
    """Return the number of samples of which the convolutions make so many frames."""
    for kernel, stride in reversed(list(zip(config.conv_kernel, config.conv_stride, strict=True))):
        frames = (frames - 1) * stride + kernel
    return int(frames)
