"""The transformer of Wan's text-to-video models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from lora_export.base.kinds.diffusers_kind import BROAD, TALL, DiffusersKind, stated, steps
from lora_export.base.kinds.model_kind import DECODER_TOKENS, ROWS, TOKENS, noise
from lora_export.graph.captured import BATCH, FRAMES, HEIGHT, TEXT_SEQUENCE, WIDTH


class Wan(DiffusersKind):
    """A denoiser of latents ``[batch, channels, frames, height, width]``, multiples of the patch."""

    model_class = "WanTransformer3DModel"
    main_input = "hidden_states"
    free: ClassVar[Mapping[str, Mapping[int, str]]] = {
        "hidden_states": {0: BATCH, 2: FRAMES, 3: HEIGHT, 4: WIDTH},
        "encoder_hidden_states": {0: BATCH, 1: TEXT_SEQUENCE},
    }

    def unsupported(self, config: Mapping[str, Any]) -> list[str]:
        """Return a first image, which the image-to-video models read as 257 or 512 tokens of their own."""
        return stated(config, "image_dim", "added_kv_proj_dim")

    def example_inputs(self, model: Any, folder: Path) -> dict[str, Any]:
        """Return latents, time steps and a text."""
        config = model.config
        long, tall, broad = config["patch_size"]
        sides = (long * DECODER_TOKENS, tall * TALL, broad * BROAD)
        return {
            "hidden_states": noise(model, (ROWS, config["in_channels"], *sides), folder),
            "timestep": steps(),
            "encoder_hidden_states": noise(model, (ROWS, TOKENS, config["text_dim"]), folder),
        }

    def smallest(self, model: Any) -> dict[str, int]:
        """Return the sizes, of which others are multiples."""
        return dict(zip((FRAMES, HEIGHT, WIDTH), model.config["patch_size"], strict=True))

    def largest(self, model: Any) -> dict[str, int]:
        """Return the sizes for which there are positions."""
        most = model.config["rope_max_seq_len"]
        return {name: most * size for name, size in self.smallest(model).items()}

    def flatten(self, model: Any) -> None:
        """Replace the ``forward`` of a model by one with plain inputs and named outputs."""
        forward = model.forward

        def plain(hidden_states: Any, timestep: Any, encoder_hidden_states: Any) -> dict[str, Any]:
            found = forward(
                hidden_states=hidden_states,
                timestep=timestep,
                encoder_hidden_states=encoder_hidden_states,
                return_dict=False,
            )
            return {"out_hidden_states": found[0]}

        model.forward = plain
