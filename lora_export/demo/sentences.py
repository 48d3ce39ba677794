"""Read the demo's three tasks from ``sentences.toml``."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib.resources import files
from typing import NamedTuple


class Example(NamedTuple):
    """A sentence and the index of its label."""

    sentence: str
    label: int


@dataclass(frozen=True)
class Task:
    """A classification of sentences to learn.

    Attributes:
        name: Name of the adapter.
        labels: Labels that a sentence can have.
        train: Sentences to learn from.
        held_out: Sentences to test with; none is in ``train``.
    """

    name: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]


def load_tasks() -> tuple[Task, ...]:
    """Return the tasks in the file's order."""
    text = files("lora_export.demo").joinpath("sentences.toml").read_text(encoding="utf-8")
    return tuple(_task(name, parts) for name, parts in tomllib.loads(text).items())


def _task(name: str, parts: dict[str, dict[str, list[str]]]) -> Task:
    labels = tuple(parts["train"])

    def examples(part: str) -> tuple[Example, ...]:
        return tuple(Example(text, labels.index(label)) for label in labels for text in parts[part][label])

    return Task(name, labels, examples("train"), examples("held_out"))
