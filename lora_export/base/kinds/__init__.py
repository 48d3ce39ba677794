"""Kinds of models that are captured: name → ``module:attribute`` of a `ModelKind`, imported when it is used.

The first one that takes a model describes it, so that the general ones come last.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lora_export.base.parts import VISION_LANGUAGE, Part

if TYPE_CHECKING:
    from lora_export.base.kinds.diffusers_kind import DiffusersKind
    from lora_export.base.kinds.model_kind import ModelKind

KINDS: dict[str, str] = {
    "unet": "lora_export.base.kinds.unet:UNet",
    "sd3": "lora_export.base.kinds.sd3:StableDiffusion3",
    "flux": "lora_export.base.kinds.flux:Flux",
    "wan": "lora_export.base.kinds.wan:Wan",
    "vae-decoder": "lora_export.base.kinds.vae_decoder:VaeDecoder",
    "vae-encoder": "lora_export.base.kinds.vae_encoder:VaeEncoder",
    "text-image": "lora_export.base.kinds.text_image:TextImage",
    "image-to-text": "lora_export.base.kinds.image_to_text:ImageToText",
    "vision": "lora_export.base.kinds.vision:Vision",
    "speech-to-text": "lora_export.base.kinds.speech_to_text:SpeechToText",
    "spectrogram": "lora_export.base.kinds.spectrogram:Spectrogram",
    "audio": "lora_export.base.kinds.audio:Audio",
    "encoder-decoder": "lora_export.base.kinds.encoder_decoder:EncoderDecoder",
    "text": "lora_export.base.kinds.text:Text",
}
# Part that is captured alone → kind of its model, whose language model is of another kind without images.
PART_KINDS: dict[str, str] = dict.fromkeys(
    VISION_LANGUAGE, "lora_export.base.kinds.vision_language:VisionLanguage"
)
# Class of diffusers → the kind that it is captured as, unless another part of it is asked for.
DIFFUSERS: dict[str, str] = {
    "UNet2DConditionModel": "unet",
    "SD3Transformer2DModel": "sd3",
    "FluxTransformer2DModel": "flux",
    "WanTransformer3DModel": "wan",
    "AutoencoderKL": "vae-decoder",
}


def kind_of(model: Any, part: Part = "") -> ModelKind | None:
    """Return the kind of a model of transformers or diffusers; None if it is none of `KINDS`.

    Args:
        model: The model.
        part: Part of it that is captured alone; the kind then describes the inputs of the whole.
    """
    places = [PART_KINDS[part]] if part in PART_KINDS else KINDS.values()
    return next((kind for kind in map(_at, places) if kind.takes(model)), None)


def diffusers_kind(name: str) -> DiffusersKind:
    """Return an entry of `KINDS` that is one of diffusers'."""
    kind: Any = _at(KINDS[name])
    return kind  # type: ignore[no-any-return]


def _at(place: str) -> ModelKind:
    module, _, attribute = place.partition(":")
    kind: ModelKind = getattr(import_module(module), attribute)()
    return kind
