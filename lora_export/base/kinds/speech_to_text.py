"""Models that read a spectrogram and go on with text: Whisper."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.base.kinds.model_kind import (
    DECODER_TOKENS,
    ROWS,
    TokenKind,
    noise,
    parameters_of,
    token_ids,
)
from lora_export.graph.captured import BATCH, DECODER_SEQUENCE, Kind

# Frames of a spectrogram for each position of the encoder: the stride of Whisper's second convolution.
_FRAMES = 2


class SpeechToText(TokenKind):
    """Encoder and decoder in one graph, without caches; of a classifier, the encoder."""

    def takes(self, model: Any) -> bool:
        """Return whether a transformers model is of this kind."""
        return bool(model.main_input_name == "input_features" and model.config.model_type == "whisper")

    def example_inputs(self, model: Any, folder: Path) -> dict[str, Any]:
        """Return a spectrogram ``[rows, num_mel_bins, frames]`` of 30 seconds, and ids of the decoder."""
        config = model.config
        frames = _FRAMES * config.max_source_positions
        inputs = {"input_features": noise(model, (ROWS, config.num_mel_bins, frames), folder)}
        if _has_decoder(model):
            inputs["decoder_input_ids"] = token_ids(model, tokens=DECODER_TOKENS)
        return inputs

    def axes(self, name: str) -> dict[int, str]:
        """Return the batch and the decoder's tokens: the length of the sound is fixed."""
        return {0: BATCH} if name == "input_features" else {0: BATCH, 1: DECODER_SEQUENCE}

    def word(self, outputs: Mapping[str, Any]) -> Kind:
        """Return the word for it."""
        return "encoder-decoder" if "encoder_last_hidden_state" in outputs else "audio"

    def largest(self, model: Any) -> dict[str, int]:
        """Return the number of positions of the decoder."""
        return {DECODER_SEQUENCE: int(model.config.max_target_positions)} if _has_decoder(model) else {}

    def vocab_size(self, model: Any) -> int | None:
        """Return the number of the decoder's token ids."""
        return super().vocab_size(model) if _has_decoder(model) else None


def _has_decoder(model: Any) -> bool:
    return "decoder_input_ids" in parameters_of(model)
