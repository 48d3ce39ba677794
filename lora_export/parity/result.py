"""Results of a parity check, as data: verdicts with numbers and limits, metrics, where the error begins.

Nothing here computes: the reports (`lora_export.reports.parity`) read it. `ParityReport.as_dict` is the JSON,
for which there is a schema beside them, and `ParityReport.from_json` reads it again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from lora_export.errors import LoraExportError
from lora_export.untrusted.fields import (
    AtLeast,
    Axes,
    Count,
    FieldError,
    Keys,
    Later,
    Number,
    WholeMatch,
    check_plain,
    from_plain,
)
from lora_export.untrusted.shown import limited

FORMAT = 1
# Adapters of one row with their weights; () is the base. Hashable, as results are kept by state.
State = tuple[tuple[str, float], ...]
BASE: State = ()
# State of a verdict that belongs to no single state.
ANY = "everything"
Kind = Literal["finite", "error", "effect", "tokens", "law"]
Name = Annotated[str, WholeMatch(".+", "a text that is not empty")]
Sha256 = Annotated[str, WholeMatch("([0-9a-f]{64})?", "64 hexadecimal digits, or an empty text")]
_REFERENCE = Keys(
    {"kind": Literal["checkpoint", "onnx", "saved"], "path": str, "dtype": str}, {"sha256": Sha256}
)
_CANDIDATE = Keys(
    {
        "path": str,
        "mode": Literal["plain", "merged", "swap", "bank"],
        "runtime": str,
        "provider": str,
        "dtype": str,
        "sha256": Sha256,
    }
)
_SCALING = Annotated[list[Number], Axes(0, 2)]
_ADAPTER = Keys({"name": Name, "sha256": Sha256, "modules": Count, "scaling": _SCALING})
_FEED = Keys({"label": Name, "shapes": Mapping[str, list[Count]]}, {"sha256": Sha256})
_HINT = "write a report: the same check without --baseline, with --report FILE.json"
# A damaged report can break a rule once for every verdict.
_NAMED = 20


def state_of(adapter: str) -> State:
    """Return the state in which one adapter is active with its full strength."""
    return ((adapter, 1.0),)


def state_name(state: State) -> str:
    """Return the name of a state in reports: ``no adapter``, ``json``, ``0.7 json + 0.3 pirate``."""
    if not state:
        return "no adapter"
    return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in state)


@dataclass(frozen=True, kw_only=True)
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
    name: Name
    state: Name
    output: str
    value: Number
    limit: Number
    passed: bool
    why: str = ""
    counted: bool = True


@dataclass(frozen=True, kw_only=True)
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
        applied: Share of the adapter's effect that is there: 1 all of it, 0 none, 2 twice; None for the base
            or without effect.
        kl: Mean Kullback-Leibler divergence KL(reference‖candidate) in nats, of logits.
        top1: Share of positions whose largest logit is the same.
        top5: Mean share of the five largest logits that are the same.
        positions: Number of compared vectors along the last axis, without padding.
    """

    state: Name
    output: Name
    max_abs: Number
    mean_abs: Number
    relative: Number
    worst_position: Number
    cosine: Number
    own_relative: Number | None = None
    effect: Number | None = None
    error_over_effect: Number | None = None
    kl: Number | None = None
    top1: Number | None = None
    top5: Number | None = None
    positions: Annotated[Count, Later()] = 0
    applied: Annotated[Number | None, Later()] = None


@dataclass(frozen=True, kw_only=True)
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

    module: Name
    error_in: Number
    error_out: Number
    own_out: Number
    effect: Number
    jumped: bool = False


@dataclass(frozen=True, kw_only=True)
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

    state: Name
    module: str
    rows: tuple[ModuleRow, ...] = ()
    looked_at: Count = 0
    of: Count = 0
    note: str = ""


@dataclass(frozen=True)
class Scatter:
    """Up to a few thousand values of one output, reference against candidate, for a plot."""

    state: Name
    output: str
    reference: tuple[Number, ...]
    candidate: tuple[Number, ...]


@dataclass(frozen=True, kw_only=True)
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

    state: Name
    prompt: tuple[Count, ...]
    reference: tuple[Count, ...]
    candidate: tuple[Count, ...]
    equal: Count
    tie: bool = False


@dataclass(frozen=True, kw_only=True)
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

    reference: Annotated[Mapping[str, Any], _REFERENCE]
    candidate: Annotated[Mapping[str, Any], _CANDIDATE]
    adapters: tuple[Annotated[Mapping[str, Any], _ADAPTER], ...]
    feeds: tuple[Annotated[Mapping[str, Any], _FEED], ...]
    tolerance: Name
    verdicts: tuple[Verdict, ...]
    metrics: tuple[OutputMetrics, ...]
    localisation: Localisation | None = None
    generated: tuple[Generated, ...] = ()
    scatter: tuple[Scatter, ...] = ()
    notes: tuple[str, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    seconds: Annotated[float, AtLeast(0)] = 0.0
    format: int = FORMAT

    @property
    def failed(self) -> tuple[Verdict, ...]:
        """The verdicts that did not pass."""
        return tuple(verdict for verdict in self.verdicts if not verdict.passed)

    @property
    def passed(self) -> bool:
        """True if everything passed and something was proven."""
        return not self.failed and any(verdict.counted for verdict in self.verdicts)

    def __str__(self) -> str:
        """A few lines: the verdict in a sentence, what was compared, what failed."""
        from lora_export.parity.sentence import summary

        return "\n".join(summary(self))

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; NaN and infinities are the texts ``nan``, ``inf``, ``-inf``."""
        data = {"passed": self.passed, **asdict(self)}
        return {key: _plain(value) for key, value in data.items()}

    @classmethod
    def from_json(cls, data: object, name: str = "the report") -> ParityReport:
        """Return the report from which `as_dict` made the data.

        Args:
            data: Parsed JSON.
            name: Name of the report in the error.

        Raises:
            LoraExportError: The data is not a whole report of this format; every broken rule is listed.
        """
        if isinstance(data, dict) and repr(data.get("format")) != repr(FORMAT):
            seen = json.dumps(data.get("format"), default=str)[:60]
            raise LoraExportError(
                f"{name}: the report's format is {seen}, this version reads {FORMAT}", _HINT
            )
        problems: list[str] = []
        passed, fields = None, data
        if isinstance(data, dict):
            fields = {key: value for key, value in data.items() if key != "passed"}
            try:
                passed = check_plain(bool, data["passed"], "passed") if "passed" in data else None
            except FieldError as error:
                problems += error.problems
            problems += [] if "passed" in data else ["passed: is missing"]
        try:
            report = from_plain(cls, fields, complete=True)
        except FieldError as error:
            problems += error.problems
        if not problems:
            problems = list(_contradictions(report, passed))
        if problems:
            listed = limited(problems, most=_NAMED)
            raise LoraExportError(
                f"{name}: not a report of lora-export parity, or a damaged one", _HINT, listed
            )
        return report


def _contradictions(report: ParityReport, passed: bool | None) -> Iterator[str]:
    """Yield what one part of a report says against another."""
    if passed != report.passed:
        yield f"passed: {passed}, but its verdicts say {report.passed}"
    for i, plot in enumerate(report.scatter):
        if len(plot.reference) != len(plot.candidate):
            yield f"scatter[{i}]: {len(plot.reference)} values against {len(plot.candidate)}"
    for i, run in enumerate(report.generated):
        if run.equal > min(len(run.reference), len(run.candidate)):
            yield f"generated[{i}]: {run.equal} equal tokens of fewer"
    found = report.localisation
    if found and found.module and found.rows and found.module not in {row.module for row in found.rows}:
        yield f"localisation.module: {found.module!r} has no row"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
