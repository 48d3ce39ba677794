"""Find the classes with which transformers puts a head of a name and size on a base, tried on meta device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.meta_model import quiet_config
from lora_export.base.checkpoint.module_counts import few_modules

# Endings of the names of transformers' classes that put a head of labels on a model.
_ENDS = ("Classification", "QuestionAnswering", "MultipleChoice")
# PEFT's task types: https://huggingface.co/docs/peft ``TaskType``.
_TASKS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def head_classes(
    checkpoint: Checkpoint, path: str, shape: tuple[int, ...], trained: Mapping[str, Any]
) -> list[str]:
    """Return the names of transformers' Auto classes that give a base a parameter of a head.

    Args:
        checkpoint: The base.
        path: Path of the parameter, ``classifier.weight``.
        shape: Shape of the parameter: a row for each label.
        trained: The adapter's config, which may name the class or the task that it was trained for.

    Returns:
        Their names; none if transformers can't tell.
    """
    try:
        found = dict(_fitting(checkpoint, path, shape))
    except Exception:  # no transformers, or a model that it doesn't know
        return []
    named = (trained.get("auto_mapping") or {}).get("base_model_class")
    own = [auto for auto, model in found.items() if model == named or auto == _TASKS.get(_task(trained))]
    return own or sorted(found)


def _task(trained: Mapping[str, Any]) -> str:
    return str(trained.get("task_type") or "")


def _fitting(checkpoint: Checkpoint, path: str, shape: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """Yield the name of an Auto class and of the model's class that it makes, for each that fits."""
    import torch
    import transformers

    with quiet_config(checkpoint, num_labels=shape[0]) as config:
        for name in dir(transformers):
            if not (name.startswith("AutoModelFor") and name.endswith(_ENDS)):
                continue
            kind = getattr(transformers, name)._model_mapping.get(type(config), None)
            if kind is None:
                continue
            with few_modules(checkpoint.folder), torch.device("meta"):
                shapes = {key: tuple(value.shape) for key, value in kind(config).state_dict().items()}
            # PEFT's paths are those of the whole model.
            if shapes.get(path) == shape:
                yield name, kind.__name__
