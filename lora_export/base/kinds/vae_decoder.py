"""Decoders of a variational autoencoder: latents to images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from lora_export.base.kinds.diffusers_kind import BROAD, TALL, DiffusersKind
from lora_export.base.kinds.model_kind import ROWS, noise
from lora_export.graph.captured import BATCH, HEIGHT, WIDTH, Kind


class VaeDecoder(DiffusersKind):
    """Second half of an autoencoder, which a pipeline ends with; the other half is taken off the model."""

    model_class = "AutoencoderKL"
    main_input = "latent_sample"
    free: ClassVar[Mapping[str, Mapping[int, str]]] = {"latent_sample": {0: BATCH, 2: HEIGHT, 3: WIDTH}}

    def unsupported(self, config: Mapping[str, Any]) -> list[str]:
        """Return nothing: all of them have the same input."""
        return []

    def example_inputs(self, model: Any, folder: Path) -> dict[str, Any]:
        """Return latents."""
        shape = (ROWS, model.config["latent_channels"], 2 * TALL, 2 * BROAD)
        return {"latent_sample": noise(model, shape, folder)}

    def word(self, outputs: Mapping[str, Any]) -> Kind:
        """Return the word for it."""
        return "vae-decoder"

    def flatten(self, model: Any) -> None:
        """Replace the ``forward`` of a model by one with plain inputs and named outputs."""
        del model.encoder, model.quant_conv

        def plain(latent_sample: Any) -> dict[str, Any]:
            return {"sample": model.decode(latent_sample, return_dict=False)[0]}

        model.forward = plain
