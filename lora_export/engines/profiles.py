"""Make optimisation profiles: for each input whose shape varies, the smallest, usual and largest shape.

They are made from the graph, so that the user states only what differs: ``batch=1:1:8`` for a dimension,
wherever it occurs, or ``input_ids=1x1:1x128:8x2048`` for one input.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lora_export.engines.dims import (
    PAST,
    PHASES,
    RANK,
    ROLES,
    TOTAL,
    Range,
    default_ranges,
    default_rank,
    phase_ranges,
    rank_dims,
    sum_of_both,
    varying,
)
from lora_export.engines.record import Profile, ShapeRange
from lora_export.errors import BackendError
from lora_export.graph.captured import SEQUENCE
from lora_export.graph.exposed import LoraRecord
from lora_export.graph.expressions import evaluate, names_in
from lora_export.graph.port import Port
from lora_export.graph.roles import role_of

_HINT = (
    "give --shape DIMENSION=MIN:OPT:MAX (batch=1:1:8) or --shape INPUT=MIN:OPT:MAX with shapes "
    "(input_ids=1x1:1x128:8x2048)"
)
_FIT_HINT = "change --shape or --profile as listed"
_PROFILE_HINT = "give --profile 'NAME KEY=MIN:OPT:MAX …' (--profile 'decode batch=1:1:8')"
# Limit of names in a message: a decoder has an input for each layer's cache.
_LISTED = 10
_SIZE = re.compile(r"^[0-9]+\Z")
# TensorRT-RTX 1.7.1 refuses 2**31 but silently builds 2**40: it keeps 32 bits of a size.
_MAX_SIZE, _MAX_DIGITS = 2**31 - 1, 10


@dataclass(frozen=True)
class ProfileRequest:
    """A profile as the user asks for it.

    Attributes:
        name: Name; ``prefill`` and ``decode`` have sizes of their own, other names the usual ones.
        shapes: Dimension or input → ``MIN:OPT:MAX``, or one size for all three.
    """

    name: str = "default"
    shapes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> ProfileRequest:
        """Read ``NAME KEY=MIN:OPT:MAX …``; a name with spaces is quoted, as in a shell.

        Raises:
            BackendError: The text has another form.
        """
        try:
            name, *words = shlex.split(text)
        except ValueError as error:
            raise BackendError(f"the profile {text!r} can't be read", _PROFILE_HINT) from error
        if "=" in name:
            raise BackendError(f"the profile {text!r} has no name", _PROFILE_HINT)
        if not words and name not in PHASES:
            near = difflib.get_close_matches(name, PHASES, 1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise BackendError(
                f"the profile {name!r} has no sizes; only {' and '.join(PHASES)} have sizes of their own",
                meant + _PROFILE_HINT,
            )
        return cls(name, parse_shapes(words))

    def text(self) -> str:
        """Return the text that `parse` reads."""
        return shlex.join([self.name, *(f"{key}={sizes}" for key, sizes in self.shapes.items())])


def shape_text(sizes: str | Sequence[int | Sequence[int]]) -> str:
    """Return ``(1, 1, 8)`` or ``((1, 1), (1, 128), (8, 2048))`` as typed; a text unchanged."""
    if isinstance(sizes, str):
        return sizes
    return ":".join(str(part) if isinstance(part, int) else "x".join(map(str, part)) for part in sizes)


def parse_shapes(words: Sequence[str]) -> dict[str, str]:
    """Read ``KEY=MIN:OPT:MAX`` words.

    Raises:
        BackendError: A word has no ``=``, its sizes are not three rising ones, or a key is given twice.
    """
    problems, found = [], {}
    for word in words:
        # An input's name may hold '='; a shape does not.
        key, equals, value = word.rpartition("=")
        if not equals or not key:
            problems.append(f"{word!r}: not KEY=MIN:OPT:MAX")
        elif key in found:
            problems.append(f"{key}: given twice")
        else:
            problems += [f"{key}={value}: {problem}" for problem in _ranges(value)[1]]
        found[key] = value
    if problems:
        raise BackendError("these shapes can't be read", _HINT, problems)
    return found


def make_profiles(
    inputs: Sequence[Port],
    exposed: LoraRecord | None,
    largest: Mapping[str, int],
    requests: Sequence[ProfileRequest],
) -> tuple[Profile, ...]:
    """Return the profiles for a graph.

    Args:
        inputs: All inputs of the graph.
        exposed: Its LoRA record.
        largest: Role of a dimension → the largest size that the model takes, if known.
        requests: The requested profiles; if empty, one named ``default`` is made.

    Returns:
        A profile for each request, with shapes for each input that varies.

    Raises:
        BackendError: Unknown keys, sizes out of order, ranks above the graph's, dimensions of unknown size;
            all of them are listed.
    """
    problems: list[str] = []
    hints: list[str] = []
    profiles = []
    for request in requests or [ProfileRequest()]:
        made = _Maker(inputs, exposed, largest, request)
        profiles.append(made.profile())
        label = f"profile '{request.name}': " if len(requests) > 1 else ""
        problems += [f"{label}{problem}" for problem in [*made.problems, *made.unknown]]
        hints += [_FIT_HINT] * bool(made.problems) + [_HINT] * bool(made.unknown)
    names = [profile.name for profile in profiles]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        problems += [f"two profiles are called '{name}'" for name in twice]
        hints.append("give each --profile a name of its own")
    if problems:
        hint = "; ".join(dict.fromkeys(hints))
        raise BackendError("the engine's shapes don't fit the graph", hint, problems)
    return tuple(profiles)


class _Maker:
    """Make one profile and collect its problems."""

    def __init__(
        self,
        inputs: Sequence[Port],
        exposed: LoraRecord | None,
        largest: Mapping[str, int],
        request: ProfileRequest,
    ) -> None:
        self.problems: list[str] = []
        self.unknown: list[str] = []  # lines on dimensions of unknown size
        self._request = request
        self._exposed = exposed
        self._inputs = inputs
        self._varying = varying(inputs)
        self._static = {port.name: port for port in inputs if port not in self._varying}
        self._ranks = rank_dims(exposed)
        self._roles = phase_ranges(request.name, largest) or default_ranges(largest)
        self._roles[RANK] = default_rank(exposed)
        self._by_symbol: dict[str, Range] = {}
        self._by_input: dict[str, tuple[Range, ...]] = {}
        self._read(request.shapes)

    def _check_total(self) -> None:
        """Check that a mask's sizes cover past and sequence: otherwise the engine accepts no request."""
        if TOTAL not in self._roles or self.problems:
            return
        wanted, given = sum_of_both(self._of_role(SEQUENCE), self._of_role(PAST)), self._roles[TOTAL]
        if given.low > wanted.low or given.high < wanted.high:
            self.problems.append(f"{TOTAL}: {given}, but sequence and past together are {wanted}")

    def profile(self) -> Profile:
        """Return the profile, without inputs of `unknown` sizes."""
        self._check_total()
        shapes: dict[str, ShapeRange] = {}
        for port in self._varying:
            ranges = [self._range(port, axis) for axis in range(len(port.shape))]
            known = [found for found in ranges if found is not None]
            if len(known) == len(ranges):
                shapes[port.name] = _shapes(known)
        return Profile(self._request.name, shapes)

    def _range(self, port: Port, axis: int) -> Range | None:
        size, symbol = port.shape[axis], str(port.dims[axis])
        if size >= 0:
            return Range(size, size, size)
        if port.name in self._by_input:
            return self._by_input[port.name][axis]
        if symbol in self._by_symbol:
            return self._by_symbol[symbol]
        if symbol in self._ranks:
            return self._ranks[symbol].sizes(self._roles[RANK])
        role = role_of(port.name, port.dims, axis)
        if role == TOTAL and TOTAL not in self._roles:
            return sum_of_both(self._of_role(SEQUENCE), self._of_role(PAST))
        if role != TOTAL and (computed := self._computed(symbol)) is not None:
            return computed
        if role is None:
            self.unknown.append(f"{port.name}: the sizes of dimension {axis} ({symbol}) are unknown")
            return None
        return self._roles[role]

    def _of_role(self, role: str) -> Range:
        """Return the sizes of the graph's dimension of that role, also if it is fixed; 0 if there is none."""
        for port in self._inputs:
            for axis, dim in enumerate(port.dims):
                if str(dim) not in self._ranks and role_of(port.name, port.dims, axis) == role:
                    return self._range(port, axis) or self._roles[role]
        return Range(0, 0, 0)

    def _computed(self, symbol: str) -> Range | None:
        """Return the sizes of an expression such as ``2*batch`` if the sizes of ``batch`` are known."""
        named = {name: self._named(name) for name in names_in(symbol)}
        known = {name: sizes for name, sizes in named.items() if sizes is not None}
        if not known or len(known) < len(named):
            return None
        low, usual, high = (
            evaluate(symbol, {name: getattr(sizes, which) for name, sizes in known.items()})
            for which in ("low", "usual", "high")
        )
        if low is None or usual is None or high is None:
            return None
        return Range(min(low, high), usual, max(low, high))

    def _named(self, name: str) -> Range | None:
        for port in self._varying:
            if name in port.dims:
                return self._range(port, port.dims.index(name))
        return None

    def _read(self, given: Mapping[str, str]) -> None:
        """Read the user's shapes: of a role of dimensions, a dimension by its name, or an input."""
        ports = {port.name: port for port in self._varying}
        symbols = {str(dim) for port in self._varying for dim in port.dims if not isinstance(dim, int)}
        roles = self._roles_here()
        # An input's shape also sets its dimensions' sizes for other inputs; a dimension's own key wins.
        for key, text in sorted(given.items(), key=lambda item: item[0] not in ports):
            if key in ports:
                self._read_input(ports[key], text)
            elif key in self._static:
                self.problems.append(
                    f"{key}: its shape {list(self._static[key].shape)} is fixed in the graph"
                )
            elif key in roles or key in symbols:
                self._read_dim(key, text, symbols)
            else:
                self._unknown(key, [*roles, *symbols, *ports])

    def _roles_here(self) -> list[str]:
        """Return the roles of the varying dimensions, LoRA's ranks included."""
        found = {
            role_of(port.name, port.dims, axis)
            for port in self._varying
            for axis, dim in enumerate(port.dims)
            if str(dim) not in self._ranks
        }
        return [role for role in ROLES if role in found or (role == RANK and self._ranks)]

    def _read_dim(self, key: str, text: str, symbols: set[str]) -> None:
        found = self._parse(key, text, 1)
        if found is None:
            return
        (sizes,) = found
        if key in ROLES and key not in (PAST, RANK):
            self._check_size(key, sizes)
        if key == RANK or key in self._ranks:
            self._check_rank(key, sizes)
        if key in symbols:
            self._by_symbol[key] = sizes
        if key in ROLES:
            self._roles[key] = sizes

    def _read_input(self, port: Port, text: str) -> None:
        found = self._parse(port.name, text, len(port.shape))
        if found is None:
            return
        for axis, (sizes, size) in enumerate(zip(found, port.shape, strict=True)):
            if size >= 0 and sizes != Range(size, size, size):
                self.problems.append(f"{port.name}: dimension {axis} is {size} in the graph, got {sizes}")
            if size >= 0:
                continue
            symbol = str(port.dims[axis])
            if symbol in self._ranks:
                self._check_rank(port.name, sizes)
            elif role_of(port.name, port.dims, axis) != PAST:
                self._check_size(port.name, sizes)
            self._by_symbol[symbol] = sizes
            # Masks and positions have names of their own for the same dimension.
            if (role := role_of(port.name, port.dims, axis)) and symbol not in self._ranks:
                self._roles[role] = sizes
        self._by_input[port.name] = found

    def _check_size(self, key: str, sizes: Range) -> None:
        """Check that a size other than a past's is not 0."""
        if sizes.low == 0:
            self.problems.append(f"{key}: the smallest size is 0")

    def _check_rank(self, key: str, sizes: Range) -> None:
        assert self._exposed is not None  # else there are no ranks
        most = self._exposed.max_rank
        if key in self._ranks:
            most = self._ranks[key].sizes(Range(most, most, most)).high
        if sizes.high > most:
            self.problems.append(f"{key}: rank {sizes.high}, the graph takes at most {most} (max_rank)")

    def _parse(self, key: str, text: str, dims: int) -> tuple[Range, ...] | None:
        """Read ``MIN:OPT:MAX`` of sizes or of shapes such as ``1x128``."""
        found, problems = _ranges(text)
        if found and len(found) != dims:
            problems = [f"it has {dims} dimension{'s' if dims > 1 else ''}"]
        self.problems += [f"{key}={text}: {problem}" for problem in problems]
        return None if problems else found

    def _unknown(self, key: str, known: list[str]) -> None:
        near = difflib.get_close_matches(key, known, 1)
        plain = [name for name in known if ".lora_" not in name and name not in self._ranks]
        listed = list(dict.fromkeys(plain))
        more = ", …" if len(listed) > _LISTED else ""
        there = f" (there are: {', '.join(listed[:_LISTED])}{more})"
        guess = f"; did you mean {near[0]!r}?" if near else there
        self.problems.append(f"{key}: the graph has no such input or dimension{guess}")


def _ranges(text: str) -> tuple[tuple[Range, ...], list[str]]:
    """Return the sizes of each dimension, and what is wrong with them."""
    parts = text.split(":")
    if len(parts) == 1:
        parts = parts * 3
    sizes = [part.split("x") for part in parts]
    if len(parts) != 3 or not all(_SIZE.match(size) for part in sizes for size in part):
        return (), ["wanted MIN:OPT:MAX, or one size for all three"]
    if len({len(part) for part in sizes}) > 1:
        return (), ["its parts have different numbers of dimensions"]
    # Python does not read numbers of any length.
    sizes = [[size.lstrip("0")[: _MAX_DIGITS + 1] or "0" for size in part] for part in sizes]
    ranges = tuple(Range(*(int(size) for size in axis)) for axis in zip(*sizes, strict=True))
    return ranges, [*_out_of_order(ranges), *_too_large(ranges)]


def _out_of_order(ranges: Sequence[Range]) -> Iterator[str]:
    for axis, sizes in enumerate(ranges):
        where = f" in dimension {axis}" if len(ranges) > 1 else ""
        if not sizes.low <= sizes.usual <= sizes.high:
            yield f"smallest, usual and largest are out of order{where}"


def _too_large(ranges: Sequence[Range]) -> Iterator[str]:
    if any(sizes.high > _MAX_SIZE for sizes in ranges):
        yield f"larger than any size that TensorRT takes ({_MAX_SIZE})"


def _shapes(ranges: Sequence[Range]) -> ShapeRange:
    return (
        tuple(sizes.low for sizes in ranges),
        tuple(sizes.usual for sizes in ranges),
        tuple(sizes.high for sizes in ranges),
    )
