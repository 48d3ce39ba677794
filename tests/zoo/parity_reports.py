"""Parity reports with realistic numbers and with hostile ones, for the tests of what is written of them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from lora_export.parity.result import (
    Generated,
    Localisation,
    ModuleRow,
    OutputMetrics,
    ParityReport,
    Scatter,
    Verdict,
)

SHA = {"candidate": "c0" * 32, "json": "1a" * 32, "pirate": "2b" * 32, "reference": "3d" * 32}
STATES = ("no adapter", "json", "pirate", "0.7 json + 0.3 pirate")
OUTPUTS = ("logits", "hidden_states", *(f"present.{i}.{part}" for i in range(5) for part in ("key", "value")))
PROJECTIONS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
CULPRIT = "model.layers.7.self_attn.v_proj"
# What breaks a page, a terminal, XML, a file name's encoding or an SVG.
HOSTILE = (
    "<script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "]]></failure><b>&amp;&#0;",
    "\x00\x01\x1b[31mred\x07\r\nnext\tline",
    "lone \udc80 surrogate \ufffe\uffff",
    "right-to-left \u202eevil\u202c\u2028",
    "naïve 模型 🦜 Ω",
    "</style></title><style>*{display:none}",
)


def good(seed: int = 0, **changes) -> ParityReport:
    """A float16 swap of two adapters that passes: about 60 verdicts."""
    rng = np.random.default_rng(seed)
    verdicts, metrics = [], []
    for state in STATES:
        adapted = state != "no adapter"
        verdicts.append(
            Verdict(
                kind="finite",
                name="finite",
                state=state,
                output="all outputs",
                value=0.0,
                limit=0.0,
                passed=True,
                why="no NaN, no Inf",
            )
        )
        for output in OUTPUTS:
            relative = float(3e-4 * rng.lognormal(0, 0.4))
            own = float(4e-4 * rng.lognormal(0, 0.1))
            effect = float(0.15 * rng.lognormal(0, 0.6)) if adapted else None
            why = f"3 × {own:.1e}, what PyTorch loses in float16 on the same feeds"
            verdicts.append(
                Verdict(
                    kind="error",
                    name="relative error",
                    state=state,
                    output=output,
                    value=relative,
                    limit=3 * own,
                    passed=True,
                    why=why,
                )
            )
            logits = {"kl": 2e-6, "top1": 1.0, "top5": 0.998} if output == "logits" else {}
            metrics.append(
                OutputMetrics(
                    state=state,
                    output=output,
                    max_abs=40 * relative,
                    mean_abs=3 * relative,
                    relative=relative,
                    worst_position=2.5 * relative,
                    cosine=1 - relative**2 / 2,
                    own_relative=own,
                    effect=effect,
                    error_over_effect=relative / effect if effect else None,
                    **logits,
                )
            )
        if adapted:
            ratio = metrics[-len(OUTPUTS)].error_over_effect
            why = "an adapter that is not applied has 1"
            verdicts.append(
                Verdict(
                    kind="effect",
                    name="error / effect",
                    state=state,
                    output="logits",
                    value=ratio,
                    limit=0.1,
                    passed=True,
                    why=why,
                )
            )
    for law in ("no adapter = base", "A→B→A", "permuted rows", "batch of one = row of a batch"):
        verdicts.append(
            Verdict(
                kind="law",
                name=law,
                state="laws",
                output="",
                value=0.0,
                limit=1e-6,
                passed=True,
                why="bit for bit up to a kernel's order",
            )
        )
    x = rng.normal(0, 4, 600)
    seen = x * (1 + rng.normal(0, 4e-4, 600))
    report = ParityReport(
        reference={"kind": "checkpoint", "path": "models/smollm2-135m", "dtype": "float32"},
        candidate={
            "path": "out/model.onnx",
            "mode": "swap",
            "runtime": "onnxruntime 1.32.0",
            "provider": "cpu",
            "dtype": "float16",
            "sha256": SHA["candidate"],
        },
        adapters=tuple(
            {"name": name, "sha256": SHA[name], "modules": 30, "scaling": [0.5, 2.0]}
            for name in ("json", "pirate")
        ),
        feeds=tuple(
            {"label": f"batch {b}, sequence {s}", "shapes": {"input_ids": [b, s], "attention_mask": [b, s]}}
            for b in (1, 4)
            for s in (1, 16)
        ),
        tolerance="auto",
        verdicts=tuple(verdicts),
        metrics=tuple(metrics),
        generated=(
            Generated(
                state="json", prompt=(1, 5, 9), reference=(4, 8, 15, 16), candidate=(4, 8, 15, 16), equal=4
            ),
        ),
        scatter=tuple(
            Scatter(state, "logits", tuple(x.tolist()), tuple(seen.tolist())) for state in STATES[:3]
        ),
        notes=("the reference ran in float32 on the CPU",),
        environment={"packages": {"onnxruntime": "1.32.0", "torch": "2.13.0"}, "gpus": ["H200"], "cores": 2},
        seconds=73.25,
    )
    return replace(report, **changes)


def failed() -> ParityReport:
    """The same with one module whose adapter is not applied; the error begins at ``CULPRIT``."""
    report, rng = good(), np.random.default_rng(1)
    verdicts, metrics = list(report.verdicts), list(report.metrics)
    for i, verdict in enumerate(verdicts):
        if verdict.state == "pirate" and verdict.output == "logits":
            value = 0.31 if verdict.kind == "effect" else 4.6e-2
            why = f"{verdict.why}; the error is a sizeable part of the adapter's effect"
            verdicts[i] = replace(verdict, value=value, passed=False, why=why)
    for i, row in enumerate(metrics):
        if row.state == "pirate" and row.output == "logits":
            metrics[i] = replace(
                row, relative=4.6e-2, effect=0.148, error_over_effect=0.31, kl=3.1e-2, top1=0.87, top5=0.9
            )
    rows, error = [], 2e-4
    for layer in range(10):
        for part in PROJECTIONS:
            name = f"model.layers.{layer}.{part}"
            before = error
            error = 4e-2 if name == CULPRIT else error * float(rng.lognormal(0.03, 0.1))
            own = float(3e-4 * rng.lognormal(0, 0.1))
            effect = float(0.2 * rng.lognormal(0, 0.5))
            rows.append(
                ModuleRow(
                    module=name,
                    error_in=before,
                    error_out=error,
                    own_out=own,
                    effect=effect,
                    jumped=name == CULPRIT,
                )
            )
    found = Localisation(state="pirate", module=CULPRIT, rows=tuple(rows), looked_at=30, of=30, note="")
    tokens = Generated(
        state="pirate", prompt=(1, 5, 9), reference=(4, 8, 15, 16), candidate=(4, 8, 23, 42), equal=2
    )
    noise = rng.normal(1, 4.6e-2, 600)
    bad = tuple(np.multiply(report.scatter[2].reference, noise).tolist())
    scatter = (*report.scatter[:2], replace(report.scatter[2], candidate=bad))
    return replace(
        report,
        verdicts=tuple(verdicts),
        metrics=tuple(metrics),
        localisation=found,
        scatter=scatter,
        generated=(*report.generated, tokens),
    )


def named(text: str) -> ParityReport:
    """Every text is the same one."""
    return hostile((text,) * len(HOSTILE))


def hostile(texts: tuple[str, ...] = HOSTILE) -> ParityReport:
    """Every text is one of ``texts`` and the numbers are NaN, infinite, zero, tiny or huge."""
    odd = (math.nan, math.inf, -math.inf, 0.0, 5e-324, 1.7e308, -1.7e308, 1.0)
    verdicts, metrics, rows, scatter = [], [], [], []
    for i, text in enumerate(texts):
        for j, value in enumerate(odd):
            other = odd[(i + j) % len(odd)]
            passed, counted = (i + j) % 3 > 0, j % 2 > 0
            verdicts.append(
                Verdict(
                    kind="error",
                    name=text,
                    state=text,
                    output=text,
                    value=value,
                    limit=other,
                    passed=passed,
                    why=text,
                    counted=counted,
                )
            )
            metrics.append(
                OutputMetrics(
                    state=text,
                    output=f"{text}{j}",
                    max_abs=value,
                    mean_abs=value,
                    relative=value,
                    worst_position=value,
                    cosine=value,
                    own_relative=value,
                    effect=other,
                    error_over_effect=other,
                    kl=value,
                    top1=other,
                    top5=value,
                )
            )
            rows.append(
                ModuleRow(
                    module=f"{text}.{j}.x",
                    error_in=value,
                    error_out=other,
                    own_out=value,
                    effect=other,
                    jumped=passed,
                )
            )
        scatter.append(Scatter(text, text, odd, odd[::-1]))
    return ParityReport(
        reference={"kind": "saved", "path": texts[4], "dtype": texts[0]},
        candidate={
            "path": texts[7],
            "mode": "bank",
            "runtime": texts[1],
            "provider": texts[2],
            "dtype": texts[3],
            "sha256": "",
        },
        adapters=tuple({"name": t, "sha256": "", "modules": 0, "scaling": [math.nan, 1.0]} for t in texts),
        feeds=tuple({"label": text, "shapes": {text: [1, 2]}} for text in texts),
        tolerance=texts[0],
        verdicts=tuple(verdicts),
        metrics=tuple(metrics),
        localisation=Localisation(
            state=texts[0], module=rows[3].module, rows=tuple(rows), looked_at=3, of=9, note=texts[3]
        ),
        generated=tuple(
            Generated(state=text, prompt=(1,), reference=(2, 3), candidate=(2,), equal=1, tie=True)
            for text in texts
        ),
        scatter=tuple(scatter),
        notes=texts,
        environment={text: text for text in texts},
        seconds=0.5,
    )


REPORTS = {"good": good, "failed": failed, "hostile": hostile}


def words(text):
    """A text with all white space as one blank: how lines are broken does not matter."""
    return " ".join(text.split())
