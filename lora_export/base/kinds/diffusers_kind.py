"""Describe a model of diffusers to a capture: it gets plain inputs and outputs under optimum's names.

A ``forward`` of diffusers takes nested arguments and returns tuples or objects. It is replaced on the model
itself: with a module around it, each weight of the graph would have another name than in the checkpoint.

The names are those of optimum's ONNX pipelines: https://github.com/huggingface/optimum-onnx
``optimum/exporters/onnx/model_configs.py`` and ``optimum/onnxruntime/modeling_diffusion.py``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from lora_export.base.kinds.model_kind import ROWS, ModelKind
from lora_export.errors import CheckpointError
from lora_export.graph.captured import BATCH, Kind

# Sides of the example, in the smallest steps that the model takes: no two axes of it are alike.
TALL, BROAD = 2, 3


class DiffusersKind(ModelKind):
    """A kind of model of diffusers.

    Attributes:
        model_class: The model's class.
        main_input: Input that the model is told by once its ``forward`` was replaced.
        free: Input → its free axes and their names.
    """

    # Angles of time steps, up to 1000, are computed in float32 in every dtype.
    is_exact_in_float64 = False
    model_class: ClassVar[str]
    main_input: ClassVar[str]
    free: ClassVar[Mapping[str, Mapping[int, str]]]

    @abstractmethod
    def flatten(self, model: Any) -> None:
        """Replace the ``forward`` of a model by one with plain inputs and named outputs."""

    @abstractmethod
    def unsupported(self, config: Mapping[str, Any]) -> list[str]:
        """Return what a config states that the inputs of this kind don't cover."""

    def takes(self, model: Any) -> bool:
        """Return whether a model is of this kind."""
        is_told = getattr(model, "main_input_name", None) == self.main_input
        return is_told and type(model).__name__ == self.model_class

    def axes(self, name: str) -> dict[int, str]:
        """Return the free axes of an input: those that it is listed with, else the batch."""
        return dict(self.free.get(name, {0: BATCH}))

    def step(self, model: Any, dim: str) -> int:
        """Return the smallest size of an axis: others are multiples of it."""
        return self.smallest(model).get(dim, 1)

    def word(self, outputs: Mapping[str, Any]) -> Kind:
        """Return the word for it."""
        return "denoiser"

    def refuse_unsupported(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Raise `CheckpointError` if a config's model needs inputs that are not known here."""
        if problems := self.unsupported(config):
            raise CheckpointError(
                f"{folder}: {self.model_class} needs inputs that are not known",
                "export the model yourself and go on with that .onnx",
                [f"config.json: {problem}" for problem in problems],
            )

    def prepare(self, model: Any) -> None:
        """Give a model as diffusers loads it plain inputs."""
        self.flatten(model)
        model.main_input_name = self.main_input

    def twin(self, model: Any) -> Any:
        """Return a model of the same config with other weights, on the device of the context."""
        made = type(model).from_config(model.config).to(model.dtype)
        self.prepare(made)
        return made


def stated(config: Mapping[str, Any], *names: str) -> list[str]:
    """Return the entries of a config that are set, as they are written there."""
    return [f"{name}: {config[name]!r}" for name in names if config.get(name)]


def steps() -> Any:
    """Return an example of time steps, one a row: float32, in which a scheduler computes them."""
    import torch

    return torch.linspace(100.5, 900.0, ROWS)
