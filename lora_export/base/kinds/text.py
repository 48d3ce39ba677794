"""Models that read tokens: encoders, and decoders with or without a cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.base.kinds.model_kind import TokenKind, text_inputs
from lora_export.graph.captured import Kind

# Outputs with the state of a decoder.
_STATES = ("past_key_values", "cache_params")


class Text(TokenKind):
    """A model of one text; of a vision–language model, its text without images."""

    def takes(self, model: Any) -> bool:
        """Return whether a transformers model is of this kind."""
        return bool(model.main_input_name == "input_ids")

    def example_inputs(self, model: Any, folder: Path) -> dict[str, Any]:
        """Return ids, a mask of 1 and token types."""
        return text_inputs(model)

    def word(self, outputs: Mapping[str, Any]) -> Kind:
        """Return whether it is a decoder, which returns a state, or an encoder."""
        return "decoder" if any(outputs.get(name) is not None for name in _STATES) else "encoder"
