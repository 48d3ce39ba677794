"""Find the batches and sequences that a graph takes: sizes that it fixes, positions that its model has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_export.graph.captured import (
    BATCH,
    DECODER_SEQUENCE,
    PAST_SEQUENCE,
    SAMPLES,
    SEQUENCE,
    SIDES,
    TOTAL_SEQUENCE,
    Captured,
)
from lora_export.parity.feeds.feed import InputPort, sizes_by_role

LENGTHS = (SEQUENCE, DECODER_SEQUENCE)
DEFAULT_BATCHES, DEFAULT_SEQUENCES = (1, 4), (1, 16)
_MAX_PAST = 7
# Of sides, in their smallest sizes.
_MAX_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a graph's dimensions, by the role names of `captured`.

    Attributes:
        roles: Roles that occur.
        fixed: Role → its fixed size.
        largest: Role → its largest size.
        smallest: Role → its smallest size, if that is not 1.
        problems: Lines on axes whose size is unknown, or that contradict each other.
    """

    roles: frozenset[str]
    fixed: dict[str, int]
    largest: dict[str, int]
    smallest: dict[str, int]
    problems: tuple[str, ...]

    @classmethod
    def of(cls, ports: Sequence[InputPort], captured: Captured | None) -> Sizes:
        """Return the sizes by the inputs and the graph's metadata."""
        roles: set[str] = set()
        fixed: dict[str, int] = {}
        problems = []
        smallest = dict(captured.smallest) if captured else {}
        for port, axis, role in sizes_by_role(ports):
            dim = port.dims[axis]
            if role is not None:
                roles.add(role)
            if isinstance(dim, int) and role is not None and fixed.setdefault(role, dim) != dim:
                problems.append(f"{port.name}: {port.text}, but another input fixes {role} at {fixed[role]}")
            unknown = role is None or (role == SAMPLES and role not in smallest)
            # Other exporters' graphs don't say of which step their sides are multiples.
            unknown = unknown or (role in SIDES and captured is None)
            if not isinstance(dim, int) and unknown:
                problems.append(f"{port.name}: {port.text}, the size of axis {axis} is unknown")
        largest = dict(captured.largest) if captured else {}
        for port in ports:
            if port.kind == "positions" and port.rows is not None:
                largest = dict.fromkeys((SEQUENCE, TOTAL_SEQUENCE), port.rows) | largest
        return cls(
            roles=frozenset(roles),
            fixed=fixed,
            largest=largest,
            smallest=smallest,
            problems=tuple(problems),
        )

    @property
    def main(self) -> str:
        """The role that a requested sequence sets: the decoder's in a graph without an encoder's tokens."""
        alone = DECODER_SEQUENCE in self.roles and SEQUENCE not in self.roles
        return DECODER_SEQUENCE if alone else SEQUENCE

    def samples(self, number: int) -> int:
        """Return the number of samples of a sound in the feed of a number: not always the same."""
        wanted = (2 + number % 3) * self.smallest.get(SAMPLES, 1) + number
        return min(wanted, self.largest.get(SAMPLES, wanted))

    def sides(self, number: int) -> dict[str, int]:
        """Return the sides of latents in the feed of a number, multiples of the smallest ones."""
        found = {}
        for place, role in enumerate(SIDES):
            step = self.smallest.get(role, 1)
            most = self.largest.get(role, _MAX_STEPS * step) // step
            found[role] = max(1, min(most, 1 + (number + place) % _MAX_STEPS)) * step
        return found

    def pasts(self, sequence: int) -> tuple[int, int]:
        """Return the smallest and largest past that may precede so many new tokens."""
        if PAST_SEQUENCE not in self.roles:
            return 0, 0
        if PAST_SEQUENCE in self.fixed:
            return self.fixed[PAST_SEQUENCE], self.fixed[PAST_SEQUENCE]
        if TOTAL_SEQUENCE in self.fixed:
            rest = self.fixed[TOTAL_SEQUENCE] - sequence
            return rest, rest
        limits = [_MAX_PAST]
        if PAST_SEQUENCE in self.largest:
            limits.append(self.largest[PAST_SEQUENCE])
        if TOTAL_SEQUENCE in self.largest:
            limits.append(self.largest[TOTAL_SEQUENCE] - sequence)
        return 0, min(limits)

    @property
    def longest(self) -> int | None:
        """Largest number of new tokens that the graph or its metadata allow; None if neither limits it."""
        if self.main in self.fixed or TOTAL_SEQUENCE in self.fixed:
            return max(_usual_sequences(self))
        limits = [self.largest[role] for role in (*LENGTHS, TOTAL_SEQUENCE) if role in self.largest]
        past = self.fixed.get(PAST_SEQUENCE, 0)
        return min((limit - past for limit in limits), default=None)

    def sequence_problem(self, sequence: int) -> str:
        """Return the reason why so many new tokens don't fit, or an empty text."""
        if sequence != self.fixed.get(self.main, sequence):
            return f"the graph fixes {self.main} at {self.fixed[self.main]}"
        past, total = self.pasts(sequence)[0], self.fixed.get(TOTAL_SEQUENCE)
        if past < 0 or (total is not None and past + sequence != total):
            return f"the graph fixes {TOTAL_SEQUENCE} at {total}"
        lengths = {SEQUENCE: sequence, DECODER_SEQUENCE: sequence, TOTAL_SEQUENCE: past + sequence}
        for role, length in lengths.items():
            if role in self.roles and role not in self.fixed and length > self.largest.get(role, length):
                return f"the model has positions for {self.largest[role]} tokens"
        return ""


def chosen_batches(asked: Sequence[int] | None, sizes: Sizes) -> tuple[list[str], list[int]]:
    """Return the problems of the requested batches, and the batches, each once."""
    fixed = sizes.fixed.get(BATCH)
    if asked is None:
        return [], list(DEFAULT_BATCHES) if fixed is None else [fixed]
    found = list(dict.fromkeys(asked))
    problems = _count_problems("batch", found)
    problems += [
        f"batch {size}: the graph fixes it at {fixed}"
        for size in found
        if size > 0 and size != (fixed or size)
    ]
    return problems, found


def chosen_sequences(asked: Sequence[int] | None, sizes: Sizes) -> tuple[list[str], list[int]]:
    """Return the problems of the requested sequences, and the sequences, each once."""
    if not sizes.roles & set(LENGTHS):
        return [], [1]
    found = list(dict.fromkeys(_usual_sequences(sizes) if asked is None else asked))
    problems = _count_problems("sequence", found)
    for size in found:
        if size > 0 and (problem := sizes.sequence_problem(size)):
            problems.append(f"sequence {size}: {problem}")
    return problems, found


def _usual_sequences(sizes: Sizes) -> list[int]:
    """Return the sequences that a graph is run with by default."""
    if sizes.main in sizes.fixed:
        return [sizes.fixed[sizes.main]]
    if TOTAL_SEQUENCE in sizes.fixed:
        past = sizes.fixed.get(PAST_SEQUENCE, 0)
        return [max(sizes.fixed[TOTAL_SEQUENCE] - past, 1)]
    longest = sizes.longest
    return [max(size if longest is None else min(size, longest), 1) for size in DEFAULT_SEQUENCES]


def _count_problems(word: str, sizes: Sequence[int]) -> list[str]:
    problems = [f"{word} {size}: must be at least 1" for size in sizes if size < 1]
    return problems if sizes else [f"no {word} at all"]
