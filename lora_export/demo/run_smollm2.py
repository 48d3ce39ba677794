"""Run the chat demo from end to end: base, three adapters, genai's bases and PyTorch's tokens to compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lora_export.demo.genai_base import Precision, build_base, load_int4_weights
from lora_export.demo.greedy import Expected, Greedy
from lora_export.demo.questions import Lesson, load_lesson
from lora_export.demo.run import check_output, save_report
from lora_export.demo.smollm2 import ChatTrainer, require_packages, save_base
from lora_export.demo.training import silence, training_session
from lora_export.progress import Say
from lora_export.storage.commit.leftovers import scratch_folder
from lora_export.storage.outputs import OutputSet, output_errors
from lora_export.untrusted.shown import command

PRECISIONS: tuple[Precision, ...] = ("fp32", "int4")
_NEEDED_BYTES = 1_300_000_000
# Share of the demo's time at which each stage ends, as measured on two cores.
_LOADED, _TRAINED = 0.2, 0.7


@dataclass(frozen=True)
class ChatReport:
    """Everything the chat demo prints.

    Attributes:
        output: The folder.
        questions: Questions that no adapter was trained on.
        answers: Precision → adapter (or "(none)") → PyTorch's answers.
        seconds: Wall time.
    """

    output: Path
    questions: tuple[str, ...]
    answers: dict[str, dict[str, list[str]]]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return the report for ``--json`` and ``demo.json``; the folder is left out, so it can be moved."""
        rest = asdict(self)
        del rest["output"]
        return rest | {"seconds": round(self.seconds, 1)}


def run_smollm2(
    output: Path, *, seed: int = 0, force: bool = False, progress: Say | None = None
) -> ChatReport:
    """Train three adapters on SmolLM2 and build its bases for onnxruntime-genai; no network.

    Args:
        output: Folder to write: ``hf/``, ``adapters/``, ``base-fp32/``, ``base-int4/`` and ``demo.json``.
        seed: Seed of everything random.
        force: Replace the folder of an earlier demo.
        progress: Called with what is being done and the share of the whole that is done.

    Returns:
        The results.

    Raises:
        BackendUnavailable: A package that the demo needs is not installed.
        BackendError: onnxruntime-genai's model builder failed.
        OutputError: The folder exists, or can't be written.
    """
    started, progress = time.monotonic(), progress or (lambda _what, _share: None)
    require_packages()
    replaces = check_output(output, force, _NEEDED_BYTES)
    progress("loading the libraries and SmolLM2", 0.0)
    with output_errors(output), OutputSet(replaces) as outputs, training_session():
        folder, lesson = outputs.stage(output, folder=True), load_lesson()
        with silence():
            save_base(folder / "hf")
        trainer = ChatTrainer(folder / "hf", seed)
        _train(trainer, lesson, folder, progress)
        answers = dict(_bases(trainer, lesson, folder, progress))
        report = ChatReport(output, lesson.held_out, answers, time.monotonic() - started)
        save_report(report.as_dict(), folder)
        outputs.commit(lambda: check_output(output, force))
    progress("done", 1.0)
    return replace(report, seconds=time.monotonic() - started)


def _train(trainer: ChatTrainer, lesson: Lesson, folder: Path, progress: Say) -> None:
    for number, style in enumerate(lesson.styles):
        what = f"training adapter '{style.name}' on {len(style.train)} answers"

        def advance(share: float, what: str = what, number: int = number) -> None:
            progress(what, _LOADED + (_TRAINED - _LOADED) * (number + share) / len(lesson.styles))

        advance(0.0)
        trainer.train(style, folder / "adapters" / style.name, advance)


def _bases(
    trainer: ChatTrainer, lesson: Lesson, folder: Path, progress: Say
) -> Iterator[tuple[str, dict[str, list[str]]]]:
    """Build each base and save PyTorch's answers from its weights in it; yield precision and answers."""
    adapters = [folder / "adapters" / style.name for style in lesson.styles]
    prompts = tuple(tuple(trainer.prompt(question)) for question in lesson.held_out)
    for number, precision in enumerate(PRECISIONS):
        progress(
            f"building base-{precision}/ with onnxruntime-genai, generating with PyTorch to compare",
            _TRAINED + (1 - _TRAINED) * number / len(PRECISIONS),
        )
        base = folder / f"base-{precision}"
        with scratch_folder(folder) as cache:
            graph = build_base(folder / "hf", base, precision, cache)
        model = trainer.load_base()
        if precision == "int4":
            load_int4_weights(model, graph)
        generated = tuple(trainer.greedy(model, adapters, lesson.held_out))
        Expected(prompts, generated).save(base)
        yield precision, {row.adapter or "(none)": _texts(row, trainer.text) for row in generated}


def _texts(row: Greedy, text: Callable[[tuple[int, ...]], str]) -> list[str]:
    return [text(answer) for answer in row.answers]


def chat_lines(report: ChatReport) -> list[str]:
    """Return the report as lines of text."""
    lines = [f"One base, three adapters, the question {report.questions[0]!r}:"]
    for precision, answers in report.answers.items():
        lines.append(f"  PyTorch + PEFT, {precision} weights:")
        lines += [f"    {name:<8} {texts[0]}" for name, texts in answers.items()]
    out = report.output
    following = command(
        [
            *("lora-export", "swap-onnx", "--base", out / "base-fp32" / "model.onnx"),
            *("--adapter", out / "adapters" / "json", "-o", out / "genai-fp32" / "model.onnx"),
        ]
    )
    return [
        *lines,
        "",
        f"Everything is in {out}/ ({report.seconds:.0f} s). Next:",
        f"  {following}",
    ]
