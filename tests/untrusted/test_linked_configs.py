"""Configs and records that are links to a private file: nothing of it is said, in no verb."""

import json
import os
import secrets
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_export.base.checkpoint.checkpoint import read_config
from lora_export.base.checkpoint.sentence_modules import module_paths
from lora_export.base.checkpoint.weight_files import find_weights
from lora_export.base.history.history import history_of
from lora_export.demo.greedy import EXPECTED, Expected
from lora_export.engines.record import read_engine
from lora_export.errors import LoraExportError
from lora_export.formats import load_adapter
from lora_export.integrity.check import verify
from lora_export.packages.onnxruntime_genai import companions_of
from lora_export.parity.sides.merged import _manifest
from lora_export.reports.artefact import read_artefact


def adapter(folder):
    load_adapter(folder)


def shards(folder):
    for number in (1, 2):
        save_file({}, folder / f"adapter_model-0000{number}-of-00002.safetensors")
    load_adapter(folder)


def weights(folder):
    find_weights(folder, is_diffusers=False, config={})


def manifest_for_parity(folder):
    notes = []
    _manifest(folder / "m.onnx", notes)
    raise LoraExportError("; ".join(notes))


def engine(folder):
    (folder / "m.engine").touch()
    read_engine(folder / "m.engine")


def described(folder):
    for name in ("build.sh", "m.engine"):
        (folder / name).touch()
    raise LoraExportError("\n".join(read_artefact(folder).lines))


def linked_graph_beside(folder):
    """An adapter's file that the user named, in whose folder the config is the stranger's."""
    load_adapter(folder / "adapter_model.safetensors")


def verified(folder):
    (folder / "m.onnx").touch()
    found = verify(folder)
    raise LoraExportError("", "", [f"{state.path} {state.details}" for state in found.files])


def verified_beside(folder):
    (folder / "m.onnx").touch()
    found = verify(folder / "m.onnx")
    raise LoraExportError("", "", [f"{state.path} {state.details}" for state in found.files])


def companions(folder):
    companions_of(folder / "m.onnx", folder / "out" / "m.onnx")


HEX = "0" * 64
# Name of the file, its content with a secret in it, and a reader that says the secret of a file itself.
KINDS = {
    "adapter": ("adapter_config.json", lambda word: {"peft_type": word}, adapter),
    "adapter's file": ("adapter_config.json", lambda word: {"peft_type": word}, linked_graph_beside),
    "index of shards": (
        "adapter_model.safetensors.index.json",
        lambda word: {"weight_map": {"w": word}},
        shards,
    ),
    "checkpoint": ("config.json", lambda word: {"architectures": word}, read_config),
    "index": ("model.safetensors.index.json", lambda word: {"weight_map": {"w": f"../{word}"}}, weights),
    "modules": ("modules.json", lambda word: [{"path": f"../{word}", "type": "x"}], module_paths),
    "manifest of a merge": (
        "m.lora.json",
        lambda word: {"adapters": word},
        lambda folder: history_of(folder / "m.lora.json", folder / "m.onnx"),
    ),
    "manifest of a folder": (
        "lora.json",
        lambda word: {"adapters": word},
        lambda folder: history_of(folder / "lora.json"),
    ),
    "manifest for parity": ("m.lora.json", lambda word: {"format": word}, manifest_for_parity),
    "engine's record": ("m.json", lambda word: {"kind": word, "format": 1}, engine),
    "kit": ("record.json", lambda word: {"kind": word, "format": 1}, described),
    "genai": ("genai_config.json", lambda word: {"model": {"type": word}}, described),
    "genai beside a graph": ("genai_config.json", lambda word: f'{{"{word}": 1, "{word}": 2}}', companions),
    "demo": (EXPECTED, lambda word: {"model": word, word: 1}, Expected.load),
    "verified manifest": ("m.lora.json", lambda word: {"files": {word: {"name": word}}}, verified),
    "manifest beside": ("m.lora.json", lambda word: {"files": {word: {"name": word}}}, verified_beside),
    "sums": ("SHA256SUMS", lambda word: f"{HEX}  m.onnx\n{HEX}  {word}\n", verified),
    "sums beside": ("SHA256SUMS", lambda word: f"{HEX}  m.onnx\n{HEX}  {word}\n", verified_beside),
}


def said(kind, folder, hidden):
    """Return what is said of a folder, and the secret."""
    name, content, read = KINDS[kind]
    word = f"s{secrets.token_hex(8)}"
    made = content(word)
    hidden.write_text(made if isinstance(made, str) else json.dumps(made))
    if name.startswith("adapter_config"):
        save_file({"w": np.zeros(2, np.float32)}, folder / "adapter_model.safetensors")
    with pytest.raises(LoraExportError) as caught:
        read(folder)
    # A message may write a word in capitals.
    return "\n".join((caught.value.message, *caught.value.problems, caught.value.hint or "")).lower(), word


@pytest.mark.parametrize("kind", KINDS)
def test_a_linked_file_is_refused_without_its_values(kind, tmp_path):
    """The same file in the folder, or as a blob of Hugging Face's cache, is read: its word is said."""
    name, _, _ = KINDS[kind]
    for layout in ("itself", "cache", "out", "a link to a link out"):
        folder = tmp_path / layout / "models--x" / "snapshots" / "abc"
        folder.mkdir(parents=True)
        hidden = folder.parents[1] / "blobs" / "h" if layout == "cache" else tmp_path / layout / "hidden"
        hidden.parent.mkdir(exist_ok=True)
        if layout == "itself":
            hidden = folder / name
        elif layout == "a link to a link out":
            (folder / "further").symlink_to(hidden)
            (folder / name).symlink_to("further")
        else:
            (folder / name).symlink_to(os.path.relpath(hidden, folder))
        text, word = said(kind, folder, hidden)
        if layout in ("itself", "cache"):
            assert word in text
        else:
            assert word not in text
            assert f"is a link out of the folder, to {hidden}" in text


def test_a_file_that_is_named_may_be_a_link(tmp_path):
    """Its config lies beside either of its places: of two links to one folder, both are read."""
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").mkdir()
    text, word = said("adapter's file", tmp_path / "real", tmp_path / "real" / "adapter_config.json")
    assert word in text
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "linked" / name).symlink_to(tmp_path / "real" / name)
    with pytest.raises(LoraExportError, match=f"(?i){word}"):
        load_adapter(tmp_path / "linked" / "adapter_model.safetensors")
    with pytest.raises(LoraExportError, match="is a link out of the folder") as caught:
        load_adapter(tmp_path / "linked")
    assert word not in caught.value.message


def test_weights_of_an_adapter_are_those_of_its_folder(tmp_path):
    (tmp_path / "a").mkdir()
    pair = {"lora_A": np.zeros((1, 2), np.float32), "lora_B": np.zeros((2, 1), np.float32)}
    tensors = {f"base_model.model.secret.{name}.weight": values for name, values in pair.items()}
    save_file(tensors, tmp_path / "private.safetensors")
    (tmp_path / "a" / "adapter_model.safetensors").symlink_to(tmp_path / "private.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1})
    )
    with pytest.raises(LoraExportError) as caught:
        load_adapter(tmp_path / "a")
    assert "is a link out of the folder" in caught.value.problems[0]
    assert "secret" not in str((caught.value.message, caught.value.problems))
    shutil.copyfile(tmp_path / "private.safetensors", tmp_path / "a" / "copy")
    (tmp_path / "a" / "copy").replace(tmp_path / "a" / "adapter_model.safetensors")
    loaded = load_adapter(tmp_path / "a").modules.values()
    assert [module.path.partition(".")[0] for module in loaded] == ["secret"]
