"""The transformer of Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from lora_export.base.kinds.diffusers_kind import BROAD, TALL, DiffusersKind, steps
from lora_export.base.kinds.model_kind import ROWS, TOKENS, noise
from lora_export.graph.captured import BATCH, HEIGHT, TEXT_SEQUENCE, WIDTH


class StableDiffusion3(DiffusersKind):
    """A denoiser of latents ``[batch, channels, height, width]``, whose sides are multiples of the patch."""

    model_class = "SD3Transformer2DModel"
    main_input = "hidden_states"
    free: ClassVar[Mapping[str, Mapping[int, str]]] = {
        "hidden_states": {0: BATCH, 2: HEIGHT, 3: WIDTH},
        "encoder_hidden_states": {0: BATCH, 1: TEXT_SEQUENCE},
    }

    def unsupported(self, config: Mapping[str, Any]) -> list[str]:
        """Return nothing: all of them have the same inputs."""
        return []

    def example_inputs(self, model: Any, folder: Path) -> dict[str, Any]:
        """Return latents, a text, the text as a whole and time steps."""
        config = model.config
        side = config["patch_size"]
        return {
            "hidden_states": noise(model, (ROWS, config["in_channels"], TALL * side, BROAD * side), folder),
            "encoder_hidden_states": noise(model, (ROWS, TOKENS, config["joint_attention_dim"]), folder),
            "pooled_projections": noise(model, (ROWS, config["pooled_projection_dim"]), folder),
            "timestep": steps(),
        }

    def smallest(self, model: Any) -> dict[str, int]:
        """Return the sides, of which others are multiples."""
        return dict.fromkeys((HEIGHT, WIDTH), model.config["patch_size"])

    def largest(self, model: Any) -> dict[str, int]:
        """Return the sides for which there are positions."""
        most = model.config["pos_embed_max_size"]
        return dict.fromkeys((HEIGHT, WIDTH), most * model.config["patch_size"]) if most else {}

    def flatten(self, model: Any) -> None:
        """Replace the ``forward`` of a model by one with plain inputs and named outputs."""
        forward = model.forward

        def plain(
            hidden_states: Any, encoder_hidden_states: Any, pooled_projections: Any, timestep: Any
        ) -> dict[str, Any]:
            found = forward(
                hidden_states=hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                pooled_projections=pooled_projections,
                timestep=timestep,
                return_dict=False,
            )
            return {"out_hidden_states": found[0]}

        model.forward = plain
