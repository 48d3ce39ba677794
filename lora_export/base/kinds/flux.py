"""The transformer of FLUX.1."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from lora_export.base.kinds.diffusers_kind import DiffusersKind
from lora_export.base.kinds.model_kind import DECODER_TOKENS, ROWS, TOKENS, noise
from lora_export.graph.captured import BATCH, IMAGE_SEQUENCE, TEXT_SEQUENCE


class Flux(DiffusersKind):
    """A denoiser of patches ``[batch, image_sequence, channels]``, whose places are inputs as well."""

    model_class = "FluxTransformer2DModel"
    main_input = "hidden_states"
    free: ClassVar[Mapping[str, Mapping[int, str]]] = {
        "hidden_states": {0: BATCH, 1: IMAGE_SEQUENCE},
        "encoder_hidden_states": {0: BATCH, 1: TEXT_SEQUENCE},
        "img_ids": {0: IMAGE_SEQUENCE},
        "txt_ids": {0: TEXT_SEQUENCE},
    }

    def unsupported(self, config: Mapping[str, Any]) -> list[str]:
        """Return nothing: all of them have the same inputs."""
        return []

    def example_inputs(self, model: Any, folder: Path) -> dict[str, Any]:
        """Return patches, a text, the text as a whole, time steps from 0 to 1, places and guidance."""
        import torch

        config = model.config
        places = len(config["axes_dims_rope"])
        inputs = {
            "hidden_states": noise(model, (ROWS, TOKENS, config["in_channels"]), folder),
            "encoder_hidden_states": noise(
                model, (ROWS, DECODER_TOKENS, config["joint_attention_dim"]), folder
            ),
            "pooled_projections": noise(model, (ROWS, config["pooled_projection_dim"]), folder),
            "timestep": torch.linspace(0.1, 0.9, ROWS),
            "img_ids": noise(model, (TOKENS, places), folder),
            "txt_ids": noise(model, (DECODER_TOKENS, places), folder),
        }
        if config["guidance_embeds"]:
            inputs["guidance"] = torch.linspace(2.0, 4.0, ROWS)
        return inputs

    def flatten(self, model: Any) -> None:
        """Replace the ``forward`` of a model by one with plain inputs and named outputs."""
        forward = model.forward

        def plain(
            hidden_states: Any,
            encoder_hidden_states: Any,
            pooled_projections: Any,
            timestep: Any,
            img_ids: Any,
            txt_ids: Any,
            guidance: Any = None,
        ) -> dict[str, Any]:
            found = forward(
                hidden_states=hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                pooled_projections=pooled_projections,
                timestep=timestep,
                img_ids=img_ids,
                txt_ids=txt_ids,
                guidance=guidance,
                return_dict=False,
            )
            return {"out_hidden_states": found[0]}

        model.forward = plain
