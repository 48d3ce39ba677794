"""Describe a model to a capture: inputs that it runs with, and which of their axes are free."""

from __future__ import annotations

import copy
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lora_export.base.checkpoint.module_counts import weights_bytes
from lora_export.errors import CheckpointError
from lora_export.graph.captured import BATCH, DECODER_SEQUENCE, SEQUENCE, Kind

# Sizes of the examples that no other dimension of a model has; the rows are those of one batch.
ROWS, TOKENS, DECODER_TOKENS = 2, 7, 5
# Config of the image processor.
PROCESSOR = "preprocessor_config.json"
# Numbers of positions from here on are none.
_NO_LIMIT = 1 << 31
# Of an example, beside the size of the weights: two images of 1182 × 1182 pixels in float32.
_SMALL_BYTES = 32 << 20


class ModelKind(ABC):
    """A kind of model; it holds nothing.

    Attributes:
        is_exact_in_float64: True if a model in float64 computes all but details in it, so that its answers
            tell how far those in float32 are off.
    """

    is_exact_in_float64: ClassVar[bool] = True

    @abstractmethod
    def takes(self, model: Any) -> bool:
        """Return whether a model of transformers or diffusers is of this kind."""

    @abstractmethod
    def example_inputs(self, model: Any, folder: Path) -> dict[str, Any]:
        """Return inputs that the model runs with, on its device.

        Args:
            model: A model of this kind.
            folder: Its folder.

        Raises:
            CheckpointError: The folder does not say what the inputs are like.
        """

    @abstractmethod
    def axes(self, name: str) -> dict[int, str]:
        """Return the free axes of an input and their names."""

    @abstractmethod
    def word(self, outputs: Mapping[str, Any]) -> Kind:
        """Return the graph's word for the kind, given what the model returned for the example."""

    def largest(self, model: Any) -> dict[str, int]:
        """Return the name of each free axis that has a largest size; by default none."""
        return {}

    def smallest(self, model: Any) -> dict[str, int]:
        """Return the name of each free axis that has a smallest size above 1; by default none."""
        return {}

    def rests(self, model: Any) -> dict[str, int]:
        """Return the name of each free axis that is divided by strides, and a size with the largest rest."""
        return {}

    def seam(self, model: Any) -> int:
        """Return the number of tokens from which on a model may compute in another way; by default 0."""
        return 0

    def step(self, model: Any, dim: str) -> int:
        """Return the number of which the sizes of a free axis are multiples; by default 1."""
        return 1

    def vocab_size(self, model: Any) -> int | None:
        """Return the number of token ids; None, as by default, if it reads none."""
        return None

    def twin(self, model: Any) -> Any:
        """Return a model of the same config with other weights, on the device of the context."""
        attention = getattr(model.config, "_attn_implementation", None)
        return type(model)._from_config(
            copy.deepcopy(model.config), dtype=model.dtype, attn_implementation=attention
        )


class TokenKind(ModelKind):
    """A kind of model that reads tokens."""

    def axes(self, name: str) -> dict[int, str]:
        """Return batch and tokens."""
        return {0: BATCH, 1: DECODER_SEQUENCE if name.startswith("decoder") else SEQUENCE}

    def largest(self, model: Any) -> dict[str, int]:
        """Return the number of positions, if the config has one."""
        longest = longest_of(model, model.config.get_text_config())
        return {SEQUENCE: longest} if longest else {}

    def seam(self, model: Any) -> int:
        """Return what the config's blocks of tokens say; 0 if it has none."""
        config = model.config.get_text_config()
        block, random = (getattr(config, name, None) for name in ("block_size", "num_random_blocks"))
        if not isinstance(block, int):
            return 0
        # BigBird attends in full where its blocks would cover all (``modeling_big_bird``).
        return block * (5 + 2 * random if isinstance(random, int) else 1) + 1

    def vocab_size(self, model: Any) -> int | None:
        """Return the number of token ids; None if the config has none."""
        size = getattr(model.config.get_text_config(), "vocab_size", None)
        return None if size is None else int(size)


def token_ids(model: Any, rows: int = ROWS, tokens: int = TOKENS) -> Any:
    """Return ids ``[rows, tokens]`` that differ: of equal ones attention gives the same under each mask."""
    import torch

    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None) or rows
    return (torch.arange(3, 3 + rows * tokens) % vocabulary).reshape(rows, tokens)


def text_inputs(model: Any) -> dict[str, Any]:
    """Return ids and what belongs to them: a mask of 1, and token types of 0 if the model has some."""
    import torch

    config, accepted = model.config, parameters_of(model)
    inputs = {"input_ids": token_ids(model)}
    # Models without token types still accept the argument (GPT-2 takes it for word ids). PaliGemma's tell
    # where attention goes in both directions.
    text = config.get_text_config()
    types = getattr(config, "type_vocab_size", None) or getattr(text, "use_bidirectional_attention", None)
    for name in ("attention_mask", "token_type_ids"):
        if name in accepted and (name == "attention_mask" or types):
            inputs[name] = torch.full((ROWS, TOKENS), int(name == "attention_mask"), dtype=torch.int64)
    return inputs


def noise(model: Any, shape: Sequence[int], folder: Path) -> Any:
    """Return random values of a shape in the model's dtype; zeros on the meta device, which has no values.

    Args:
        model: A model of transformers or diffusers.
        shape: The shape, which its config states in some way.
        folder: Its folder.

    Raises:
        CheckpointError: A size is not one, or they would take more memory than suits the model's weights.
    """
    import torch

    most = _SMALL_BYTES + weights_bytes(folder)
    if min(shape) < 1 or math.prod(shape) * model.dtype.itemsize > most:
        raise CheckpointError(
            f"{folder}: {model.main_input_name} of the stated size would be {' × '.join(map(str, shape))} "
            f"values in {model.dtype}; wanted are sizes of at least 1, and at most {most} bytes for these "
            "weights",
            f"write the sizes that the model is for into config.json or {PROCESSOR} (of images, of steps)",
        )
    if model.device.type == "meta":
        return torch.zeros(*shape, dtype=model.dtype)
    generator = torch.Generator(device=model.device).manual_seed(0)
    return torch.randn(*shape, generator=generator).to(model.dtype)


def parameters_of(model: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a model's ``forward``."""
    return inspect.signature(model.forward).parameters


def longest_of(model: Any, config: Any) -> int | None:
    """Return the number of positions of a transformers model; None if its config doesn't tell.

    Args:
        model: The module.
        config: Config of its text model.
    """
    limit = getattr(config, "max_position_embeddings", None)
    # What can't be a size says nothing: tokenizers, for one, write 10³⁰ for "no limit".
    if not isinstance(limit, int) or not 0 < limit < _NO_LIMIT:
        return None
    for name, module in model.named_modules():
        # RoBERTa and similar models begin to count after the padding token's id.
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None and module.num_embeddings == limit:
            return limit - int(padding) - 1
    return limit
