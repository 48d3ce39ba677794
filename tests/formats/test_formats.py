"""The formats beside PEFT, and files that are wrong: each line of the list is one message."""

from __future__ import annotations

import contextlib
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_export.adapter import Adapter, LoraModule
from lora_export.errors import AdapterError
from lora_export.formats import FORMATS, load_adapter, save_adapter
from lora_export.formats.reading.tensors import read_header, read_safetensors, write_safetensors

RANDOM = np.random.default_rng(0)


def values(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(dtype)


def write(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> Path:
    write_safetensors(path, tensors, metadata or {})
    return path


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


def loralib_file(tmp_path: Path, content: dict[str, Any]) -> Path:
    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: convert(inner) for key, inner in value.items()}
        return torch.from_numpy(value) if isinstance(value, np.ndarray) else value

    torch.save(convert(content), tmp_path / "adapter.pt")
    return tmp_path / "adapter.pt"


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
        match=r"rank 2 is stated, but the factors have rank 6 \(a multiple is loralib's ConvLoRA",
    ):
        load_adapter(file, alpha=4)


def test_loralib_lists_every_tensor_it_does_not_know(tmp_path: Path) -> None:
    content = {"q.lora_A": values(2, 4), "q.lora_B": values(3, 2), "q.weight": values(3, 4), "x": values(1)}
    with pytest.raises(AdapterError, match=r"(?s)q\.weight: neither.*x: neither"):
        load_adapter(loralib_file(tmp_path, content), alpha=4)


# --- plain -----------------------------------------------------------------------------------------------

PAIR = {"layer.0.q.A.weight": values(2, 4), "layer.0.q.B.weight": values(3, 2)}


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
    assert adapter.notes == ("2 modules of other components were left aside",)
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
        ("lora_unet_x.other", "not a name that kohya's files have"),
    ],
)
def test_kohya_refuses_lycoris_by_name(name: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"{name}: {what}"):
        load_adapter(write(tmp_path / "a.safetensors", kohya(**{name: values(2, 2)})))


def test_kohya_cannot_be_written_as_peft(tmp_path: Path) -> None:
    adapter = load_adapter(write(tmp_path / "a.safetensors", kohya()))
    with pytest.raises(AdapterError, match="have lost the dots"):
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


def flux(*ranks: int) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for i, rank in enumerate(ranks):
        tensors[f"transformer.b.{i}.q.lora_A.weight"] = values(rank, 4)
        tensors[f"transformer.b.{i}.q.lora_B.weight"] = values(6, rank)
    return tensors


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
    assert "is in no adapter format that we know" in text
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
    with pytest.raises(AdapterError, match="there is no format 'gguf'"):
        load_adapter(file, format="gguf")


def test_component_of_a_file_that_serves_one_model_is_a_path(tmp_path: Path) -> None:
    tensors = {f"{part}.{name}": values for part in ("one", "two") for name, values in PAIR.items()}
    file = write(tmp_path / "a.safetensors", tensors)
    part = load_adapter(file, alpha=2, component="one")
    assert part.scope == "one"
    assert [module.path for module in part.modules.values()] == ["one.layer.0.q"]
    assert set(part.tensor_names) == {name for name in tensors if name.startswith("one.")}
    assert "left aside, not below 'one'" in part.notes[-1]
    # Not a part of the adapter's paths: perhaps of the base's, which is known when it is placed.
    whole = load_adapter(file, alpha=2, component="unet")
    assert (whole.scope, len(whole.tensor_names)) == ("unet", len(tensors))


# --- bad input -------------------------------------------------------------------------------------------

GOOD = {"base_model.model.m.lora_A.weight": values(2, 4), "base_model.model.m.lora_B.weight": values(3, 2)}
A, B = GOOD


def peft_folder(tmp_path: Path, tensors: dict[str, np.ndarray], config: Any = None) -> Path:
    text = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} if config is None else config
    (tmp_path / "adapter_config.json").write_text(text if isinstance(text, str) else json.dumps(text))
    write(tmp_path / "adapter_model.safetensors", tensors)
    return tmp_path


WRONG: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "half of a pair": ({A: GOOD[A]}, r"m: lora_B is missing"),
    "other half": ({B: GOOD[B]}, r"m: lora_A is missing"),
    "only a magnitude": (
        {**GOOD, "base_model.model.n.lora_magnitude_vector": values(3)},
        "n: lora_A and lora_B is missing",
    ),
    "ranks differ": ({A: values(3, 4), B: GOOD[B]}, "have no common rank"),
    "transposed": ({A: values(4, 2), B: values(2, 3)}, "transposed"),
    "a vector": ({A: values(2), B: GOOD[B]}, "wanted two matrices"),
    "NaN": ({A: np.full((2, 4), np.nan, np.float32), B: GOOD[B]}, "8 of 8 values are NaN or infinite"),
    "infinity in bf16": (
        {A: np.array([[np.inf, 1, 2, 3]] * 2).astype(ml_dtypes.bfloat16), B: GOOD[B]},
        "2 of 8 values are NaN or infinite",
    ),
    "integers": ({A: np.ones((2, 4), np.int32), B: GOOD[B]}, "dtype int32, wanted a float"),
    "no values": ({A: np.ones((0, 4), np.float32), B: np.ones((3, 0), np.float32)}, "holds no values"),
    "magnitude": (
        {**GOOD, "base_model.model.m.lora_magnitude_vector": values(4)},
        r"magnitude \(4,\), wanted 3 values",
    ),
    "twice": ({**GOOD, "m.lora_A.weight": GOOD[A]}, "m: lora_a is there twice"),
    "two biases": (
        {**GOOD, "base_model.model.n.bias": values(3), "n.base_layer.bias": values(3)},
        r"a second, different value of n\.bias",
    ),
    "another tuner's tensor": (
        {**GOOD, "base_model.model.m.lora_diag": values(2)},
        "m.lora_diag: not a tensor that a LoRA adapter has",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_tensors(name: str, tmp_path: Path) -> None:
    tensors, message = WRONG[name]
    with pytest.raises(AdapterError, match=message):
        load_adapter(peft_folder(tmp_path, tensors))


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    tensors = {
        **GOOD,
        A: np.full((2, 4), np.inf, np.float32),
        "base_model.model.n.lora_A.weight": values(2, 2),
    }
    with pytest.raises(AdapterError) as caught:
        load_adapter(peft_folder(tmp_path, tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": -1}))
    assert len(caught.value.problems) >= 3
    assert "has" in caught.value.message
    assert str(len(caught.value.problems)) in caught.value.message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{not json", "can't be read as JSON"),
        ("[1, 2]", "is JSON but no adapter config"),
        ('{"architectures": ["Llama"]}', "it has no 'peft_type'"),
    ],
)
def test_configs_that_are_none(config: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=message):
        load_adapter(peft_folder(tmp_path, GOOD, config))


@pytest.mark.parametrize(("option", "value"), [("alpha", 0), ("alpha", -2), ("rank", 0), ("rank", -1)])
def test_options_that_make_no_scaling(option: str, value: int, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"{option}: {value}, wanted a number above 0"):
        load_adapter(peft_folder(tmp_path, GOOD), **{option: value})  # type: ignore[arg-type]


def test_options_that_contradict_the_config(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path, GOOD)
    with pytest.raises(AdapterError, match=r"(?s)r: the config says 2, the option 3.*lora_alpha: the config"):
        load_adapter(folder, rank=3, alpha=9)
    with pytest.raises(AdapterError, match="use_rslora: the config says False, the option True"):
        load_adapter(folder, rslora=True)
    assert load_adapter(folder, rank=2, alpha=4, rslora=False).modules


def test_missing_things(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="there is no adapter at"):
        load_adapter(tmp_path / "nothing")
    with pytest.raises(AdapterError, match=r"hf download owner/name --local-dir name"):
        load_adapter("owner/name")
    with pytest.raises(AdapterError, match=r"holds 0 weights files and no adapter_config\.json"):
        load_adapter(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AdapterError, match="is a model, not an adapter"):
        load_adapter(tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "one/adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="holds adapters in its subfolders"):
        load_adapter(tmp_path)
    with pytest.raises(AdapterError, match="but no adapter_model"):
        load_adapter(tmp_path / "one")
    with pytest.raises(AdapterError, match=r"its name ends in '\.json'"):
        load_adapter(tmp_path / "config.json")


def test_an_empty_adapter(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is empty"):
        load_adapter(peft_folder(tmp_path, {}))
    with pytest.raises(AdapterError, match="the file has no LoRA tensors"):
        load_adapter(peft_folder(tmp_path, {"base_model.model.m.lora_velora_embed": values(2)}))


def test_damaged_safetensors(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", GOOD)
    whole = file.read_bytes()
    for content, message in (
        (b"", "it holds 0 bytes"),
        (whole[:4], "it holds 4 bytes"),
        (whole[:60], "its header claims"),
        (whole[:-3], "ends at byte"),
        (struct.pack("<Q", 2**60) + whole[8:], "its header claims"),
        (struct.pack("<Q", 4) + b"{}xx", "its header can't be read as JSON"),
        (struct.pack("<Q", 2) + b"[]", "its header is not a JSON object"),
        (struct.pack("<Q", 8) + b'{"a": 1}', "'a' has no dtype, shape or data_offsets"),
        (_header({"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}), "dtype F4 is not one of"),
        (_header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}), "needs 12 bytes"),
        (_header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}), "not counts"),
    ):
        file.write_bytes(content)
        with pytest.raises(AdapterError, match=r"is not a complete \.safetensors file") as caught:
            load_adapter(file, alpha=1)
        assert message in str(caught.value)


def _header(content: dict[str, Any]) -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text


def test_pickles_that_hold_code_or_are_damaged(tmp_path: Path) -> None:
    class Thing:
        pass

    Thing.__qualname__ = "Thing"
    globals()["Thing"] = Thing
    file = tmp_path / "a.pt"
    torch.save({"x": Thing()}, file)
    with pytest.raises(
        AdapterError, match=r"(?s)can't be loaded with weights_only=True.*would run their code"
    ):
        load_adapter(file)
    torch.save(PAIR | {"alpha": 1}, file)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(AdapterError, match="can't be loaded with weights_only=True"):
        load_adapter(file)
    file.write_bytes(b"")
    with pytest.raises(AdapterError, match="can't be loaded with weights_only=True"):
        load_adapter(file)
    torch.save(torch.ones(3), file)
    with pytest.raises(AdapterError, match="holds a Tensor, wanted a dict of tensors"):
        load_adapter(file)
    torch.save({"weird": {"x": torch.ones(2)}, 3: [torch.ones(1)]}, file)
    with pytest.raises(AdapterError, match=r"(?s)weird: dict.*3: list"):
        load_adapter(file)


# --- laws ------------------------------------------------------------------------------------------------

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, ml_dtypes.float8_e4m3fn]


@st.composite
def modules(draw: st.DrawFn) -> dict[str, LoraModule]:
    made: dict[str, LoraModule] = {}
    rslora, dora, bias = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    for i in range(draw(st.integers(1, 4))):
        rank, out_dim, in_dim = (draw(st.integers(1, 6)) for _ in range(3))
        kind = draw(st.sampled_from(["linear", "conv", "embedding"]))
        kernel = (3,) * draw(st.integers(1, 3)) if kind == "conv" else ()
        dtype = draw(st.sampled_from(DTYPES))
        bias_here = values(out_dim) if bias and not dora else None
        module = LoraModule(
            path=f"block.{i}.m",
            kind=kind,  # type: ignore[arg-type]
            lora_a=values(rank, in_dim, *kernel, dtype=dtype),
            lora_b=values(out_dim, rank, *(1 for _ in kernel), dtype=dtype),
            alpha=draw(st.one_of(st.integers(1, 64), st.floats(0.1, 64))),
            rank=rank,
            rslora=rslora,
            magnitude=values(out_dim) if dora else None,
            lora_bias=bias_here,
        )
        made[module.key] = module
    return made


@given(modules())
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_what_is_read(tmp_path_factory: pytest.TempPathFactory, made: Any) -> None:
    folder = tmp_path_factory.mktemp("a")
    save_adapter(Adapter(name="x", source="x", format="peft", modules=made), folder)
    again = load_adapter(folder).modules
    assert again.keys() == made.keys()
    for key, module in made.items():
        assert (again[key].alpha, again[key].rank, again[key].kind) == (
            module.alpha,
            module.rank,
            module.kind,
        )
        for name in ("lora_a", "lora_b", "magnitude", "lora_bias"):
            ours, theirs = getattr(again[key], name), getattr(module, name)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert ours.dtype == theirs.dtype
                np.testing.assert_array_equal(ours, theirs)


@given(st.dictionaries(st.text(min_size=1, max_size=8), st.lists(st.integers(0, 3), max_size=3), max_size=5))
@settings(max_examples=60, deadline=None)
def test_our_safetensors_are_the_reference_readers_safetensors(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, list[int]]
) -> None:
    from safetensors.numpy import load_file

    shapes.pop("__metadata__", None)
    file = tmp_path_factory.mktemp("a") / "x.safetensors"
    tensors = {name: values(*shape) for name, shape in shapes.items()}
    tensors = {name: np.asarray(value, np.float32) for name, value in tensors.items()}
    write_safetensors(file, tensors, {"format": "pt"})
    theirs, ours = load_file(file), read_safetensors(file)[0]
    assert theirs.keys() == ours.keys() == read_header(file).entries.keys() == tensors.keys()
    for name, wanted in tensors.items():
        np.testing.assert_array_equal(theirs[name], wanted)
        np.testing.assert_array_equal(ours[name], wanted)


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    adapter = load_adapter(peft_folder(tmp_path, GOOD))
    for name in ("b", "c"):
        save_adapter(adapter, tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "c" / file).read_bytes()


# --- whatever the bytes: an adapter, or one error of ours ------------------------------------------------


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_damage_to_the_file_is_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = peft_folder(tmp_path_factory.mktemp("a"), GOOD)
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(AdapterError):
        assert load_adapter(folder).modules


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = [
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "use_bdlora",
]
KEYS += [
    "target_parameters",
    "modules_to_save",
    "bias",
    "fan_in_fan_out",
    "init_lora_weights",
    "peft_type",
    "x",
]


@given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4))
@settings(max_examples=300, deadline=None)
def test_any_config_is_an_adapter_or_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, change: dict[str, Any]
) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **change}
    folder = peft_folder(tmp_path_factory.mktemp("a"), GOOD, config)
    with contextlib.suppress(AdapterError):
        (module,) = load_adapter(folder).modules.values()
        assert 0 < module.scaling < float("inf")


@pytest.mark.parametrize(
    ("tensors", "change", "message"),
    [
        ({}, {"use_dora": True}, "m: has no magnitude, but the config's use_dora is on"),
        ({}, {"lora_bias": True}, "m: has no lora_bias, but the config's lora_bias is on"),
        ({"m.lora_magnitude_vector": values(3)}, {}, "m: has a magnitude, but the config's use_dora is off"),
        ({"m.lora_B.bias": values(3)}, {}, "m: has a lora_bias, but the config's lora_bias is off"),
        ({"m.bias": np.full(3, np.nan)}, {}, r"m\.bias: 3 of 3 values are NaN"),
        ({}, {"use_rslora": "yes"}, "config use_rslora: 'yes', wanted true or false"),
        ({}, {"r": 2.5}, "config r: 2.5, wanted a whole number"),
        ({}, {"lora_alpha": float("inf")}, "config lora_alpha: inf, wanted a number above 0"),
        ({}, {"target_parameters": "m.weight"}, "config target_parameters: 'm.weight', wanted a list"),
        ({}, {"use_bdlora": {"nblocks": 0}}, "nblocks is 0, wanted a whole number above 0"),
    ],
)
def test_config_and_tensors_contradict(
    tensors: dict[str, np.ndarray], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    named = {f"base_model.model.{name}": array for name, array in tensors.items()}
    folder = peft_folder(tmp_path, GOOD | named, {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **change})
    with pytest.raises(AdapterError, match=message):
        load_adapter(folder)


def test_a_header_with_a_name_twice_or_odd_metadata(tmp_path: Path) -> None:
    entry = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    for text, message in (
        (f'{{"a": {entry}, "a": {entry}}}', "'a' is there twice"),
        ('{"__metadata__": [1]}', "its __metadata__ is not a JSON object"),
    ):
        file = tmp_path / "a.safetensors"
        file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(4))
        with pytest.raises(AdapterError, match=message):
            load_adapter(file, alpha=1)


def test_settings_of_a_checkpoint_that_we_cannot_honour(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="config/use_dora: true is not supported in this format"):
        load_adapter(loralib_file(tmp_path, {**PAIR, "config": {"alpha": 8, "use_dora": True}}))
    with pytest.raises(AdapterError, match=r"alpha_pattern: .* is not supported in this format"):
        load_adapter(loralib_file(tmp_path, {**PAIR, "alpha": 8, "alpha_pattern": {"q": 1}}))


def test_flat_diffusers_metadata_serves_every_component(tmp_path: Path) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 8})}
    (module,) = load_adapter(write(tmp_path / "a.safetensors", flux(2), metadata)).modules.values()
    assert module.scaling == 4.0
