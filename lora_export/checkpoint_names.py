"""Which stored tensors hold a parameter of a model: by name, else by the renaming that transformers knows.

An adapter speaks of modules as they were named in memory; a file may use other names. Three differences
occur: a prefix (``bert.encoder…`` against ``encoder…``), names of an older transformers (5.x renames modules
and writes the old names), and experts that are stacked in memory but stored one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lora_export.base.meta_model import Renaming, build_model
from lora_export.checkpoint import Checkpoint

_NO_TRANSFORMERS = "transformers' table of renamed modules could not be asked: pip install 'lora-export[hf]'"


@dataclass(frozen=True)
class Part:
    """A stored tensor that holds a parameter, or some rows of it.

    Attributes:
        tensor: The stored tensor's name.
        expert: Which of the parameter's stacked matrices; None: all of them, or it is not stacked.
        piece: ``(index, count)``: the tensor is the index-th of count that are concatenated along the rows.
        reason: What led here.
    """

    tensor: str
    expert: int | None = None
    piece: tuple[int, int] = (0, 1)
    reason: str = "name"


class Names:
    """Finds parameters in a checkpoint.

    Args:
        checkpoint: The base.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._stored = _Table({name: (Part(name),) for name in checkpoint.tensors})

    def find(self, parameter: str, flattened: bool = False) -> tuple[Part, ...] | str:
        """Return where ``parameter`` is stored, or why that is not known.

        Args:
            parameter: Dotted path with the parameter's own name: ``model.layers.0.mlp.up_proj.weight``.
            flattened: The module path's dots are underscores (kohya's files).
        """
        found = self._stored.find(parameter, flattened)
        if isinstance(found, str) or found:
            return found
        table, problem = self._renamed
        if table is None:
            return f"no tensor of that name ({problem})" if problem else "no tensor of that name"
        found = table.find(parameter, flattened)
        return found or "no tensor of that name"

    @cached_property
    def _renamed(self) -> tuple[_Table | None, str]:
        """The renaming of transformers, asked only when a name was not found: it imports torch."""
        try:
            renamed = dict(_by_transformers(self._checkpoint))
        except ImportError:
            return None, _NO_TRANSFORMERS
        except Exception as error:  # a model that this transformers can't build
            return None, f"transformers cannot build the model: {type(error).__name__}: {error}"
        return _Table(renamed), ""


class _Table:
    """Parameters by name and by dotted suffix."""

    def __init__(self, parts: Mapping[str, tuple[Part, ...]]) -> None:
        self._parts = parts
        self._by_tail: dict[str, list[str]] = {}
        for name in parts:
            for tail in _tails(name):
                self._by_tail.setdefault(tail, []).append(name)

    def find(self, parameter: str, flattened: bool) -> tuple[Part, ...] | str:
        """Return the parts; empty if there are none; a sentence if the name is ambiguous."""
        if flattened:
            names = self._flattened(parameter)
        elif parameter in self._parts:
            names = [parameter]
        else:
            # The file's names have more components in front, or fewer.
            names = self._by_tail.get(parameter, []) or next(
                ([tail] for tail in _tails(parameter) if tail in self._parts), []
            )
        if len(names) > 1:
            return f"ambiguous: {', '.join(sorted(names)[:4])}{', …' if len(names) > 4 else ''}"
        return self._parts[names[0]] if names else ()

    def _flattened(self, parameter: str) -> list[str]:
        module, _, leaf = parameter.rpartition(".")
        wanted = module.replace(".", "_")
        names = [name for name in self._parts if name.rpartition(".")[2] == leaf]
        flat = {name: name.rpartition(".")[0].replace(".", "_") for name in names}
        exact = [name for name in names if flat[name] == wanted]
        return exact or [n for n in names if flat[n].endswith(f"_{wanted}")]


def _tails(name: str) -> Iterator[str]:
    """Yield ``b.c`` and ``c`` for ``a.b.c``, without the bare parameter name."""
    at = name.find(".")
    while at >= 0 and "." in name[at + 1 :]:
        yield name[at + 1 :]
        at = name.find(".", at + 1)


def _by_transformers(checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[Part, ...]]]:
    """Yield the model's parameters as transformers would load them from this checkpoint.

    The model is built on torch's meta device, without memory.
    """
    renaming = Renaming(build_model(checkpoint))
    found: dict[str, list[Part]] = {}
    for stored in checkpoint.tensors:
        target, pattern, converter = renaming.loaded(stored)
        part = Part(stored, reason="transformers' renaming")
        if pattern is not None:
            stacked = _stacked(stored, pattern, converter)
            if stacked is None:
                continue
            part = stacked
        found.setdefault(target, []).append(part)
    for target, parts in found.items():
        yield target, tuple(sorted(parts, key=lambda part: (part.expert or 0, part.piece)))


def _stacked(stored: str, pattern: str, converter: Any) -> Part | None:
    """Return which rows of which expert a tensor becomes; None for a conversion that we can't follow."""
    operations = [
        (type(operation).__name__, getattr(operation, "dim", None)) for operation in converter.operations
    ]
    if operations not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        return None
    numbers = [int(word) for word in stored.split(".") if word.isdigit()]
    if pattern.count("*") != 1 or not numbers:
        return None
    sources = list(converter.source_patterns)
    # The expert's number is the last one of the name: ``layers.3.mlp.experts.17.up_proj.weight``.
    piece = (sources.index(pattern), len(sources))
    return Part(stored, numbers[-1], piece, "transformers' stacking of experts")
