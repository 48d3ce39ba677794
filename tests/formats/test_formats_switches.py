"""A file that says it is DoRA (or more than LoRA) is no plain LoRA, wherever it says so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_cases import flux, peft_folder, values, write

from lora_export.adapter import Adapter, LoraModule
from lora_export.errors import AdapterError
from lora_export.formats import load_adapter, save_adapter
from lora_export.formats.reading.wrappers import MOST_WORDS

NUMBERS = {"r": 2, "lora_alpha": 8}


def _metadata(component: str = "transformer.", **config: Any) -> dict[str, str]:
    stated = {f"{component}{key}": value for key, value in {**NUMBERS, **config}.items()}
    return {"lora_adapter_metadata": json.dumps(stated)}


def _kohya() -> dict[str, np.ndarray]:
    return {"lora_unet_x.lora_down.weight": values(2, 4), "lora_unet_x.lora_up.weight": values(6, 2)}


@pytest.mark.parametrize("component", ["transformer.", ""])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_dora", True, "has no magnitude, but the metadata lora_adapter_metadata's use_dora is on"),
        ("lora_bias", True, "has no lora_bias, but the metadata lora_adapter_metadata's lora_bias is on"),
        ("use_bdlora", {"nblocks": 2}, "config use_bdlora: .* is read in an adapter folder of PEFT's only"),
        ("target_parameters", ["q.weight"], "config target_parameters: .* only"),
        ("trainable_token_indices", [1, 2], "config trainable_token_indices: .* only"),
        ("use_qalora", True, "config use_qalora"),
    ],
)
def test_switches_of_diffusers_metadata(
    key: str, value: object, message: str, component: str, tmp_path: Path
) -> None:
    off = load_adapter(write(tmp_path / "off.safetensors", flux(2), _metadata(component, **{key: None})))
    assert len(off.modules) == 1
    file = write(tmp_path / "on.safetensors", flux(2), _metadata(component, **{key: value}))
    with pytest.raises(AdapterError) as caught:
        load_adapter(file)
    assert any(re.search(message, line) for line in caught.value.problems)


def test_a_magnitude_that_diffusers_metadata_know(tmp_path: Path) -> None:
    tensors = {**flux(2), "transformer.b.0.q.lora_magnitude_vector.weight": values(6)}
    (module,) = load_adapter(
        write(tmp_path / "a.safetensors", tensors, _metadata(use_dora=True))
    ).modules.values()
    assert module.magnitude is not None
    with pytest.raises(AdapterError) as caught:
        load_adapter(write(tmp_path / "b.safetensors", tensors, _metadata(use_dora=False)))
    assert "use_dora is off" in str(caught.value.problems)


def test_the_switch_of_one_component_is_not_anothers(tmp_path: Path) -> None:
    tensors = {**flux(2), "text_encoder.q.lora_A.weight": values(2, 4)}
    tensors |= {"text_encoder.q.lora_B.weight": values(6, 2)}
    tensors |= {"text_encoder.q.lora_magnitude_vector.weight": values(6)}
    stated = {**{f"transformer.{key}": value for key, value in NUMBERS.items()}}
    stated |= {f"text_encoder.{key}": value for key, value in {**NUMBERS, "use_dora": True}.items()}
    file = write(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(stated)})
    assert len(load_adapter(file).modules) == 2
    stated["transformer.use_dora"] = True
    file = write(tmp_path / "b.safetensors", tensors, {"lora_adapter_metadata": json.dumps(stated)})
    with pytest.raises(AdapterError) as caught:
        load_adapter(file)
    assert [line.partition(":")[0] for line in caught.value.problems] == ["b.0.q"]


@pytest.mark.parametrize(
    ("make", "metadata"),
    [
        (lambda: flux(2), {"use_dora": "true"}),
        (lambda: flux(2), {"transformer.use_dora": "True"}),
        (_kohya, {"ss_network_args": json.dumps({"dora_wd": "True"})}),
        (_kohya, {"ss_network_args": json.dumps({"dora_wd": True})}),
        (lambda: {"base_model.model.m.lora_A.weight": values(2, 4),
                  "base_model.model.m.lora_B.weight": values(3, 2)}, {"lora_alpha": "4", "use_dora": "1"}),
    ],
)  # fmt: skip
def test_dora_in_plain_metadata(make: Any, metadata: dict[str, str], tmp_path: Path) -> None:
    off = {key: value.replace("rue", "alse").replace("T", "F").replace("talse", "false")
           for key, value in metadata.items()}  # fmt: skip
    off = {key: "0" if value == "1" else value for key, value in off.items()}
    alpha = None if "lora_alpha" in metadata else 2
    load_adapter(write(tmp_path / "off.safetensors", make(), off), alpha=alpha)
    with pytest.raises(AdapterError) as caught:
        load_adapter(write(tmp_path / "on.safetensors", make(), metadata), alpha=alpha)
    assert "is on (DoRA)" in str(caught.value.problems)


@pytest.mark.parametrize("text", ["None", "{", "[1]", ""])
def test_arguments_that_are_no_object_say_nothing(text: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", _kohya(), {"ss_network_args": text})
    assert len(load_adapter(file, alpha=2).modules) == 1


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("lora_A.weight", "lora_embedding_B"),
        ("lora_embedding_A", "lora_B.weight"),
    ],
)
def test_factors_of_two_kinds_of_layer_are_no_pair(a: str, b: str, tmp_path: Path) -> None:
    tensors = {f"base_model.model.m.{a}": values(2, 4), f"base_model.model.m.{b}": values(4, 2)}
    with pytest.raises(AdapterError) as caught:
        load_adapter(peft_folder(tmp_path, tensors))
    assert "an embedding's" in str(caught.value.problems)


def test_an_embeddings_factors_with_a_bias_are_no_pair(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.m.lora_embedding_A": values(2, 4),
        "base_model.model.m.lora_embedding_B": values(4, 2),
        "base_model.model.m.lora_B.bias": values(4),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_bias": True}
    with pytest.raises(AdapterError) as caught:
        load_adapter(peft_folder(tmp_path, tensors, config))
    assert "an embedding's" in str(caught.value.problems)


def test_an_embeddings_bias_is_not_written(tmp_path: Path) -> None:
    """PEFT refuses to train one, and so could not load it."""
    module = LoraModule("m", "embedding", values(2, 4), values(4, 2), alpha=4, rank=2, lora_bias=values(4))
    made = Adapter("x", "x", "peft", {module.key: module})
    with pytest.raises(AdapterError, match="can't be saved in PEFT's format") as caught:
        save_adapter(made, tmp_path / "a")
    assert "no bias of lora_B for an embedding" in str(caught.value.problems)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model." + "a." * MOST_WORDS + "q.lora_A.weight",
        "lora_unet_" + "a_" * MOST_WORDS + "q.lora_down.weight",
        "transformer." + "a/" * MOST_WORDS + "q.lora.down.weight",
    ],
)
def test_names_of_too_many_words_are_refused(name: str, tmp_path: Path) -> None:
    up = name.replace("lora_A", "lora_B").replace("down", "up")
    file = write(tmp_path / "a.safetensors", {name: values(2, 4), up: values(6, 2)})
    with pytest.raises(AdapterError, match=f"2 tensors with names of more than {MOST_WORDS} words") as caught:
        load_adapter(file, alpha=2)
    assert all(len(line) < 100 for line in caught.value.problems)
