"""Feeds beside the usual ones, for rows of embeddings that these leave unread.

The usual ones are short, so that of a table of positions most rows are read by none. What is added is within
a few times their cost:

1. for a table that is read by position, one input as long as the table, the model and `_TOKENS` allow;
2. for a vocabulary, one input with the ids that are left, where it can hold all of them. Of a large
   vocabulary it can't, and a thousand ids more would prove little.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from lora_export.errors import BackendError
from lora_export.parity.comparison import Comparison
from lora_export.parity.feeds.coverage import Coverage, Table
from lora_export.parity.feeds.made import Feed, make_feeds
from lora_export.parity.feeds.sizes import LENGTHS, Sizes, chosen_batches, chosen_sequences
from lora_export.parity.sides.reference import CheckpointReference
from lora_export.parity.sides.sides import Sides, vocabulary_of

# Tokens of one feed, and values of its logits: half a gigabyte in float64.
_TOKENS = 1024
_LOGITS = 1 << 26
# Where nothing tells which token is padding, it is taken for one of the first.
_SPECIAL = 4


class FurtherFeeds:
    """Adds feeds to a comparison.

    Args:
        sides: Both sides.
        coverage: What was read so far.
        batches: What the user asked for.
        seed: Of the values.
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
        """Compare on more feeds, which are added to ``runs``; return what a user should know."""
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

    def _feeds(self, table: Table) -> Iterator[Feed]:
        """Yield feeds that may read more of a table, the best one first."""
        unread = table.unread
        if not unread:
            return
        usual = max(chosen_sequences(None, self._sizes)[1])
        if not table.is_vocabulary:
            # Where a table starts behind an offset (RoBERTa, OPT), two tokens fewer fit; buckets of distances
            # (T5) reach further than there are rows.
            wanted = (4 * table.rows, table.rows, table.rows - 2, table.rows // 2)
            for length in dict.fromkeys(min(size, self._most) for size in wanted):
                if length > usual:
                    yield from self._made(min(self._batches), length, self._meant())
        elif len(unread) <= self._tokens and len(self._batches) > 1:
            yield from self._made(-(-len(unread) // usual), usual, unread)
        elif len(unread) <= self._most * self._batches[0]:
            yield from self._made(self._batches[0], -(-len(unread) // self._batches[0]), unread)

    def _made(self, batch: int, sequence: int, first: Sequence[int]) -> Iterator[Feed]:
        try:
            yield from make_feeds(
                self._ports,
                self._captured,
                [batch],
                [sequence],
                self._seed,
                samples=1,
                vocab_size=vocabulary_of(self._sides),
                first=first,
                padded=False,
            )
        except BackendError:
            # The graph does not take this size; the next may fit.
            return

    def _meant(self) -> list[int]:
        """Return all token ids but the padding's: RoBERTa gives that one no position of its own."""
        right = self._sides.reference
        special: set[int | None] = set(range(_SPECIAL))
        if isinstance(right, CheckpointReference):
            special = {getattr(getattr(right.model.module, "config", None), "pad_token_id", None)}
        ids = np.random.default_rng(self._seed).permutation(self._vocabulary)
        return [int(token) for token in ids if token not in special]

    def _fits(self, comparison: Comparison, feed: Feed) -> bool:
        """Whether the reference takes a feed: nothing but a run tells how many positions it has."""
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
                f"an input that the reference takes ({feed.label}) was not compared, the candidate does not "
                f"take it: {error.message}"
            ]
        runs.append(feed)
        return []

    def _is_longest(self, table: Table, feed: Feed) -> bool:
        """Whether what is still unread is so because the model has no more positions."""
        length = max((values.shape[1] for values in feed.values.values() if values.ndim == 2), default=0)
        return length == self._sizes.longest or (not table.is_vocabulary and length < self._most)
