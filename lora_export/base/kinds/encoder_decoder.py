"""Models that read one text and go on with another: T5, BART, Marian."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.base.kinds.model_kind import DECODER_TOKENS, TokenKind, parameters_of, text_inputs, token_ids
from lora_export.graph.captured import DECODER_SEQUENCE, SEQUENCE, Kind


class EncoderDecoder(TokenKind):
    """Both halves in one graph, without caches: scores of a given answer."""

    def takes(self, model: Any) -> bool:
        """Return whether a transformers model is of this kind."""
        # Not its config: in UMT5EncoderModel's it still says of itself that it is one.
        return model.main_input_name == "input_ids" and "decoder_input_ids" in parameters_of(model)

    def example_inputs(self, model: Any, folder: Path) -> dict[str, Any]:
        """Return ids and masks of the encoder, and ids of the decoder."""
        return text_inputs(model) | {"decoder_input_ids": token_ids(model, tokens=DECODER_TOKENS)}

    def word(self, outputs: Mapping[str, Any]) -> Kind:
        """Return the word for it."""
        return "encoder-decoder"

    def largest(self, model: Any) -> dict[str, int]:
        """Return the number of positions, which both halves have."""
        found = super().largest(model)
        return found | {DECODER_SEQUENCE: found[SEQUENCE]} if found else found
