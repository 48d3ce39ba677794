"""Kinds of models that are captured: name → ``module:attribute`` of a `ModelKind`, imported when it is used.

The first one that takes a model describes it, so that the general ones come last.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_export.base.kinds.model_kind import ModelKind

KINDS: dict[str, str] = {
    "text-image": "lora_export.base.kinds.text_image:TextImage",
    "image-to-text": "lora_export.base.kinds.image_to_text:ImageToText",
    "vision": "lora_export.base.kinds.vision:Vision",
    "speech-to-text": "lora_export.base.kinds.speech_to_text:SpeechToText",
    "spectrogram": "lora_export.base.kinds.spectrogram:Spectrogram",
    "audio": "lora_export.base.kinds.audio:Audio",
    "encoder-decoder": "lora_export.base.kinds.encoder_decoder:EncoderDecoder",
    "text": "lora_export.base.kinds.text:Text",
}


def kind_of(model: Any) -> ModelKind | None:
    """Return the kind of a transformers model; None if it is none of `KINDS`."""
    for target in KINDS.values():
        module, _, attribute = target.partition(":")
        kind: ModelKind = getattr(import_module(module), attribute)()
        if kind.takes(model):
            return kind
    return None
