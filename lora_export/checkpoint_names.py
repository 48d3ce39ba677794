"""Which stored tensors hold a parameter of a model: by name, else by the renaming that transformers knows.

An adapter speaks of modules as they were named in memory; a file may use other names. Three differences
occur: a prefix (``bert.encoder…`` against ``encoder…``), names of an older transformers (5.x renames modules
and writes the old names), and experts that are stacked in memory but stored one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lora_export.base.meta_model import LoadedNames, build_model
from lora_export.checkpoint import Checkpoint
from lora_export.formats.wrappers import strip_wrappers
from lora_export.sites.known_names import KnownNames
from lora_export.sites.renaming import AMBIGUOUS, NOT_FOUND, Named, Renaming, rename

NO_TENSOR = "no tensor of that name"
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
    """Finds parameters in a checkpoint; iterating yields the paths of what it stores.

    Args:
        checkpoint: The base.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._stored = _unwrapped(checkpoint.tensors)
        self._known = KnownNames(self._stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def rename(self, named: Sequence[Named], flattened: bool = False, scope: str | None = None) -> Renaming:
        """Return the path of each parameter of one adapter, for `parts`.

        The names of the file are tried first, then those that transformers gives to what is in it.

        Args:
            named: All that the adapter changes: one change of names holds for it.
            flattened: The paths' dots are underscores (kohya's files).
            scope: The part that belongs, as the user says it.
        """
        found = rename(named, self._known, flattened=flattened, scope=scope)
        missing = self._missing(named, found, self._stored)
        if all(found.problems.get(number, "").startswith(AMBIGUOUS) for number in missing):
            return found
        table, problem = self._renamed
        again = rename(named, KnownNames(table), flattened=flattened, scope=scope) if table else found
        if len(self._missing(named, again, table)) < len(missing):
            return again
        return replace(
            found,
            problems={number: _reason(found.problems.get(number, ""), problem) for number in missing}
            | {number: reason for number, reason in found.problems.items() if number not in missing},
        )

    def parts(self, name: str) -> tuple[Part, ...]:
        """Return where a parameter of `rename`'s path is stored; nothing where it is not."""
        return self._stored.get(name) or (self._renamed[0].get(name, ()) if self._is_renamed else ())

    def find(self, parameter: str) -> tuple[Part, ...] | str:
        """Return where one parameter is stored, or why that is not known."""
        found = self.rename([Named(parameter)])
        (name,) = found.names
        problem = found.problems.get(0, "")
        parts = self.parts(name) if name and not problem else ()
        return parts or (NO_TENSOR if problem in ("", NOT_FOUND) else problem)

    def _missing(
        self, named: Sequence[Named], found: Renaming, table: Mapping[str, tuple[Part, ...]]
    ) -> list[int]:
        return [number for number, name in enumerate(found.names) if name is None or name not in table]

    @property
    def _is_renamed(self) -> bool:
        """Whether transformers was asked: it imports torch."""
        return "_renamed" in self.__dict__

    @cached_property
    def _renamed(self) -> tuple[dict[str, tuple[Part, ...]], str]:
        """The renaming of transformers, asked only when a name was not found."""
        try:
            return dict(_by_transformers(self._checkpoint)), ""
        except ImportError:
            return {}, _NO_TRANSFORMERS
        except Exception as error:  # a model that this transformers can't build
            return {}, f"transformers cannot build the model: {type(error).__name__}: {error}"


def _unwrapped(names: Iterable[str]) -> dict[str, tuple[Part, ...]]:
    """Return the parts by their paths without wrappers; of two that become one, both keep their names."""
    plain = {name: strip_wrappers(name) for name in names}
    count = Counter(plain.values())
    return {path if count[path] == 1 else name: (Part(name),) for name, path in plain.items()}


def _reason(problem: str, asked: str) -> str:
    """Return why a parameter is not stored, and where transformers could not be asked, why."""
    reason = NO_TENSOR if problem in ("", NOT_FOUND) else problem
    return f"{reason} ({asked})" if asked else reason


def _by_transformers(checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[Part, ...]]]:
    """Yield the model's parameters as transformers would load them from this checkpoint.

    The model is built on torch's meta device, without memory.
    """
    renaming = LoadedNames(build_model(checkpoint))
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
