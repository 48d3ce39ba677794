"""Choose sizes that the user did not give: the usual ones, or smaller if a model has too few positions."""

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
        models: The models; all of them run the same sizes.
        sequences: Tokens of a row; None if not given.
        pasts: Tokens in the cache; empty if not given.
    """
    if sequences is not None:
        return sequences, pasts, ()  # given sizes are used or refused, never changed
    notes = []
    sequence = min([USUAL_SEQUENCE, *most_of(models, "sequence"), *most_of(models, "total")])
    if sequence < USUAL_SEQUENCE:
        notes.append(f"--sequence is {sequence}, usually {USUAL_SEQUENCE}: the model has no more positions")
    if pasts or not has_cache(models[0]):
        return (sequence,), pasts, tuple(notes)
    # The decoded token needs one more position.
    past = min([sequence, *most_of(models, "past"), *(most - 1 for most in most_of(models, "total"))])
    if past < sequence:
        notes.append(
            f"--past is {past}, not {sequence} as --sequence: the model has positions for {past + 1} tokens "
            "in all, and one of them is decoded"
        )
    return (sequence,), (past,), tuple(notes)
