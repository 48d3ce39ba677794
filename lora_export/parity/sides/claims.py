"""What a candidate's record of itself says against what shows: it may not choose how it is checked.

A graph's metadata are its maker's, as its weights are. Its dtype is that of its outputs and weights
(`About.dtype`); how many positions and token ids there are, the reference tells where it knows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lora_export.base.capture.capture import longest_of
from lora_export.graph.captured import Captured
from lora_export.parity.feeds.sizes import DEFAULT_SEQUENCES, LENGTHS
from lora_export.parity.sides.candidate import About
from lora_export.parity.sides.reference import CheckpointReference, GraphReference, Reference


def believed(about: About, reference: Reference) -> tuple[Captured | None, list[str]]:
    """Return a candidate's record with sizes that its reference bears out, and what a user should know.

    Args:
        about: The candidate.
        reference: What it is compared with.
    """
    said = about.captured
    if said is None:
        return None, []
    notes = []
    known = _known_sizes(reference, said)
    largest = dict(said.largest)
    for role, size in said.largest.items():
        right = size if known is None else known.get(role)
        if right is not None and right <= size:
            continue
        least = "any" if right is None else str(right)
        notes.append(
            f"the metadata of {about.path.name} say at most {size} for {role}, the reference takes {least}: "
            "it is checked as the reference is"
        )
        largest.pop(role) if right is None else largest.update({role: right})
    longest = min((largest[role] for role in LENGTHS if role in largest), default=max(DEFAULT_SEQUENCES))
    if longest < max(DEFAULT_SEQUENCES):
        notes.append(f"{about.path.name} says that it takes {longest} tokens: longer inputs are not compared")
    return replace(said, largest=largest, vocab_size=_vocabulary(reference) or said.vocab_size), notes


def dtype_notes(about: About) -> list[str]:
    """Return what a user should know of a candidate that says another dtype than its outputs have."""
    said, outputs, mostly = about.captured and about.captured.dtype, about.types.outputs, about.types.mostly
    if said in (None, outputs):
        return []
    shows = f"its outputs are {outputs}, most of its weights {mostly or 'of no one dtype'}"
    name = about.path.name
    if said == about.dtype:
        return [f"the metadata of {name} say that it computes in {said}, which it is held to; {shows}"]
    return [
        f"the metadata of {name} say that it computes in {said}, but {shows}: it is held to {about.dtype}; "
        f"if {said} is meant: --dtype {said}"
    ]


def _known_sizes(reference: Reference, said: Captured) -> Mapping[str, int] | None:
    """Return role → the largest size that the reference has positions for; None where it does not tell."""
    if isinstance(reference, CheckpointReference):
        config = getattr(reference.model.module, "config", None)
        longest = None if config is None else longest_of(reference.model.module, config.get_text_config())
        return dict.fromkeys(said.largest, longest) if longest else {}
    if isinstance(reference, GraphReference) and reference.graph.about.captured is not None:
        return reference.graph.about.captured.largest
    return None


def _vocabulary(reference: Reference) -> int | None:
    """Return how many token ids a graph that is the reference has."""
    if not isinstance(reference, GraphReference):
        return None
    about = reference.graph.about
    rows = [port.rows for port in about.ports if port.kind == "ids" and port.rows]
    said = about.captured.vocab_size if about.captured else None
    return said or min(rows, default=None)
