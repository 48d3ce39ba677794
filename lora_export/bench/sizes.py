"""Sizes that the user left to us: what is usual, or less where the models have positions for less."""

from __future__ import annotations

from collections.abc import Sequence

from lora_export.bench.workloads import has_cache, most_of
from lora_export.runtimes.model_file import BenchModel

USUAL_SEQUENCE = 128


def choose_sizes(
    models: Sequence[BenchModel], sequences: tuple[int, ...] | None, pasts: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]]:
    """Return sequences, pasts, and notes on what is smaller than usual.

    Args:
        models: The models: all of them run the same.
        sequences: Tokens of a row; None: not given.
        pasts: Tokens in the cache; empty: not given.
    """
    if sequences is not None:
        return sequences, pasts, ()  # what was asked for is done or refused, never changed
    notes = []
    sequence = min([USUAL_SEQUENCE, *most_of(models, "sequence"), *most_of(models, "total")])
    if sequence < USUAL_SEQUENCE:
        notes.append(
            f"--sequence is {sequence}, usually {USUAL_SEQUENCE}: the model has positions for no more"
        )
    if pasts or not has_cache(models[0]):
        return (sequence,), pasts, tuple(notes)
    # The token that is decoded needs a position of its own.
    past = min([sequence, *most_of(models, "past"), *(most - 1 for most in most_of(models, "total"))])
    if past < sequence:
        notes.append(
            f"--past is {past}, not {sequence} as --sequence: the model has positions for {past + 1} tokens "
            "in all, and one is decoded"
        )
    return (sequence,), (past,), tuple(notes)
