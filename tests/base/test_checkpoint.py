"""Checkpoints: headers are believed only after checking; names are found or refused."""

from __future__ import annotations

import builtins
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, build

from lora_export.base.capture.loading import load_model
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.names import Names
from lora_export.base.ties.ties import tied_head
from lora_export.errors import CheckpointError
from lora_export.sites.naming.names import Named


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def folder(path, content, name="model.safetensors"):
    path.mkdir(exist_ok=True)
    (path / name).write_bytes(content)
    return path


def test_reads_every_dtype_and_shape(tmp_path):
    tensors = {
        "a.weight": torch.randn(3, 4).bfloat16(),
        "b": torch.randn(2, 3, 4).half(),
        "c": torch.tensor(5.0, dtype=torch.float64),
        "d": torch.arange(5),
        "e": torch.tensor([True, False]),
        "f": torch.empty(0, 3),
        "g": torch.randn(4, 4).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.tensors) == set(tensors)
    for name, value in tensors.items():
        found = checkpoint.read(name)
        assert found.shape == tuple(value.shape)
        wide = value.double() if value.is_floating_point() else value
        assert np.array_equal(found.astype(wide.numpy().dtype), wide.numpy()), name
    assert checkpoint.read("a.weight").dtype == np.dtype(ml_dtypes.bfloat16)
    assert not checkpoint.read("a.weight").flags.writeable
    with pytest.raises(CheckpointError, match="no tensor 'z'"):
        checkpoint.read("z")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "truncated"),
        (b"\x01\x02", "truncated"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "truncated"),
        (raw(b"{nonsense"), "Expecting property name"),
        (raw([]), "is not a JSON object"),
        (raw({"a": {"dtype": "F32"}}), "has no dtype, shape or data_offsets"),
        (raw({"a": entry([2], 0, 4)}, bytes(4)), "needs 8 bytes"),
        (raw({"a": entry([-1], 0, 4)}, bytes(4)), "not counts"),
        (raw({"a": entry("x", 0, 4)}, bytes(4)), "not counts"),
        (raw({"a": entry([1], 4, 0)}, bytes(4)), "needs 4 bytes"),
        (raw({"a": entry([4], 0, 16)}, bytes(8)), "truncated"),
        (raw({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)), "overlaps"),
        (raw({"a": entry([1], 4, 8)}, bytes(8)), "belong to no tensor"),
        (raw({"a": entry([1], 0, 4)}, bytes(8)), "belong to no tensor"),
        (raw(b'{"a": {}, "a": {}}'), "the key 'a' occurs twice"),
    ],
)
def test_damaged_files(tmp_path, content, says):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder(tmp_path, content))
    assert says in caught.value.problems[0]
    assert caught.value.hint


def sharded(path, weight_map, files):
    path.mkdir(exist_ok=True)
    for name, tensors in files.items():
        save_file({t: torch.zeros(2) for t in tensors}, path / name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.mark.parametrize(
    ("weight_map", "files", "says"),
    [
        (
            {"a": "1.safetensors", "b": "gone.safetensors"},
            {"1.safetensors": ["a"]},
            "gone.safetensors: No such",
        ),
        (
            {"a": "1.safetensors", "b": "1.safetensors"},
            {"1.safetensors": ["a"]},
            "puts 'b' into 1.safetensors",
        ),
        (
            {"a": "1.safetensors", "b": "2.safetensors"},
            {"1.safetensors": ["a", "b"], "2.safetensors": ["b"]},
            "'b' is in both",
        ),
        (
            {"a": "2.safetensors", "b": "1.safetensors"},
            {"1.safetensors": ["a"], "2.safetensors": ["b"]},
            "it is in 1.safetensors",
        ),
    ],
)
def test_index_and_shards_disagree(tmp_path, weight_map, files, says):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(sharded(tmp_path, weight_map, files))
    assert says in "\n".join(caught.value.problems)


def test_all_damaged_shards_are_listed(tmp_path):
    weight_map = {name: f"{name}.safetensors" for name in "abc"}
    path = sharded(tmp_path, weight_map, {f"{name}.safetensors": [name] for name in "abc"})
    for name in "ac":
        whole = (path / f"{name}.safetensors").read_bytes()
        (path / f"{name}.safetensors").write_bytes(whole[:-3])
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    assert [line.split(":")[0] for line in caught.value.problems] == ["a.safetensors", "c.safetensors"]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "holds no safetensors"),
        ({"pytorch_model.bin": b"x"}, "PyTorch pickles"),
        ({"model-q4.gguf": b"x"}, "GGUF"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, "is an adapter"),
        ({"a.safetensors": b"", "b.safetensors": b""}, "no index"),
        ({"model.safetensors": b"", "model.safetensors.index.json": b"{}"}, "several sets"),
        ({"model.safetensors.index.json": b"{}"}, "no 'weight_map'"),
        ({"model.safetensors.index.json": b"["}, "read as JSON"),
        ({"config.json": b"[]", "model.safetensors": raw({})}, "holds list"),
        ({"config.json": b"{,}", "model.safetensors": raw({})}, "read as JSON"),
    ],
)
def test_folders_without_usable_weights(tmp_path, files, says):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as caught:
        Checkpoint.open(tmp_path)
    assert caught.value.hint


def test_a_pipeline_of_several_models_names_them(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    for part in ("unet", "text_encoder"):
        (tmp_path / part).mkdir()
        save_file({"a.weight": torch.zeros(1)}, tmp_path / part / "model.safetensors")
    with pytest.raises(CheckpointError, match="pipeline of several models") as caught:
        Checkpoint.open(tmp_path)
    assert [problem.split()[-1] for problem in caught.value.problems] == [
        str(tmp_path / part) for part in ("text_encoder", "unet")
    ]


def test_a_name_of_the_hub_is_no_folder():
    with pytest.raises(CheckpointError, match="no folder at") as caught:
        Checkpoint.open("org/model-that-is-not-here")
    assert "hf download" in caught.value.hint


# --- names -------------------------------------------------------------------------------------------


def names_of(tmp_path, *stored, config=None):
    save_file({name: torch.zeros(1) for name in stored}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config or {}))
    return Names(Checkpoint.open(tmp_path))


@pytest.mark.parametrize(
    ("stored", "parameter", "found"),
    [
        (["a.b.weight", "x.a.b.weight"], "a.b.weight", "a.b.weight"),
        (["model.a.b.weight"], "a.b.weight", "model.a.b.weight"),
        (["a.b.weight"], "bert.a.b.weight", "a.b.weight"),
        (["b.weight"], "a.bb.weight", None),
        (["weight"], "a.weight", None),
    ],
)
def test_names_by_suffix(tmp_path, stored, parameter, found):
    parts = names_of(tmp_path, *stored).find(parameter)
    assert [part.tensor for part in parts] == ([found] if found else [])


def test_ambiguous_suffix(tmp_path):
    names = names_of(tmp_path, "x.a.weight", "y.a.weight")
    assert not names.find("a.weight")
    (problem,) = names.rename([Named("a.weight")]).problems.values()
    assert str(problem) == "ambiguous: may be x.a.weight, y.a.weight"


def test_flattened_names(tmp_path):
    names = names_of(tmp_path, "unet.down_blocks.0.to_q.weight", "unet.down_blocks.0.to_q.bias")
    found = names.rename([Named("down_blocks_0_to_q.weight")], flattened=True)
    assert found.names == ("unet.down_blocks.0.to_q.weight",)


def test_without_transformers_the_reason_says_so(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name == "transformers":
            raise ImportError(name)
        return real(name, *rest)

    names = names_of(tmp_path, "a.weight")
    monkeypatch.setattr(builtins, "__import__", missing)
    (problem,) = names.rename([Named("b.weight")]).problems.values()
    assert "pip install" in problem.detail


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != "conv"])
def test_every_parameter_of_every_architecture_is_found(arch):
    """Values decide: what is found holds what the model holds, experts taken apart."""
    checkpoint = Checkpoint.open(tiny.checkpoint(arch))
    names, stored = Names(checkpoint), load_file(tiny.checkpoint(arch) / "model.safetensors")
    for parameter, value in build(arch).named_parameters():
        parts = names.find(parameter)
        if isinstance(parts, str):
            assert tied_head(checkpoint.config), f"{parameter}: {parts}"
            continue
        for part in parts:
            wanted = value if part.expert is None else value[part.expert]
            index, count = part.piece
            rows = wanted.shape[0] // count if count > 1 else wanted.shape[0] if wanted.ndim else 0
            wanted = wanted[index * rows : (index + 1) * rows] if count > 1 else wanted
            assert torch.equal(stored[part.tensor], wanted), (parameter, part)


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({}, False),
        ({"architectures": ["LlamaForCausalLM"]}, True),
        ({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"architectures": ["BertModel"]}, False),
    ],
)
def test_tied_head(config, tied):
    assert tied_head(config) == tied


def test_a_file_that_was_cut_short_since_it_was_opened(tmp_path):
    save_file({"a": torch.zeros(8), "b": torch.ones(8)}, tmp_path / "model.safetensors")
    opened = Checkpoint.open(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(opened.tensors["b"].offset + 4)
    assert not opened.read("a").any()
    with pytest.raises(CheckpointError, match="can't be read where 'b' lies"):
        opened.read("b")


@pytest.mark.parametrize("size", ["vocab_size", "hidden_size", "intermediate_size"])
def test_a_model_that_is_much_larger_than_its_weights(size, tmp_path, monkeypatch):
    """What the weights lack would be made up before anybody looks; refused before anything is loaded."""
    shutil.copytree(tiny.checkpoint("llama"), tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    left = {name: values for name, values in weights.items() if 100 not in values.shape}
    assert len(left) == len(weights) - 2
    save_file(left, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {size: 10**9}))

    def never(*arguments, **options):
        raise AssertionError("loaded")

    monkeypatch.setattr("transformers.LlamaForCausalLM.from_pretrained", never)
    with pytest.raises(CheckpointError, match="describes a model of") as caught:
        load_model(tmp_path, "float32")
    assert any("values" in problem for problem in caught.value.problems)
    assert caught.value.hint
