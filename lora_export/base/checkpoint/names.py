"""Find the stored tensors that hold a parameter of a model: by name, else by transformers' renaming.

An adapter has the modules' names in memory; a file may use other names. Three differences
occur: a prefix (``bert.encoder…`` against ``encoder…``), names of an older transformers (5.x renames modules
and writes the old names), and experts that are stacked in memory but stored one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.doubles import (
    has_layers_alike,
    may_be_doubles,
    refuse_doubles,
    refuse_unasked,
)
from lora_export.base.checkpoint.meta_model import LoadedNames, build_model, module_kind
from lora_export.errors import CheckpointError, install_line
from lora_export.formats.reading.wrappers import strip_wrappers
from lora_export.sites.experts import ExpertLayout
from lora_export.sites.naming.known_names import KnownNames
from lora_export.sites.naming.names import Named
from lora_export.sites.naming.renaming import NOT_FOUND, NamingProblem, Renaming, rename
from lora_export.sites.naming.towers import Kinds, kinds_of_class
from lora_export.untrusted.numbers import whole_number

NO_TENSOR = "no tensor of that name"
_NO_TRANSFORMERS = f"transformers' table of renamed modules could not be asked: {install_line('hf')}"


@dataclass(frozen=True, kw_only=True)
class StoredPart:
    """Stored tensor that holds a parameter, or some rows of it.

    Attributes:
        tensor: The stored tensor's name.
        expert: Number of the stacked matrix; None for all of them, or if the parameter is not stacked.
        piece: ``(index, count)``: the tensor is the index-th of count that are concatenated along the rows.
        reason: Evidence, for the plan.
        transposed: True if the module holds the transpose of the (last two axes of the) tensor.
    """

    tensor: str
    expert: int | None = None
    piece: tuple[int, int] = (0, 1)
    reason: str = "name"
    transposed: bool = False


class Names:
    """Finder of parameters in a checkpoint; iterating yields the paths of those that it stores.

    Args:
        checkpoint: The base.
        is_changed: True if its tensors will be changed, see `doubles.refuse_doubles`.

    Raises:
        StoredTwiceError: Two stored tensors are one parameter for transformers.
    """

    def __init__(self, checkpoint: Checkpoint, *, is_changed: bool = False) -> None:
        self._checkpoint, self._is_changed = checkpoint, is_changed
        self._stored = _unwrapped(checkpoint.tensors)
        self._known = self._known_of(self._stored)
        self._held: dict[str, ExpertLayout | None] = {}
        self._refuse_doubles()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def _refuse_doubles(self) -> None:
        """Raise `StoredTwiceError` if two tensors are one parameter, as far as their names make one ask."""
        if self._checkpoint.diffusers_class or not self._checkpoint.config:
            return
        alike = may_be_doubles(self._checkpoint)
        if alike is None and not has_layers_alike(self._checkpoint):
            return
        _, problem = self._renamed
        if alike is not None and problem == _NO_TRANSFORMERS:
            refuse_unasked(self._checkpoint, *alike)

    def rename(self, named: Sequence[Named], flattened: bool = False, scope: str | None = None) -> Renaming:
        """Return the path of each parameter of one adapter, for `parts`.

        The names of the file are tried first, then those that transformers gives to its tensors.

        Args:
            named: All parameters of the adapter: one change of names holds for it.
            flattened: True if the paths' dots are underscores (kohya's files).
            scope: Part that belongs, as the user names it.
        """
        found = rename(named, self._known, flattened=flattened, scope=scope)
        missing = self._missing(named, found, self._stored)
        if all(self._kind(found, number) == "ambiguous" for number in missing):
            return found
        table, problem = self._renamed
        if table:
            known = self._known_of(table)
            again = rename(named, known, flattened=flattened, scope=scope)
            left = len(self._missing(named, again, table))
            if left < len(missing) or (left == len(missing) and again.reach > found.reach):
                found, missing = again, self._missing(named, again, table)
        reasons = {number: _reason(found.problems.get(number, NOT_FOUND), problem) for number in missing}
        return replace(found, problems=found.problems | reasons)

    def _known_of(self, table: Mapping[str, tuple[StoredPart, ...]]) -> KnownNames:
        return KnownNames(
            table, lambda name: self._shape(table[name]), lambda: kinds_of_class(self._checkpoint.config)
        )

    @property
    def kinds(self) -> Kinds:
        """Kinds of model that the checkpoint is, as far as its config and its names tell."""
        return self._known.kinds

    def parts(self, name: str) -> tuple[StoredPart, ...]:
        """Return the tensors that hold a parameter, by its path from `rename`; none if it is not stored."""
        return self._stored.get(name) or (self._renamed[0].get(name, ()) if self._is_renamed else ())

    def find(self, parameter: str) -> tuple[StoredPart, ...]:
        """Return the tensors that hold one parameter; none if it is not stored, or several may be meant."""
        found = self.rename([Named(parameter)])
        (name,) = found.names
        return self.parts(name) if name and not found.problems else ()

    def _kind(self, found: Renaming, number: int) -> str:
        return found.problems.get(number, NOT_FOUND).kind

    def _shape(self, parts: Sequence[StoredPart]) -> tuple[int, ...] | None:
        """Return the shape of a parameter that is stored as one tensor."""
        (part, *more) = parts
        if more or part.expert is not None or part.piece != (0, 1):
            return None
        return self._checkpoint.tensors[part.tensor].shape

    def _missing(
        self, named: Sequence[Named], found: Renaming, table: Mapping[str, tuple[StoredPart, ...]]
    ) -> list[int]:
        return [number for number, name in enumerate(found.names) if name is None or name not in table]

    @property
    def _is_renamed(self) -> bool:
        """True if transformers was asked, which imports torch."""
        return "_renamed" in self.__dict__

    def held(self, parameter: str) -> ExpertLayout | None:
        """Return the layout of a parameter in the model's own module, as transformers builds it.

        Without transformers, or for a model that it doesn't know, the layout is the stored one. None if no
        parameter has this path, or several that differ.
        """
        if parameter not in self._held:
            self._held[parameter] = self._look_up(parameter)
        return self._held[parameter]

    def stored(self, parameter: str) -> tuple[tuple[int, ...], bool] | None:
        """Return a stored parameter's shape, and True if its module has a bias; None if it is unknown."""
        parts = self.find(parameter)
        shape = self._shape(parts) if parts else None
        if shape is None:
            return None
        return shape, f"{parts[0].tensor.rpartition('.')[0]}.bias" in self._checkpoint.tensors

    def _look_up(self, parameter: str) -> ExpertLayout | None:
        shapes = self._shapes
        names: list[str] = [parameter] if parameter in shapes else []
        # Other components may be in front, in both paths; all parameters that may be meant have to be alike.
        for tail in () if names else (parameter, *_tails(parameter)):
            names = names or [name for name in shapes if name == tail or name.endswith(f".{tail}")]
        found = set()
        for name in names:
            owner = self._model[0].get_submodule(name.rpartition(".")[0])
            found.add(
                ExpertLayout(shapes[name], bool(getattr(owner, "is_transposed", False)), module_kind(owner))
            )
        if found:
            return found.pop() if len(found) == 1 else None
        parts = self.find(parameter)
        if len(parts) != 1:
            return None
        return ExpertLayout(self._checkpoint.tensors[parts[0].tensor].shape, None)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        model, _ = self._model
        return {} if model is None else {n: tuple(v.shape) for n, v in model.state_dict().items()}

    @cached_property
    def _model(self) -> tuple[Any, str]:
        """Model without values, or the reason why there is none; built only if needed: it imports torch."""
        if self._checkpoint.diffusers_class:
            return None, ""  # diffusers stores parameters under the names that they have in memory
        try:
            return build_model(self._checkpoint), ""
        except ImportError:
            return None, _NO_TRANSFORMERS
        except Exception as error:  # a model that this transformers can't build
            return None, f"transformers cannot build the model: {type(error).__name__}: {error}"

    @cached_property
    def _renamed(self) -> tuple[dict[str, tuple[StoredPart, ...]], str]:
        """Transformers' renaming, asked for only if a name was not found."""
        model, problem = self._model
        if model is None:
            return {}, problem
        try:
            table = loaded_parts(self._checkpoint, model)
        except Exception as error:  # a conversion that we don't know
            return {}, f"transformers' renaming can't be followed: {type(error).__name__}: {error}"
        refuse_doubles(self._checkpoint, table, model.state_dict(), self._is_changed)
        return table, ""


def refuse_stored_twice(folder: Path) -> None:
    """Raise `StoredTwiceError` if a folder's safetensors hold a parameter under two names."""
    try:
        checkpoint = Checkpoint.open(folder)
    except CheckpointError:  # other files, or damaged ones: loading them tells
        return
    Names(checkpoint)


def _tails(name: str) -> Iterator[str]:
    """Yield a path with fewer and fewer components in front, such as ``b.c`` for ``a.b.c``; no bare name."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(1, len(parts) - 1))


def _unwrapped(names: Iterable[str]) -> dict[str, tuple[StoredPart, ...]]:
    """Return the parts by their paths without wrappers; two that would become one keep their names."""
    plain = {name: strip_wrappers(name) for name in names}
    count = Counter(plain.values())
    return {path if count[path] == 1 else name: (StoredPart(tensor=name),) for name, path in plain.items()}


def _reason(problem: NamingProblem, asked: str) -> NamingProblem:
    """Add to a problem the reason why transformers could not be asked."""
    detail = problem.detail or NO_TENSOR
    return replace(problem, detail=f"{detail} ({asked})" if asked else detail)


def loaded_parts(checkpoint: Checkpoint, model: Any) -> dict[str, tuple[StoredPart, ...]]:
    """Return the parameters of a model as transformers would load them from this checkpoint."""
    renaming = LoadedNames(model)
    found: dict[str, list[StoredPart]] = {}
    for stored in checkpoint.tensors:
        target, pattern, converter = renaming.loaded(stored)
        part = StoredPart(tensor=stored, reason="transformers' renaming")
        if pattern is not None:
            stacked = _stacked(stored, pattern, converter)
            if stacked is None:
                continue
            part = stacked
        found.setdefault(target, []).append(part)
    return {
        target: tuple(sorted(parts, key=lambda part: (part.expert or 0, part.piece)))
        for target, parts in found.items()
    }


def _stacked(stored: str, pattern: str, converter: Any) -> StoredPart | None:
    """Return the part, with expert and rows, that a tensor becomes; None for an unknown conversion."""
    operations = [
        (type(operation).__name__, getattr(operation, "dim", None)) for operation in converter.operations
    ]
    if operations == [("Transpose", None)]:
        (turn,) = converter.operations
        # ``check_dims``: the orientation depends on the shape, which is decided later.
        always = (turn.dim0, turn.dim1) in ((0, 1), (1, 2)) and not turn.check_dims
        return StoredPart(tensor=stored, reason="transformers' renaming", transposed=True) if always else None
    if operations not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        return None
    numbers = [number for word in stored.split(".") if (number := whole_number(word)) is not None]
    if pattern.count("*") != 1 or not numbers:
        return None
    sources = list(converter.source_patterns)
    # The expert's number is the last one of the name: ``layers.3.mlp.experts.17.up_proj.weight``.
    piece = (sources.index(pattern), len(sources))
    return StoredPart(
        tensor=stored, expert=numbers[-1], piece=piece, reason="transformers' stacking of experts"
    )
