"""Check shapes against an engine's record before TensorRT is called, and report all problems at once.

TensorRT itself reports only the first tensor whose shape is outside of the profile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lora_export.adapter import Array
from lora_export.engines.record import EngineRecord, Profile, ShapeRange
from lora_export.errors import BackendError
from lora_export.graph.port import Port

Shapes = Mapping[str, tuple[int, ...]]


class EngineShapes:
    """The optimisation profiles of one engine.

    Attributes:
        chosen: Numbers of the profiles that may be used, in order of preference.
    """

    def __init__(self, record: EngineRecord, profile: str | None) -> None:
        """Read a record.

        Args:
            record: The engine record.
            profile: Name of the profile to use, or None for any.

        Raises:
            BackendError: No profile has this name.
        """
        self._name = record.name
        self._ports = {port.name: port for port in record.inputs}
        self._profiles = record.profiles
        names = [known.name for known in record.profiles]
        if profile is not None and profile not in names:
            raise BackendError(f"{record.name} has no profile {profile!r}", f"it has: {', '.join(names)}")
        self.chosen = range(len(names)) if profile is None else [names.index(profile)]

    def varies(self, name: str) -> bool:
        """Return True if an input has a size that is not fixed in the engine."""
        return -1 in self._ports[name].shape

    def taking(self, shapes: Shapes) -> tuple[int, ...]:
        """Return the profiles that take these inputs' shapes."""
        return tuple(number for number in self.chosen if not self._outside(number, shapes))

    def choose(self, shapes: Shapes, among: Sequence[int]) -> int:
        """Return the first profile that takes a request.

        Args:
            shapes: Shapes of the request's feeds.
            among: Numbers of the profiles that take the LoRA tensors of the run.

        Raises:
            BackendError: No profile takes the request; every reason is listed.
        """
        problems = self._unequal(shapes)
        fitting = () if problems else [number for number in among if not self._outside(number, shapes)]
        if fitting:
            return fitting[0]
        for number in among:
            problems += self._outside(number, shapes)
        raise BackendError(
            f"the feeds' shapes don't fit {self._name}",
            "change the feeds' shapes, or build the engine with a profile that takes them",
            problems or [f"no profile takes both the feeds and the adapter; it has {len(self._profiles)}"],
        )

    def padded(self, number: int, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """Return LoRA tensors padded with zeros at the end of each axis to a profile's smallest shape.

        Only ranks vary in these tensors' shapes, and additional ranks of zeros have no effect.
        """
        return {name: _padded(values, self._range(number, name)) for name, values in tensors.items()}

    def problems(self, shapes: Shapes) -> list[str]:
        """Return the reasons why no profile takes these inputs: a line for each input and profile."""
        return [line for number in self.chosen for line in self._outside(number, shapes)]

    def _range(self, number: int, name: str) -> ShapeRange:
        fixed = self._ports[name].shape
        return self._profiles[number].shapes.get(name, (fixed, fixed, fixed))

    def _outside(self, number: int, shapes: Shapes) -> list[str]:
        profile = self._profiles[number]
        return [
            f"{name} {shape}: {_taken(profile, self._ports[name], sizes)}"
            for name, shape in shapes.items()
            if not _within(shape, sizes := self._range(number, name))
        ]

    def _unequal(self, shapes: Shapes) -> list[str]:
        """Return a line for each dimension whose size differs between two inputs."""
        seen: dict[str, tuple[int, str]] = {}
        problems = []
        for name, shape in shapes.items():
            dims = self._ports[name].dims
            for dim, size in zip(dims, shape, strict=False):
                if not isinstance(dim, str):
                    continue
                known, where = seen.setdefault(dim, (size, name))
                if known != size:
                    problems.append(f"{name} {shape}: dimension '{dim}' is {size}, in {where} it is {known}")
        return problems


def _within(shape: tuple[int, ...], sizes: ShapeRange) -> bool:
    low, _, high = sizes
    return len(shape) == len(low) and all(
        least <= size <= most for least, size, most in zip(low, shape, high, strict=True)
    )


def _taken(profile: Profile, port: Port, sizes: ShapeRange) -> str:
    pairs = zip(sizes[0], sizes[2], strict=True)
    each = [str(least) if least == most else f"{least}..{most}" for least, most in pairs]
    shape = f"({', '.join(each)}{',' if len(each) == 1 else ''})"
    return f"profile '{profile.name}' takes {shape}" if -1 in port.shape else f"the engine takes {shape}"


def _padded(values: Array, sizes: ShapeRange) -> Array:
    low = sizes[0]
    if len(low) != values.ndim:
        return values
    missing = [(0, max(0, least - size)) for least, size in zip(low, values.shape, strict=True)]
    return np.pad(values, missing) if any(more for _, more in missing) else values
