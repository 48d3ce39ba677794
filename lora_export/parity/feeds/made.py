"""Make feeds for a parity check from the graph's own inputs; `file.read_feeds` reads the user's.

The values are: token ids within the vocabulary, dealt like cards so that as many different ones as possible
occur; masks with rows padded on the left, rows padded on the right and full rows; an empty past and one of a
few tokens; positions that count a row's own tokens; floats from a standard normal distribution.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from lora_export.adapter import Array
from lora_export.errors import BackendError
from lora_export.graph.captured import (
    BATCH,
    DECODER_SEQUENCE,
    PAST_SEQUENCE,
    SAMPLES,
    SEQUENCE,
    TOTAL_SEQUENCE,
    Captured,
)
from lora_export.graph.feed_sizes import FeedSizes
from lora_export.parity.feeds.feed import (
    Feed,
    InputPort,
    ids_left,
    ports_of_graph,
    rows_of,
    shared_inputs,
    sizes_by_role,
)
from lora_export.parity.feeds.file import read_feeds
from lora_export.parity.feeds.sizes import LENGTHS, Sizes, chosen_batches, chosen_sequences

__all__ = ["Feed", "InputPort", "ids_left", "make_feeds", "ports_of_graph", "read_feeds", "rows_of"]

# Steps of a diffusion model's schedule.
_TIMESTEPS = 1000
# A cache's keys and values are smaller than the outputs of a layer's norm.
_PAST_SCALE = 0.5
# Number of token types if the graph's table can't be seen: BERT's.
_TYPES = 2
# Today's largest models have some hundred thousand ids; all ids are shuffled at once.
_MAX_VOCABULARY = 1 << 22
_UNCLEAR = "give sizes with --shape NAME=SIZE, or values for all inputs: --feeds FILE.npz or FILE.safetensors"
Padding = Literal["any", "right", "none"]
# What rows have in turn, by what a graph takes; ``prompt`` is on the right, where there is no past.
_PADDINGS: dict[Padding, tuple[str, ...]] = {
    "any": ("none", "left", "right"),
    "right": ("none", "prompt"),
    "none": ("none",),
}


def make_feeds(
    ports: Sequence[InputPort],
    captured: Captured | None = None,
    batches: Sequence[int] | None = None,
    sequences: Sequence[int] | None = None,
    seed: int = 0,
    samples: int = 8,
    vocab_size: int | None = None,
    first: Sequence[int] = (),
    padding: Padding = "any",
    long_past: bool = True,
) -> list[Feed]:
    """Make feeds for a graph; the same arguments give the same bytes.

    Every batch and every sequence occurs, then every pair of them, then the pairs again with other values,
    paddings and pasts; more samples leave the first feeds unchanged. With a cache, every second feed has a
    past. A decoder after an encoder reads as many tokens as the next sequence in the list, so that the two
    differ.

    Args:
        ports: The graph's inputs without LoRA's.
        captured: The graph's metadata on its model, if any: vocabulary and largest sizes.
        batches: Numbers of rows; None: the number that the graph fixes, else (1, 4).
        sequences: Numbers of new tokens; None: the number that the graph fixes, else (1, 16) as far as the
            model has positions. They have no effect on a graph without tokens.
        seed: Seed of the random values.
        samples: Number of feeds; at least the number of batches and of sequences.
        vocab_size: Number of token ids; it overrides the metadata, and these the graph's table.
        first: Token ids that are dealt before all others.
        padding: Sides on which rows are padded, if the graph has a mask; ``right``: in prompts.
        long_past: Also make feeds of several rows with several new tokens after a past.

    Returns:
        ``samples`` feeds with different labels.

    Raises:
        BackendError: Inputs are not understood, the vocabulary is unknown, or the graph does not take the
            sizes; all problems are listed.
    """
    sizes = Sizes.of(ports, captured)
    unclear = _unclear(ports, captured, vocab_size)
    wrong, rows = chosen_batches(batches, sizes)
    more, tokens = chosen_sequences(sequences, sizes)
    wrong += more + _number_problems(seed, samples, max(len(set(batches or ())), len(set(sequences or ()))))
    if unclear or wrong:
        hints = [_UNCLEAR] * bool(unclear)
        hints += ["give sizes that the graph takes: --batch, --sequence, --samples, --seed"] * bool(wrong)
        raise BackendError("can't make feeds for the graph", "; ".join(hints), unclear + wrong)
    maker = _Maker(
        ports,
        sizes,
        vocabularies=_vocabularies(ports, captured, vocab_size),
        seed=seed,
        first=first,
        paddings=_PADDINGS[padding],
        long_past=long_past,
    )
    pairs = _pairs(rows, tokens)
    return [maker.feed(number, pairs, tokens) for number in range(samples)]


def _unclear(ports: Sequence[InputPort], captured: Captured | None, vocab_size: int | None) -> list[str]:
    """Return a line for each input that no values can be made for."""
    problems = [f"{port.name}: {port.text}, its purpose is unknown" for port in ports if port.kind is None]
    known = [port for port in ports if port.kind is not None]
    problems += Sizes.of(known, captured).problems
    vocabularies = _vocabularies(ports, captured, vocab_size)
    problems += [
        f"{port.name}: {port.text}, the number of token ids is unknown"
        for port in ports
        if port.kind == "ids" and vocabularies[port.name] is None
    ]
    problems += [
        f"{name}: a vocabulary of {size} tokens, wanted at most {_MAX_VOCABULARY}"
        for name, size in vocabularies.items()
        if size is not None and size > _MAX_VOCABULARY
    ]
    if vocab_size is not None and vocab_size < 1:
        problems.append(f"a vocabulary of {vocab_size} tokens")
    return problems if ports else ["the graph has no inputs"]


def _vocabularies(
    ports: Sequence[InputPort], captured: Captured | None, vocab_size: int | None
) -> dict[str, int | None]:
    # The graph's own table comes last: if it lacks a row, a feed must use that row.
    known = vocab_size or (captured.vocab_size if captured else None)
    return {port.name: known or port.rows for port in ports if port.kind == "ids"}


def _number_problems(seed: int, samples: int, least: int) -> list[str]:
    problems = [f"seed {seed}: must not be negative"] if seed < 0 else []
    if samples < 1:
        problems.append(f"samples {samples}: nothing would be checked")
    elif samples < least:
        problems.append(f"samples {samples}: {least} sizes were asked for, and each needs a feed")
    return problems


def _pairs(batches: Sequence[int], sequences: Sequence[int]) -> list[tuple[int, int]]:
    """Return all pairs; the first of them contain every batch and every sequence."""
    longer = max(len(batches), len(sequences))
    first = [(batches[i % len(batches)], sequences[i % len(sequences)]) for i in range(longer)]
    return first + [pair for pair in itertools.product(batches, sequences) if pair not in first]


class _Deck:
    """Token ids, shuffled and dealt: none is dealt again before all were dealt."""

    def __init__(self, size: int, random: np.random.Generator, first: Sequence[int] = ()) -> None:
        self.size, self._random = size, random
        deck = random.permutation(size)
        chosen = np.asarray([token for token in first if token < size], deck.dtype)
        self._left = np.concatenate([chosen, deck[~np.isin(deck, chosen)]])

    def deal(self, count: int) -> Array:
        dealt = self._left[:count]
        self._left = self._left[count:]
        while len(dealt) < count:
            deck = self._random.permutation(self.size)
            again = np.isin(deck, dealt)
            # Ids dealt in this hand come last, so that a hand repeats an id only if it must.
            deck = np.concatenate([deck[~again], deck[again]])
            taken = count - len(dealt)
            dealt, self._left = np.concatenate([dealt, deck[:taken]]), deck[taken:]
        return dealt


class _Maker:
    """Make one feed after the other."""

    def __init__(
        self,
        ports: Sequence[InputPort],
        sizes: Sizes,
        vocabularies: dict[str, int | None],
        seed: int,
        first: Sequence[int],
        paddings: Sequence[str],
        long_past: bool,
    ) -> None:
        self._ports, self._sizes, self._paddings, self._long_past = ports, sizes, paddings, long_past
        self._shared = shared_inputs(ports)
        self._random = np.random.default_rng(seed)
        self._decks = {name: _Deck(size or 0, self._random, first) for name, size in vocabularies.items()}
        self._roles = {(port.name, axis): role for port, axis, role in sizes_by_role(ports)}
        # Of all feeds together: eight of four large scans each (Donut's, of 2560 × 1920 pixels) are taken.
        self._sizes_made = FeedSizes()

    def feed(self, number: int, pairs: Sequence[tuple[int, int]], sequences: Sequence[int]) -> Feed:
        """Return the feed of a number; call it with the numbers in order."""
        turn, place = divmod(number, len(pairs))
        batch, sequence = pairs[place]
        after = sequences[(sequences.index(sequence) + 1) % len(sequences)]
        least, most = self._sizes.pasts(sequence)
        past = least
        fits = self._long_past or batch == 1 or sequence == 1
        if fits and (turn + place) % 2 and most > least:
            past = int(self._random.integers(min(2, most), most + 1))
        lengths = {BATCH: batch, PAST_SEQUENCE: past, TOTAL_SEQUENCE: past + sequence}
        lengths |= {SEQUENCE: sequence, DECODER_SEQUENCE: after, self._sizes.main: sequence}
        lengths[SAMPLES] = self._sizes.samples(number)
        lengths |= self._sizes.sides(number) | self._sizes.fixed
        masks = {}
        for later, side in enumerate(LENGTHS):
            before = past if side == self._sizes.main else 0
            masks[side] = self._mask(
                turn + place + later, side, batch=batch, past=before, sequence=lengths[side]
            )
        values = {port.name: self._values(port, lengths, masks) for port in self._ports}
        return Feed(self._label(number, lengths, masks), values, self._shared)

    def _label(self, number: int, lengths: dict[str, int], masks: dict[str, Array]) -> str:
        words = [f"batch {lengths[BATCH]}"]
        words += [
            f"{role.replace('_', ' ')} {lengths[role]}" for role in LENGTHS if role in self._sizes.roles
        ]
        words += [f"past {lengths[PAST_SEQUENCE]}"] * (PAST_SEQUENCE in self._sizes.roles)
        words += ["padded"] * (not all(mask.all() for mask in masks.values()))
        return f"{number + 1}: {', '.join(words)}"

    def _mask(self, first: int, side: str, batch: int, past: int, sequence: int) -> Array:
        """Return a mask that is True for tokens without padding, bool ``[batch, past + sequence]``."""
        self._take("the mask", (batch, past + sequence))
        mask = np.ones((batch, past + sequence), np.bool_)
        has_mask = any(port.kind == "mask" and self._side(port) == side for port in self._ports)
        if not has_mask:
            return mask
        for row in range(batch):
            padding = self._paddings[(row + first) % len(self._paddings)]
            # Never pad all tokens of the past, nor all new tokens.
            most = past - 1 if padding == "left" and past else sequence - 1
            if padding == "none" or most < 1 or (padding == "prompt" and past):
                continue
            count = int(self._random.integers(1, most + 1))
            if padding == "left":
                mask[row, :count] = False
            else:
                mask[row, past + sequence - count :] = False
        return mask

    def _side(self, port: InputPort) -> str:
        roles = {self._roles[port.name, axis] for axis in range(len(port.dims))}
        return DECODER_SEQUENCE if DECODER_SEQUENCE in roles else SEQUENCE

    def _values(self, port: InputPort, lengths: dict[str, int], masks: dict[str, Array]) -> Array:
        shape = tuple(
            dim if isinstance(dim, int) else lengths[str(self._roles[port.name, axis])]
            for axis, dim in enumerate(port.dims)
        )
        self._take(port.name, shape)
        mask = masks[self._side(port)]
        made = self._made(port, shape, mask)
        return np.ascontiguousarray(made.astype(port.numpy_dtype))

    def _take(self, name: str, shape: tuple[int, ...]) -> None:
        """Count values before they are made: the graph only claims the sizes of its inputs."""
        if problem := self._sizes_made.problem(name, shape):
            raise BackendError(
                problem,
                "give fewer or smaller ones (--samples, --batch, --sequence), or your own (--feeds)",
            )

    def _made(self, port: InputPort, shape: tuple[int, ...], mask: Array) -> Array:
        """Return values, not yet in the input's dtype, for the last tokens of the mask that fit."""
        random, kind = self._random, port.kind
        if kind == "ids":
            return self._ids(port.name, mask[:, mask.shape[1] - shape[1] :])
        if kind == "types":
            return random.integers(0, port.rows or _TYPES, shape)
        if kind == "positions":
            places: Array = np.maximum(mask.cumsum(1) - 1, 0)
            return places[:, mask.shape[1] - shape[1] :]
        if kind == "steps":
            return np.arange(mask.shape[1] - shape[0], mask.shape[1])
        if kind == "mask":
            return mask[:, mask.shape[1] - shape[1] :]
        if kind == "bytes":
            return random.integers(0, 256, shape)
        if kind == "timestep":
            return random.integers(0, _TIMESTEPS, shape)
        if kind == "bools":
            return random.integers(0, 2, shape)
        return random.standard_normal(shape) * (_PAST_SCALE if kind == "past" else 1)

    def _ids(self, name: str, mask: Array) -> Array:
        """Return ids: dealt ones for tokens, random ones for padding."""
        deck = self._decks[name]
        ids = self._random.integers(0, deck.size, mask.shape)
        ids[mask] = deck.deal(int(mask.sum()))
        return ids
