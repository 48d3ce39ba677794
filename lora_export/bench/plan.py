"""What a benchmark is going to do, with everything checked that can be known before a model is opened."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_export.bench.contenders import AdapterChoice, Contender, plan_contenders
from lora_export.bench.models import BenchModel, label_models, read_model
from lora_export.bench.opened import Opening
from lora_export.bench.workloads import Workload, has_cache, has_sequence, plan_workloads, shape_problems
from lora_export.errors import LoraExportError
from lora_export.formats import load_adapter


@dataclass(frozen=True)
class Wish:
    """What the user asks for.

    Attributes:
        models: The first is what the others are compared with.
        adapters: Named adapters.
        batches: Rows.
        sequences: Tokens of a row.
        pasts: Tokens in the cache when one is decoded; empty: as `sequences`.
        opening: How models are opened.
        seconds: Time for the timed runs.
        narrow: Width of a ratio's interval, as a share of it, at which enough is known.
        seed: Of feeds and orders.
    """

    models: tuple[Path, ...]
    adapters: tuple[AdapterChoice, ...] = ()
    batches: tuple[int, ...] = (1,)
    sequences: tuple[int, ...] = (128,)
    pasts: tuple[int, ...] = ()
    opening: Opening = field(default_factory=Opening)
    seconds: float = 60.0
    narrow: float = 0.02
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """What is going to be done.

    Attributes:
        wish: What was asked for.
        models: What the files say of themselves.
        contenders: Who is timed; the first is what the others are compared with.
        workloads: What they run.
        notes: What of the wish has no effect.
    """

    wish: Wish
    models: tuple[BenchModel, ...]
    contenders: tuple[Contender, ...]
    workloads: tuple[Workload, ...]
    notes: tuple[str, ...]

    def adapters_for(self, model: BenchModel) -> tuple[AdapterChoice, ...]:
        """Return the adapters that are loaded into a model."""
        return self.wish.adapters if model.takes_files else ()


def plan_bench(wish: Wish, already: Sequence[str] = ()) -> Plan:
    """Read the models and check the wish.

    Args:
        wish: What the user asks for.
        already: What was found wrong before.

    Raises:
        LoraExportError: Something of it can't be done; all that was found is listed.
    """
    problems = [*already, *_number_problems(wish, already)]
    models, unreadable = _read_all(wish.models)
    problems += unreadable
    if problems or len(models) < len(wish.models):
        raise _refused(problems)
    first = models[0]
    problems += [*_input_problems(models), *_adapter_problems(wish.adapters, models)]
    workloads = plan_workloads(first, wish.batches, wish.sequences, wish.pasts)
    if wish.pasts and not has_cache(first):
        problems.append(f"--past: {first.label} has no key-value cache")
    if not problems:
        problems += _shape_problems(models, workloads)
    if problems:
        raise _refused(problems)
    contenders = plan_contenders(models, wish.adapters)
    return Plan(wish, tuple(models), contenders, workloads, tuple(_notes(wish, models)))


def _refused(problems: Sequence[str]) -> LoraExportError:
    count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
    return LoraExportError(f"the benchmark can't be run: {count}", "see: lora-export bench --help", problems)


def _read_all(paths: Iterable[Path]) -> tuple[list[BenchModel], list[str]]:
    models, problems = [], []
    for path in paths:
        try:
            models.append(read_model(path))
        except LoraExportError as error:
            problems.append(_one_line(error))
    return label_models(models), problems


def _one_line(error: LoraExportError) -> str:
    more = f": {'; '.join(error.problems)}" if error.problems else ""
    hint = f" ({error.hint})" if error.hint else ""
    return f"{error.message}{more}{hint}"


def _number_problems(wish: Wish, already: Sequence[str]) -> list[str]:
    wanted = [("--batch", wish.batches, 1), ("--sequence", wish.sequences, 1), ("--past", wish.pasts, 0)]
    problems = [
        f"{flag} {value}: wanted at least {least}"
        for flag, values, least in wanted
        for value in values
        if value < least
    ]
    problems += [
        f"{flag} names no size"
        for flag, values, least in wanted
        if least and not values and not any(known.startswith(flag) for known in already)
    ]
    if not wish.seconds > 0:
        problems.append(f"--seconds {wish.seconds:g}: wanted more than 0")
    if not wish.narrow > 0:
        problems.append(f"--narrow {wish.narrow:g}: wanted more than 0")
    threads = wish.opening.threads
    if threads is not None and threads < 1:
        problems.append(f"--threads {threads}: wanted at least 1")
    if wish.opening.cuda_graph and wish.opening.provider == "cpu":
        problems.append("--cuda-graph needs --provider cuda")
    return problems


def _input_problems(models: Sequence[BenchModel]) -> list[str]:
    """Return how models differ from the first in what they are fed; dtypes of floats may differ."""
    first, problems = models[0], []
    wanted = {port.name: port for port in first.inputs}
    for model in models[1:]:
        own = {port.name: port for port in model.inputs}
        if missing := _some(name for name in wanted if name not in own):
            problems.append(f"{model.label} lacks inputs of {first.label}: {missing}")
        if extra := _some(name for name in own if name not in wanted):
            problems.append(f"{model.label} has inputs that {first.label} lacks: {extra}")
        for name in own.keys() & wanted.keys():
            if len(own[name].dims) != len(wanted[name].dims):
                problems.append(
                    f"{name} has {len(own[name].dims)} axes in {model.label}, "
                    f"{len(wanted[name].dims)} in {first.label}"
                )
    return problems


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    shown = ", ".join(listed[:3])
    return f"{shown} and {len(listed) - 3} more" if len(listed) > 3 else shown


def _adapter_problems(adapters: Sequence[AdapterChoice], models: Sequence[BenchModel]) -> list[str]:
    names = [adapter.name for adapter in adapters]
    problems = [f"--adapter {name}: named twice" for name in sorted({n for n in names if names.count(n) > 1})]
    if adapters and not any(model.mode for model in models):
        listed = ", ".join(model.label for model in models)
        return [*problems, f"--adapter: {listed} takes no adapter (merged, or without exposed LoRA)"]
    for adapter in adapters:
        if not adapter.name:
            problems.append(f"--adapter ={adapter.path}: wanted NAME=PATH")
            continue
        problems += [
            f"--adapter {adapter.name}: {model.label} needs its file: {adapter.name}=PATH"
            for model in models
            if adapter.path is None and model.mode and adapter.name not in model.slots
        ]
        problems += [
            f"--adapter {adapter.name}: {model.label} has no such slot; it has: {', '.join(model.slots)}"
            for model in models
            if model.mode == "bank"
            and not model.takes_files
            and adapter.path is not None
            and adapter.name not in model.slots
        ]
        if adapter.path is not None:
            try:
                load_adapter(adapter.path)
            except LoraExportError as error:
                problems.append(f"--adapter {adapter.name}: {_one_line(error)}")
    return problems


def _shape_problems(models: Sequence[BenchModel], workloads: Sequence[Workload]) -> list[str]:
    found: dict[str, None] = {}  # a set in order: several workloads have the same problem
    for model in models:
        for workload in workloads:
            for problem in shape_problems(model, workload):
                found[f"{model.label}: {problem}"] = None
    return list(found)


def _notes(wish: Wish, models: Sequence[BenchModel]) -> Iterable[str]:
    if not has_cache(models[0]) and not has_sequence(models[0]):
        yield f"{models[0].label} reads no sequence: --sequence has no effect"
    if wish.opening.threads is not None and any(model.kind == "engine" for model in models):
        yield "--threads has no effect on engines"
    named = [adapter.name for adapter in wish.adapters if adapter.path is not None]
    for model in models:
        if named and model.mode == "bank" and not model.takes_files:
            yield f"{model.label} runs its own {', '.join(named)}; nothing was loaded into it"
