"""Compare a candidate's metadata with what can be seen, as a candidate may not choose how it is checked.

Whoever made the graph also wrote its metadata. The dtype is taken from its outputs and weights
(`About.dtype`), and the numbers of positions and token ids from the reference if it knows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lora_export.base.kinds import kind_of
from lora_export.base.kinds.model_kind import longest_of
from lora_export.graph.captured import Captured
from lora_export.parity.feeds.sizes import DEFAULT_SEQUENCES, LENGTHS
from lora_export.parity.sides.candidate import About
from lora_export.parity.sides.reference import CheckpointReference, GraphReference, Reference


def believed(about: About, reference: Reference) -> tuple[Captured | None, list[str]]:
    """Return a candidate's metadata with sizes that its reference confirms, and notes.

    Args:
        about: Facts on the candidate.
        reference: The reference.
    """
    stated = about.captured
    if stated is None:
        return None, []
    notes = []
    known = _known_sizes(reference, stated)
    largest = dict(stated.largest)
    for role, size in stated.largest.items():
        expected = size if known is None else known.get(role)
        if expected is not None and expected <= size:
            continue
        taken = "any" if expected is None else str(expected)
        notes.append(
            f"the metadata of {about.path.name} say at most {size} for {role}, the reference takes {taken}: "
            "the reference's limit is used"
        )
        largest.pop(role) if expected is None else largest.update({role: expected})
    longest = min((largest[role] for role in LENGTHS if role in largest), default=max(DEFAULT_SEQUENCES))
    if longest < max(DEFAULT_SEQUENCES):
        notes.append(f"{about.path.name} says that it takes {longest} tokens: longer inputs are not compared")
    return replace(stated, largest=largest, vocab_size=_vocabulary(reference) or stated.vocab_size), notes


def dtype_notes(about: About) -> list[str]:
    """Return a note if a candidate's metadata state another dtype than its outputs have."""
    stated, outputs, mostly = about.captured and about.captured.dtype, about.types.outputs, about.types.mostly
    if stated in (None, outputs):
        return []
    shows = f"its outputs are {outputs}, most of its weights {mostly or 'of no one dtype'}"
    name = about.path.name
    if stated == about.dtype:
        return [f"the metadata of {name} say that it computes in {stated}, which it is held to; {shows}"]
    return [
        f"the metadata of {name} say that it computes in {stated}, but {shows}: it is held to {about.dtype}; "
        f"if {stated} is meant: --dtype {stated}"
    ]


def _known_sizes(reference: Reference, stated: Captured) -> Mapping[str, int] | None:
    """Return role → the largest size that the reference has positions for; None if it doesn't tell."""
    if isinstance(reference, CheckpointReference):
        module = reference.model.module
        config = getattr(module, "config", None)
        if config is not None and not hasattr(config, "get_text_config"):  # of diffusers
            kind = kind_of(module)
            return kind.largest(module) if kind else {}
        longest = None if config is None else longest_of(module, config.get_text_config())
        return dict.fromkeys(stated.largest, longest) if longest else {}
    if isinstance(reference, GraphReference) and reference.graph.about.captured is not None:
        return reference.graph.about.captured.largest
    return None


def _vocabulary(reference: Reference) -> int | None:
    """Return the number of token ids of a reference graph; None if unknown or not a graph."""
    if not isinstance(reference, GraphReference):
        return None
    about = reference.graph.about
    rows = [port.rows for port in about.ports if port.kind == "ids" and port.rows]
    stated = about.captured.vocab_size if about.captured else None
    return stated or min(rows, default=None)
