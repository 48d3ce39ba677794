"""Plan a benchmark: check everything that can be known before a model is opened."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_export.bench.adapter_checks import adapter_problems
from lora_export.bench.contenders import AdapterChoice, Contender, plan_contenders
from lora_export.bench.model import BenchModel, label_models, read_bench_model
from lora_export.bench.opened import Opening
from lora_export.bench.outputs import overlap_problems
from lora_export.bench.workloads import (
    Workload,
    choose_sizes,
    has_cache,
    has_sequence,
    plan_workloads,
    shape_problems,
)
from lora_export.errors import LoraExportError, install_line

# More threads than any machine has cores are a typing mistake, and ONNX Runtime would start them all.
_MOST_THREADS = 4096


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """The user's request.

    Attributes:
        models: Paths of the models; the others are compared with the first.
        adapters: Named adapters.
        batches: Batch sizes.
        sequences: Tokens of a row; None: the usual number, see `workloads.choose_sizes`.
        pasts: Tokens in the cache when one is decoded; empty: as `sequences`.
        opening: Options for opening the models.
        seconds: Time budget of the timed runs.
        narrow: Width of a ratio's interval, as a share of the ratio, at which timing stops.
        seed: Seed of feeds and orders.
        shapes: Sizes that graphs leave open: of a dimension, or all of an input.
    """

    models: tuple[Path, ...]
    adapters: tuple[AdapterChoice, ...] = ()
    batches: tuple[int, ...] = (1,)
    sequences: tuple[int, ...] | None = None
    pasts: tuple[int, ...] = ()
    opening: Opening = field(default_factory=Opening)
    seconds: float = 60.0
    narrow: float = 0.02
    seed: int = 0
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BenchPlan:
    """The checked plan of a benchmark.

    Attributes:
        request: The user's request.
        models: The models as their files describe them.
        contenders: The contenders to time; the others are compared with the first.
        workloads: The workloads that they run.
        notes: Notes on options without effect and on sizes that are smaller than usual.
    """

    request: BenchRequest
    models: tuple[BenchModel, ...]
    contenders: tuple[Contender, ...]
    workloads: tuple[Workload, ...]
    notes: tuple[str, ...]

    def adapters_for(self, model: BenchModel) -> tuple[AdapterChoice, ...]:
        """Return the adapters to load into a model."""
        return self.request.adapters if model.takes_files else ()


def plan_bench(
    request: BenchRequest, already: Sequence[str] = (), outputs: Mapping[str, Path] | None = None
) -> BenchPlan:
    """Read the models, check the request, and return the plan.

    Args:
        request: The user's request.
        already: Problems that were found before.
        outputs: Option with its value → the file that it writes, which must not be a timed file.

    Raises:
        LoraExportError: The request can't be carried out; all problems are listed.
    """
    problems = [*already, *_number_problems(request)]
    models, unreadable = _read_all(request.models, request.shapes)
    problems += [
        *unreadable,
        *_provider_problems(request.opening, models),
        *overlap_problems(outputs or {}, request.models, models, request.adapters),
    ]
    if len(models) < len(request.models):  # the other checks need all models
        raise _refused(problems)
    first = models[0]
    problems += [*_input_problems(models), *adapter_problems(request.adapters, models)]
    sequences, pasts, smaller = choose_sizes(models, request.sequences, request.pasts)
    workloads = plan_workloads(first, request.batches, sequences, pasts)
    if request.pasts and not has_cache(first):
        problems.append(f"--past: {first.label} has no key-value cache (omit it)")
    if not problems:
        problems += _shape_problems(models, workloads)
    if problems:
        raise _refused(problems)
    contenders = plan_contenders(models, request.adapters)
    return BenchPlan(
        request=request,
        models=tuple(models),
        contenders=contenders,
        workloads=workloads,
        notes=(*_notes(request, models), *smaller),
    )


def _refused(problems: Sequence[str]) -> LoraExportError:
    count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
    return LoraExportError(f"the benchmark can't be run: {count}", "fix the listed problems", problems)


def _read_all(
    paths: Iterable[Path], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[list[BenchModel], list[str]]:
    models, problems = [], []
    for path in paths:
        try:
            models.append(read_bench_model(path, shapes))
        except LoraExportError as error:
            problems.append(_one_line(error))
    return label_models(models), problems


def _one_line(error: LoraExportError) -> str:
    more = f": {'; '.join(error.problems)}" if error.problems else ""
    hint = f" ({error.hint})" if error.hint else ""
    return f"{error.message}{more}{hint}"


def _number_problems(request: BenchRequest) -> list[str]:
    sequences = (1,) if request.sequences is None else request.sequences
    limits = [("--batch", request.batches, 1), ("--sequence", sequences, 1), ("--past", request.pasts, 0)]
    problems = [
        f"{flag} {value}: give at least {least}"
        for flag, values, least in limits
        for value in values
        if value < least
    ]
    problems += [f"{flag} names no size" for flag, values, least in limits if least and not values]
    problems += [
        f"{flag} {value:g}: give a number above 0"
        for flag, value in (("--seconds", request.seconds), ("--narrow", request.narrow))
        if not (value > 0 and math.isfinite(value))
    ]
    threads = request.opening.threads
    if threads is not None and not 1 <= threads <= _MOST_THREADS:
        problems.append(f"--threads {threads}: give 1 to {_MOST_THREADS}")
    if request.seed < 0:
        problems.append(f"--seed {request.seed}: give at least 0")
    if request.opening.cuda_graph and request.opening.provider == "cpu":
        problems.append("--cuda-graph needs --provider cuda")
    return problems


def _provider_problems(opening: Opening, models: Sequence[BenchModel]) -> list[str]:
    """Return the reasons why graphs can't run with the provider, as far as the installed packages tell."""
    if not any(model.kind == "graph" for model in models):
        return []
    if importlib.util.find_spec("onnxruntime") is None:
        extra = "gpu" if opening.provider == "cuda" else "cpu"
        return [f"graphs need onnxruntime, which is not installed ({install_line(extra)})"]
    if opening.provider == "cpu":
        return []
    import onnxruntime as ort

    if "CUDAExecutionProvider" in ort.get_available_providers():
        return []
    return [
        f"--provider cuda: this onnxruntime ({ort.__version__}) has no CUDA provider "
        f"(pip uninstall onnxruntime; {install_line('gpu')})"
    ]


def _input_problems(models: Sequence[BenchModel]) -> list[str]:
    """Return how the inputs of models differ from the first model's; dtypes of floats may differ."""
    first, problems = models[0], []
    expected = {port.name: port for port in first.inputs}
    for model in models[1:]:
        own = {port.name: port for port in model.inputs}
        if missing := _some(name for name in expected if name not in own):
            problems.append(f"{model.label} lacks inputs of {first.label}: {missing}")
        if extra := _some(name for name in own if name not in expected):
            problems.append(f"{model.label} has inputs that {first.label} lacks: {extra}")
        for name in own.keys() & expected.keys():
            if len(own[name].dims) != len(expected[name].dims):
                problems.append(
                    f"{name} has {len(own[name].dims)} axes in {model.label}, "
                    f"{len(expected[name].dims)} in {first.label}"
                )
    return problems


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    shown = ", ".join(listed[:3])
    return f"{shown} and {len(listed) - 3} more" if len(listed) > 3 else shown


def _shape_problems(models: Sequence[BenchModel], workloads: Sequence[Workload]) -> list[str]:
    found: dict[str, None] = {}  # a set in order: several workloads have the same problem
    for model in models:
        for workload in workloads:
            for problem in shape_problems(model, workload):
                found[f"{model.label}: {problem}"] = None
    return list(found)


def _notes(request: BenchRequest, models: Sequence[BenchModel]) -> Iterable[str]:
    if not has_cache(models[0]) and not has_sequence(models[0]):
        yield f"{models[0].label} reads no sequence: --sequence has no effect"
    if request.opening.threads is not None and any(model.kind == "engine" for model in models):
        yield "--threads has no effect on engines"
    named = [adapter.name for adapter in request.adapters if adapter.path is not None]
    for model in models:
        if named and model.mode == "bank" and not model.takes_files:
            yield f"{model.label} runs its own {', '.join(named)}; nothing was loaded into it"
