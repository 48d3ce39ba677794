"""What a benchmark found, as data; ``reports.bench_*`` show it."""

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

FORMAT = 1
KIND = "lora_export.bench"
# Of the cores, wanted by others before anything of ours ran.
_BUSY_SHARE = 0.5


@dataclass(frozen=True)
class Row:
    """One contender with one workload.

    Attributes:
        contender: Its label.
        runs_per_block: Its counted runs in a round: more of a fast model than of a slow one.
        latency: How long runs took.
        rows_per_s: Rows of the batch by the median.
        tokens_per_s: New tokens by the median; None where the model reads no sequence.
        ratio: How much longer it takes than the first contender; None for the first, and where one round
            was all there was time for.
    """

    contender: str
    runs_per_block: int
    latency: Latency
    rows_per_s: float
    tokens_per_s: float | None
    ratio: Interval | None


@dataclass(frozen=True)
class Table:
    """All contenders with one workload.

    Attributes:
        workload: What they ran.
        rounds: How many rounds.
        stopped_by: ``narrow`` or ``time``.
        rows: One for each contender; the first is what the others are compared with.
    """

    workload: Workload
    rounds: int
    stopped_by: Stop
    rows: tuple[Row, ...]

    @property
    def runs_per_block(self) -> str:
        """The rows' counted runs in a round, for people: ``5``, or ``1 to 20`` where they differ."""
        counts = {row.runs_per_block for row in self.rows}
        return " to ".join(str(count) for count in sorted({min(counts), max(counts)}))


@dataclass(frozen=True)
class ModelFacts:
    """One model.

    Attributes:
        label: What the report calls it.
        file: Its path, as it was given.
        kind: ``graph`` or ``engine``.
        mode: ``swap``, ``bank``, or "" without exposed LoRA.
        device: ``cpu`` or ``cuda``.
        size_bytes: Of its files.
        sha256: Of each file, by name.
        loaded: What opening it costs.
    """

    label: str
    file: str
    kind: str
    mode: str
    device: str
    size_bytes: int
    sha256: Mapping[str, str]
    loaded: Loaded


@dataclass(frozen=True)
class BenchReport:
    """Everything that was measured.

    Attributes:
        models: The models, in the user's order.
        tables: One for each workload.
        adapters: Loading times.
        swapping: Of swap models with two adapters or more.
        environment: The machine.
        load_average: Before and after; None where unknown.
        settings: What the user chose: seconds, narrow, threads, seed, provider, cuda_graph.
        timed: What a time is the time of.
        notes: What is to be known when these numbers are read.
    """

    models: tuple[ModelFacts, ...]
    tables: tuple[Table, ...]
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
        """Whether other programs wanted the processor, by the load before and, beyond its cores, after."""
        before, after = (load[0] if load else 0.0 for load in self.load_average)
        cores = self.environment.cpu_quota or self.environment.cores
        return before > _BUSY_SHARE * cores or after > cores + 1

    @property
    def stopped_by(self) -> str:
        """In a sentence, what ended the measurement."""
        narrow = sum(table.stopped_by == "narrow" for table in self.tables)
        wanted = f"{self.settings['narrow']:.1%}"
        if narrow == len(self.tables):
            return f"stopped because every interval was narrower than {wanted}"
        if narrow:
            parts = f"{narrow} of {len(self.tables)} workloads"
            return f"stopped at intervals below {wanted} in {parts}, by the time budget in the others"
        return f"stopped by the time budget of {self.settings['seconds']:g} s, before intervals of {wanted}"

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON has it; every unit is in its key's name."""
        found = {
            "kind": KIND,
            "format": FORMAT,
            "confidence": CONFIDENCE,
            "stopped_by": self.stopped_by,
            "was_busy": self.was_busy,
        }
        return found | asdict(self)
