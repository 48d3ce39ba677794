"""The formats beside PEFT, and files that are wrong: each line of the list is one message."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from format_cases import PAIR, flux, loralib_file, values, write

from lora_export.adapter import LoraModule
from lora_export.errors import AdapterError
from lora_export.formats import FORMATS, load_adapter, save_adapter


def delta(module: LoraModule) -> np.ndarray:
    left, right = module.factors(dtype=np.float64)
    product: np.ndarray = left @ right
    return product


def test_reading_imports_no_torch(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", {"m.lora_A": values(2, 4), "m.lora_B": values(3, 2)})
    code = (
        "import sys; from lora_export.formats import load_adapter; "
        f"load_adapter({str(file)!r}, alpha=4); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- loralib ---------------------------------------------------------------------------------------------


def test_loralib_state_dict_with_biases(tmp_path: Path) -> None:
    a, b, bias = values(2, 4), values(3, 2), values(3)
    file = loralib_file(tmp_path, {"enc.q.lora_A": a, "enc.q.lora_B": b, "enc.q.bias": bias})
    adapter = load_adapter(file, alpha=8)
    (module,) = adapter.modules.values()
    assert (adapter.format, module.path, module.kind, module.rank) == ("loralib", "enc.q", "linear", 2)
    np.testing.assert_allclose(delta(module), 4 * (b.astype(np.float64) @ a), rtol=1e-12)
    np.testing.assert_array_equal(adapter.extras["enc.q.bias"], bias)


def test_loralib_embedding_is_transposed(tmp_path: Path) -> None:
    """Loralib's Embedding: weight += (lora_B @ lora_A).T * scaling."""
    a, b = values(2, 10), values(4, 2)
    adapter = load_adapter(loralib_file(tmp_path, {"tr.wte.lora_A": a, "tr.wte.lora_B": b}), alpha=2)
    (module,) = adapter.modules.values()
    assert module.weight_shape == (10, 4)
    np.testing.assert_allclose(delta(module), (b.astype(np.float64) @ a).T, rtol=1e-12)


@pytest.mark.parametrize("enabled", [[True, False, True], [True, True, True], [False, True, True]])
@pytest.mark.parametrize("rslora", [False, True])
def test_loralib_merged_linear(enabled: list[bool], rslora: bool, tmp_path: Path) -> None:
    """Oracle: loralib's MergedLinear.merge_AB, a grouped 1-D convolution and zero padding, in torch."""
    rank, part, in_dim, alpha = 2, 5, 7, 6
    count = sum(enabled)
    a, b = values(rank * count, in_dim), values(part * count, rank)
    product = torch.nn.functional.conv1d(
        torch.from_numpy(a)[None].double(), torch.from_numpy(b)[..., None].double(), groups=count
    )[0]
    index = torch.zeros(len(enabled), part, dtype=torch.bool)
    index[torch.tensor(enabled)] = True
    wanted = torch.zeros(part * len(enabled), in_dim, dtype=torch.float64)
    wanted[index.reshape(-1)] = product * alpha / (rank**0.5 if rslora else rank)
    content = {"state_dict": {"attn.lora_A": a, "attn.lora_B": b}, "enable_lora": enabled, "r": rank}
    adapter = load_adapter(loralib_file(tmp_path, content), alpha=alpha, rslora=rslora)
    (module,) = adapter.modules.values()
    np.testing.assert_allclose(delta(module), wanted.numpy(), rtol=1e-12, atol=1e-14)


def test_loralib_merged_linear_without_enable_lora_is_refused(tmp_path: Path) -> None:
    file = loralib_file(tmp_path, {"attn.lora_A": values(4, 7), "attn.lora_B": values(10, 2)})
    with pytest.raises(AdapterError, match="loralib's MergedLinear; add its enable_lora"):
        load_adapter(file, alpha=4)


def test_loralib_convolution_is_refused(tmp_path: Path) -> None:
    file = loralib_file(tmp_path, {"conv.lora_A": values(6, 12), "conv.lora_B": values(15, 6), "r": 2})
    with pytest.raises(
        AdapterError,
        match=r"rank 2 is stated, but the factors have rank 6 \(a multiple means loralib's ConvLoRA",
    ):
        load_adapter(file, alpha=4)


def test_loralib_lists_every_tensor_it_does_not_know(tmp_path: Path) -> None:
    content = {"q.lora_A": values(2, 4), "q.lora_B": values(3, 2), "q.weight": values(3, 4), "x": values(1)}
    with pytest.raises(AdapterError, match=r"(?s)q\.weight: neither.*x: neither"):
        load_adapter(loralib_file(tmp_path, content), alpha=4)


# --- plain -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        {**PAIR, "alpha": 8},
        {**PAIR, "alpha": torch.tensor(8.0), "r": 2},
        {"state_dict": PAIR, "lora_alpha": 8, "rank": 2, "epoch": 3},
        {"model": PAIR, "config": {"lora_alpha": 8, "lora_r": 2, "lr": 1e-3}},
        {"model": PAIR, "lora_config": {"alpha": 8, "r": 2, "lr": 1e-3}},
        {"lora": PAIR, "scaling": 4.0},
    ],
)
def test_plain_dicts_that_carry_alpha(content: dict[str, Any], tmp_path: Path) -> None:
    adapter = load_adapter(loralib_file(tmp_path, content))
    (module,) = adapter.modules.values()
    assert (adapter.format, module.path, module.scaling) == ("plain", "layer.0.q", 4.0)


def test_plain_bare_state_dict_needs_alpha(tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", PAIR)
    with pytest.raises(AdapterError, match="alpha: stated nowhere in the file; give --alpha"):
        load_adapter(file)
    (module,) = load_adapter(file, alpha=1, rslora=True).modules.values()
    assert module.scaling == pytest.approx(2**-0.5)


def test_plain_stated_alpha_and_option_must_agree(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="alpha: the file says 8, the option 4"):
        load_adapter(loralib_file(tmp_path, {**PAIR, "alpha": 8}), alpha=4)


def test_plain_is_what_two_linears_compute(tmp_path: Path) -> None:
    class Lora(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A, self.B = torch.nn.Linear(6, 2, bias=False), torch.nn.Linear(2, 5, bias=False)

    model = torch.nn.ModuleDict({"head": Lora()})
    torch.save(model.state_dict(), tmp_path / "m.pth")
    (module,) = load_adapter(tmp_path / "m.pth", alpha=2).modules.values()
    x = torch.randn(3, 6)
    wanted = model["head"].B(model["head"].A(x)).detach().numpy()
    np.testing.assert_allclose(x.numpy() @ delta(module).T, wanted, rtol=1e-5, atol=1e-6)


# --- kohya -----------------------------------------------------------------------------------------------


def kohya(**extra: np.ndarray) -> dict[str, np.ndarray]:
    names = {
        "lora_unet_down_blocks_0_attn_to_q": (values(4, 8), values(8, 4), np.float32(2)),
        "lora_te1_text_model_layers_0_q_proj": (values(2, 8), values(8, 2), None),
        "lora_unet_conv_in": (values(4, 3, 3, 3), values(8, 4, 1, 1), np.float32(4)),
    }
    tensors: dict[str, np.ndarray] = {}
    for path, (down, up, alpha) in names.items():
        tensors |= {f"{path}.lora_down.weight": down, f"{path}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{path}.alpha"] = np.asarray(alpha)
    return tensors | extra


def test_kohya(tmp_path: Path) -> None:
    adapter = load_adapter(write(tmp_path / "style.safetensors", kohya()))
    by_path = {module.path: module for module in adapter.modules.values()}
    assert adapter.flattened
    assert by_path["down_blocks_0_attn_to_q"].scaling == 0.5
    assert by_path["down_blocks_0_attn_to_q"].component == "unet"
    assert by_path["text_model_layers_0_q_proj"].scaling == 1.0, "without alpha, alpha = rank"
    assert by_path["text_model_layers_0_q_proj"].component == "text_encoder"
    assert by_path["conv_in"].kind == "conv"
    assert by_path["conv_in"].weight_shape == (8, 3, 3, 3)


def test_kohya_one_component(tmp_path: Path) -> None:
    file = write(tmp_path / "style.safetensors", kohya())
    adapter = load_adapter(file, component="text_encoder")
    assert [module.path for module in adapter.modules.values()] == ["text_model_layers_0_q_proj"]
    assert adapter.notes == ("2 modules of other components were ignored",)
    with pytest.raises(AdapterError, match=r"(?s)no component 'vae'.*text_encoder, unet"):
        load_adapter(file, component="vae")


def test_kohya_dora_scale_for_each_output(tmp_path: Path) -> None:
    scale = np.abs(values(8, 1))
    name = "lora_unet_down_blocks_0_attn_to_q.dora_scale"
    adapter = load_adapter(write(tmp_path / "a.safetensors", kohya(**{name: scale})))
    (module,) = [m for m in adapter.modules.values() if m.magnitude is not None]
    np.testing.assert_array_equal(module.magnitude, scale[:, 0])
    with pytest.raises(AdapterError, match=r"dora_scale \(1, 8\) has a norm for each input"):
        load_adapter(write(tmp_path / "b.safetensors", kohya(**{name: scale.T.copy()})))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("lora_unet_x.lora_mid.weight", "a Tucker-decomposed convolution"),
        ("lora_unet_x.hada_w1_a", "LoHa"),
        ("lora_unet_x.lokr_w1", "LoKr"),
        ("lora_unet_x.oft_blocks", "OFT"),
        ("lora_unet_x.diff", "a full-weight difference"),
        ("lora_unet_x.other", "not a tensor name of kohya's files"),
    ],
)
def test_kohya_refuses_lycoris_by_name(name: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"{name}: {what}"):
        load_adapter(write(tmp_path / "a.safetensors", kohya(**{name: values(2, 2)})))


def test_kohya_cannot_be_written_as_peft(tmp_path: Path) -> None:
    adapter = load_adapter(write(tmp_path / "a.safetensors", kohya()))
    with pytest.raises(AdapterError, match="kohya's files have no dots"):
        save_adapter(adapter, tmp_path / "out")


# --- diffusers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("down", "up", "path", "component"),
    [
        ("unet.mid.attn.to_q.lora_A.weight", "unet.mid.attn.to_q.lora_B.weight", "mid.attn.to_q", "unet"),
        ("unet.mid.to_q.lora.down.weight", "unet.mid.to_q.lora.up.weight", "mid.to_q", "unet"),
        (
            "unet.mid.processor.to_out_lora.down.weight",
            "unet.mid.processor.to_out_lora.up.weight",
            "mid.to_out.0",
            "unet",
        ),
        ("a.processor.to_k_lora.down.weight", "a.processor.to_k_lora.up.weight", "a.to_k", None),
        (
            "text_encoder_2.l.q_proj.lora_linear_layer.down.weight",
            "text_encoder_2.l.q_proj.lora_linear_layer.up.weight",
            "l.q_proj",
            "text_encoder_2",
        ),
        ("transformer.b.0.ff.lora_A.weight", "transformer.b.0.ff.lora_B.weight", "b.0.ff", "transformer"),
    ],
)
def test_diffusers_spellings(down: str, up: str, path: str, component: str | None, tmp_path: Path) -> None:
    adapter = load_adapter(write(tmp_path / "a.safetensors", {down: values(2, 4), up: values(4, 2)}))
    (module,) = adapter.modules.values()
    assert (adapter.format, module.path, module.component) == ("diffusers", path, component)
    assert module.scaling == 1.0, "without alpha, alpha = rank"


def test_diffusers_alpha_keys(tmp_path: Path) -> None:
    tensors = {
        **flux(2, 4),
        "transformer.b.0.q.alpha": np.float32(1),
        "transformer.b.1.q.alpha": np.float32(8),
    }
    tensors = {name: np.asarray(value) for name, value in tensors.items()}
    adapter = load_adapter(write(tmp_path / "a.safetensors", tensors))
    assert [module.scaling for module in adapter.modules.values()] == [0.5, 2.0]


def test_diffusers_metadata_carries_the_config(tmp_path: Path) -> None:
    config = {"r": 2, "lora_alpha": 8, "rank_pattern": {"b.1.q": 4}, "use_rslora": False}
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}
    adapter = load_adapter(write(tmp_path / "a.safetensors", flux(2, 4), metadata))
    assert [module.scaling for module in adapter.modules.values()] == [4.0, 2.0]
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 3, "transformer.lora_alpha": 8})}
    with pytest.raises(AdapterError, match=r"rank 3 is stated, but lora_A \(2, 4\)"):
        load_adapter(write(tmp_path / "b.safetensors", flux(2), metadata))
    with pytest.raises(AdapterError, match=r"lora_adapter_metadata can.t be read as JSON"):
        load_adapter(write(tmp_path / "c.safetensors", flux(2), {"lora_adapter_metadata": "]["}))


def test_diffusers_unequal_ranks_without_alpha_have_scaling_one(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", flux(2, 4))
    assert [module.scaling for module in load_adapter(file).modules.values()] == [1.0, 1.0]
    assert [module.scaling for module in load_adapter(file, alpha=4).modules.values()] == [2.0, 1.0]


# --- detection -------------------------------------------------------------------------------------------


def test_unknown_names_list_what_was_seen_and_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        load_adapter(write(tmp_path / "a.safetensors", {"a.weight": values(2, 2), "b.weight": values(2)}))
    text = str(caught.value)
    assert "is not in a known adapter format" in text
    assert "seen: a.weight, b.weight" in text
    assert all(f"{name} expects " in text for name in FORMATS)


def test_ambiguous_names_ask_for_the_format(tmp_path: Path) -> None:
    tensors = {"m.lora_A": values(2, 4), "m.lora_B": values(3, 2), "n.A.weight": values(2, 4)}
    tensors["n.B.weight"] = values(3, 2)
    file = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(AdapterError, match=r"(?s)looks like several formats: loralib, plain.*--format"):
        load_adapter(file, alpha=2)
    with pytest.raises(AdapterError, match=r"n\.A\.weight: neither a LoRA factor"):
        load_adapter(file, alpha=2, format="loralib")
    with pytest.raises(AdapterError, match="the format 'gguf' is unknown"):
        load_adapter(file, format="gguf")


def test_component_of_a_file_that_serves_one_model_is_a_path(tmp_path: Path) -> None:
    tensors = {f"{part}.{name}": values for part in ("one", "two") for name, values in PAIR.items()}
    file = write(tmp_path / "a.safetensors", tensors)
    part = load_adapter(file, alpha=2, component="one")
    assert part.scope == "one"
    assert [module.path for module in part.modules.values()] == ["one.layer.0.q"]
    assert set(part.tensor_names) == {name for name in tensors if name.startswith("one.")}
    assert "ignored, not below 'one'" in part.notes[-1]
    # Not a part of the adapter's paths: perhaps of the base's, which is known when it is placed.
    whole = load_adapter(file, alpha=2, component="unet")
    assert (whole.scope, len(whole.tensor_names)) == ("unet", len(tensors))
