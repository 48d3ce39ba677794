"""Write a benchmark as text: a row for each contender and workload, loading, memory, adapters, machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_export.bench.plan import BenchPlan
from lora_export.bench.result import BenchReport, ModelFacts, Row, WorkloadTable
from lora_export.bench.statistics import Interval
from lora_export.reports.adapter.to_text import human_bytes
from lora_export.untrusted.shown import shown_lines

HEADINGS = (
    "phase",
    "batch×sequence",
    "model",
    "median ms",
    "p95",
    "spread",
    "runs",
    "rows/s",
    "tokens/s",
    "ratio [95 % interval]",
)
MODEL_HEADINGS = ("model", "files", "opened in s", "again", "memory opened", "after runs", "peak", "GPU")
# Number of columns of `HEADINGS`, from the left, that are words; the others are numbers.
WORDS = 3
_NONE = "–"


def report_lines(report: BenchReport) -> list[str]:
    """Return the whole report."""
    return [
        *aligned([HEADINGS, *rows(report)], WORDS),
        "",
        *aligned([MODEL_HEADINGS, *map(_model_cells, report.models)], 1),
        *adapter_lines(report),
        "",
        *closing_lines(report),
    ]


def report_text(report: BenchReport) -> str:
    """Return the lines for a file, with control characters written out."""
    return "\n".join(shown_lines(report_lines(report))) + "\n"


def plan_lines(plan: BenchPlan) -> list[str]:
    """Return the lines that ``--dry-run`` prints."""
    request, count = plan.request, len(plan.contenders)
    lines = [
        f"{model.label}: {' '.join(filter(None, [model.mode, model.kind]))}, "
        f"{human_bytes(model.size_bytes)}, on {request.opening.device_of(model)}"
        for model in plan.models
    ]
    works = [work.label for work in plan.workloads]
    # A contender alone has no ratio, so the measurement ends by its own time's interval.
    known = "its time's interval" if count == 1 else "the ratio's interval"
    known = "every ratio's interval" if count > 2 else known
    lines += [
        "would time one contender:"
        if count == 1
        else f"would time {count} contenders, compared with the first:",
        *(f"  {contender.label}" for contender in plan.contenders),
        f"in {'one workload' if len(works) == 1 else f'{len(works)} workloads'}: {', '.join(works)}",
        f"until {known} is narrower than {request.narrow:.1%}, or for {request.seconds:g} s",
    ]
    return lines + [f"note: {note}" for note in plan.notes]


def rows(report: BenchReport) -> list[tuple[str, ...]]:
    """Return the cells of the large table."""
    return [_cells(table, row) for table in report.tables for row in table.rows]


def model_rows(report: BenchReport) -> list[tuple[str, ...]]:
    """Return the cells of the table of models."""
    return [_model_cells(model) for model in report.models]


def adapter_lines(report: BenchReport) -> list[str]:
    """Return the costs of adapters."""
    lines = [
        f"adapter {loading.adapter} into {loading.model}: ready in {_ms(loading.median_ms)} ms "
        f"(median of {loading.loadings})"
        for loading in report.adapters
    ]
    lines += [
        f"{swap.adapters} adapters in turn in {swap.model} ({swap.workload.label}): {_ms(swap.other_ms)} ms, "
        f"one again {_ms(swap.same_ms)} ms; a change adds {_added(swap.added_ms)} ms ({swap.cycles} cycles)"
        for swap in report.swapping
    ]
    return ["", *lines] if lines else []


def closing_lines(report: BenchReport) -> list[str]:
    """Return the end of the measurement, the meaning of the numbers, the machine, and notes."""
    machine, settings = report.environment, report.settings
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    quota = f", {machine.cpu_quota:g} of them by quota" if machine.cpu_quota else ""
    threads = settings["threads"] or "default"
    before, after = (_load(value) for value in report.load_average)
    lines = [
        report.stopped_by,
        f"timed     {report.timed}",
        "spread    interquartile range; ratio: of times to the first model's, below 1 is faster",
        f"interval  {report.method}",
        "          of the models as opened in this run; MODEL --against MODEL shows what that leaves out",
        "opened    each model alone in a process, its files in the system's cache; memory is what it added",
        f"machine   {machine.cpu}, {machine.cores} cores{quota}; {threads} threads; "
        f"turbo {machine.turbo}, governor {machine.governor}",
        *(f"GPU       {gpu}" for gpu in machine.gpus),
        f"software  {machine.system}, Python {machine.python}, {packages}",
        f"load      {before} before, {after} after (1, 5, 15 minutes)",
    ]
    problems = [(model.label, model.loaded.problem) for model in report.models if model.loaded.problem]
    lines += [f"note: {label}: opening it alone was not measured: {problem}" for label, problem in problems]
    whose = {model.loaded.gpu_whose for model in report.models} - {""}
    lines += [f"note: GPU memory is {text}, CUDA's own included" for text in sorted(whose)]
    if report.was_busy:
        lines.append(
            "note: other programs kept the processor busy: times are longer, intervals wider than alone"
        )
    return lines + [f"note: {note}" for note in report.notes]


def aligned(table: Sequence[Sequence[str]], left: int) -> list[str]:
    """Return rows of cells as lines: the first columns to the left, the others to the right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def ratio_text(ratio: Interval | None) -> str:
    """Return ``1.052 [1.046, 1.058]``; a dash for None."""
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]" if ratio else _NONE


def _cells(table: WorkloadTable, row: Row) -> tuple[str, ...]:
    latency = row.latency
    is_first = row is table.rows[0]
    return (
        table.workload.phase,
        table.workload.size,
        row.contender,
        _ms(latency.median_ms),
        _ms(latency.p95_ms),
        _ms(latency.iqr_ms),
        str(latency.count),
        _rate(row.rows_per_s),
        _rate(row.tokens_per_s) if row.tokens_per_s is not None else _NONE,
        "1" if is_first else ratio_text(row.ratio),
    )


def _model_cells(model: ModelFacts) -> tuple[str, ...]:
    loaded = model.loaded
    return (
        model.label,
        human_bytes(model.size_bytes),
        *(f"{value:.2f}" if value is not None else _NONE for value in (loaded.first_s, loaded.again_s)),
        *_bytes(loaded.loaded_bytes, loaded.running_bytes, loaded.peak_bytes, loaded.gpu_running_bytes),
    )


def _bytes(*sizes: int | None) -> Iterator[str]:
    return (human_bytes(size) if size is not None else _NONE for size in sizes)


def _ms(value: float) -> str:
    """Return a time with at least three significant digits, but none below a microsecond."""
    return f"{value:.3f}" if value < 10 else f"{value:.2f}" if value < 100 else f"{value:.1f}"


def _added(interval: Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _load(values: tuple[float, ...] | None) -> str:
    return " ".join(f"{value:g}" for value in values) if values else "unknown"
