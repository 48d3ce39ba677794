"""Add feeds for rows of embeddings that the usual feeds leave unread.

The usual feeds are short, so that most rows of a table of positions are unread. The added feeds cost at most
a few times as much:

1. for a table that is read by position, one input as long as the table, the model and `_TOKENS` allow;
2. for a vocabulary, one input with the remaining ids, if it can hold all of them. For a large vocabulary it
   can't, and a thousand more ids would prove little.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from lora_export.errors import BackendError
from lora_export.parity.comparison import Comparison
from lora_export.parity.feeds.coverage import Coverage, EmbeddingTable
from lora_export.parity.feeds.made import Feed, make_feeds
from lora_export.parity.feeds.sizes import LENGTHS, Sizes, chosen_batches, chosen_sequences
from lora_export.parity.sides.reference import CheckpointReference
from lora_export.parity.sides.sides import Sides, vocabulary_of

# Largest number of tokens of one feed, and of values of its logits: half a gigabyte in float64.
_TOKENS = 1024
_LOGITS = 1 << 26
# If the padding token is unknown, it is assumed to be among the first ids.
_SPECIAL = 4


class FurtherFeeds:
    """Add feeds to a comparison.

    Args:
        sides: Both sides.
        coverage: Rows that were read so far.
        batches: Batch sizes that the user gave, or None.
        seed: Seed of the values.
    """

    def __init__(self, sides: Sides, coverage: Coverage, batches: Sequence[int] | None, seed: int) -> None:
        about = sides.candidate.about
        self._sides, self._coverage, self._seed = sides, coverage, seed
        self._ports, self._captured = about.ports, about.captured
        self._sizes = Sizes.of(about.ports, about.captured)
        self._batches = chosen_batches(batches, self._sizes)[1]
        known = vocabulary_of(sides) or (about.captured.vocab_size if about.captured else None)
        sizes = [known or port.rows or 1 for port in about.ports if port.kind == "ids"]
        self._vocabulary = min(sizes, default=0)
        self._tokens = min(_TOKENS, _LOGITS // max(sizes, default=1))
        self._most = max(min(self._tokens, self._sizes.longest or _TOKENS), 1)

    def add_to(self, comparison: Comparison, runs: list[Feed]) -> list[str]:
        """Compare on more feeds, append them to ``runs``, and return notes."""
        notes: list[str] = []
        if self._sizes.roles & set(LENGTHS) and self._coverage.tables:
            for table in self._coverage.tables.values():
                for feed in self._feeds(table):
                    if not self._fits(comparison, feed):
                        continue
                    found = self._compare(comparison, feed, runs)
                    notes += found
                    table.is_longest = not found and self._is_longest(table, feed)
                    break
        return notes

    def _feeds(self, table: EmbeddingTable) -> Iterator[Feed]:
        """Yield feeds that may read more of a table, the best one first."""
        unread = table.unread
        if not unread:
            return
        usual = max(chosen_sequences(None, self._sizes)[1])
        if not table.is_vocabulary:  # rule 1
            # If positions start at an offset (RoBERTa, OPT), two tokens fewer fit; buckets of distances (T5)
            # reach further than there are rows.
            lengths = (4 * table.rows, table.rows, table.rows - 2, table.rows // 2)
            for length in dict.fromkeys(min(size, self._most) for size in lengths):
                if length > usual:
                    yield from self._made(min(self._batches), length, self._meant())
        elif len(unread) <= self._tokens and len(self._batches) > 1:  # rule 2
            yield from self._made(-(-len(unread) // usual), usual, unread)
        elif len(unread) <= self._most * self._batches[0]:
            yield from self._made(self._batches[0], -(-len(unread) // self._batches[0]), unread)

    def _made(self, batch: int, sequence: int, first: Sequence[int]) -> Iterator[Feed]:
        try:
            yield from make_feeds(
                self._ports,
                self._captured,
                batches=[batch],
                sequences=[sequence],
                seed=self._seed,
                samples=1,
                vocab_size=vocabulary_of(self._sides),
                first=first,
                padding="none",
            )
        except BackendError:
            # The graph does not take this size; the next one may fit.
            return

    def _meant(self) -> list[int]:
        """Return all token ids except padding, which has no position of its own in RoBERTa."""
        reference = self._sides.reference
        special: set[int | None] = set(range(_SPECIAL))
        if isinstance(reference, CheckpointReference):
            special = {getattr(getattr(reference.model.module, "config", None), "pad_token_id", None)}
        ids = np.random.default_rng(self._seed).permutation(self._vocabulary)
        return [int(token) for token in ids if token not in special]

    def _fits(self, comparison: Comparison, feed: Feed) -> bool:
        """Return True if the reference takes a feed: only a run tells how many positions it has."""
        try:
            self._sides.reference.run(feed.values, comparison.states[0])
        except BackendError:
            return False
        return True

    def _compare(self, comparison: Comparison, feed: Feed, runs: list[Feed]) -> list[str]:
        label = f"{len(runs) + 1}{feed.label[feed.label.index(':') :]}, for rows not read before"
        feed = replace(feed, label=f"{label}; seed {self._seed}" if self._seed else label)
        try:
            with self._coverage.watch(feed):
                comparison.add(feed)
        except BackendError as error:
            return [
                f"an input that the reference takes ({feed.label}) was not compared: the candidate doesn't "
                f"take it: {error.message}"
            ]
        runs.append(feed)
        return []

    def _is_longest(self, table: EmbeddingTable, feed: Feed) -> bool:
        """Return True if rows are still unread because the model has no more positions."""
        length = max((values.shape[1] for values in feed.values.values() if values.ndim == 2), default=0)
        return length == self._sizes.longest or (not table.is_vocabulary and length < self._most)
