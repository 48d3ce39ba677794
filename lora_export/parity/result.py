"""Results of a parity check, as data: verdicts with numbers and limits, metrics, where the error begins.

Nothing here computes or prints: the reports (`lora_export.reports.parity`) read it, `as_dict` is the JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FORMAT = 1
# Adapters of one row with their weights; () is the base. Hashable, as results are kept by state.
State = tuple[tuple[str, float], ...]
BASE: State = ()
# State of a verdict that belongs to no single state.
ANY = "everything"
Kind = Literal["finite", "error", "effect", "tokens", "law"]


def state_of(adapter: str) -> State:
    """Return the state in which one adapter is active with its full strength."""
    return ((adapter, 1.0),)


def state_name(state: State) -> str:
    """Return the name of a state in reports: ``no adapter``, ``json``, ``0.7 json + 0.3 pirate``."""
    if not state:
        return "no adapter"
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in state)


@dataclass(frozen=True)
class Verdict:
    """Result of one check.

    Attributes:
        kind: ``finite`` (NaN, Inf), ``error`` (distance from the reference), ``effect`` (the adapter is
            applied), ``tokens`` (greedy generation) or ``law``.
        name: Short text on what was checked: ``relative error``, ``A→B→A``.
        state: `state_name` of the active adapters.
        output: Name of the output, of a group of outputs (``present.*``), or "".
        value: Measured value; NaN if it could not be computed.
        limit: Largest value that passes; Inf if nothing was proven, see ``counted``.
        passed: True if it passes.
        why: The reason for the limit, or what went wrong; one line.
        counted: True if it proves something. False for an adapter without effect, which is only reported.
    """

    kind: Kind
    name: str
    state: str
    output: str
    value: float
    limit: float
    passed: bool
    why: str = ""
    counted: bool = True


@dataclass(frozen=True)
class OutputMetrics:
    """Distance of one output of the candidate from the reference's, over all feeds of a state.

    Attributes:
        state: `state_name` of the state.
        output: Name of the output.
        max_abs: Largest absolute difference.
        mean_abs: Mean absolute difference.
        relative: ‖candidate − reference‖ / ‖reference‖.
        worst_position: ‖difference‖ of the worst vector along the last axis, relative to the mean vector's
            norm.
        cosine: Cosine of candidate and reference, over all values.
        own_relative: ``relative`` of PyTorch itself, run in the candidate's dtype; None if it was not run.
        effect: ‖with − without‖ / ‖with‖, the adapter's effect on the reference; None for the base.
        error_over_effect: ‖candidate − reference‖ / ‖with − without‖; None for the base or without effect.
        kl: Mean Kullback-Leibler divergence KL(reference‖candidate) in nats, of logits.
        top1: Share of positions whose largest logit is the same.
        top5: Mean share of the five largest logits that are the same.
        positions: Number of compared vectors along the last axis, without padding.
    """

    state: str
    output: str
    max_abs: float
    mean_abs: float
    relative: float
    worst_position: float
    cosine: float
    own_relative: float | None = None
    effect: float | None = None
    error_over_effect: float | None = None
    kl: float | None = None
    top1: float | None = None
    top5: float | None = None
    positions: int = 0


@dataclass(frozen=True)
class ModuleRow:
    """One target module in the table of where the error begins.

    Attributes:
        module: Path in the base.
        error_in: Relative error of its input; NaN if the graph does not show it.
        error_out: Relative error of its output.
        own_out: Relative error of its output in PyTorch in the candidate's dtype; NaN if that was not run.
        effect: ‖with − without‖ / ‖with‖ of its output.
        jumped: True if the error jumps here.
    """

    module: str
    error_in: float
    error_out: float
    own_out: float
    effect: float
    jumped: bool = False


@dataclass(frozen=True)
class Localisation:
    """The module at which the error begins.

    Attributes:
        state: `state_name` of the examined run.
        module: The first module whose error jumps; "" if none does.
        rows: The examined modules in the order of computation.
        looked_at: Number of modules that were run with their outputs exposed.
        of: Number of modules in the graph.
        note: Text on modules that were not found in the graph, or on the reason for a missing table.
    """

    state: str
    module: str
    rows: tuple[ModuleRow, ...] = ()
    looked_at: int = 0
    of: int = 0
    note: str = ""


@dataclass(frozen=True)
class Scatter:
    """Up to a few thousand values of one output, reference against candidate, for a plot."""

    state: str
    output: str
    reference: tuple[float, ...]
    candidate: tuple[float, ...]


@dataclass(frozen=True)
class Generated:
    """Greedy tokens of one prompt.

    Attributes:
        state: `state_name` of the state.
        prompt: Token ids.
        reference: Tokens that the reference chose.
        candidate: Tokens that the candidate chose.
        equal: Number of equal tokens before the first difference.
        tie: True if the reference itself can hardly tell the first two different tokens apart.
    """

    state: str
    prompt: tuple[int, ...]
    reference: tuple[int, ...]
    candidate: tuple[int, ...]
    equal: int
    tie: bool = False


@dataclass(frozen=True)
class ParityReport:
    """Result of a parity check.

    Attributes:
        reference: Facts on the reference: ``kind`` (checkpoint, onnx, saved), ``path``, ``dtype``.
        candidate: Facts on the candidate: ``path``, ``mode`` (plain, merged, swap, bank), ``runtime``,
            ``provider``, ``dtype``, ``sha256``.
        adapters: Facts on each adapter: ``name``, ``sha256``, ``modules`` (their number), ``scaling``
            (smallest and largest).
        feeds: Facts on each feed: ``label`` and ``shapes`` (input → list of sizes).
        tolerance: ``auto`` or ``rtol,atol`` as given.
        verdicts: Results of all checks.
        metrics: Numbers for each state and output.
        localisation: Module at which the error begins; None if all passed or no search was possible.
        generated: Greedy tokens, if they were requested.
        scatter: Values for a plot.
        notes: Notes for the user that are not verdicts.
        environment: Versions of packages, processor, provider.
        seconds: Time that the check took.
    """

    reference: Mapping[str, Any]
    candidate: Mapping[str, Any]
    adapters: tuple[Mapping[str, Any], ...]
    feeds: tuple[Mapping[str, Any], ...]
    tolerance: str
    verdicts: tuple[Verdict, ...]
    metrics: tuple[OutputMetrics, ...]
    localisation: Localisation | None = None
    generated: tuple[Generated, ...] = ()
    scatter: tuple[Scatter, ...] = ()
    notes: tuple[str, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    format: int = FORMAT

    @property
    def failed(self) -> tuple[Verdict, ...]:
        """The verdicts that did not pass."""
        return tuple(verdict for verdict in self.verdicts if not verdict.passed)

    @property
    def passed(self) -> bool:
        """True if everything passed and something was proven."""
        return not self.failed and any(verdict.counted for verdict in self.verdicts)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; NaN and infinities are the texts ``nan``, ``inf``, ``-inf``."""
        data = {"passed": self.passed, **asdict(self)}
        return {key: _plain(value) for key, value in data.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
