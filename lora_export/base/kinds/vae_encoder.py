"""Encoders of a variational autoencoder: images to the distribution of latents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from lora_export.base.kinds.diffusers_kind import BROAD, TALL, DiffusersKind
from lora_export.base.kinds.model_kind import ROWS, noise
from lora_export.graph.captured import BATCH, HEIGHT, WIDTH, Kind


class VaeEncoder(DiffusersKind):
    """First half of an autoencoder, which reads a pipeline's images; the other half is taken off the model.

    The output is the mean and the logarithm of the variance, of which the pipeline draws latents.
    """

    model_class = "AutoencoderKL"
    main_input = "sample"
    free: ClassVar[Mapping[str, Mapping[int, str]]] = {"sample": {0: BATCH, 2: HEIGHT, 3: WIDTH}}

    def unsupported(self, config: Mapping[str, Any]) -> list[str]:
        """Return nothing: all of them have the same input."""
        return []

    def example_inputs(self, model: Any, folder: Path) -> dict[str, Any]:
        """Return images."""
        side = _step(model.config)
        shape = (ROWS, model.config["in_channels"], 2 * TALL * side, 2 * BROAD * side)
        return {"sample": noise(model, shape, folder)}

    def word(self, outputs: Mapping[str, Any]) -> Kind:
        """Return the word for it."""
        return "vae-encoder"

    def smallest(self, model: Any) -> dict[str, int]:
        """Return the sides, of which others are multiples."""
        return dict.fromkeys((HEIGHT, WIDTH), _step(model.config))

    def flatten(self, model: Any) -> None:
        """Replace the ``forward`` of a model by one with plain inputs and named outputs."""
        del model.decoder, model.post_quant_conv

        def plain(sample: Any) -> dict[str, Any]:
            return {"latent_parameters": model.encode(sample).latent_dist.parameters}

        model.forward = plain


def _step(config: Mapping[str, Any]) -> int:
    return 1 << (len(config["down_block_types"]) - 1)
