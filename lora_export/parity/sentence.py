"""One sentence for what a parity check found, for somebody who knows nothing of LoRA; the numbers follow it.

It says what the export does, what that looks like, and what to do. Of several verdicts that failed, the one
that explains the others is said: `_ORDER`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lora_export.parity.judge.limits import EFFECT_CEILING
from lora_export.parity.result import BASE, OutputMetrics, ParityReport, Verdict, state_name
from lora_export.untrusted.shown import shown

_AGAIN = "Export again."
# Below, none of the adapter's effect is there.
_NOTHING = 0.05
# |share − 1| to error / effect: the cosine between the error and the effect. With a wrong scaling it was 0.87
# to 1 on small Llamas and BERTs, with wrong modules at most 0.42.
_ALONG = 0.8
# What scalings are wrong by, mostly; a network that is not linear shows up to this share more or less.
_FACTORS = (1 / 16, 1 / 8, 1 / 4, 1 / 3, 1 / 2, 3 / 2, 2, 3, 4, 8, 16)
_NEAR = 0.05
# Characters of a name in a sentence, and verdicts in a summary.
_NAME, _SHOWN = 80, 10


def sentence(report: ParityReport) -> str:
    """Return what a check found: ``FAILED: the export does 49 % of what the adapter should; …``."""
    if report.failed:
        return failure_sentence(report, report.failed)
    if report.passed:
        return f"PASSED: {_passed(report)}"
    return (
        "FAILED: nothing was proven: no check says anything of these two models. Give other inputs, and an "
        "adapter that changes something."
    )


def failure_sentence(report: ParityReport, failed: Sequence[Verdict]) -> str:
    """Return what is wrong by some of a report's verdicts, which failed: those of one state, or all."""
    verdict = min(failed, key=lambda one: (_place(one), -_size(one)))
    return f"FAILED: {_ORDER[_place(verdict)][1](report, verdict)}"


def summary(report: ParityReport) -> list[str]:
    """Return a few lines: the sentence, how many checks, what was compared, what failed first."""
    checks = [verdict for verdict in report.verdicts if verdict.counted or not verdict.passed]
    failed = report.failed
    sides = (("candidate", report.candidate, "mode"), ("reference", report.reference, "kind"))
    lines = [
        sentence(report),
        f"{len(failed)} of {len(checks)} checks failed" if failed else f"{len(checks)} checks passed",
        *(
            f"{name}  {about.get('path', '')} ({about.get(kind)}, {about.get('dtype')})"
            for name, about, kind in sides
        ),
    ]
    for verdict in failed[:_SHOWN]:
        names = ", ".join(_name(part) for part in (verdict.state, verdict.output) if part)
        lines.append(f"FAIL  {verdict.name} ({names}): {verdict.value:.3g}, limit {verdict.limit:.3g}")
    more = len(failed) - _SHOWN
    return [shown(line) for line in [*lines, *([f"… and {more} more"] if more > 0 else [])]]


def _size(verdict: Verdict) -> float:
    """Return how far a verdict is from its limit, to choose between two of a kind."""
    used = verdict.value / verdict.limit if verdict.limit > 0 else verdict.value
    return math.inf if math.isnan(used) else used


def _place(verdict: Verdict) -> int:
    """Return a verdict's place in `_ORDER`."""
    return next(place for place, (fits, _) in enumerate(_ORDER) if fits(verdict))


def _finite(report: ParityReport, verdict: Verdict) -> str:
    narrow = report.candidate.get("dtype") == "float16"
    why = " (float16 can't hold what this model computes?)" if narrow else ""
    advice = "Export in float32 or bfloat16." if narrow else "Check the weights, and export again."
    return f"some outputs are NaN or infinite{why}. {advice}"


def _not_compared(report: ParityReport, verdict: Verdict) -> str:
    if verdict.output:
        output = _name(verdict.output)
        return f"the export has no output {output}, which the reference returns. Export again with it."
    return "nothing could be compared on these inputs: every position is padding. Give other inputs."


def _base_error(report: ParityReport, verdict: Verdict) -> str:
    if not report.adapters:
        return f"{_off(verdict)}{_begins(report)}. {_AGAIN}"
    return (
        f"even without an adapter {_off(verdict)}{_begins(report)} (another base model than the reference, "
        "or an adapter stays active?). Export again from the base that the adapter was trained on."
    )


def _no_effect(report: ParityReport, verdict: Verdict) -> str:
    return (
        f"{_adapter(report, verdict.state)} changes nothing on these inputs (was it trained?), so nothing "
        "shows that the export has it. Check the adapter's file, or give other inputs."
    )


def _applied(report: ParityReport, verdict: Verdict) -> str:
    row, adapter = _metrics(report, verdict), _adapter(report, verdict.state)
    share = row.applied if row is not None else None
    if row is None or share is None or not math.isfinite(share):
        return f"the export doesn't do what {adapter} should{_begins(report)}. {_AGAIN}"
    error = row.error_over_effect or 0.0
    if abs(share) < _NOTHING and error < 1 + _NOTHING:
        return f"the export does nothing of what {adapter} should (it was left out?). Export again with it."
    if share < _NOTHING:
        return (
            f"the export does something else than {adapter} should (another adapter, or its slot?). {_AGAIN}"
        )
    does = f"the export does {_percent(share)} of what {adapter} should"
    if abs(share - 1) < _ALONG * error:
        return f"{does}, and other things besides{_begins(report)}. {_AGAIN}"
    cause = (
        "merged twice, or alpha changed after the export?" if share > 1 else "alpha changed after the export?"
    )
    return f"{does}; {_scaling(report, verdict.state, share)} ({cause}). {_AGAIN}"


def _effect(report: ParityReport, verdict: Verdict) -> str:
    row, adapter = _metrics(report, verdict), _adapter(report, verdict.state)
    if row is not None and row.effect and (row.own_relative or 0.0) > EFFECT_CEILING / 2 * row.effect:
        dtype = shown(report.candidate.get("dtype", "its dtype"))
        return (
            f"{dtype} itself loses so much that it can't be shown that the export does what {adapter} "
            "should. Check an export in float32."
        )
    off = f"the export is off by {_percent(verdict.value)} of what {adapter} does"
    return f"{off}{_begins(report)}. {_AGAIN}"


def _error(report: ParityReport, verdict: Verdict) -> str:
    return f"with {_adapter(report, verdict.state)} {_off(verdict)}{_begins(report)}. {_AGAIN}"


def _tokens(report: ParityReport, verdict: Verdict) -> str:
    starts = [
        run.equal + 1
        for run in report.generated
        if run.state == verdict.state
        and not run.tie
        and run.equal < max(len(run.reference), len(run.candidate))
    ]
    where = f", from token {min(starts)} on" if starts else ""
    return f"the export writes another text than the reference{where}{_begins(report)}. {_AGAIN}"


def _again(report: ParityReport, verdict: Verdict) -> str:
    return (
        "an adapter leaves something behind when another one takes its place: the same adapter gives another "
        f"answer afterwards. {_AGAIN}"
    )


def _mixed(report: ParityReport, verdict: Verdict) -> str:
    return f"rows of one batch don't each get their own adapter (slots exchanged?). {_AGAIN}"


def _permuted(report: ParityReport, verdict: Verdict) -> str:
    return (
        f"the answer to a row depends on its place in the batch. {_AGAIN} Until then, run one row at a time."
    )


def _alone(report: ParityReport, verdict: Verdict) -> str:
    return (
        "a row gets another answer by itself than among the rows of a batch. "
        f"{_AGAIN} Until then, run one row at a time."
    )


def _other(report: ParityReport, verdict: Verdict) -> str:
    return f"{shown(verdict.name, _NAME)} is not as it should be{_begins(report)}. {_AGAIN}"


_Sentence = Callable[[ParityReport, Verdict], str]
# The first that fits a verdict says its sentence; of several verdicts, the one with the first of these.
_ORDER: tuple[tuple[Callable[[Verdict], bool], _Sentence], ...] = (
    (lambda verdict: verdict.kind == "finite", _finite),
    (lambda verdict: verdict.name == "not compared", _not_compared),
    (lambda verdict: verdict.kind == "error" and verdict.state == state_name(BASE), _base_error),
    (lambda verdict: verdict.kind == "effect" and not verdict.counted, _no_effect),
    (lambda verdict: verdict.kind == "effect" and verdict.name == "adapter applied", _applied),
    (lambda verdict: verdict.kind == "effect", _effect),
    (lambda verdict: verdict.kind == "error", _error),
    (lambda verdict: verdict.kind == "law" and verdict.name == "A→B→A", _again),
    (lambda verdict: verdict.kind == "law" and verdict.name.startswith("mixed batch"), _mixed),
    (lambda verdict: verdict.kind == "law" and verdict.name.startswith("permuted rows"), _permuted),
    (lambda verdict: verdict.kind == "law" and verdict.name.startswith("row alone"), _alone),
    (lambda verdict: verdict.kind == "tokens", _tokens),
    (lambda verdict: True, _other),
)


def _passed(report: ParityReport) -> str:
    counted = [verdict for verdict in report.verdicts if verdict.counted]
    effects = [v.value for v in counted if v.kind == "effect" and v.name == "error / effect"]
    if effects:
        count = len(report.adapters)
        whose = "the adapter" if count < 2 else f"each of the {count} adapters"
        text = f"the export does what {whose} should; it is off by {_percent(max(effects))} of the effect."
    else:
        errors = [v.value for v in counted if v.kind == "error" and v.name == "relative error"]
        off = f"; it is off by {_percent(max(errors))}" if errors else ""
        text = f"the export computes what the reference does{off}."
        if report.adapters:
            text += " How much of that is the adapter's was not measured."
    idle = dict.fromkeys(v.state for v in report.verdicts if v.kind == "effect" and not v.counted)
    if effects and idle:
        text += f" Of {', '.join(_name(state) for state in idle)} nothing is proven: it changes nothing here."
    return text


def _scaling(report: ParityReport, state: str, share: float) -> str:
    """Return what an adapter's scaling looks like, from the share of its effect that is there."""
    near = [factor for factor in _FACTORS if abs(share / factor - 1) < _NEAR]
    about = "" if near else "about "
    factor = near[0] if near else share
    scaling = next((row["scaling"] for row in report.adapters if row["name"] == state), ())
    if not scaling or not math.isclose(*(scaling[0], scaling[-1]), rel_tol=1e-6):
        # A blend of several, or modules that have other scalings.
        return f"its scaling looks like {about}{factor:.2g} times what it should be"
    return f"its scaling looks like {about}{factor * scaling[0]:.3g} instead of {scaling[0]:.3g}"


def _metrics(report: ParityReport, verdict: Verdict) -> OutputMetrics | None:
    rows = (row for row in report.metrics if (row.state, row.output) == (verdict.state, verdict.output))
    return next(rows, None)


def _off(verdict: Verdict) -> str:
    """Return how far an output is off."""
    output = f"output {_name(verdict.output)} is" if verdict.output else "outputs are"
    if verdict.name.endswith("tolerance"):
        return f"the export's {output} off by {verdict.value:.2g} times what the tolerance allows"
    where = " at its worst position" if verdict.name.endswith("worst position") else ""
    return (
        f"the export's {output} off by {_percent(verdict.value)}{where}, where rounding explains "
        f"{_percent(verdict.limit)}"
    )


def _begins(report: ParityReport) -> str:
    found = report.localisation
    return f"; the error begins at {_name(found.module)}" if found is not None and found.module else ""


def _adapter(report: ParityReport, state: str) -> str:
    return "the adapter" if len(report.adapters) < 2 else f"the adapter {_name(state)}"


def _name(name: str) -> str:
    return shown(name, _NAME)


def _percent(share: float) -> str:
    """Return a share as a reader of a newspaper has it: ``49 %``, ``0.23 %``, ``less than 0.01 %``."""
    value = 100 * share
    if not math.isfinite(value):
        return shown(share)
    if 0 < value < 0.01:
        return "less than 0.01 %"
    return f"{value:.0f} %" if value >= 9.95 or value == 0 else f"{value:.2g} %"
