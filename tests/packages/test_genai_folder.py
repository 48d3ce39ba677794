"""What goes beside a graph for onnxruntime-genai: which files, under which rules, and what is only said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_export.errors import OutputError, PackageError
from lora_export.packages import onnxruntime_genai
from lora_export.packages.onnxruntime_genai import CONFIG, Companions, companions_of
from lora_export.storage.beside import stage_beside
from lora_export.storage.outputs import OutputSet

CONFIG_DATA = {"model": {"decoder": {"filename": "model.onnx", "head_size": 16}, "type": "llama"}}
TOKENIZER = ["chat_template.jinja", "merges.txt", "tokenizer.json", "tokenizer.model"]
# The builder's folder after a while: a graph, adapters, a manifest of ours, notes, folders.
OTHERS = ["model.onnx", "model.onnx.data", "a.onnx_adapter", "model.lora.json", "notes.md", "x.safetensors"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    (folder / "sub.json").mkdir(parents=True)
    for name in [*TOKENIZER, *OTHERS]:
        (folder / name).write_text(f"the content of {name}")
    write_config(folder, CONFIG_DATA)
    return folder / "model.onnx"


def write_config(folder: Path, data: Any) -> None:
    (folder / CONFIG).write_text(json.dumps(data, indent=4))


def write(companions: Companions) -> None:
    """Write them as a mode does, as a part of its set."""
    files = {companions.output.parent / name: content for name, content in companions.files.items()}
    with OutputSet(companions.force) as outputs:
        outputs.commit(stage_beside(outputs, files, companions.force))


def test_tokenizer_and_config_go_and_nothing_else(base: Path, tmp_path: Path) -> None:
    companions = companions_of(base, tmp_path / "out" / "model.onnx")
    companions.check()
    write(companions)
    assert not companions.notes
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*TOKENIZER, CONFIG}
    for name in (*TOKENIZER, CONFIG):
        assert (tmp_path / "out" / name).read_bytes() == (base.parent / name).read_bytes()
    # A folder without it is no model: what is half written must not look whole.
    assert list(companions.files)[-1] == CONFIG


def test_the_config_names_the_new_graph(base: Path, tmp_path: Path) -> None:
    write(companions_of(base, tmp_path / "out" / "lora.onnx"))
    got = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert got == {"model": {"decoder": {"filename": "lora.onnx", "head_size": 16}, "type": "llama"}}


def test_a_second_graph_beside_the_first_finds_its_files(base: Path, tmp_path: Path) -> None:
    write(companions_of(base, tmp_path / "out" / "model.onnx"))
    again = companions_of(base, tmp_path / "out" / "model.onnx")
    again.check()
    before = (tmp_path / "out" / "tokenizer.json").stat().st_ino
    write(again)
    assert (tmp_path / "out" / "tokenizer.json").stat().st_ino == before


def test_every_other_file_of_that_name_is_named(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("tokenizer.json", CONFIG):
        (tmp_path / "out" / name).write_text("another model's")
    with pytest.raises(OutputError) as caught:
        companions_of(base, tmp_path / "out" / "model.onnx").check()
    assert set(caught.value.problems) == {str(tmp_path / "out" / name) for name in ("tokenizer.json", CONFIG)}
    with pytest.raises(OutputError):
        write(companions_of(base, tmp_path / "out" / "model.onnx"))
    assert (tmp_path / "out" / CONFIG).read_text() == "another model's"
    write(companions_of(base, tmp_path / "out" / "model.onnx", force=True))
    assert json.loads((tmp_path / "out" / CONFIG).read_text()) == CONFIG_DATA


def test_beside_the_base_its_own_config_stays(base: Path) -> None:
    companions = companions_of(base, base.with_name("lora.onnx"))
    assert not companions.files
    (note,) = companions.notes
    assert note == f"{base.parent / CONFIG} runs model.onnx; to run lora.onnx, put that name there"


def test_other_graphs_of_the_config_are_named(base: Path, tmp_path: Path) -> None:
    pipeline = {"pipeline": [{"embed": {"filename": "embed.onnx"}}], "vision": {"filename": "vision.onnx"}}
    write_config(base.parent, {"model": CONFIG_DATA["model"] | pipeline})
    companions = companions_of(base, tmp_path / "out" / "model.onnx")
    assert companions.notes == (f"{CONFIG} also names embed.onnx, vision.onnx: copy them from {base.parent}",)
    assert CONFIG in companions.files


@pytest.mark.parametrize("number", ["1e999", "-1e999", "Infinity", "NaN"])
def test_a_number_that_is_not_json_is_not_written_again(number: str, base: Path, tmp_path: Path) -> None:
    text = (base.parent / CONFIG).read_text().replace("16", number)
    (base.parent / CONFIG).write_text(text)
    with pytest.raises(PackageError, match=f"{CONFIG} can.t be read as JSON"):
        companions_of(base, tmp_path / "out" / "other.onnx")


@pytest.mark.parametrize("config", [None, {"model": {"decoder": {"filename": "other.onnx"}}}, [], {"a": 1}])
def test_a_base_that_no_config_runs_needs_nothing(base: Path, tmp_path: Path, config: Any) -> None:
    (base.parent / CONFIG).unlink()
    if config is not None:
        write_config(base.parent, config)
    companions = companions_of(base, tmp_path / "out" / "model.onnx")
    assert not companions.files
    assert not companions.notes
    write(companions)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe"])
def test_a_damaged_config_is_refused(base: Path, tmp_path: Path, content: bytes) -> None:
    (base.parent / CONFIG).write_bytes(content)
    with pytest.raises(PackageError, match=f"{CONFIG} can.t be read as JSON"):
        companions_of(base, tmp_path / "out" / "model.onnx")


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("content", ["mine", "theirs"])
def test_another_writer_between_staging_and_commit(content, force, is_there, tmp_path):
    """What both write is either equal, or all of it is of the one that came last, or one of them fails."""
    file, graph = tmp_path / "tokenizer.json", tmp_path / "model.onnx"
    if is_there:
        file.write_text("mine")
    with OutputSet(force) as outputs:
        check = stage_beside(outputs, {file: b"mine"}, force)
        outputs.stage(graph).write_text("graph")
        file.write_text(content)
        if content == "mine" or (force and not is_there):
            outputs.commit(check)
            assert file.read_text() == "mine"
        else:
            with pytest.raises(OutputError, match="another process has written other files"):
                outputs.commit(check)
            assert file.read_text() == "theirs"
            assert not graph.exists()


def sparse(path: Path, size: int) -> None:
    """Make a file of a size that takes no room on the disk."""
    with path.open("wb") as file:
        file.truncate(size)


def test_a_large_file_beside_the_base_is_not_read(base: Path, tmp_path: Path) -> None:
    large = base.with_name("notes.txt")
    sparse(large, 1 << 41)
    companions = companions_of(base, tmp_path / "out" / "model.onnx")
    assert set(companions.files) == {*TOKENIZER, CONFIG}
    assert [str(large) in note and str(1 << 41) in note for note in companions.notes] == [True]


def test_files_beside_the_base_have_a_limit_together(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = sum((base.parent / name).stat().st_size for name in (*TOKENIZER, CONFIG))
    for more, fits in ((0, True), (-1, False)):
        monkeypatch.setattr(onnxruntime_genai, "_MOST_TOGETHER", held + more)
        if fits:
            assert set(companions_of(base, tmp_path / "o" / "m.onnx").files) == {*TOKENIZER, CONFIG}
            continue
        with pytest.raises(PackageError, match=str(held - 1)):
            companions_of(base, tmp_path / "o" / "m.onnx")


def test_a_large_file_that_is_there_is_not_compared(base: Path, tmp_path: Path) -> None:
    companions = companions_of(base, tmp_path / "out" / "model.onnx")
    (tmp_path / "out").mkdir()
    sparse(tmp_path / "out" / "tokenizer.json", 1 << 41)
    with pytest.raises(OutputError, match=r"tokenizer\.json"):
        companions.check()
