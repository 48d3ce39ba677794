"""Files that are wrong: whatever the bytes, an adapter or one clear error."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from format_cases import GOOD, PAIR, flux, loralib_file, peft_folder, values, write
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_export.errors import AdapterError
from lora_export.formats import load_adapter

A, B = GOOD


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
    "beyond float32": (
        {A: np.array([[1e39, 1, 2, 3]] * 2), B: GOOD[B]},
        "2 of 8 values are NaN or infinite, or too large for float32",
    ),
    "integers": ({A: np.ones((2, 4), np.int32), B: GOOD[B]}, "dtype int32, wanted a float"),
    "no values": ({A: np.ones((0, 4), np.float32), B: np.ones((3, 0), np.float32)}, "holds no values"),
    "magnitude": (
        {**GOOD, "base_model.model.m.lora_magnitude_vector": values(4)},
        r"magnitude \(4,\), wanted 3 values",
    ),
    "twice": ({**GOOD, "m.lora_A.weight": GOOD[A]}, "m: lora_a exists twice"),
    "two biases": (
        {**GOOD, "base_model.model.n.bias": values(3), "n.base_layer.bias": values(3)},
        r"a second, different value of n\.bias",
    ),
    "another tuner's tensor": (
        {**GOOD, "base_model.model.m.lora_diag": values(2)},
        "m.lora_diag: not a tensor of a LoRA adapter",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_tensors(name: str, tmp_path: Path) -> None:
    tensors, message = WRONG[name]
    with pytest.raises(AdapterError, match=message):
        load_adapter(peft_folder(tmp_path, tensors))


@pytest.mark.parametrize("alpha", [1e20, 1e15, 1e-15, 1e-40])
def test_an_alpha_by_which_a_change_is_infinite_or_none(alpha: float, tmp_path: Path) -> None:
    """In float32; a merge by 1e-40 said that nothing of the change was lost, `inspect --json` Infinity."""
    file = tmp_path / "a.pt"
    tensors = {name: torch.from_numpy(values) for name, values in PAIR.items()}
    torch.save(tensors | {"alpha": alpha}, file)
    with pytest.raises(AdapterError, match=r"wanted a number between 1e-15 and 1e\+15"):
        load_adapter(file)


def test_tensors_that_torch_has_not_negated_yet(tmp_path: Path) -> None:
    """PyTorch saves such a view as it is; numpy refused it."""
    file, turned = tmp_path / "a.pt", tmp_path / "b.pt"
    tensors = {name: torch.from_numpy(values) for name, values in PAIR.items()}
    torch.save({name: torch._neg_view(tensor) for name, tensor in tensors.items()} | {"alpha": 1}, file)
    torch.save({name: -tensor for name, tensor in tensors.items()} | {"alpha": 1}, turned)
    (found,), (wanted,) = (load_adapter(path).modules.values() for path in (file, turned))
    assert np.array_equal(found.lora_a, wanted.lora_a)
    assert np.array_equal(found.lora_b, wanted.lora_b)


# Names of one module in two spellings.
TWICE = {
    "kohya": ("lora_te_m.lora_down.weight", "lora_te_m.lora_up.weight", "lora_te_m.alpha"),
    "kohya, SDXL's": ("lora_te1_m.lora_down.weight", "lora_te1_m.lora_up.weight", "lora_te1_m.alpha"),
    "PEFT": ("base_model.model.m.lora_A.weight", "base_model.model.m.lora_B.weight"),
    "a state dict": ("m.lora_A.weight", "m.lora_B.weight"),
}


@pytest.mark.parametrize(("one", "other"), [("kohya", "kohya, SDXL's"), ("PEFT", "a state dict")])
def test_both_names_of_what_exists_twice_are_said(one: str, other: str, tmp_path: Path) -> None:
    shapes = ((2, 4), (3, 2), ())
    pairs = list(zip(TWICE[one], TWICE[other], strict=True))
    tensors = {name: values(*shape) for pair, shape in zip(pairs, shapes, strict=False) for name in pair}
    file = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(AdapterError, match="exists twice") as caught:
        load_adapter(file, alpha=2)
    twice = [problem for problem in caught.value.problems if "exists twice" in problem]
    assert len(twice) == len(pairs)
    for names in pairs:
        assert any(all(f" {name} " in f"{problem} " for name in names) for problem in twice), names


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
        ("[1, 2]", "is JSON but not an adapter config"),
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
    with pytest.raises(AdapterError, match=r"no adapter at .*: it does not exist"):
        load_adapter(tmp_path / "nothing")
    with pytest.raises(AdapterError, match=r"hf download owner/name --local-dir name"):
        load_adapter("owner/name")
    with pytest.raises(AdapterError, match=r"holds 0 weights files but no adapter_config\.json"):
        load_adapter(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AdapterError, match="is a model, not an adapter"):
        load_adapter(tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "one/adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="holds no adapter itself, only in its subfolders"):
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
        (b"", "it has 0 bytes"),
        (whole[:4], "it has 4 bytes"),
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
    torch.save({"m.A.weight": torch.ones(1, 1), "r": 10**4000}, file)
    with pytest.raises(AdapterError, match="weights_only=True: Unsupported") as caught:
        load_adapter(file)
    assert "`False`" not in str(caught.value)  # torch advises to load it without
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
        (f'{{"a": {entry}, "a": {entry}}}', "the key 'a' occurs twice"),
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
