"""The parity check: run both sides on the same feeds in every state, judge, look where it fails."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_export.adapter import Adapter, Array
from lora_export.errors import BackendError
from lora_export.parity import laws as laws_of
from lora_export.parity.candidate import About, Candidate, describe, open_candidate
from lora_export.parity.comparison import Comparison
from lora_export.parity.environment import environment
from lora_export.parity.feeds import Feed, ids_left, make_feeds, read_feeds
from lora_export.parity.generate import check_decoder, generate, prompts_of, token_verdicts
from lora_export.parity.limits import STEP, STEPS
from lora_export.parity.localise import Sources
from lora_export.parity.localise import localise as localise_error
from lora_export.parity.merged import Merged, read_merged
from lora_export.parity.naming import Adapters, named_adapters
from lora_export.parity.pasts import with_real_pasts
from lora_export.parity.reference import (
    CheckpointReference,
    GraphReference,
    Reference,
    SavedReference,
    open_reference,
)
from lora_export.parity.result import BASE, Generated, Localisation, ParityReport, State, Verdict, state_name
from lora_export.parity.verdicts import Judge, Tolerance
from lora_export.progress import Say
from lora_export.runtimes.device import Provider
from lora_export.runtimes.torch_reference import TorchReference

PathLike = str | os.PathLike[str]
_PROMPTS = 2
_DTYPES = tuple(STEP)


@dataclass
class Sides:
    """Both sides, opened.

    Attributes:
        candidate: What is checked.
        reference: What is right.
        own: PyTorch in the candidate's dtype; None where there is no such run.
        dtype: The candidate's.
        merged: What the candidate's manifest says.
        blend: The state of a plain candidate.
        notes: What a user should know.
    """

    candidate: Candidate
    reference: Reference
    own: TorchReference | None
    dtype: str
    merged: Merged
    blend: State
    notes: list[str] = field(default_factory=list)


def check_parity(
    reference: PathLike,
    candidate: PathLike,
    adapters: Adapters = (),
    *,
    weights: Sequence[float] = (),
    base: PathLike | None = None,
    provider: Provider | None = None,
    feeds: PathLike | None = None,
    batches: Sequence[int] | None = None,
    sequences: Sequence[int] | None = None,
    seed: int = 0,
    samples: int = 8,
    tolerance: str | tuple[float, float] = "auto",
    generate: int = 0,
    dtype: str | None = None,
    reference_dtype: str | None = None,
    localise: bool = True,
    progress: Say | None = None,
) -> ParityReport:
    """Compare an exported model with what it was exported from.

    Args:
        reference: A Hugging Face checkpoint folder (run by PyTorch, adapters unmerged: h = W0·x +
            scaling·B·A·x), another ``.onnx`` file, or saved outputs (``.npz``, ``.safetensors``).
        candidate: An ``.onnx`` file (merged, swap or bank), run by ONNX Runtime, or an ``.engine``.
        adapters: Files, folders or `Adapter` objects; or name → them. Of a merged candidate those that were
            merged; of a bank those in its slots, by the slots' names.
        weights: Of several that were merged together; by default those of the candidate's manifest.
        base: With a reference graph that has the adapter merged: the graph without it.
        provider: ``cpu`` or ``cuda``: where graphs run. By default ``cpu``; engines run on the GPU.
        feeds: A file of inputs; by default they are made from the graph's own inputs.
        batches: Batch sizes of made feeds; by default 1 and 4, or what the graph fixes.
        sequences: Lengths of made feeds; by default 1 and 16, or what the graph fixes.
        seed: Of made feeds.
        samples: How many feeds are made.
        tolerance: ``auto``: from the dtypes, see `lora_export.parity.limits`; or ``(rtol, atol)``.
        generate: Compare this many greedy tokens as well, of decoders.
        dtype: What the candidate is to be held to; by default what it says of itself.
        reference_dtype: What PyTorch computes the reference in: ``float64`` or ``float32``; by default
            ``float64`` for float32 candidates and ``float32`` for the others.
        localise: Where something fails, look for the first module whose error jumps.
        progress: Called with what is being done and the share that is done.

    Returns:
        What was found. ``passed`` says whether everything passed, and ``failed`` what did not.

    Raises:
        AdapterError: An adapter can't be read, or has no place.
        BackendError: Something can't be opened, run or compared; all that is wrong is listed.
        LoraExportError: Other problems of the input, each with its own class.
    """
    started = time.monotonic()
    say = progress or (lambda _what, _share: None)
    given = named_adapters(adapters)
    options = _Options(
        _tolerance(tolerance), generate, _known(dtype), _known(reference_dtype, ("float64", "float32"))
    )
    say("opening both sides", 0.0)
    sides = _open(Path(reference), Path(candidate), given, weights, base, provider, options)
    about = sides.candidate.about
    if generate:
        if sides.reference.about["kind"] == "saved":
            raise BackendError("saved outputs can't go on from new tokens", "leave out --generate")
        check_decoder(about.ports, about.outputs, about.path.name, generate, about.captured)
    runs = _feeds(sides, feeds, batches, sequences, seed, samples)
    comparison = Comparison(
        sides.candidate,
        sides.reference,
        sides.own,
        _states(sides),
        laws_of.Laws(sides.candidate, options.tolerance_pair),
        options.tolerance_pair,
    )
    for number, feed in enumerate(runs):
        say(f"feed {number + 1} of {len(runs)}: {feed.label}", number / (len(runs) + 1))
        comparison.add(feed)
    sides.notes += ids_left(runs, about.ports, _vocabulary(sides))
    judge = Judge(sides.dtype, options.tolerance, sides.merged.rounding)
    verdicts = [*judge.judge(comparison.tallies), *comparison.coverage(), *comparison.laws.judge(judge)]
    generated: list[Generated] = []
    if generate:
        say("generating", 0.95)
        generated, more = _generate(sides, comparison, runs, generate)
        verdicts += more
    where = None
    # An adapter without effect and outputs that are missing begin nowhere.
    if localise and any(not verdict.passed and not math.isinf(verdict.limit) for verdict in verdicts):
        say("looking where it begins", 0.97)
        where = _localise(sides, comparison, runs, verdicts)
    return ParityReport(
        sides.reference.about,
        {
            "path": str(about.path),
            "mode": "merged" if about.mode == "plain" and sides.blend else about.mode,
            "runtime": about.runtime,
            "provider": about.provider,
            "dtype": sides.dtype,
            "sha256": about.sha256,
        },
        tuple(_about_adapter(name, adapter) for name, adapter in given.items()),
        tuple(_about_feed(feed, from_file=feeds is not None) for feed in runs),
        str(options.tolerance),
        tuple(verdicts),
        tuple(comparison.metrics()),
        where,
        tuple(generated),
        tuple(comparison.scatter),
        tuple(
            dict.fromkeys([*sides.notes, *sides.candidate.notes, *comparison.said, *comparison.laws.notes])
        ),
        environment(about.runtime, about.provider),
        time.monotonic() - started,
    )


@dataclass(frozen=True)
class _Options:
    tolerance: Tolerance
    generate: int
    dtype: str | None
    reference_dtype: str | None

    @property
    def tolerance_pair(self) -> tuple[float, float] | None:
        if self.tolerance.rtol is None or self.tolerance.atol is None:
            return None
        return self.tolerance.rtol, self.tolerance.atol


def _tolerance(given: str | tuple[float, float]) -> Tolerance:
    if given == "auto":
        return Tolerance()
    try:
        parts = given.split(",") if isinstance(given, str) else given
        rtol, atol = (float(part) for part in parts)
    except (TypeError, ValueError) as error:
        raise BackendError(f"tolerance is {given!r}", "give auto, or rtol,atol: 1e-3,1e-5") from error
    if not (0 <= rtol < float("inf") and 0 <= atol < float("inf") and rtol + atol > 0):
        raise BackendError(f"tolerance is {given!r}", "give numbers from 0 on, not both 0: 1e-3,1e-5")
    return Tolerance(rtol, atol)


def _known(dtype: str | None, among: Sequence[str] = _DTYPES) -> str | None:
    if dtype is not None and dtype not in among:
        raise BackendError(f"there is no dtype {dtype!r} to check in", f"one of: {', '.join(among)}")
    return dtype


def _open(
    reference: Path,
    candidate: Path,
    adapters: Mapping[str, Adapter],
    weights: Sequence[float],
    base: PathLike | None,
    provider: Provider | None,
    options: _Options,
) -> Sides:
    about = describe(candidate, provider)
    if wrong := [weight for weight in weights if not math.isfinite(weight)]:
        raise BackendError(f"weights are {', '.join(map(str, wrong))}", "give numbers")
    if reference.is_file() and reference.samefile(candidate):
        raise BackendError(
            f"{candidate.name} would be compared with itself",
            "give what it was exported from: a checkpoint folder, another graph, or saved outputs",
        )
    if about.mode == "plain":
        merged = read_merged(candidate, adapters, weights)
    elif weights:
        raise BackendError(
            f"weights are of adapters that were merged; {candidate.name} is a {about.mode} graph",
            "leave them out",
        )
    else:
        merged = Merged()
    blend = merged.state
    dtype = options.dtype or about.dtype
    notes = [*merged.notes]
    if about.types.quantised and options.tolerance.auto:
        raise BackendError(
            f"{candidate.name} is quantised, and no dtype tells what that loses",
            "give --tolerance rtol,atol",
            about.types.quantised,
        )
    mostly = about.types.mostly
    if mostly not in (None, dtype) and STEP[str(mostly)] > STEP[dtype]:
        notes.append(
            f"most weights of {candidate.name} are stored in {mostly}, it is held to {dtype}; "
            f"if that is meant: --dtype {mostly}"
        )
    high = options.reference_dtype or ("float64" if STEP[dtype] <= STEP["float32"] else "float32")
    opened = open_candidate(about, adapters)
    right = open_reference(
        reference, adapters, high, blend, Path(base) if base is not None else None, provider or "cpu"
    )
    if base is not None and not adapters:
        raise BackendError(
            "--base tells what an adapter changes, and no adapter was given",
            "give --adapter, or leave --base out",
        )
    if isinstance(right, GraphReference):
        _same_inputs(about, right.graph.about)
    if STEP[dtype] > STEP[about.dtype]:
        notes.append(
            f"{candidate.name} is in {about.dtype} and held to {dtype}, as asked: the limits are wider"
        )
    rough = str(right.about["dtype"])
    if STEP.get(rough, 0.0) > STEP[dtype]:
        notes.append(
            f"{reference.name} is in {rough}, coarser than {dtype}, which the candidate is held to; "
            f"if that is meant: --dtype {rough}"
        )
    own = None
    if isinstance(right, CheckpointReference) and dtype != high:
        own = TorchReference(reference, dtype, adapters)
    return Sides(opened, right, own, dtype, merged, blend, notes)


def _same_inputs(candidate: About, reference: About) -> None:
    """Refuse graphs that read different things.

    Raises:
        BackendError: An input of one is none of the other.
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


def _feeds(
    sides: Sides,
    file: PathLike | None,
    batches: Sequence[int] | None,
    sequences: Sequence[int] | None,
    seed: int,
    samples: int,
) -> list[Feed]:
    about = sides.candidate.about
    if file is not None:
        found = read_feeds(Path(file), about.ports, about.captured, _vocabulary(sides))
        if sides.reference.about["kind"] == "saved" and len(found) > 1:
            raise BackendError(
                f"{file} holds {len(found)} feeds, saved outputs are of one", "check each feed by itself"
            )
        return found
    if sides.reference.about["kind"] == "saved":
        raise BackendError(
            "saved outputs belong to inputs that only the user knows", "give --feeds FILE as well"
        )
    made = make_feeds(about.ports, about.captured, batches, sequences, seed, samples, _vocabulary(sides))
    right = sides.reference
    if isinstance(right, CheckpointReference) and about.caches and right.has(BASE):
        made = with_real_pasts(made, lambda values: right.run(values, BASE), seed)
    # A report of another seed is one of other feeds.
    return [replace(feed, label=f"{feed.label}; seed {seed}") for feed in made] if seed else made


def _vocabulary(sides: Sides) -> int | None:
    right = sides.reference
    return right.model.vocab_size if isinstance(right, CheckpointReference) else None


def _states(sides: Sides) -> list[State]:
    """Return the states that both sides can be in, the base first.

    Raises:
        BackendError: There is none.
    """
    wanted = sides.candidate.states(sides.blend)
    states = [state for state in wanted if sides.reference.has(state)]
    lacking = [state_name(state) for state in wanted if state not in states and state != BASE]
    if lacking or not states:
        raise BackendError(
            "the reference can't be run with every adapter of the candidate",
            "give a checkpoint folder as the reference, or outputs saved with each of them",
            lacking,
        )
    saved = sides.reference.outputs if isinstance(sides.reference, SavedReference) else {}
    if left := [state_name(state) for state in saved if state not in (*wanted, BASE)]:
        sides.notes.append(f"saved for {', '.join(left)}, which the candidate can't be: not compared")
    if BASE in wanted and BASE not in states:
        sides.notes.append("the reference can't be run without adapter: the candidate's base is not checked")
    return states


def _generate(
    sides: Sides, comparison: Comparison, feeds: Sequence[Feed], count: int
) -> tuple[list[Generated], list[Verdict]]:
    found, ties = [], {}
    ports = sides.candidate.about.ports
    prompts = prompts_of(feeds, _PROMPTS)
    for state in comparison.states:
        tie = comparison.told_apart("logits", state)
        if tie is None:
            tie = STEPS * STEP[sides.dtype] * comparison.largest_value("logits", state)
        ties[state_name(state)] = tie

        def reference(values: Mapping[str, Array], state: State = state) -> Mapping[str, Array]:
            right = sides.reference.run(values, state)
            return {name: right[other] for name, other in comparison.pairs.items()}

        def candidate(values: Mapping[str, Array], state: State = state) -> Mapping[str, Array]:
            return sides.candidate.run(values, (state,))

        for prompt in prompts:
            found.append(generate(reference, candidate, ports, prompt, count, state, tie))
    return found, token_verdicts(found, count, ties)


def _localise(
    sides: Sides, comparison: Comparison, feeds: Sequence[Feed], verdicts: Sequence[Verdict]
) -> Localisation | None:
    """Look into the first state that failed, on the feed that shows most of it."""
    right = sides.reference
    if not isinstance(right, CheckpointReference):
        return Localisation("", "", note="only a checkpoint as the reference can be looked into")
    failed = [verdict.state for verdict in verdicts if not verdict.passed]
    states = sides.candidate.states(sides.blend)
    state = next((state for state in states if state_name(state) in failed), states[-1])
    feed = comparison.telling_feed(state, feeds)
    about = sides.candidate.about
    rows = (state,) * feed.batch
    sources = Sources(
        right.model,
        right.model.module,
        sides.own,
        about.path,
        about.provider,
        feed.values,
        sides.candidate.lora_inputs(feed.values, rows) if about.path.suffix == ".onnx" else {},
        state,
        sides.dtype,
        laws_of.masks_of(feed),
    )
    return localise_error(sources)


def _about_feed(feed: Feed, from_file: bool) -> Mapping[str, object]:
    # Made ones are the same by their label, up to a past that this machine's arithmetic gave.
    return {"label": feed.label, "shapes": feed.shapes} | ({"sha256": feed.sha256} if from_file else {})


def _about_adapter(name: str, adapter: Adapter) -> Mapping[str, object]:
    scalings = [module.scaling for module in adapter.modules.values()]
    return {
        "name": name,
        "sha256": adapter.sha256,
        "modules": len(adapter.modules) + len(adapter.extras),
        "scaling": [min(scalings), max(scalings)] if scalings else [],
    }
