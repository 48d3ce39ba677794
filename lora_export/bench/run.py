"""Run a benchmark: plan, open, time, report."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lora_export.bench.adapters import AdapterLoading, Swapping, load_adapters, measure_swapping
from lora_export.bench.contenders import AdapterChoice, Contender
from lora_export.bench.load_probe import Loaded, LoadJob, measure_loading
from lora_export.bench.opened import Opened, Opening, opened
from lora_export.bench.plan import BenchPlan, BenchRequest, plan_bench
from lora_export.bench.result import BenchReport, ModelFacts, Row, WorkloadTable
from lora_export.bench.rounds import Rounds, Run, measure
from lora_export.bench.statistics import summarise
from lora_export.bench.workloads import Workload, make_feeds
from lora_export.errors import BackendError, LoraExportError
from lora_export.graph.told_sizes import parse_sizes
from lora_export.machines.environment import load_average, read_environment
from lora_export.progress import Say
from lora_export.runtimes.ort.device import Provider
from lora_export.storage.inputs import note_states, same_inputs

PathLike = str | os.PathLike[str]
# Shares of the progress bar; the time of the first parts can't be known in advance.
_HASHED, _PROBED, _OPENED, _TIMED = 0.05, 0.2, 0.3, 0.95
# Share of the time budget for swapping, and its limit in seconds.
_SWAPPING_SHARE, _SWAPPING_S = 0.1, 5.0


def run_bench(
    model: PathLike,
    against: Sequence[PathLike] = (),
    *,
    adapters: Mapping[str, PathLike | None] | None = None,
    batches: Sequence[int] = (1,),
    sequences: Sequence[int] | None = None,
    pasts: Sequence[int] = (),
    shapes: Sequence[str] | Mapping[str, Sequence[int]] = (),
    provider: Provider = "cpu",
    threads: int | None = None,
    cuda_graph: bool = False,
    seconds: float = 60.0,
    narrow: float = 0.02,
    seed: int = 0,
    progress: Say | None = None,
) -> BenchReport:
    """Time models side by side.

    All models are open at once and take turns in every round; see `lora_export.bench.rounds`. Before that,
    the time and memory that opening takes are measured, each model in a separate process.

    Args:
        model: Graph or engine; the others are compared with it.
        against: Other models with the same inputs.
        adapters: Name → file or folder; None for a slot of a bank.
        batches: Batch sizes.
        sequences: Tokens of a row; by default 128, or as many as the models have positions for.
        pasts: Tokens in the key-value cache when one more is decoded; empty: as ``sequences``. If neither is
            given, at most as many as leave a position for one more token.
        shapes: Sizes that graphs leave open: ``height=64`` for a dimension, ``timestep=1`` or
            ``sample=1x4x64x64`` for all axes of an input; or a mapping of names to sizes.
        provider: ``cpu`` or ``cuda``, for graphs; engines always run on a GPU.
        threads: ONNX Runtime's threads within one operator.
        cuda_graph: Replay runs as CUDA graphs.
        seconds: Time budget of the timed runs of all workloads; opening and loading are extra.
        narrow: Stop when each ratio's interval is narrower than this share of the ratio.
        seed: Seed of feeds and orders.
        progress: Called with what is being done and the share of the whole that is done.

    Returns:
        The measured results.

    Raises:
        LoraExportError: The benchmark can't be run; all problems are listed. If only one runtime refuses its
            model, it is that runtime's error.
    """
    request = BenchRequest(
        models=(Path(model), *map(Path, against)),
        adapters=tuple(
            AdapterChoice(name, None if path is None else Path(path))
            for name, path in (adapters or {}).items()
        ),
        batches=tuple(batches),
        sequences=None if sequences is None else tuple(sequences),
        pasts=tuple(pasts),
        opening=Opening(provider, threads, cuda_graph),
        seconds=seconds,
        narrow=narrow,
        seed=seed,
        shapes=parse_sizes(shapes),
    )
    return carry_out(plan_bench(request), progress)


@same_inputs(at_end=True)
def carry_out(plan: BenchPlan, progress: Say | None = None) -> BenchReport:
    """Run a planned benchmark and return its results; see `run_bench`."""
    # The plan, the hashes and the results are all about these states of the files.
    note_states(state for model in plan.models for state in model.states)
    progress = progress or (lambda _what, _share: None)
    before = load_average()
    progress("hashing the models", 0.0)
    hashes = [model.sha256() for model in plan.models]
    loaded = _probe_all(plan, progress)
    with contextlib.ExitStack() as stack:
        progress("opening all models", _PROBED)
        sessions = _open_all(plan, stack)
        loadings = _load_all(plan, sessions)
        runs = _trial_runs(plan, sessions)
        tables = list(_time_all(plan, runs, progress))
        progress("swapping adapters", _TIMED)
        swapping = list(_swap_all(plan, sessions))
    devices = [plan.request.opening.device_of(model) for model in plan.models]
    facts = tuple(
        ModelFacts(
            label=model.label,
            file=str(model.path),
            kind=model.kind,
            mode=model.mode,
            device=device,
            size_bytes=model.size_bytes,
            sha256=sha256,
            loaded=costs,
        )
        for model, device, sha256, costs in zip(plan.models, devices, hashes, loaded, strict=True)
    )
    return BenchReport(
        models=facts,
        tables=tuple(tables),
        adapters=tuple(loadings),
        swapping=tuple(swapping),
        environment=read_environment("cuda" in devices),
        load_average=(before, load_average()),
        settings=_settings(plan.request),
        timed=plan.request.opening.timed(),
        notes=plan.notes,
    )


def _settings(request: BenchRequest) -> dict[str, object]:
    return {
        "seconds": request.seconds,
        "narrow": request.narrow,
        "seed": request.seed,
        "provider": request.opening.provider,
        "threads": request.opening.threads,
        "cuda_graph": request.opening.cuda_graph,
    }


def _contender_of(plan: BenchPlan, number: int) -> Contender:
    """Return a model's first contender."""
    return next(one for one in plan.contenders if one.model is plan.models[number])


def _probe_all(plan: BenchPlan, progress: Say) -> list[Loaded]:
    found = []
    for number, model in enumerate(plan.models):
        share = _HASHED + (_PROBED - _HASHED) * number / len(plan.models)
        progress(f"opening {model.label} alone", share)
        job = LoadJob(
            contender=_contender_of(plan, number),
            opening=plan.request.opening,
            adapters=plan.adapters_for(model),
            workloads=plan.workloads,
            seed=plan.request.seed,
        )
        found.append(measure_loading(job))
    return found


def _open_all(plan: BenchPlan, stack: contextlib.ExitStack) -> list[Opened]:
    sessions, errors = [], []
    for model in plan.models:
        try:
            sessions.append(stack.enter_context(opened(model, plan.request.opening)))
        except LoraExportError as error:
            errors.append((model.label, error))
    _raise(errors, "can't be opened")
    return sessions


def _load_all(plan: BenchPlan, sessions: Sequence[Opened]) -> list[AdapterLoading]:
    found, errors = [], []
    for number, model in enumerate(plan.models):
        try:
            found += load_adapters(_contender_of(plan, number), sessions[number], plan.adapters_for(model))
        except LoraExportError as error:
            errors.append((model.label, error))
    _raise(errors, "can't load the adapters")
    return found


def _trial_runs(plan: BenchPlan, sessions: Sequence[Opened]) -> dict[Workload, list[Run]]:
    """Return the runs to time, each tried once, so that a runtime's refusal is known before the timing."""
    runs: dict[Workload, list[Run]] = {workload: [] for workload in plan.workloads}
    errors = []
    for workload in plan.workloads:
        for contender in plan.contenders:
            try:
                run = _runner(plan, sessions, contender, workload)
                run()
            except LoraExportError as error:
                errors.append((f"{contender.label}, {workload.label}", error))
                continue
            except Exception as error:  # ONNX Runtime's exceptions have no common class
                failed = BackendError(f"the runtime failed: {error}")
                errors.append((f"{contender.label}, {workload.label}", failed))
                continue
            runs[workload].append(run)
    _raise(errors, "can't be run")
    return runs


def _runner(
    plan: BenchPlan,
    sessions: Sequence[Opened],
    contender: Contender,
    workload: Workload,
    adapter: str | None = None,
) -> Run:
    number = next(n for n, model in enumerate(plan.models) if model is contender.model)
    feeds = make_feeds(contender.model, workload, plan.request.seed)
    choice = contender.choice(workload.batch) if adapter is None else {"adapter": adapter}
    return sessions[number].runner(feeds, choice)


def _raise(errors: Sequence[tuple[str, LoraExportError]], what: str) -> None:
    if len(errors) == 1:
        label, error = errors[0]
        error.message = f"{label} {what}: {error.message}"
        raise error
    if errors:
        problems = [f"{label}: {' '.join(str(error).split())}" for label, error in errors]
        raise BackendError(f"{len(errors)} of the benchmark's models or runs {what}", problems=problems)


def _time_all(plan: BenchPlan, runs: Mapping[Workload, list[Run]], progress: Say) -> Iterator[WorkloadTable]:
    left = plan.request.seconds
    for number, workload in enumerate(plan.workloads):
        waiting = len(plan.workloads) - number
        start = _OPENED + (_TIMED - _OPENED) * number / len(plan.workloads)
        span = (_TIMED - _OPENED) / len(plan.workloads)
        progress(workload.label, start)
        # Time that one workload doesn't use goes to the next ones.
        rounds = measure(
            runs[workload],
            seconds=left / waiting,
            narrow=plan.request.narrow,
            seed=plan.request.seed + number,
            tick=functools.partial(_tick, progress, workload.label, start=start, span=span),
        )
        left = max(left - rounds.seconds, 0.0)
        yield _table(plan, workload, rounds)


def _tick(progress: Say, what: str, share: float, start: float, span: float) -> None:
    progress(what, start + span * share)


def _table(plan: BenchPlan, workload: Workload, rounds: Rounds) -> WorkloadTable:
    rows = []
    for number, contender in enumerate(plan.contenders):
        latency = summarise(rounds.times_s[number])
        per_s = 1e3 / latency.median_ms
        tokens = workload.tokens * per_s if workload.sequence else None
        ratio = rounds.ratio(number) if number else None
        runs = rounds.runs_per_block[number]
        rows.append(
            Row(
                contender=contender.label,
                runs_per_block=runs,
                latency=latency,
                rows_per_s=workload.batch * per_s,
                tokens_per_s=tokens,
                ratio=ratio,
            )
        )
    return WorkloadTable(workload, rounds.count, rounds.stopped_by, tuple(rows))


def _swap_all(plan: BenchPlan, sessions: Sequence[Opened]) -> Iterator[Swapping]:
    """Yield the cost of switching adapters in the smallest workload, for each swap model."""
    names = [adapter.name for adapter in plan.request.adapters]
    workload = min(plan.workloads, key=lambda work: (work.tokens or work.batch, work.past))
    for model in plan.models:
        if model.mode != "swap" or len(names) < 2:
            continue
        contender = Contender(model.label, model)
        runs = [_runner(plan, sessions, contender, workload, adapter=name) for name in names]
        seconds = min(plan.request.seconds * _SWAPPING_SHARE, _SWAPPING_S)
        yield measure_swapping(model.label, workload, runs, seconds)
