"""Results of a benchmark, as data; the room ``reports.bench`` shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lora_export.bench.adapters import AdapterLoading, Swapping
from lora_export.bench.load_probe import Loaded
from lora_export.bench.rounds import Stop
from lora_export.bench.statistics import CONFIDENCE, METHOD, Interval, Latency
from lora_export.bench.workloads import Workload
from lora_export.machines.environment import Environment
from lora_export.untrusted.shown import shown

FORMAT = 1
KIND = "lora_export.bench"
# Share of the cores that other programs used before the benchmark ran.
_BUSY_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender with one workload.

    Attributes:
        contender: The contender's label.
        runs_per_block: Number of counted runs in a round: more for a fast model than for a slow one.
        latency: Summary of the times of runs.
        rows_per_s: Rows of the batch per second, by the median.
        tokens_per_s: New tokens per second, by the median; None if the model reads no sequence.
        ratio: Ratio of its times to the first contender's; None for the first, and if there was time for one
            round only.
    """

    contender: str
    runs_per_block: int
    latency: Latency
    rows_per_s: float
    tokens_per_s: float | None
    ratio: Interval | None


@dataclass(frozen=True)
class WorkloadTable:
    """All contenders with one workload.

    Attributes:
        workload: The workload that they ran.
        rounds: Number of rounds.
        stopped_by: ``narrow`` or ``time``.
        rows: One row for each contender; the others are compared with the first.
    """

    workload: Workload
    rounds: int
    stopped_by: Stop
    rows: tuple[Row, ...]

    @property
    def runs_per_block(self) -> str:
        """Counted runs in a round as text: ``5``, or ``1 to 20`` if the rows differ."""
        counts = {row.runs_per_block for row in self.rows}
        return " to ".join(str(count) for count in sorted({min(counts), max(counts)}))


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Facts on one model.

    Attributes:
        label: Name in the report.
        file: Path as it was given.
        kind: ``graph`` or ``engine``.
        mode: ``swap``, ``bank``, or "" without exposed LoRA.
        device: ``cpu`` or ``cuda``.
        size_bytes: Size of its files.
        sha256: SHA-256 of each file, by name.
        loaded: Cost of opening it.
    """

    label: str
    file: str
    kind: str
    mode: str
    device: str
    size_bytes: int
    sha256: Mapping[str, str]
    loaded: Loaded


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """Everything that was measured.

    Attributes:
        models: The models, in the user's order.
        tables: One table for each workload.
        adapters: Loading times of adapters.
        swapping: Cost of switching adapters, for swap models with two adapters or more.
        environment: The machine and its packages.
        load_average: Load before and after; None if unknown.
        settings: The user's choices: seconds, narrow, threads, seed, provider, cuda_graph.
        timed: Text that says what a time includes.
        notes: Notes for reading these numbers.
        method: Text on how intervals are computed.
    """

    models: tuple[ModelFacts, ...]
    tables: tuple[WorkloadTable, ...]
    adapters: tuple[AdapterLoading, ...]
    swapping: tuple[Swapping, ...]
    environment: Environment
    load_average: tuple[tuple[float, ...] | None, tuple[float, ...] | None]
    settings: Mapping[str, Any]
    timed: str
    notes: tuple[str, ...] = ()
    method: str = field(default=METHOD)

    @property
    def was_busy(self) -> bool:
        """True if other programs used the processor, by the load before and the excess load after."""
        before, after = (load[0] if load else 0.0 for load in self.load_average)
        cores = self.environment.cpu_quota or self.environment.cores
        return before > _BUSY_SHARE * cores or after > cores + 1

    @property
    def stopped_by(self) -> str:
        """A sentence on what ended the measurement."""
        narrow = sum(table.stopped_by == "narrow" for table in self.tables)
        width = f"{self.settings['narrow']:.1%}"
        if narrow == len(self.tables):
            return f"stopped because every interval was narrower than {width}"
        if narrow:
            parts = f"{narrow} of {len(self.tables)} workloads"
            return f"stopped at intervals below {width} in {parts}, by the time budget in the others"
        return f"stopped by the time budget of {self.settings['seconds']:g} s, before intervals of {width}"

    def __str__(self) -> str:
        """Return a line for each workload and contender."""
        return "\n".join(
            f"{table.workload.label}  {shown(row.contender)}  {row.latency.median_ms:.4g} ms"
            + (f"  {row.ratio.value:.3g} ×" if row.ratio else "")
            for table in self.tables
            for row in table.rows
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; units are part of the keys."""
        found = {
            "kind": KIND,
            "format": FORMAT,
            "confidence": CONFIDENCE,
            "stopped_by": self.stopped_by,
            "was_busy": self.was_busy,
        }
        return found | asdict(self)
