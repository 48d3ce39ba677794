"""Check parity: run both sides on the same feeds in every state, judge, and localise an error."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_export.adapter import Adapter, Array
from lora_export.errors import BackendError
from lora_export.formats.given import Adapters, named_adapters
from lora_export.graph.told_sizes import parse_sizes
from lora_export.parity import laws as laws_of
from lora_export.parity.comparison import Comparison
from lora_export.parity.environment import environment
from lora_export.parity.feeds.coverage import Coverage
from lora_export.parity.feeds.further import FurtherFeeds
from lora_export.parity.feeds.made import Feed, ids_left, make_feeds, read_feeds
from lora_export.parity.feeds.pasts import with_real_pasts
from lora_export.parity.judge.limits import STEP, STEPS, CodesLoss
from lora_export.parity.judge.verdicts import Judge
from lora_export.parity.localise.localise import Sources
from lora_export.parity.localise.localise import localise as localise_error
from lora_export.parity.result import BASE, Generated, Localisation, ParityReport, State, Verdict, state_name
from lora_export.parity.sides.reference import CheckpointReference
from lora_export.parity.sides.sides import (
    ParityOptions,
    Sides,
    open_sides,
    states_of,
    vocabulary_of,
)
from lora_export.parity.tokens import check_decoder, generate, prompts_of, token_verdicts
from lora_export.progress import Say
from lora_export.runtimes.ort.device import Provider
from lora_export.storage.inputs import same_inputs

PathLike = str | os.PathLike[str]
_PROMPTS = 2


@same_inputs(at_end=True)
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
    shapes: Sequence[str] | Mapping[str, Sequence[int]] = (),
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
        adapters: Files, folders or `Adapter` objects; or name → one of these. For a merged candidate the
            adapters that were merged; for a bank those in its slots, by the slots' names.
        weights: Weights of adapters that were merged together; by default those of the candidate's manifest.
        base: For a reference graph with the adapter merged: the graph without it.
        provider: Provider of graphs, ``cpu`` or ``cuda``; by default ``cpu``. Engines run on the GPU.
        feeds: File of inputs; by default feeds are made from the graph's own inputs.
        batches: Batch sizes of made feeds; by default 1 and 4, or the size that the graph fixes.
        sequences: Lengths of made feeds; by default 1 and 16, or the length that the graph fixes.
        shapes: Sizes that the candidate leaves open: ``height=64`` for a dimension, ``timestep=1`` or
            ``sample=1x4x64x64`` for all axes of an input; or a mapping of names to sizes.
        seed: Seed of made feeds.
        samples: Number of feeds to make.
        tolerance: ``auto``: from the dtypes, see `lora_export.parity.judge.limits`; or ``(rtol, atol)``.
        generate: Number of greedy tokens to compare as well, for decoders.
        dtype: Type whose limits the candidate must keep; by default the type that it states.
        reference_dtype: Type that PyTorch computes the reference in: ``float64`` or ``float32``; by default
            ``float64`` for float32 candidates and ``float32`` for the others.
        localise: If a verdict fails, search for the first module whose error jumps.
        progress: Called with what is being done and the share that is done.

    Returns:
        The report. ``passed`` is True if everything passed, and ``failed`` lists the failed verdicts.

    Raises:
        AdapterError: An adapter can't be read, or has no site.
        BackendError: A side can't be opened, run or compared; all problems are listed.
        LoraExportError: Other problems of the input, each with its own class.
    """
    started = time.monotonic()
    progress = progress or (lambda _what, _share: None)
    given = named_adapters(adapters)
    options = replace(ParityOptions.read(tolerance, dtype, reference_dtype), shapes=parse_sizes(shapes))
    progress("opening both sides", 0.0)
    sides = open_sides(
        Path(reference),
        Path(candidate),
        adapters=given,
        weights=weights,
        base=base,
        provider=provider,
        options=options,
    )
    _refuse_generating(sides, generate)
    choice = _FeedChoice(file=feeds, batches=batches, sequences=sequences, seed=seed, samples=samples)
    runs = _feeds(sides, choice)
    comparison = _compare(sides, runs, choice=choice, options=options, progress=progress)
    verdicts = _judge(sides, comparison, options)
    generated, more = _generate(sides, comparison, runs, count=generate, progress=progress)
    verdicts += more
    where = None
    if localise:
        where = _localise(sides, comparison, runs, verdicts=verdicts, progress=progress)
    return ParityReport(
        reference=sides.reference.about,
        candidate=_about_candidate(sides),
        adapters=tuple(_about_adapter(name, adapter) for name, adapter in given.items()),
        feeds=tuple(_about_feed(feed, from_file=feeds is not None) for feed in runs),
        tolerance=str(options.tolerance),
        verdicts=tuple(verdicts),
        metrics=tuple(comparison.metrics()),
        localisation=where,
        generated=tuple(generated),
        scatter=tuple(comparison.scatter),
        notes=_notes(sides, comparison),
        environment=environment(sides.candidate.about.runtime, sides.candidate.about.provider),
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True, kw_only=True)
class _FeedChoice:
    """The user's choice of feeds.

    Attributes:
        file: File of inputs; None: feeds are made.
        batches: Batch sizes of made feeds, or None.
        sequences: Lengths of made feeds, or None.
        seed: Seed of made feeds.
        samples: Number of feeds to make.
    """

    file: PathLike | None
    batches: Sequence[int] | None
    sequences: Sequence[int] | None
    seed: int
    samples: int


def _refuse_generating(sides: Sides, count: int) -> None:
    """Raise `BackendError` if greedy tokens were asked for, and can't be compared."""
    if not count:
        return
    about = sides.candidate.about
    if sides.reference.about["kind"] == "saved":
        raise BackendError("saved outputs can't continue from new tokens", "omit --generate")
    check_decoder(about.ports, about.outputs, where=about.path.name, count=count, captured=about.captured)


def _feeds(sides: Sides, choice: _FeedChoice) -> list[Feed]:
    about = sides.candidate.about
    if choice.file is not None:
        if choice.batches or choice.sequences:
            raise BackendError(
                "sizes apply to made inputs; the inputs of a file have sizes of their own",
                "omit --batch and --sequence, or omit --feeds",
            )
        found = read_feeds(Path(choice.file), about.ports, about.captured, vocabulary_of(sides))
        if sides.reference.about["kind"] == "saved" and len(found) > 1:
            raise BackendError(
                f"{choice.file} holds {len(found)} feeds, but saved outputs belong to one feed",
                "give a file with the one feed that the outputs were saved from",
            )
        return found
    if sides.reference.about["kind"] == "saved":
        raise BackendError(
            "saved outputs belong to inputs that only the user knows", "give --feeds FILE as well"
        )
    made = make_feeds(
        about.ports,
        about.captured,
        batches=choice.batches,
        sequences=choice.sequences,
        seed=choice.seed,
        samples=choice.samples,
        vocab_size=vocabulary_of(sides),
        padding=about.padding,
        long_past=about.padding == "any",
    )
    reference, seed = sides.reference, choice.seed
    if isinstance(reference, CheckpointReference) and about.caches and reference.has(BASE):
        made = with_real_pasts(made, lambda values: reference.run(values, BASE), seed)
    # Reports with different seeds are about different feeds.
    return [replace(feed, label=f"{feed.label}; seed {seed}") for feed in made] if seed else made


def _compare(
    sides: Sides, runs: list[Feed], choice: _FeedChoice, options: ParityOptions, progress: Say
) -> Comparison:
    """Run both sides on all feeds; ``runs`` gets those that were found to be needed besides."""
    comparison = Comparison(
        candidate=sides.candidate,
        reference=sides.reference,
        own=sides.own,
        states=states_of(sides),
        laws=laws_of.Laws(candidate=sides.candidate, tolerance=options.tolerance_pair),
        tolerance=options.tolerance_pair,
    )
    coverage = Coverage.of(sides)
    for number, feed in enumerate(runs):
        progress(f"feed {number + 1} of {len(runs)}: {feed.label}", number / (len(runs) + 1))
        with coverage.watch(feed):
            comparison.add(feed)
    if choice.file is None and choice.sequences is None:
        progress("rows of embeddings that no input reads", 0.9)
        sides.notes += FurtherFeeds(sides, coverage, choice.batches, choice.seed).add_to(comparison, runs)
    more = "more: --samples, --sequence" if choice.file is None else "more: --feeds"
    sides.notes += coverage.notes(more)
    if not any(table.is_vocabulary for table in coverage.tables.values()):
        sides.notes += ids_left(runs, sides.candidate.about.ports, vocabulary_of(sides))
    return comparison


def _judge(sides: Sides, comparison: Comparison, options: ParityOptions) -> list[Verdict]:
    """Return the verdicts on all that was compared."""
    judge = Judge(
        dtype=sides.dtype,
        tolerance=options.tolerance,
        rounding=sides.merged.rounding,
        codes=_codes(sides, options),
        switches=sides.candidate.switches,
    )
    verdicts = [*judge.judge(comparison.tallies), *comparison.coverage(), *comparison.laws.judge(judge)]
    if (rounding := sides.merged.rounding) and any(limit.is_bounded for limit in judge.limits.values()):
        sides.notes.append(
            f"{rounding.source} says that rounding cost {rounding.relative:.2g} of what was merged: no more "
            f"is believed than weights in {rounding.dtype} can lose"
        )
    return verdicts


def _codes(sides: Sides, options: ParityOptions) -> CodesLoss | None:
    """Return the candidate's loss by quantising, if the limits are derived from it."""
    return sides.candidate.about.codes if options.tolerance.auto else None


def _generate(
    sides: Sides, comparison: Comparison, feeds: Sequence[Feed], count: int, progress: Say
) -> tuple[list[Generated], list[Verdict]]:
    """Compare ``count`` greedy tokens in every state; none if that is 0."""
    if not count:
        return [], []
    progress("generating", 0.95)
    found, ties = [], {}
    ports = sides.candidate.about.ports
    prompts = prompts_of(feeds, _PROMPTS)
    for state in comparison.states:
        tie = comparison.told_apart("logits", state)
        if tie is None:
            tie = STEPS * STEP[sides.dtype] * comparison.largest_value("logits", state)
        if (codes := sides.candidate.about.codes) is not None:
            tie = max(tie, codes.cost * comparison.largest_value("logits", state))
        ties[state_name(state)] = tie

        def reference(values: Mapping[str, Array], state: State = state) -> Mapping[str, Array]:
            outputs = sides.reference.run(values, state)
            return {name: outputs[other] for name, other in comparison.pairs.items()}

        def candidate(values: Mapping[str, Array], state: State = state) -> Mapping[str, Array]:
            return sides.candidate.run(values, (state,))

        for prompt in prompts:
            found.append(
                generate(reference, candidate, ports=ports, prompt=prompt, count=count, state=state, tie=tie)
            )
    return found, token_verdicts(found, count, ties)


def _localise(
    sides: Sides, comparison: Comparison, feeds: Sequence[Feed], verdicts: Sequence[Verdict], progress: Say
) -> Localisation | None:
    """Localise the error of the first failed state, on the feed that shows it best; None without an error."""
    # A missing effect or a missing output can't be traced to a module.
    if all(verdict.passed or math.isinf(verdict.limit) for verdict in verdicts):
        return None
    progress("searching where the error begins", 0.97)
    reference = sides.reference
    failed = [verdict.state for verdict in verdicts if not verdict.passed]
    states = sides.candidate.states(sides.blend)
    state = next((state for state in states if state_name(state) in failed), states[-1])
    if not isinstance(reference, CheckpointReference):
        return Localisation(
            state=state_name(state),
            module="",
            note="the error can be localised only if the reference is a checkpoint",
        )
    feed = comparison.telling_feed(state, feeds)
    about = sides.candidate.about
    rows = (state,) * feed.batch
    sources = Sources(
        reference=reference.model,
        model=reference.model.module,
        own=sides.own,
        candidate=about.path,
        provider=about.provider,
        values=feed.values,
        tensors=sides.candidate.lora_inputs(feed.values, rows) if not about.is_engine else {},
        state=state,
        dtype=sides.dtype,
        masks=laws_of.masks_of(feed),
    )
    return localise_error(sources)


def _notes(sides: Sides, comparison: Comparison) -> tuple[str, ...]:
    notes = [*sides.notes, *sides.candidate.notes, *comparison.all_notes, *comparison.laws.notes]
    return tuple(dict.fromkeys(notes))


def _about_candidate(sides: Sides) -> Mapping[str, object]:
    about = sides.candidate.about
    return {
        "path": str(about.path),
        "mode": "merged" if about.mode == "plain" and sides.blend else about.mode,
        "runtime": about.runtime,
        "provider": about.provider,
        "dtype": sides.dtype,
        "sha256": about.sha256,
    }


def _about_feed(feed: Feed, from_file: bool) -> Mapping[str, object]:
    # Made feeds with the same label are equal, except for a past that this machine computed.
    return {"label": feed.label, "shapes": feed.shapes} | ({"sha256": feed.sha256} if from_file else {})


def _about_adapter(name: str, adapter: Adapter) -> Mapping[str, object]:
    scalings = [module.scaling for module in adapter.modules.values()]
    return {
        "name": name,
        "sha256": adapter.sha256,
        "modules": len(adapter.modules) + len(adapter.extras),
        "scaling": [min(scalings), max(scalings)] if scalings else [],
    }
