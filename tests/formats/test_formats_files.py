"""Which files a folder's adapter is made from: shards, what lies beside, what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from huggingface_hub import save_torch_state_dict
from peft_models import worst_error
from safetensors.torch import load_file, save_file

from lora_export.errors import AdapterError
from lora_export.formats import load_adapter

State = dict[str, torch.Tensor]


def _parameters(folder: Path) -> dict[str, np.ndarray]:
    made = {}
    for key, module in load_adapter(folder).modules.items():
        left, right = module.factors(dtype=np.float64)
        made[key] = left @ right
    return made


def _whole(folder: Path) -> State:
    return load_file(folder / "adapter_model.safetensors")


def _sharded(arch: str, folder: Path, suffix: str = "safetensors") -> Path:
    """Shards and index as the Hub's own library writes them."""
    source = tiny.adapter(arch, "patterns")
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    save_torch_state_dict(
        _whole(source),
        folder,
        filename_pattern=f"adapter_model{{suffix}}.{suffix}",
        max_shard_size=8000,
        safe_serialization=suffix == "safetensors",
    )
    assert len(list(folder.glob(f"adapter_model-*.{suffix}"))) > 2
    return folder


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_shards_are_one_adapter(arch: str, suffix: str, index: bool, tmp_path: Path) -> None:
    folder = _sharded(arch, tmp_path / "a", suffix)
    if not index:
        (folder / f"adapter_model.{suffix}.index.json").unlink()
    whole = tiny.adapter(arch, "patterns")
    assert worst_error(_parameters(folder), _parameters(whole)) == 0
    adapter = load_adapter(folder)
    assert adapter.name == "a"
    assert set(adapter.tensor_names) == set(_whole(whole))


def _edit_index(folder: Path, change: dict[str, Any] | None, **weight_map: str | None) -> None:
    path = folder / "adapter_model.safetensors.index.json"
    content = json.loads(path.read_text())
    for name, shard in weight_map.items():
        if shard is None:
            del content["weight_map"][name]
        else:
            content["weight_map"][name] = shard
    path.write_text(json.dumps(content if change is None else change))


def _first(folder: Path) -> Path:
    return min(folder.glob("adapter_model-*"))


def _damage(folder: Path) -> None:
    _first(folder).write_bytes(_first(folder).read_bytes()[:-8])


def _nan(folder: Path) -> None:
    tensors = load_file(_first(folder))
    next(iter(tensors.values()))[0] = torch.nan
    save_file(tensors, _first(folder))


def _twice(folder: Path) -> None:
    last = max(folder.glob("adapter_model-*"))
    name, values = next(iter(load_file(_first(folder)).items()))
    save_file({**load_file(last), name: values}, last)


DAMAGE: dict[str, tuple[Any, str]] = {
    "a shard is missing": (lambda folder: _first(folder).unlink(), r"(?s)shards.*adapter_model-00001-of-000"),
    "a shard is cut": (_damage, r"adapter_model-00001-of-\d+\.safetensors is not a complete"),
    "NaN in a shard": (_nan, "are NaN or infinite"),
    "a tensor in two shards": (_twice, r"(?s)don't fit together.*: in adapter_model-00001-of-"),
    "the index names a missing file": (
        lambda folder: _edit_index(folder, None, x="adapter_model-00099.safetensors"),
        r"(?s)shards.*adapter_model-00099\.safetensors",
    ),
    "the index names a missing tensor": (
        lambda folder: _edit_index(folder, None, x=_first(folder).name),
        r"x: in adapter_model-00001-of-\d+\.safetensors by the index, found in no shard",
    ),
    "a tensor beside the index": (
        lambda folder: _edit_index(folder, None, **{next(iter(load_file(_first(folder)))): None}),
        r"in adapter_model-00001-of-\d+\.safetensors, but not in the index",
    ),
    "no index at all": (lambda folder: _edit_index(folder, {"a": 1}), "has no 'weight_map'"),
    "another adapter's shard": (
        lambda folder: save_file({"x": torch.ones(1)}, folder / "adapter_model-00001-of-00077.safetensors"),
        "holds the shards of several adapters",
    ),
    "a whole file beside them": (
        lambda folder: save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors"),
        r"holds several weights files: adapter_model\.safetensors and adapter_model-00001",
    ),
    "another tuner": (
        lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LOHA"}'),
        "is LOHA, not LoRA",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_shards_that_are_not_whole(case: str, tmp_path: Path) -> None:
    folder = _sharded("bert", tmp_path / "a")
    damage, message = DAMAGE[case]
    damage(folder)
    with pytest.raises(AdapterError, match=message):
        load_adapter(folder)


def test_one_shard_alone_is_refused(tmp_path: Path) -> None:
    folder = _sharded("bert", tmp_path / "a")
    with pytest.raises(AdapterError, match=r"(?s)is one of \d+ shards.*give the folder"):
        load_adapter(_first(folder))


# --- what lies beside --------------------------------------------------------------------------------------


def _copied(tmp_path: Path) -> Path:
    source, folder = tiny.adapter("bert"), tmp_path / "checkpoint-40"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "scaler.pt"],
        ["rng_state_0.pth", "rng_state_1.pth", "random_states_0.pkl", "optimizer.bin", "optimizer_1.bin"],
        ["lr_scheduler.pt", "dl_state_dict.bin", "sampler.bin", "custom_checkpoint_0.pkl"],
    ],
)
def test_a_trainings_own_files_are_no_weights(names: list[str], tmp_path: Path) -> None:
    folder = _copied(tmp_path)
    for name in names:
        (folder / name).write_bytes(b"x")
    assert load_adapter(folder).modules.keys() == load_adapter(tiny.adapter("bert")).modules.keys()


@pytest.mark.parametrize(
    "name",
    ["non_lora_trainables.bin", "adapter_model.bin", "value_head.safetensors", "model.safetensors",
     "new_embeddings.safetensors", "pytorch_lora_weights.safetensors", "x.onnx_adapter"],
)  # fmt: skip
def test_other_weights_are_named_and_never_passed_over(name: str, tmp_path: Path) -> None:
    folder = _copied(tmp_path)
    (folder / name).write_bytes(b"x")
    with pytest.raises(AdapterError, match=f"holds several weights files.*{name}") as caught:
        load_adapter(folder)
    given = folder / "adapter_model.safetensors"
    assert str(given) in str(caught.value.hint)
    assert load_adapter(given).modules
