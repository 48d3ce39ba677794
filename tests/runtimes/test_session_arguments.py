"""Arguments of a session that are mistakes: an error says what is wanted, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import session_graphs
import tiny

from lora_export import AdapterSession, load_adapter
from lora_export.errors import AdapterError, BackendError

NUMBERS = [
    ({"max_bytes": float("nan")}, "max_bytes is nan, wanted a whole number"),
    ({"max_adapters": 1.5}, "max_adapters is 1.5, wanted a whole number"),
    ({"threads": True}, "threads is True, wanted a whole number"),
    ({"threads": "2"}, "threads is '2', wanted a whole number"),
    ({"threads": 0}, "threads is 0, wanted at least 1"),
    ({"threads": 2**40}, "threads is 1099511627776, wanted at most 2147483647"),
    ({"device_id": 2**31, "provider": "cuda"}, "device_id is 2147483648, wanted at most 2147483647"),
]


@pytest.mark.parametrize(("options", "problem"), NUMBERS)
def test_numbers_that_no_runtime_takes(options: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="options can't be used") as caught:
        AdapterSession(session_graphs.swap(tmp_path), **options)
    assert problem in caught.value.problems


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    graph = session_graphs.swap(tmp_path)
    with AdapterSession(graph, max_adapters=np.int64(2), threads=np.int32(1)) as session:  # type: ignore[arg-type]
        assert session.run(session_graphs.feeds())


@pytest.mark.parametrize("outputs", ["yh", "y", b"y", (name for name in ["y"]), 3])
def test_outputs_are_a_list(outputs: Any, tmp_path: Path) -> None:
    with (
        AdapterSession(session_graphs.swap(tmp_path)) as session,
        pytest.raises(BackendError, match="wanted a list of names") as caught,
    ):
        session.run(session_graphs.feeds(), outputs=outputs)
    assert "y" in caught.value.hint


def test_outputs_of_any_collection_are_computed(tmp_path: Path) -> None:
    with AdapterSession(session_graphs.swap(tmp_path)) as session:
        feeds = session_graphs.feeds()
        every = session.run(feeds)
        for outputs in (["y"], ("y",), {"y": 1}.keys(), np.array(["y"])):
            found = session.run(feeds, outputs=outputs)  # type: ignore[arg-type]
            assert list(found) == ["y"]
            assert np.array_equal(found["y"], every["y"])


def test_a_mask_is_not_dropped(tmp_path: Path) -> None:
    feeds = session_graphs.feeds()
    with AdapterSession(session_graphs.swap(tmp_path)) as session, pytest.raises(BackendError) as caught:
        session.run(feeds | {"x": np.ma.masked_array(feeds["x"], mask=True)})
    assert "x: a masked array" in caught.value.problems[0]
    assert ".filled(" in caught.value.problems[0]


@pytest.mark.parametrize("option", ["alpha", "rank"])
@pytest.mark.parametrize("value", ["3", True, [3], float("nan"), -1])
def test_a_scaling_is_a_number(value: Any, option: str) -> None:
    with pytest.raises(AdapterError, match="not a valid scaling") as caught:
        load_adapter(tiny.adapter("llama"), **{option: value})
    assert caught.value.problems[0].startswith(f"{option}: ")
