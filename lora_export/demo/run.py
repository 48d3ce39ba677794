"""Run the demo from end to end: base, three adapters, a merge, ONNX Runtime, parity and sizes."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_export.adapter import Array
from lora_export.demo.report import DemoReport, Parity, Prediction, StorageRow, TaskResult
from lora_export.demo.sentences import Task, load_tasks
from lora_export.demo.training import Trainer, require_packages, save_base, training_session
from lora_export.errors import OutputError
from lora_export.modes.merge_onnx import merge_onnx
from lora_export.progress import Say
from lora_export.storage.free_space import refuse_small_disk
from lora_export.storage.hashes import hash_folder
from lora_export.storage.outputs import OutputSet, make_parent, output_errors
from lora_export.storage.sums.seal import sealed_json
from lora_export.untrusted.places import exists, is_file, is_folder

REPORT = "demo.json"
_NEEDED_BYTES = 400_000_000
# Share of the demo's time at which each stage ends, as measured on two cores.
_TRAINED, _MERGED = 0.7, 0.97


def run_demo(output: Path, *, seed: int = 0, force: bool = False, progress: Say | None = None) -> DemoReport:
    """Train three adapters on MiniLM, merge one into ONNX, run it and compare; no network.

    Args:
        output: Folder to write, with ``base/``, ``adapters/``, the merged graphs and ``demo.json``.
        seed: Seed of everything random.
        force: Replace the folder of an earlier demo.
        progress: Called with what is being done and the share of the whole that is done.

    Returns:
        The results.

    Raises:
        BackendUnavailable: A package of the extra ``demo`` is not installed.
        OutputError: The folder exists, or can't be written.
    """
    started, progress = time.monotonic(), progress or (lambda _what, _share: None)
    require_packages()
    replaces = check_output(output, force, _NEEDED_BYTES)
    progress("loading the libraries and MiniLM", 0.0)
    with output_errors(output), OutputSet(replaces) as outputs, training_session():
        folder = outputs.stage(output, folder=True)
        tasks = load_tasks()
        save_base(folder / "base", max(len(task.labels) for task in tasks), seed)
        trainer = Trainer(folder / "base", seed)
        _train(trainer, tasks, folder, progress)
        first = tasks[0]
        _merge(folder, first, progress)
        report = _report(trainer, tasks, folder, first)
        # The numbers were taken in the staging folder; the user sees the folder's final name.
        report = dataclasses.replace(report, output=output, seconds=time.monotonic() - started)
        save_report(report.as_dict(), folder)
        outputs.commit(lambda: check_output(output, force))
    progress("done", 1.0)
    return report


def save_report(report: dict[str, Any], folder: Path) -> None:
    """Write the report with the hashes of all files in the folder."""
    files = {place: dataclasses.asdict(entry) for place, entry in hash_folder(folder).items()}
    (folder / REPORT).write_bytes(sealed_json(json.dumps(report | {"files": files}, indent=2) + "\n"))


def check_output(output: Path, force: bool, needed_bytes: int = 0) -> bool:
    """Return whether the output may be replaced.

    Args:
        output: The folder to write.
        force: Replace the folder of an earlier demo.
        needed_bytes: Bytes that the demo writes.

    Raises:
        OutputError: The output exists without ``force``, no demo wrote it, or the disk is too full.
    """
    empty = is_folder(output) and not any(output.iterdir())
    if exists(output) and not empty and not is_file(output / REPORT):
        raise OutputError(
            f"{output} exists and is not the folder of an earlier demo (it has no {REPORT})",
            "choose another --output; --force replaces only what a demo wrote",
        )
    if exists(output) and not empty and not force:
        raise OutputError("the output exists already", "choose another name, or give --force", [str(output)])
    make_parent(output)
    refuse_small_disk(output.parent, needed_bytes, "the demo")
    return force or empty


def _train(trainer: Trainer, tasks: tuple[Task, ...], folder: Path, progress: Say) -> None:
    for number, task in enumerate(tasks):
        what = f"training adapter '{task.name}' on {len(task.train)} sentences"

        def advance(share: float, what: str = what, number: int = number) -> None:
            progress(what, _TRAINED * (number + share) / len(tasks))

        advance(0.0)
        trainer.train(task, folder / "adapters" / task.name, advance)


def _merge(folder: Path, task: Task, progress: Say) -> None:
    adapter, half = folder / "adapters" / task.name, (_TRAINED + _MERGED) / 2
    progress(f"merging '{task.name}' and exporting {task.name}.onnx", _TRAINED)
    merge_onnx(folder / "base", adapter, folder / f"{task.name}.onnx")
    progress(f"again as {task.name}-shared.onnx, whose unchanged weights stay in base/", half)
    merge_onnx(folder / "base", adapter, folder / f"{task.name}-shared.onnx", share_base=True)
    progress("comparing ONNX Runtime with PyTorch", _MERGED)


def _report(trainer: Trainer, tasks: tuple[Task, ...], folder: Path, merged: Task) -> DemoReport:
    results, logits = [], {}
    for task in tasks:
        # A task with fewer labels than the base's classifier has uses the first logits only.
        answers = trainer.logits(folder / "adapters" / task.name, task.held_out)[:, : len(task.labels)]
        expected = [example.label for example in task.held_out]
        correct = int(np.sum(answers.argmax(-1) == expected))
        results.append(TaskResult(task.name, task.labels, correct, len(expected)))
        logits[task.name] = answers
    feeds = trainer.encode(merged.held_out)
    own, shared = (
        run_graph(folder / f"{name}.onnx", feeds)[:, : len(merged.labels)]
        for name in (merged.name, f"{merged.name}-shared")
    )
    predictions = tuple(
        Prediction(example.sentence, merged.labels[index], merged.labels[example.label])
        for example, index in zip(merged.held_out, own.argmax(-1), strict=True)
    )
    return DemoReport(
        output=folder,
        tasks=tuple(results),
        merged=merged.name,
        predictions=predictions,
        parity=Parity.between(own, logits[merged.name]),
        shared_is_equal=bool(np.array_equal(own, shared)),
        storage=_storage(folder, tasks, merged),
        seconds=0.0,
    )


def run_graph(path: Path, feeds: dict[str, Array]) -> Array:
    """Return the graph's first output in ONNX Runtime on one CPU thread."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    first = session.get_outputs()[0].name
    return np.asarray(session.run([first], {name: feeds[name] for name in names})[0])


def _storage(folder: Path, tasks: tuple[Task, ...], merged: Task) -> tuple[StorageRow, ...]:
    """Add up the sizes of written files; every part of a row names its files, so that a reader can check."""
    base = ("base/model.safetensors",)
    adapters = [
        tuple(f"adapters/{task.name}/{name}" for name in ("adapter_model.safetensors", "adapter_config.json"))
        for task in tasks
    ]
    full, shared = (
        tuple(f"{merged.name}{kind}.onnx{suffix}" for suffix in ("", ".data")) for kind in ("", "-shared")
    )

    def row(name: str, parts: Sequence[tuple[int, tuple[str, ...]]]) -> StorageRow:
        counted = [(count, sum((folder / file).stat().st_size for file in names)) for count, names in parts]
        return StorageRow(name, tuple(counted), tuple(names for _, names in parts))

    count = len(tasks)
    return (
        row("a full merged model for each task", [(count, full)]),
        row("W0 once + merged graphs that share it", [(1, base), (count, shared)]),
        row("W0 once + adapters", [(1, base), *((1, names) for names in adapters)]),
    )
