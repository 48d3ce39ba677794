"""What strangers wrote is written again as JSON: the same data, in a length and memory that suit it."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peaks
import pytest
from safetensors.numpy import save_file
from small_graphs import graph, random, save

from lora_export.commands.printing import print_json
from lora_export.untrusted.json_text import json_text

VALUES: list[Any] = [
    {},
    [],
    3,
    "\u65e5",
    {"b": [1, 2.5, None, True, {"a": "x\n"}], "a": ("y", "\u202e")},
    {"weight_map": {f"layer.{i}.weight": "model-00001-of-00002.safetensors" for i in range(20_000)}},
]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("options", [{}, {"indent": 4, "ensure_ascii": True}, {"sort_keys": True}])
def test_what_is_indented_is_what_json_writes(value: Any, options: dict[str, Any]) -> None:
    assert json_text(value, **options) == json.dumps(value, **{"indent": 1, "ensure_ascii": False} | options)


def nested(count: int) -> Any:
    value: Any = [11111111] * count
    for _ in range(60):
        value = [value]
    return value


def test_a_deep_list_does_not_grow() -> None:
    for count in (10, 100_000):
        value = nested(count)
        text, compact = json_text(value, indent=4), json.dumps(value)
        assert json.loads(text) == value
        assert len(text) <= 2 * len(compact) + 2**20
    assert json_text(nested(10)) == json.dumps(nested(10), indent=1)


def test_numbers_that_json_has_not_are_texts_where_they_must() -> None:
    value = {"a": [math.nan, (math.inf, 1.5)], "b": -math.inf}
    assert json.loads(json_text(value, allow_nan=False)) == {"a": ["nan", ["inf", 1.5]], "b": "-inf"}
    assert json_text(value) == json.dumps(value, indent=1)


@pytest.mark.parametrize(
    "text", ["##[error]x", "###[", "####[a", "##vso[x", "# #[", "\x7f\u202e\U000e0001\udcff"]
)
def test_printed_json_is_the_same_data(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_json(json.dumps({"a": [text, "\u65e5"]}, ensure_ascii=False, indent=1))
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"a": [text, "\u65e5"]}
    assert "##" not in printed
    assert all(char.isprintable() or char == "\n" for char in printed)


def base(folder: Path, config: Any) -> Path:
    folder.mkdir()
    text = "g (float[batch,8] x) => (float[batch,8] y) {\n y = MatMul(x, p_weight)\n}"
    save(graph(text, {"p.weight": random(8, 8)}), folder, "base.onnx")
    model = {"type": "x", "decoder": {"filename": "base.onnx"}}
    (folder / "genai_config.json").write_text(json.dumps({"model": model, "z": config}, ensure_ascii=False))
    return folder


def adapter(folder: Path) -> Path:
    folder.mkdir()
    tensors = {"lora_A": random(2, 8), "lora_B": random(8, 2)}
    save_file(
        {f"base_model.model.p.{name}.weight": np.ascontiguousarray(value) for name, value in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["p"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_config_takes_no_more_than_ten_times_its_file(tmp_path: Path) -> None:
    given = adapter(tmp_path / "adapter")
    small = base(tmp_path / "small", 1)
    deep = base(tmp_path / "deep", nested(1_300_000))
    wide = base(tmp_path / "wide", "\u65e5" * 3_000_000)

    def swap(folder: Path) -> list[object]:
        out = tmp_path / "out" / folder.name / "m.onnx"
        return ["swap-onnx", "--base", folder / "base.onnx", "--adapter", given, "-o", out]

    runs = [(deep, swap(deep)), (deep, ["inspect", "--json", deep]), (wide, ["inspect", "--json", wide])]
    found = peaks.measured([swap(small), ["inspect", "--json", small]], [run for _, run in runs])
    for (folder, run), (code, _, err, peak, _) in zip(runs, found, strict=True):
        config = folder / "genai_config.json"
        assert code == 0, err
        assert peak <= peaks.allowed(config), f"{run[0]} {folder.name}: {peak / 1e6:.0f} MB"
    written = tmp_path / "out" / "deep" / "genai_config.json"
    assert written.stat().st_size <= 2 * (deep / "genai_config.json").stat().st_size + 2**20
    wanted = json.loads((deep / "genai_config.json").read_text())
    wanted["model"]["decoder"]["filename"] = "m.onnx"
    assert json.loads(written.read_text()) == wanted
