"""Open both sides of a parity check: candidate, reference, and PyTorch in the candidate's dtype."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_export.adapter import Adapter
from lora_export.base.checkpoint.checkpoint import read_config
from lora_export.base.checkpoint.own_code import code_notes
from lora_export.errors import BackendError
from lora_export.parity.judge.limits import STEP
from lora_export.parity.judge.verdicts import Tolerance
from lora_export.parity.result import BASE, State, state_name
from lora_export.parity.sides.candidate import About, Candidate, describe, open_candidate
from lora_export.parity.sides.claims import believed, dtype_notes
from lora_export.parity.sides.merged import Merged, read_merged
from lora_export.parity.sides.reference import (
    CheckpointReference,
    GraphReference,
    Reference,
    SavedReference,
    open_reference,
)
from lora_export.runtimes.ort.device import Provider
from lora_export.runtimes.torch.reference import TorchReference
from lora_export.untrusted.places import is_file

PathLike = str | os.PathLike[str]
_DTYPES = tuple(STEP)


@dataclass(kw_only=True)
class Sides:
    """Both sides, opened.

    Attributes:
        candidate: The side to check.
        reference: The side that is right by definition.
        own: PyTorch in the candidate's dtype; None if it is not run.
        dtype: Type whose limits the candidate must keep.
        merged: State and rounding by the candidate's manifest.
        blend: State of a plain candidate.
        notes: Notes for the user.
    """

    candidate: Candidate
    reference: Reference
    own: TorchReference | None
    dtype: str
    merged: Merged
    blend: State
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ParityOptions:
    """The user's options.

    Attributes:
        tolerance: Tolerance of errors.
        dtype: Type whose limits the candidate must keep; None: the type that it states.
        reference_dtype: Type that PyTorch computes the reference in; None: chosen by the dtype.
        shapes: Sizes that the candidate leaves open.
    """

    tolerance: Tolerance
    dtype: str | None
    reference_dtype: str | None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def read(
        cls, tolerance: str | tuple[float, float], dtype: str | None, reference_dtype: str | None
    ) -> ParityOptions:
        """Read the options as they are given to `check_parity`.

        Raises:
            BackendError: One of them is not known.
        """
        return cls(
            tolerance_of(tolerance),
            known_dtype(dtype),
            known_dtype(reference_dtype, ("float64", "float32")),
        )

    @property
    def tolerance_pair(self) -> tuple[float, float] | None:
        """The user's ``(rtol, atol)``; None for ``auto``."""
        if self.tolerance.rtol is None or self.tolerance.atol is None:
            return None
        return self.tolerance.rtol, self.tolerance.atol


def tolerance_of(given: str | tuple[float, float]) -> Tolerance:
    """Read a tolerance.

    Raises:
        BackendError: The text or pair is not a tolerance.
    """
    if given == "auto":
        return Tolerance()
    try:
        parts = given.split(",") if isinstance(given, str) else given
        rtol, atol = (float(part) for part in parts)
    except (TypeError, ValueError) as error:
        raise BackendError(f"tolerance is {given!r}", "give auto, or rtol,atol: 1e-3,1e-5") from error
    if not (0 <= rtol < float("inf") and 0 <= atol < float("inf") and rtol + atol > 0):
        raise BackendError(
            f"tolerance is {given!r}", "give finite numbers of at least 0, not both 0: 1e-3,1e-5"
        )
    return Tolerance(rtol, atol)


def known_dtype(dtype: str | None, among: Sequence[str] = _DTYPES) -> str | None:
    """Return a dtype, or None, after checking that it is known.

    Raises:
        BackendError: The dtype is unknown.
    """
    if dtype is not None and dtype not in among:
        raise BackendError(f"can't check in dtype {dtype!r}", f"give one of: {', '.join(among)}")
    return dtype


def open_sides(
    reference: Path,
    candidate: Path,
    adapters: Mapping[str, Adapter],
    weights: Sequence[float],
    base: PathLike | None,
    provider: Provider | None,
    options: ParityOptions,
) -> Sides:
    """Open candidate and reference.

    Raises:
        BackendError: They can't be compared with these options.
        LoraExportError: As for opening a graph, a checkpoint or an adapter.
    """
    about = describe(candidate, provider, options.shapes)
    _refuse_itself(candidate, reference)
    merged = _merged(about, adapters, weights)
    dtype = options.dtype or about.dtype
    _refuse_unknown_losses(about, options.tolerance)
    high = options.reference_dtype or ("float64" if STEP[dtype] <= STEP["float32"] else "float32")
    opened = open_candidate(about, adapters)
    opened_reference = open_reference(
        reference,
        adapters,
        dtype=high,
        blend=merged.state,
        base=Path(base) if base is not None else None,
        provider=provider or "cpu",
    )
    if base is not None and not adapters:
        raise BackendError(
            "--base shows an adapter's effect, but no adapter was given",
            "give --adapter, or omit --base",
        )
    if isinstance(opened_reference, GraphReference):
        _same_inputs(about, opened_reference.graph.about)
    own = None
    if isinstance(opened_reference, CheckpointReference) and dtype != high:
        own = TorchReference(reference, dtype, adapters)
    code = code_notes(read_config(reference)) if isinstance(opened_reference, CheckpointReference) else ()
    captured, claims = believed(about, opened_reference)
    opened.about = replace(about, captured=captured)
    claims += dtype_notes(about) if options.dtype is None else []
    reference_dtype = str(opened_reference.about["dtype"])
    claims += [*_of_codes(about, options.tolerance), *_of_padding(about)]
    notes = [*code, *merged.notes, *claims, *_of_dtypes(about, dtype, reference, reference_dtype)]
    return Sides(
        candidate=opened,
        reference=opened_reference,
        own=own,
        dtype=dtype,
        merged=merged,
        blend=merged.state,
        notes=notes,
    )


def _refuse_itself(candidate: Path, reference: Path) -> None:
    if is_file(reference) and reference.samefile(candidate):
        raise BackendError(
            f"{candidate.name} would be compared with itself",
            "give what it was exported from: a checkpoint folder, another graph, or saved outputs",
        )


def _refuse_unknown_losses(about: About, tolerance: Tolerance) -> None:
    if about.types.quantised and tolerance.auto and about.codes is None:
        raise BackendError(
            f"{about.path.name} is quantised, and no dtype tells how much that loses",
            "give --tolerance rtol,atol",
            about.types.quantised,
        )


def _of_codes(about: About, tolerance: Tolerance) -> list[str]:
    """Return a note on a quantised candidate whose limits come from what its codes lost."""
    if about.codes is None or not tolerance.auto:
        return []
    return [
        f"{about.path.name} is quantised to {about.codes.to}, which by its metadata cost "
        f"{about.codes.relative:.1%} of its weights: the limits are wider by {about.codes.cost:.2g}; "
        "narrower or wider ones: --tolerance rtol,atol"
    ]


def _of_padding(about: About) -> list[str]:
    """Return a note on a candidate whose rows may not be padded on each side."""
    if about.padding == "any":
        return []
    checked = "prompts are padded on the right" if about.padding == "right" else "rows are not padded"
    return [
        f"{about.path.name} has GroupQueryAttention, which counts a mask's ones and takes them for the first "
        f"tokens: {checked} here, and padded on the left they would be wrong; several tokens after a past "
        "are checked in one row"
    ]


def _merged(about: About, adapters: Mapping[str, Adapter], weights: Sequence[float]) -> Merged:
    """Return the state of the candidate by its manifest and the user's arguments."""
    if wrong := [weight for weight in weights if not math.isfinite(weight)]:
        raise BackendError(f"weights are {', '.join(map(str, wrong))}", "give finite numbers")
    if about.mode == "plain":
        merged = read_merged(about.path, adapters, weights)
        if merged.rounding is None:
            return merged
        stored = about.types.mostly or about.types.outputs
        return replace(merged, rounding=replace(merged.rounding, dtype=stored))
    if weights:
        raise BackendError(
            f"weights are for merged adapters, but {about.path.name} is a {about.mode} graph",
            "omit --weight (weights=)",
        )
    return Merged()


def _of_dtypes(about: About, dtype: str, reference: Path, reference_dtype: str) -> list[str]:
    """Return notes on weights, candidate or reference whose dtype is not the one that limits come from."""
    notes, mostly = [], about.types.mostly
    if mostly not in (None, dtype) and STEP[str(mostly)] > STEP[dtype]:
        notes.append(
            f"most weights of {about.path.name} are stored in {mostly}, it is held to {dtype}; "
            f"if that is meant: --dtype {mostly}"
        )
    if STEP[dtype] > STEP[about.dtype]:
        notes.append(
            f"{about.path.name} is in {about.dtype} and held to {dtype}, as asked: the limits are wider"
        )
    if STEP.get(reference_dtype, 0.0) > STEP[dtype]:
        notes.append(
            f"{reference.name} is in {reference_dtype}, coarser than {dtype}, which the candidate is held "
            f"to; if that is meant: --dtype {reference_dtype}"
        )
    return notes


def _same_inputs(candidate: About, reference: About) -> None:
    """Refuse graphs with different inputs.

    Raises:
        BackendError: An input of one graph is missing in the other.
    """
    names = [{port.name for port in about.ports} for about in (candidate, reference)]
    if names[0] != names[1]:
        raise BackendError(
            "the reference graph and the candidate have different inputs",
            "compare graphs that were exported alike: both with a key-value cache, or both without",
            [
                *(f"only {candidate.path} has {name}" for name in sorted(names[0] - names[1])),
                *(f"only {reference.path} has {name}" for name in sorted(names[1] - names[0])),
            ],
        )


def vocabulary_of(sides: Sides) -> int | None:
    """Return the number of token ids of a reference checkpoint; None for other references."""
    reference = sides.reference
    return reference.model.vocab_size if isinstance(reference, CheckpointReference) else None


def _how_to_run(sides: Sides) -> str:
    """Return the hint for a reference that lacks adapters of the candidate."""
    if isinstance(sides.reference, SavedReference):
        output = sides.candidate.about.outputs[0]
        return f"save the outputs of each adapter as NAME/{output}, or give a checkpoint folder"
    return "give a checkpoint folder as the reference, or outputs saved with each of them"


def states_of(sides: Sides) -> list[State]:
    """Return the states that both sides can be in, the base first.

    Raises:
        BackendError: The reference can't be run in all adapter states of the candidate.
    """
    possible = sides.candidate.states(sides.blend)
    states = [state for state in possible if sides.reference.has(state)]
    lacking = [state_name(state) for state in possible if state not in states and state != BASE]
    if lacking or not states:
        raise BackendError(
            "the reference can't be run with every adapter of the candidate", _how_to_run(sides), lacking
        )
    saved = sides.reference.outputs if isinstance(sides.reference, SavedReference) else {}
    if left := [state_name(state) for state in saved if state not in (*possible, BASE)]:
        sides.notes.append(f"outputs saved for {', '.join(left)} are not compared: the candidate lacks it")
    if BASE in possible and BASE not in states:
        sides.notes.append(
            "the reference can't be run without an adapter: the candidate's base is not checked"
        )
    return states
