"""Numbers of the command line that are longer than any record holds, and records that would not be read."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import click
import numpy as np
import pytest
from small_graphs import adapter, graph, linear, save

from lora_export import (
    AdapterError,
    AdapterSession,
    GraphError,
    bank_onnx,
    load_adapter,
    merge_onnx,
    swap_onnx,
)
from lora_export.cli import _run
from lora_export.commands import COMMANDS
from lora_export.modes import swap_onnx as swap
from lora_export.storage.manifest import Manifest

WIDTH = 8
TEXT = f"g (float[batch,{WIDTH}] x) => (float[batch,{WIDTH}] y) {{ y = MatMul(x, a_weight) }}"


def numbers() -> list[tuple[str, click.Parameter]]:
    """Return all options of all verbs that take a whole number."""
    found = []
    for verb, place in COMMANDS.items():
        module, _, attribute = place.partition(":")
        command = getattr(import_module(module), attribute)
        found += [
            (f"{verb} {parameter.name}", parameter)
            for parameter in command.params
            if isinstance(parameter.type, click.types.IntParamType | click.IntRange)
        ]
    return found


@pytest.mark.parametrize(("name", "option"), numbers(), ids=[name for name, _ in numbers()])
def test_no_option_takes_a_number_that_records_do_not_hold(name: str, option: click.Parameter) -> None:
    small = 3
    assert option.type.convert(str(small), option, None) == small
    for number in (2**63, 10**30, 10**400, 10**4000):
        with pytest.raises(click.BadParameter):
            option.type.convert(str(number), option, None)


def base(folder: Path) -> Path:
    return save(graph(TEXT, {"a.weight": np.eye(WIDTH, dtype=np.float32)}), folder, "base.onnx")


@pytest.mark.parametrize("digits", [10, 19, 400, 5000])
def test_a_shape_of_any_length_ends_in_a_message(digits: int, tmp_path: Path, capsys) -> None:
    arguments = ["build-engine", str(base(tmp_path)), "--target", "rtx-4090", "-o", str(tmp_path / "e")]
    assert _run([*arguments, "--dry-run", "--shape", "batch=0002"], False) == 0
    capsys.readouterr()
    for number in ("9" * digits, "٣"):
        assert _run([*arguments, "--dry-run", "--shape", f"batch={number}"], False) == 1
        assert "batch=" in capsys.readouterr().err


@pytest.mark.parametrize("most", [2**31, 2**63, 10**400])
def test_max_rank_is_the_length_of_an_axis(most: int, tmp_path: Path, monkeypatch) -> None:
    """Also where that bound is missing, no graph is written whose own readers refuse it."""
    given, out = adapter(linear("a", WIDTH, WIDTH)), tmp_path / "swap.onnx"
    with pytest.raises(AdapterError, match="max_rank"):
        swap_onnx(base(tmp_path), out, adapter=given, max_rank=most)
    if most >= 2**63:
        monkeypatch.setattr(swap, "MAX_SIZE", 10**500)
        with pytest.raises(GraphError):
            swap_onnx(base(tmp_path), out, adapter=given, max_rank=most)
    assert [file.name for file in tmp_path.iterdir() if "swap" in file.name] == []


def test_no_manifest_is_written_that_can_not_be_read(tmp_path: Path) -> None:
    good = Manifest(mode="merge", base=[], adapters=[], plan={"rows": []}, rounding={})
    good.save(tmp_path / "good.lora.json")
    assert Manifest.read(tmp_path / "good.lora.json") == good
    path = tmp_path / "bad.lora.json"
    for wrong in ({"plan": {"rows": 5}}, {"rounding": {"total": 10**400}}, {"versions": {"a": 1}}):
        values = {"mode": "merge", "base": [], "adapters": [], "plan": {}, "rounding": {}, **wrong}
        with pytest.raises(GraphError):
            Manifest(**values).save(path)
    assert not path.exists()


@pytest.mark.parametrize("number", [10**400, -(10**5000)], ids=["10^400", "-10^5000"])
def test_numbers_of_callers_that_no_float_holds_are_errors(number: int, tmp_path: Path) -> None:
    one, graph_file, banked = adapter(linear("a", WIDTH, WIDTH)), base(tmp_path), tmp_path / "bank.onnx"
    with pytest.raises(AdapterError) as caught:
        merge_onnx(graph_file, [one], tmp_path / "m.onnx", weights=[number])
    assert any("finite number" in problem for problem in caught.value.problems)
    bank_onnx(graph_file, {"a": one}, banked)
    session, feed = AdapterSession(banked), {"x": np.ones((1, WIDTH), np.float32)}
    with pytest.raises(AdapterError) as caught:
        session.run(feed, adapters=[{"a": number}])
    assert any("finite number" in problem for problem in caught.value.problems)
    for option in ("alpha", "rank"):
        with pytest.raises(AdapterError, match="not a valid scaling"):
            load_adapter(tmp_path, **{option: number})  # type: ignore[arg-type]
