"""The demo's results, as data and as text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_export.adapter import Array


@dataclass(frozen=True)
class TaskResult:
    """An adapter's score on sentences that it was not trained on (PyTorch and PEFT)."""

    name: str
    labels: tuple[str, ...]
    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Share of the held-out sentences whose label is right."""
        return self.correct / self.total

    @property
    def chance(self) -> float:
        """Accuracy of guessing; all labels have the same number of held-out sentences."""
        return 1 / len(self.labels)


@dataclass(frozen=True)
class Prediction:
    """The merged graph's label for one held-out sentence, in ONNX Runtime."""

    sentence: str
    predicted: str
    wanted: str


@dataclass(frozen=True)
class Parity:
    """Difference of the merged graph in ONNX Runtime from PyTorch with PEFT's own branches."""

    max_abs: float
    relative_l2: float
    label_agreement: float

    @classmethod
    def between(cls, candidate: Array, reference: Array) -> Parity:
        """Compare logits of shape ``(sentences, labels)``."""
        difference = candidate.astype(np.float64) - reference.astype(np.float64)
        return cls(
            float(np.abs(difference).max()),
            float(np.linalg.norm(difference) / np.linalg.norm(reference.astype(np.float64))),
            float(np.mean(candidate.argmax(-1) == reference.argmax(-1))),
        )


@dataclass(frozen=True)
class StorageRow:
    """One way to keep three tasks on disk.

    Attributes:
        name: Text that names the way.
        parts: ``(count, bytes)`` of each part.
        files: Files whose sizes were added up for each part.
    """

    name: str
    parts: tuple[tuple[int, int], ...]
    files: tuple[tuple[str, ...], ...]

    @property
    def total_bytes(self) -> int:
        """Sum of count · bytes over the parts."""
        return sum(count * size for count, size in self.parts)


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """Everything the demo prints.

    Attributes:
        output: The folder.
        tasks: One result for each adapter.
        merged: Name of the task whose adapter was merged.
        predictions: The merged graph's label for each held-out sentence.
        parity: Difference of the merged graph from PyTorch.
        shared_is_equal: True if the graph that shares the base's weights gives the same bits.
        storage: Three ways to keep three tasks.
        seconds: Wall time of the whole demo.
    """

    output: Path
    tasks: tuple[TaskResult, ...]
    merged: str
    predictions: tuple[Prediction, ...]
    parity: Parity
    shared_is_equal: bool
    storage: tuple[StorageRow, ...]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return the report for ``--json`` and ``demo.json``; the folder is left out, so it can be moved."""
        tasks = [asdict(task) | {"accuracy": task.accuracy, "chance": task.chance} for task in self.tasks]
        storage = [asdict(row) | {"total_bytes": row.total_bytes} for row in self.storage]
        rest = asdict(self)
        del rest["output"]
        return rest | {"tasks": tasks, "storage": storage, "seconds": round(self.seconds, 1)}


# Number of sentences shown for each label; demo.json holds all of them.
_SHOWN = 2


def demo_lines(report: DemoReport) -> list[str]:
    """Return the report as lines of text."""
    merged, parity = report.merged, report.parity
    return [
        "Three adapters on one base, held-out sentences:",
        *(_task_line(task) for task in report.tasks),
        "",
        f"{merged}.onnx in ONNX Runtime ({merged} merged into the weights):",
        *_prediction_lines(report),
        "",
        f"Parity of {merged}.onnx with PyTorch + PEFT (not merged), {len(report.predictions)} sentences:",
        f"  max abs {parity.max_abs:.1e}   relative L2 {parity.relative_l2:.1e}   "
        f"same label {parity.label_agreement:.0%}",
        f"  {merged}-shared.onnx gives {'the same bits' if report.shared_is_equal else 'OTHER bits'}",
        "",
        "Three tasks on disk:",
        *_storage_lines(report),
        "",
        f"Everything is in {report.output}/ ({report.seconds:.0f} s).",
    ]


def _task_line(task: TaskResult) -> str:
    return (
        f"  {task.name:<10} {task.correct}/{task.total} right ({task.accuracy:.0%}; chance {task.chance:.0%})"
        f"   {', '.join(task.labels)}"
    )


def _prediction_lines(report: DemoReport) -> list[str]:
    lines, seen = [], dict.fromkeys((row.wanted for row in report.predictions), 0)
    for row in report.predictions:
        seen[row.wanted] += 1
        if seen[row.wanted] <= _SHOWN:
            verdict = "" if row.predicted == row.wanted else f"   (wrong: {row.wanted})"
            lines.append(f"  {row.predicted:<8} {row.sentence}{verdict}")
    right = sum(row.predicted == row.wanted for row in report.predictions)
    return [*lines, f"  … {right} of {len(report.predictions)} right"]


def _storage_lines(report: DemoReport) -> list[str]:
    largest = max(row.total_bytes for row in report.storage)
    lines = []
    for row in report.storage:
        # Equal sizes become one term; each is rounded, so the terms add up to the total only nearly.
        counts: dict[str, int] = {}
        for count, size in row.parts:
            counts[f"{size / 1e6:.1f}"] = counts.get(f"{size / 1e6:.1f}", 0) + count
        parts = " + ".join(f"{count} × {size}" for size, count in counts.items())
        lines.append(
            f"  {row.name:<38} {row.total_bytes / 1e6:6.1f} MB  {row.total_bytes / largest:4.0%}   ≈ {parts}"
        )
    return lines
