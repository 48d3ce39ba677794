"""Whose a number is: alpha, rank and scale count only where they are LoRA's, a config only for its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lora_export.errors import AdapterError
from lora_export.formats import load_adapter

State = dict[str, torch.Tensor]
SPELLINGS = {
    "plain": (".A.weight", ".B.weight"),
    "loralib": (".lora_A", ".lora_B"),
    "peft": (".lora_A.weight", ".lora_B.weight"),
}


def _pair(spelling: str, rank: int = 4) -> State:
    torch.manual_seed(0)
    a, b = SPELLINGS[spelling]
    front = "base_model.model." if spelling == "peft" else ""
    return {f"{front}blk.lin{a}": torch.randn(rank, 8), f"{front}blk.lin{b}": torch.randn(8, rank)}


def _save(tmp_path: Path, content: dict[str, Any]) -> Path:
    torch.save(content, tmp_path / "x.pt")
    return tmp_path / "x.pt"


# Where a training run keeps numbers that happen to have the same names.
FOREIGN: dict[str, dict[str, Any]] = {
    "mixup in hyper_parameters": {"hyper_parameters": {"mixup": True, "alpha": 0.2}},
    "a loss in args": {"args": {"loss": "focal", "alpha": 0.25, "gamma": 2}},
    "distillation in config": {"config": {"distill": {"alpha": 0.5}, "alpha": 0.5, "scale": 3.0}},
    "a process's rank": {"args": {"rank": 0, "local_rank": 0, "world_size": 8}},
    "an optimizer": {"optimizer": {"param_groups": [{"alpha": 0.99}]}, "hparams": {"scale": 0.1}},
    "a gradient scaler": {"scaler": {"scale": 65536.0}, "native_amp_scaling_state": {"scale": 2.0}},
    "beside the run's books": {"alpha": 0.2, "rank": 0, "scale": 9.0, "epoch": 3},
    "DeepSpeed": {
        "lr_scheduler": None,
        "global_steps": 3,
        "dp_world_size": 8,
        "buffer_names": ["x"],
        "rank": 7,
    },
    "an average beside it": {"ema": None, "alpha": 0.999, "config": {"lr": 1e-3, "dataset": "x"}},
    "a name beside it": {"alpha": 0.5, "hparams": {"lr": 1e-4, "temperature": 2.0}, "arch": "student"},
    "arguments beside it": {"alpha": 0.2, "args": {"mixup": True, "lr": 1e-4}},
    "a count beside it": {"alpha": 0.2, "rank": 1, "iter": 100},
    "a schedule": {"lr_scheduler": {"alpha": 0.1}, "cfg": {"scheduler": {"alpha": 0.1}}},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("case", FOREIGN)
def test_numbers_of_the_training_are_not_loras(case: str, spelling: str, tmp_path: Path) -> None:
    file = _save(tmp_path, {"state_dict": _pair(spelling), **FOREIGN[case]})
    with pytest.raises(AdapterError, match="alpha"):
        load_adapter(file)
    (module,) = load_adapter(file, alpha=8).modules.values()
    assert module.scaling == 2.0


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_refusal_mentions_what_may_be_loras(spelling: str, tmp_path: Path) -> None:
    file = _save(tmp_path, {"state_dict": _pair(spelling), **FOREIGN["mixup in hyper_parameters"]})
    with pytest.raises(
        AdapterError, match=r"hyper_parameters\.alpha is 0\.2: if that is LoRA's, give --alpha 0\.2"
    ):
        load_adapter(file)


OWN: dict[str, dict[str, Any]] = {
    "lora_config": {"lora_config": {"alpha": 12, "r": 4}},
    "peft_config by adapter": {"peft_config": {"default": {"lora_alpha": 12, "r": 4}}},
    "nested in hyper_parameters": {"hyper_parameters": {"alpha": 0.2, "lora": {"alpha": 12, "rank": 4}}},
    "names that say it": {"hyper_parameters": {"lora_alpha": 12, "lora_r": 4, "alpha": 0.2, "rank": 1}},
    "deep in a config": {"cfg": {"model": {"lora_alpha": 12}, "optimizer": {"lora_alpha": 1}}},
    "in args": {"args": {"lora_alpha": 12, "rank": 0, "scale": 7}},
    "beside the tensors' dict": {"alpha": 12, "r": 4},
    "beside it, with LoRA's own": {"alpha": 12, "r": 4, "target_modules": ["lin"], "lora_dropout": 0.1},
    "beside it, by name": {"lora_alpha": 12, "alpha": 0.1, "epoch": 3},
    "the whole factor": {"lora_config": {"scaling": 3.0}},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("case", OWN)
def test_numbers_that_are_loras(case: str, spelling: str, tmp_path: Path) -> None:
    (module,) = load_adapter(_save(tmp_path, {"state_dict": _pair(spelling), **OWN[case]})).modules.values()
    assert module.scaling == pytest.approx(3.0)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"lora_config": {"alpha": 12}, "lora_alpha": 8}, "alpha is 12 elsewhere|alpha is 8 elsewhere"),
        ({"lora_config": {"alpha": 12, "r": 2}}, "rank 2 is stated, but"),
        ({"peft_config": {"a": {"lora_alpha": 1}, "b": {"lora_alpha": 2}}}, "2, but alpha is 1 elsewhere"),
        ({"lora_config": {"alpha": True}}, "lora_config/alpha: true, wanted a finite number"),
        (
            {"hyper_parameters": {"lora_alpha": [1, 2]}},
            r"hyper_parameters/lora_alpha: an array of 2, wanted a finite number",
        ),
        ({"lora_config": {"alpha": 12, "use_dora": True}}, "use_dora: true is not supported in this format"),
    ],
)
def test_what_the_file_says_of_lora_must_fit(
    content: dict[str, Any], message: str, spelling: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=message):
        load_adapter(_save(tmp_path, {"state_dict": _pair(spelling), **content}))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_alpha_and_the_whole_factor_must_fit(spelling: str, tmp_path: Path) -> None:
    pair = _pair(spelling)
    file = _save(tmp_path, {"state_dict": pair, "lora_config": {"scaling": 3.0}})
    with pytest.raises(AdapterError, match=r"says 3, but alpha 8 makes 2 with rank 4; omit the option"):
        load_adapter(file, alpha=8)
    assert {module.scaling for module in load_adapter(file, alpha=12).modules.values()} == {3.0}
    file = _save(tmp_path, {"state_dict": pair, "lora_config": {"scaling": 3.0, "alpha": 8}})
    with pytest.raises(AdapterError, match="makes 2 with rank 4; save the file with one of them"):
        load_adapter(file)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({"lora_alpha": "12"}, 3.0),
        ({"alpha": "12", "r": "4"}, 3.0),
        ({"alpha": "0.2"}, None),
        ({"alpha": "0.2", "rank": "0"}, None),
        ({"alpha": "x"}, None),
    ],
)
def test_metadata_of_other_files(
    metadata: dict[str, str], scaling: float | None, spelling: str, tmp_path: Path
) -> None:
    save_file(_pair(spelling), tmp_path / "x.safetensors", metadata)
    if scaling is not None:
        (module,) = load_adapter(tmp_path / "x.safetensors").modules.values()
        assert module.scaling == scaling
        return
    with pytest.raises(AdapterError, match="alpha") as caught:
        load_adapter(tmp_path / "x.safetensors")
    assert ("metadata's alpha is 0.2" in str(caught.value)) == (metadata["alpha"] == "0.2")


def test_a_parameter_called_alpha_is_a_parameter(tmp_path: Path) -> None:
    state = {**_pair("plain"), "alpha": torch.tensor(0.3)}
    with pytest.raises(AdapterError, match=r"alpha: not A\.weight or B\.weight"):
        load_adapter(_save(tmp_path, {"state_dict": state}), alpha=8)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_stated_factor_of_stacked_pairs(rslora: bool, tmp_path: Path) -> None:
    """Loralib's MergedLinear: with a factor instead of alpha, each part's change is that factor times B A."""
    torch.manual_seed(0)
    a, b = torch.randn(4, 6), torch.randn(10, 2)
    content = {"qkv.lora_A": a, "qkv.lora_B": b, "scaling": 3.0, "enable_lora": [True, False, True]}
    (module,) = load_adapter(_save(tmp_path, content), rslora=rslora).modules.values()
    left, right = module.factors(dtype=np.float64)
    wanted = torch.zeros(15, 6, dtype=torch.float64)
    wanted[:5] = 3 * b[:5].double() @ a[:2].double()
    wanted[10:] = 3 * b[5:].double() @ a[2:].double()
    np.testing.assert_allclose(left @ right, wanted.numpy(), rtol=1e-9, atol=1e-12)


# --- a config belongs to one file --------------------------------------------------------------------------

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 40}


@pytest.mark.parametrize("name", ["style.safetensors", "epoch3.pt", "model.safetensors", "adapter.bin"])
@pytest.mark.parametrize("front", ["base_model.model.", ""])
def test_a_config_is_not_anothers_files(name: str, front: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    tensors = {f"{front}blk.lin.lora_{s}.weight": torch.randn(4, 4) for s in "AB"}
    file = tmp_path / name
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file)
    with pytest.raises(
        AdapterError, match=r"(?s)doesn't state alpha.*was not used: it belongs to adapter_model"
    ):
        load_adapter(file)
    adapter = load_adapter(file, alpha=4)
    assert [module.scaling for module in adapter.modules.values()] == [1.0]
    assert any("was not used" in note for note in adapter.notes)
    with pytest.raises(AdapterError, match=rf"\(found: {name}\)"):
        load_adapter(tmp_path)


def test_a_kohya_file_beside_a_config(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    tensors = {
        "lora_unet_x.lora_down.weight": torch.ones(2, 4),
        "lora_unet_x.lora_up.weight": torch.ones(4, 2),
    }
    save_file(tensors, tmp_path / "style.safetensors")
    (module,) = load_adapter(tmp_path / "style.safetensors").modules.values()
    assert module.scaling == 1.0
