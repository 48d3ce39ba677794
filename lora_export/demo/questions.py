"""Read what the chat demo learns from ``questions.toml``: the same answers in three styles."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, NamedTuple


class Answered(NamedTuple):
    """A question and the answer to learn."""

    question: str
    answer: str


@dataclass(frozen=True)
class Style:
    """One way to answer.

    Attributes:
        name: Name of the adapter.
        train: Questions with answers in this style.
        lora: Options of PEFT's ``LoraConfig``.
    """

    name: str
    train: tuple[Answered, ...]
    lora: dict[str, Any]


@dataclass(frozen=True)
class Lesson:
    """Content of ``questions.toml``.

    Attributes:
        styles: Styles in the file's order.
        held_out: Questions that no adapter was trained on.
    """

    styles: tuple[Style, ...]
    held_out: tuple[str, ...]


def load_lesson() -> Lesson:
    """Return the styles and the held-out questions of the file."""
    data = tomllib.loads(files("lora_export.demo").joinpath("questions.toml").read_text(encoding="utf-8"))
    train: dict[str, str] = data["train"]
    styles = (
        Style(name, tuple(Answered(q, style["template"] % a) for q, a in train.items()), style["lora"])
        for name, style in data["styles"].items()
    )
    return Lesson(tuple(styles), tuple(data["held_out"]))
