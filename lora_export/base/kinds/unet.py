"""UNets that a text conditions: Stable Diffusion 1.x and 2.x, SDXL and its refiner, latent consistency."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from lora_export.base.kinds.diffusers_kind import BROAD, TALL, DiffusersKind, stated, steps
from lora_export.base.kinds.model_kind import ROWS, TOKENS, noise
from lora_export.graph.captured import BATCH, HEIGHT, SEQUENCE, WIDTH

# Numbers on the size and the crop of an image that SDXL's base reads, and its refiner.
_BASE_IDS, _REFINER_IDS = 6, 5


class UNet(DiffusersKind):
    """A denoiser of latents ``[batch, channels, height, width]``.

    Height and width are multiples of 2 for each block but the last: each of them halves the sides.
    """

    model_class = "UNet2DConditionModel"
    main_input = "sample"
    free: ClassVar[Mapping[str, Mapping[int, str]]] = {
        "sample": {0: BATCH, 2: HEIGHT, 3: WIDTH},
        "encoder_hidden_states": {0: BATCH, 1: SEQUENCE},
    }

    def unsupported(self, config: Mapping[str, Any]) -> list[str]:
        """Return labels of classes, images and other conditions than SDXL's."""
        found = stated(config, "class_embed_type", "num_class_embeds")
        if config.get("addition_embed_type") != "text_time":
            found += stated(config, "addition_embed_type")
        if config.get("encoder_hid_dim_type") != "text_proj":
            found += stated(config, "encoder_hid_dim_type")
        return found

    def example_inputs(self, model: Any, folder: Path) -> dict[str, Any]:
        """Return latents, time steps and a text; of SDXL also the text as a whole and sizes."""
        config = model.config
        side = _step(config)
        width = config["encoder_hid_dim"] or config["cross_attention_dim"]
        # Of several, a block each, which the text is as wide as.
        width = width[0] if isinstance(width, list | tuple) else width
        inputs = {
            "sample": noise(model, (ROWS, config["in_channels"], TALL * side, BROAD * side), folder),
            "timestep": steps(),
            "encoder_hidden_states": noise(model, (ROWS, TOKENS, width), folder),
        }
        if config.get("addition_embed_type") == "text_time":
            ids, text = _conditions(config, width)
            inputs["text_embeds"] = noise(model, (ROWS, text), folder)
            inputs["time_ids"] = noise(model, (ROWS, ids), folder)
        if config.get("time_cond_proj_dim"):
            inputs["timestep_cond"] = noise(model, (ROWS, config["time_cond_proj_dim"]), folder)
        return inputs

    def smallest(self, model: Any) -> dict[str, int]:
        """Return the sides, of which others are multiples."""
        return dict.fromkeys((HEIGHT, WIDTH), _step(model.config))

    def flatten(self, model: Any) -> None:
        """Replace the ``forward`` of a model by one with plain inputs and named outputs."""
        forward = model.forward

        def plain(
            sample: Any,
            timestep: Any,
            encoder_hidden_states: Any,
            text_embeds: Any = None,
            time_ids: Any = None,
            timestep_cond: Any = None,
        ) -> dict[str, Any]:
            added = None if time_ids is None else {"text_embeds": text_embeds, "time_ids": time_ids}
            found = forward(
                sample,
                timestep,
                encoder_hidden_states,
                timestep_cond=timestep_cond,
                added_cond_kwargs=added,
                return_dict=False,
            )
            return {"out_sample": found[0]}

        model.forward = plain


def _step(config: Mapping[str, Any]) -> int:
    return 1 << (len(config["down_block_types"]) - 1)


def _conditions(config: Mapping[str, Any], width: int) -> tuple[int, int]:
    """Return the number of SDXL's sizes, and the width of the text as a whole.

    The config has their sum alone. The refiner reads one number less, and one text encoder, whose outputs are
    as wide as its tokens: https://github.com/huggingface/diffusers
    ``pipelines/stable_diffusion_xl/pipeline_stable_diffusion_xl_img2img.py`` (``_get_add_time_ids``).
    """
    total, each = config["projection_class_embeddings_input_dim"], config["addition_time_embed_dim"]
    ids = _REFINER_IDS if total - _REFINER_IDS * each == width else _BASE_IDS
    return ids, total - ids * each
