"""Describe a naming scheme: the counterparts of each module, and the rows of its output that each has."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from lora_export.adapter import Adapter
from lora_export.formats.schemes.known import KnownModules, flatten

Spans = tuple[tuple[int, int], ...]
# (out_dim, in_dim) of a module → the rows of its output that a counterpart has, in the counterpart's
# order; empty if these sizes can't be cut in this way.
RowsOf = Callable[[int, int], Spans]

# ComfyUI and ai-toolkit put one of these in front of the whole model.
_OUTER = re.compile(r"^(?:model[._])?diffusion_model[._]")
# Names of components; None: the file is for one model.
Components = tuple[str | None, ...]
DENOISERS: Components = (None, "unet", "transformer", "transformer_2")


def whole(rows: int, cols: int) -> Spans:
    """Return all rows."""
    return ((0, rows),)


def swapped_halves(rows: int, cols: int) -> Spans:
    """Return the second half of the rows, then the first: ``shift, scale`` → diffusers' ``scale, shift``."""
    return () if rows % 2 else ((rows // 2, rows), (0, rows // 2))


@dataclass(frozen=True)
class Counterpart:
    """A module of the base that holds (some rows of) a module of the adapter.

    Attributes:
        path: Path; underscores may stand for dots, and the base's own spelling is then looked up.
        rows: Function that returns the rows.
    """

    path: str
    rows: RowsOf = whole


def thirds(*paths: str) -> tuple[Counterpart, ...]:
    """Return the counterparts of a fused query, key and value."""

    def third(number: int) -> RowsOf:
        def rows_of(rows: int, cols: int) -> Spans:
            return () if rows % 3 else ((rows // 3 * number, rows // 3 * (number + 1)),)

        return rows_of

    return tuple(Counterpart(path, third(number)) for number, path in enumerate(paths))


def attention_and_mlp(*paths: str) -> tuple[Counterpart, ...]:
    """Return the counterparts of a fused query, key, value (each as wide as the input) and MLP (the rest)."""

    def part(number: int) -> RowsOf:
        def rows_of(rows: int, cols: int) -> Spans:
            ends = (0, cols, 2 * cols, 3 * cols, rows)
            return ((ends[number], ends[number + 1]),) if rows > 3 * cols else ()

        return rows_of

    return tuple(Counterpart(path, part(number)) for number, path in enumerate(paths))


# Path of one of the adapter's modules → its counterparts; empty if it is not a name of the scheme.
Lookup = Callable[[str], Sequence[Counterpart]]


class Scheme(Protocol):
    """Names for the modules of a family of models that are not the base's own."""

    @property
    def name(self) -> str:
        """Name for messages."""
        ...

    @property
    def components(self) -> Components:
        """Components whose modules it may name."""
        ...

    @property
    def structural(self) -> bool:
        """True if counterparts depend on the base's structure, so that a missing one makes all doubtful."""
        ...

    def recognises(self, adapter: Adapter) -> bool:
        """Return whether an adapter has names of this scheme, judged only by its module paths."""
        ...

    def explains(self, path: str) -> bool:
        """Return whether a module's path is one of the scheme's names, whatever the base."""
        ...

    def lookup(self, known: KnownModules) -> Lookup:
        """Return a function that finds counterparts in a base.

        Raises:
            AdapterError: The base looks like the family, but its structure is not clear from its names.
        """
        ...


def paths_of(scheme: Scheme, adapter: Adapter) -> list[str]:
    """Return the flattened paths of the modules that a scheme may name, without ComfyUI's outer prefix."""
    return [
        flatten(inner(module.path))
        for module in adapter.modules.values()
        if module.component in scheme.components
    ]


def unexplained(scheme: Scheme, adapter: Adapter) -> int:
    """Return how many of the modules that a scheme may name have none of its names."""
    modules = [module for module in adapter.modules.values() if module.component in scheme.components]
    return sum(not scheme.explains(inner(module.path)) for module in modules)


def inner(path: str) -> str:
    """Return a path without ComfyUI's outer prefix."""
    return _OUTER.sub("", path)


def _pattern(source: str) -> re.Pattern[str]:
    return re.compile(re.escape(source).replace(r"\{\}", r"(\d+)"))


@dataclass(frozen=True, kw_only=True)
class TableScheme:
    """A scheme that is a table of names.

    Attributes:
        name: Name for messages.
        table: Path, with ``{}`` for a number → counterparts, or the path of the only one.
        mark: Pattern of a flattened path that only this scheme, or a close relative, has.
        anchors: Groups of modules that distinguish the base's family from others with blocks of the same
            names (and, as FLUX.1 and HunyuanVideo, sizes): the base has one module of each group.
        components: See `Scheme`.
        rivals: Modules of a base that has blocks of the same names twice.
        families: For models whose blocks have the same names and sizes: trainers' name of the family
            (``modelspec.architecture``) → modules of which only a base of this family has one.
        structural: See `Scheme`.
    """

    name: str
    table: Mapping[str, str | Sequence[Counterpart]]
    mark: str
    anchors: tuple[tuple[str, ...], ...]
    components: Components = DENOISERS
    rivals: tuple[str, ...] = ()
    families: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    structural: bool = field(default=False, init=False)

    def recognises(self, adapter: Adapter) -> bool:
        """Return whether some path has the mark."""
        mark = re.compile(self.mark)
        return any(mark.match(path) for path in paths_of(self, adapter))

    def explains(self, path: str) -> bool:
        """Return whether the table has the path."""
        return bool(self._find(path))

    def lookup(self, known: KnownModules) -> Lookup:
        """Return the table as a function, or one that finds nothing if the base is of another family."""
        # A graph may have lost the names of parameters that it does not expose.
        if known.is_complete and not all(any(map(known.has, group)) for group in self.anchors):
            return lambda path: ()
        if any(map(known.has, self.rivals)):
            return lambda path: ()
        return self._find

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], re.Pattern[str], Sequence[Counterpart]]]:
        return [
            (
                _pattern(source),
                _pattern(flatten(source)),
                (Counterpart(targets),) if isinstance(targets, str) else targets,
            )
            for source, targets in self.table.items()
        ]

    def _find(self, path: str) -> Sequence[Counterpart]:
        path = inner(path)
        for dotted, flat, targets in self._patterns:
            # Dots distinguish HunyuanVideo's ``img_attn_qkv`` from FLUX.1's ``img_attn.qkv``.
            if match := (dotted if "." in path else flat).fullmatch(path):
                return [Counterpart(target.path.format(*match.groups()), target.rows) for target in targets]
        return ()
