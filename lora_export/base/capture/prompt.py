"""Give a text encoder the inputs and outputs that pipelines of diffusers use.

They read tokens alone (a padded prompt is read with its padding), and SDXL and SD 3 take what CLIP's last
layer but one gives: ``hidden_states.N``, as optimum names it. Pipelines with UMT5 (Wan) give a mask as well.
"""

from __future__ import annotations

from typing import Any

_MASKED = ("UMT5EncoderModel",)


def as_prompt(model: Any) -> None:
    """Replace the ``forward`` of a text encoder of transformers by one that pipelines call.

    Args:
        model: The model, as it was loaded.
    """
    forward, name = model.forward, type(model).__name__
    model.config.output_hidden_states = name.startswith("CLIP")

    def masked(input_ids: Any, attention_mask: Any) -> Any:
        return forward(input_ids=input_ids, attention_mask=attention_mask)

    def plain(input_ids: Any) -> Any:
        return forward(input_ids=input_ids)

    model.forward = masked if name in _MASKED else plain
