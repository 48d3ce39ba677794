"""Vision–language models whose parts become graphs of their own: LLaVA, Gemma 3.

As a whole they are captured as their language model, which is `text.Text`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.base.kinds.images import images
from lora_export.base.kinds.model_kind import TokenKind, parameters_of, token_ids
from lora_export.errors import CheckpointError
from lora_export.graph.captured import IMAGE_BATCH, Kind

if TYPE_CHECKING:
    import torch

TEXT_ALONE = "give -o NAME.onnx, for the graph of its language model"
# Tokens of the example before and behind its image.
_BEFORE, _BEHIND = 2, 7
_FEATURES, _PIXELS, _TYPES = "get_image_features", "pixel_values", "token_type_ids"
# Parameters of `_FEATURES` that say which of the tower's answers are meant; the config does, where they are
# left out.
_CHOICES = {"self", _PIXELS, "vision_feature_layer", "vision_feature_select_strategy", "kwargs"}
# Classes whose token types are 1 for an image's tokens, which attend to each other in both directions.
_IMAGE_TYPES = {"Gemma3ForConditionalGeneration"}


class VisionLanguage(TokenKind):
    """Texts with one image in each; the inputs are the whole model's."""

    def takes(self, model: Any) -> bool:
        """Return whether a transformers model can be cut."""
        return is_vision_language(type(model)) and not why_whole(type(model))

    def example_inputs(self, model: Any, folder: Path) -> dict[str, Any]:
        """Return texts with an image, and the images."""
        import torch

        image = getattr(model.config, "image_token_id", None)
        if image is None:
            raise whole_only(folder, type(model).__name__, "its config names no token for images")
        pixels = images(model, model.config.vision_config, folder)
        count = _tokens_each(self, model, pixels, folder)
        text = token_ids(model, len(pixels), _BEFORE + _BEHIND)
        text = torch.where(text == image, text - 1, text)
        row = torch.full((len(pixels), count), image, dtype=text.dtype)
        ids = torch.cat([text[:, :_BEFORE], row, text[:, _BEFORE:]], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), _PIXELS: pixels}
        return inputs | ({_TYPES: image_types(model, ids)} if has_image_types(model) else {})

    def axes(self, name: str) -> dict[int, str]:
        """Return the number of images, or batch and tokens."""
        return {0: IMAGE_BATCH} if name == _PIXELS else super().axes(name)

    def word(self, outputs: Mapping[str, Any]) -> Kind:
        """Return the word for the whole."""
        return "decoder"


def is_vision_language(kind: Any) -> bool:
    """Return whether a class of transformers is that of a model that reads images and generates text."""
    return hasattr(kind, _FEATURES) and bool(kind.can_generate())


def why_whole(kind: Any) -> str:
    """Return why the parts of a vision–language model can't be graphs of their own; empty if they can.

    Args:
        kind: Its class.
    """
    further = [name for name in inspect.signature(kind.get_image_features).parameters if name not in _CHOICES]
    if further:
        return f"beside the pixels, it reads {' and '.join(further)}"
    types = [name for name in inspect.signature(kind.forward).parameters if name.endswith(_TYPES)]
    if types and kind.__name__ not in _IMAGE_TYPES:
        return f"{' and '.join(types)} of another meaning say how it attends"
    return ""


def whole_only(where: str | Path, name: str, reason: str) -> CheckpointError:
    """Return the error of a model whose parts can't be graphs of their own.

    Args:
        where: Its folder.
        name: Its class.
        reason: Refusal, for the message.
    """
    return CheckpointError(
        f"{where}: {name} can't be cut into the graphs of vision, embedding and text: {reason}", TEXT_ALONE
    )


def has_image_types(model: Any) -> bool:
    """Return whether a model reads which tokens are an image's, beside their embeddings."""
    return _TYPES in parameters_of(model)


def image_types(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return token types: 1 for an image's tokens."""
    return (ids == model.config.image_token_id).long()


def features_of(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return what a model puts in the places of images, ``[image_tokens, width]``."""
    import torch

    with torch.no_grad(), _as_one(pixel_values):
        found = model.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output
        whole = torch.cat(tuple(found)) if isinstance(found, tuple | list) else found
        return whole.reshape(-1, whole.shape[-1])


def _tokens_each(kind: VisionLanguage, model: Any, pixels: torch.Tensor, folder: Path) -> int:
    """Return the number of tokens of an image, which a copy of the model without values tells."""
    import torch

    with torch.device("meta"):
        twin = model if model.device.type == "meta" else kind.twin(model).eval()
        try:
            found = features_of(twin, torch.zeros(pixels.shape, dtype=pixels.dtype))
        except Exception as error:  # of the model's own code
            reason = f"its {_FEATURES} gives no features of pixels alone"
            raise whole_only(folder, type(model).__name__, reason) from error
    return int(found.shape[0]) // len(pixels)


def _as_one(pixels: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Return what makes a list of all images one of their batch, in a trace for any number of them.

    LLaVA takes the batch apart, to put it together again, and a trace would have one number of images.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    if isinstance(pixels.shape[0], int):
        return contextlib.nullcontext()

    # What Python asks of a tensor that it makes a list of.
    pieces: dict[Any, Callable[[Any], Any]] = {
        torch.Tensor.__len__: lambda _: 1,
        torch.Tensor.unbind: lambda whole: (whole,),
    }

    class AsOne(TorchFunctionMode):  # type: ignore[misc]
        """Leaves an axis of no fixed size in one piece."""

        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if func in pieces and not isinstance(args[0].shape[0], int):
                return pieces[func](args[0])
            return func(*args, **(kwargs or {}))

    mode: contextlib.AbstractContextManager[object] = AsOne()
    return mode
