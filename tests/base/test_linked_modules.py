"""An adapter's modules.json leads to nothing outside of its folder, whatever links lie there."""

import json

import pytest
from small_graphs import adapter, linear

from lora_export.adapter import Adapter
from lora_export.base.checkpoint.sentence_modules import lost_modules
from lora_export.errors import AdapterError

NAME = "private-name.json"


def folder(path, module="1_Dense"):
    path.mkdir()
    entries = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": module, "type": "sentence_transformers.models.Dense"},
    ]
    (path / "modules.json").write_text(json.dumps(entries))
    return path


def given(path) -> Adapter:
    made = adapter(linear("q", 4, 4))
    return Adapter(made.name, str(path), made.format, made.modules)


@pytest.fixture
def outside(tmp_path):
    (tmp_path / "outside" / "inner").mkdir(parents=True)
    (tmp_path / "outside" / NAME).write_text('{"secret": 1}')
    (tmp_path / "outside" / "inner" / NAME).write_text('{"secret": 1}')
    return tmp_path / "outside"


@pytest.mark.parametrize("refuse", [True, False])
@pytest.mark.parametrize("module", ["1_Dense", "parts/1_Dense", "parts/inner"])
def test_a_modules_folder_that_is_a_link(module, refuse, outside, tmp_path):
    """The folder itself, or one on the way to it."""
    base, mine = folder(tmp_path / "base", module), folder(tmp_path / "adapter", module)
    (base / module).mkdir(parents=True)
    linked = mine / (module if module.endswith("1_Dense") else "parts")
    linked.parent.mkdir(exist_ok=True)
    linked.symlink_to(outside)
    with pytest.raises(AdapterError, match="is a link") as caught:
        lost_modules([given(mine)], base, refuse=refuse)
    assert NAME not in str(caught.value)
    assert str(outside) not in str(caught.value)


def test_a_file_of_a_module_that_is_a_link(outside, tmp_path):
    base, mine = folder(tmp_path / "base"), folder(tmp_path / "adapter")
    for place in (base, mine):
        (place / "1_Dense").mkdir()
    (base / "1_Dense" / "config.json").write_text('{"secret": 2}')
    (mine / "1_Dense" / "config.json").symlink_to(outside / NAME)
    (note,) = lost_modules([given(mine)], base, refuse=False)
    assert "config.json is a link out of the folder" in note
    (outside / NAME).replace(mine / "1_Dense" / "config.json")
    (note,) = lost_modules([given(mine)], base, refuse=False)
    assert "its settings are not those of" in note


def test_a_snapshot_of_hugging_faces_cache(tmp_path):
    """Its files are links to blobs beside the snapshots, and are compared as usual."""
    cache = tmp_path / "models--x"
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs" / "a1").write_text('{"size": 1}')
    (cache / "snapshots").mkdir()
    base, mine = folder(tmp_path / "base"), folder(cache / "snapshots" / "c0")
    for place in (base, mine):
        (place / "1_Dense").mkdir()
    (base / "1_Dense" / "config.json").write_text('{"size": 1}')
    (mine / "1_Dense" / "config.json").symlink_to("../../../blobs/a1")
    assert lost_modules([given(mine)], base, refuse=False) == []
