"""The sizes that an engine should take in the varying dimensions of a graph's inputs.

A dimension's role (`graph.roles`) decides. Its largest size comes from the graph's metadata if we captured
the graph (`captured`), and for LoRA's ranks from its LoRA record.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lora_export.graph.captured import BATCH, PAST_SEQUENCE, SEQUENCE, TOTAL_SEQUENCE
from lora_export.graph.exposed import LoraRecord
from lora_export.graph.port import Port

PAST, TOTAL, RANK = PAST_SEQUENCE, TOTAL_SEQUENCE, "rank"
# Profiles whose names decide their sizes.
PHASES = ("prefill", "decode")
ROLES = (BATCH, SEQUENCE, PAST, TOTAL, RANK)
# Sizes used if nothing states how large an input may get.
_MAX_BATCH, _SEQUENCE, _MAX_SEQUENCE, _PAST, _MAX_PAST = 4, 128, 512, 256, 1024


@dataclass(frozen=True)
class Range:
    """Smallest, usual and largest size of a dimension."""

    low: int
    usual: int
    high: int

    def __str__(self) -> str:
        return f"{self.low}:{self.usual}:{self.high}"


def default_ranges(largest: Mapping[str, int]) -> dict[str, Range]:
    """Return the sizes that an engine takes by default.

    Args:
        largest: Role → the largest size that the model can take, if that is known.
    """
    sequence, past = _halves(largest)
    return {
        BATCH: Range(1, 1, _MAX_BATCH),
        SEQUENCE: Range(1, min(_SEQUENCE, sequence), sequence),
        PAST: Range(0, min(_PAST, past), past),
    }


def _halves(largest: Mapping[str, int]) -> tuple[int, int]:
    """Return the largest sequence and past: together at most as many as the model has positions."""
    sequence = min(_MAX_SEQUENCE, largest.get(SEQUENCE, _MAX_SEQUENCE))
    past = min(_MAX_PAST, largest.get(PAST, _MAX_PAST))
    total = largest.get(TOTAL)
    if total is not None and sequence + past > total:
        sequence = min(sequence, max(total // 2, 1))
        past = min(past, total - sequence)
    return sequence, past


def phase_ranges(name: str, largest: Mapping[str, int]) -> dict[str, Range] | None:
    """Return the sizes of a profile whose name decides them, or None.

    ``prefill`` reads a prompt with an empty cache, ``decode`` one token with a filled one.
    """
    ranges = default_ranges(largest)
    if name == "prefill":
        # Without a past, the sequence may have all of the model's positions.
        alone = default_ranges({role: size for role, size in largest.items() if role != TOTAL})
        return alone | {PAST: Range(0, 0, 0)}
    if name == "decode":
        past = ranges[PAST]
        return ranges | {SEQUENCE: Range(1, 1, 1), PAST: Range(1, max(past.usual, 1), past.high)}
    return None


def sum_of_both(sequence: Range, past: Range) -> Range:
    """Return the sizes of both together, which an attention mask has."""
    return Range(sequence.low + past.low, sequence.usual + past.usual, sequence.high + past.high)


@dataclass(frozen=True)
class RankDim:
    """A symbolic rank of a graph with exposed LoRA.

    Attributes:
        members: Number of modules packed into one pair of tensors; their ranks add up.
        groups: Groups of a grouped convolution, whose B has rank/groups channels.
    """

    members: int = 1
    groups: int = 1

    def sizes(self, rank: Range) -> Range:
        """Return the sizes of this dimension, for adapters of these ranks."""

        def size(rank: int, members: int) -> int:
            return max(rank * members // self.groups, min(rank, 1))

        # An adapter may change one of the members alone.
        return Range(size(rank.low, 1), size(rank.usual, self.members), size(rank.high, self.members))


def rank_dims(exposed: LoraRecord | None) -> dict[str, RankDim]:
    """Return the graph's symbolic ranks by name."""
    found: dict[str, RankDim] = {}
    for module in exposed.modules if exposed else ():
        found[module.rank_symbol] = RankDim(len(module.members))
        if module.groups > 1:
            found[f"{module.rank_symbol}/{module.groups}"] = RankDim(len(module.members), module.groups)
    return found


def default_rank(exposed: LoraRecord | None) -> Range:
    """Return the ranks that an engine takes: from 1, which stands for no adapter, to the graph's largest."""
    high = exposed.max_rank if exposed else 1
    return Range(1, max(high // 2, 1), high)


def varying(ports: Iterable[Port]) -> list[Port]:
    """Return the inputs whose shape varies."""
    return [port for port in ports if any(size < 0 for size in port.shape)]
