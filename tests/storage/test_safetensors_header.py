"""lora_export.storage.safetensors: all problems of a file at once; the reference reader agrees."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.errors import AdapterError, CheckpointError
from lora_export.formats.reading.tensors import read_header
from lora_export.storage.safetensors import HeaderError, header_bytes, read_file_header


def raw(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: Any, begin: int, end: int, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def problems_of(path: Path, content: bytes, **known: bool) -> list[str]:
    file = path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(HeaderError) as caught:
        read_file_header(file, **known)
    return list(caught.value.problems)


def test_what_a_good_header_gives(tmp_path: Path) -> None:
    content = {
        "b": entry([2], 4, 12),
        "__metadata__": {"k": "ü"},
        "a": entry([], 0, 4),
        "e": entry([0], 4, 4),
    }
    start = header_bytes(content)
    file = tmp_path / "x.safetensors"
    file.write_bytes(start + bytes(12))
    found = read_file_header(file)
    assert list(found.content) == list(content)
    assert found.metadata == {"k": "ü"}
    assert (found.data_start, found.size) == (len(start), len(start) + 12)
    assert len(start) % 8 == 0
    assert [one.name for one in found.tensors] == ["a", "e", "b"]
    assert (found.tensors[2].offset, found.tensors[2].end) == (len(start) + 4, len(start) + 12)


def test_all_problems_are_listed(tmp_path: Path) -> None:
    content = {"__metadata__": {"k": 1}, "a": {}, "b": entry([3], 0, 4), "c": entry([1], 2, 6)}
    assert problems_of(tmp_path, raw(content, bytes(4))) == [
        "its __metadata__ is not a JSON object of strings",
        "'a' has no dtype, shape or data_offsets",
        "'b' F32 [3] needs 12 bytes, but data_offsets give 4",
        "'c' overlaps the tensor before it",
        f"truncated: 'c' ends at byte {len(raw(content)) + 6}, the file at {len(raw(content)) + 4}",
    ]


def test_a_broken_off_file_is_one_sentence(tmp_path: Path) -> None:
    content = {str(i): entry([1], 4 * i, 4 * i + 4) for i in range(9)}
    (problem,) = problems_of(tmp_path, raw(content, bytes(6)))
    assert "'1' ends at byte" in problem
    assert "as do 7 more" in problem


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"a": entry([True], 0, 4)}, "not counts"),
        ({"a": entry([1.0], 0, 4)}, "not counts"),
        ({"a": entry([1], 0, "4")}, "not counts"),
        ({"a": entry([10**4000], 0, 4)}, "not counts"),
        ({"a": {**entry([1], 0, 4), "data_offsets": [0, 4, 4]}}, "not counts"),
        ({"a": entry([0, 2**56, 2**56], 0, 0), "b": entry([1], 0, 4)}, "more than any array holds"),
        ({"a": entry([1] * 99, 0, 4)}, "more than any array holds"),
        ({"a": entry([1], 0, 4, dtype=["F32"])}, "dtype ['F32'] is not one of"),
        ({"a": entry([1], 0, 4), "__metadata__": [1]}, "its __metadata__ is not a JSON object"),
        ({"a\ud800": entry([1], 0, 4)}, "its header can't be read as JSON"),
        (b'{"a\xff": 1}', "its header can't be read as JSON"),
        (b"[" * 100_000, "its header can't be read as JSON"),
    ],
)
def test_ill_typed_headers(tmp_path: Path, header: Any, says: str) -> None:
    (problem,) = problems_of(tmp_path, raw(header, bytes(4)))
    assert says in problem
    with pytest.raises(CheckpointError) as in_base:
        Checkpoint.open(tmp_path)
    assert in_base.value.problems == (f"model.safetensors: {problem}",)
    with pytest.raises(AdapterError, match=r"is not a complete \.safetensors file") as in_adapter:
        read_header(tmp_path / "model.safetensors")
    assert in_adapter.value.problems == (problem,)


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, "'b' overlaps the tensor before it"),
        ({"a": entry([1], 4, 8)}, 8, "4 bytes before 'a' belong to no tensor"),
        ({"a": entry([1], 0, 4)}, 8, "4 bytes at the end belong to no tensor"),
    ],
)
def test_adapters_have_neither_gaps_nor_overlaps(tmp_path: Path, header: Any, data: int, says: str) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(raw(header, bytes(data)))
    with pytest.raises(AdapterError) as caught:
        read_header(file)
    assert caught.value.problems == (says,)


@pytest.mark.parametrize("code", ["F4", "F8_E8M0", "C64", "not yet invented"])
def test_unknown_dtypes_are_copied_in_bases_and_refused_in_adapters(tmp_path: Path, code: str) -> None:
    content = raw({"a": entry([8], 0, 4, code), "b": entry([1], 4, 8)}, bytes(8))
    (tmp_path / "model.safetensors").write_bytes(content)
    checkpoint = Checkpoint.open(tmp_path)
    assert (checkpoint.tensors["a"].code, checkpoint.tensors["a"].length) == (code, 4)
    with pytest.raises(CheckpointError, match="only copying it is possible"):
        checkpoint.read("a")
    (problem,) = problems_of(tmp_path, content, known_dtypes=True)
    assert f"'a': dtype {code} is not one of BOOL, U8" in problem
    with pytest.raises(AdapterError, match=f"dtype {code} is not one of"):
        read_header(tmp_path / "model.safetensors")


def test_a_header_beyond_the_limit(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as opened:
        opened.write((100_000_001).to_bytes(8, "little"))
        opened.truncate(100_000_100)  # sparse: nothing is written
    with pytest.raises(HeaderError, match="claims 100000001 of the file's 100000100 bytes"):
        read_file_header(file)


NUMBERS = st.integers(-1, 12)
HEADERS = st.dictionaries(
    st.text(string.ascii_lowercase, min_size=1, max_size=2),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "U8", "X"]),
            "shape": st.lists(NUMBERS, max_size=2),
            "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2),
        }
    ),
    max_size=3,
)


@st.composite
def nearly_right(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Give a header that lies without a gap, in any order, with at most one number changed."""
    header, at = {}, 0
    for name in "abc"[: draw(st.integers(0, 3))]:
        dtype, width = draw(st.sampled_from([("F32", 4), ("BF16", 2), ("U8", 1)]))
        count = draw(st.integers(0, 3))
        header[name] = entry([count], at, at + count * width, dtype)
        at += count * width
    header = {name: header[name] for name in draw(st.permutations(list(header)))}
    if header and draw(st.booleans()):
        changed = header[draw(st.sampled_from(list(header)))]
        numbers = changed[draw(st.sampled_from(["shape", "data_offsets"]))]
        numbers[draw(st.integers(0, len(numbers) - 1))] = draw(NUMBERS)
    return header, max(0, at + draw(st.sampled_from([0, 0, 0, 1, -1])))


@given(st.one_of(nearly_right(), st.tuples(HEADERS, st.integers(0, 16))))
@settings(max_examples=300, deadline=None)
def test_the_reference_reader_has_the_same_opinion(
    tmp_path_factory: pytest.TempPathFactory, made: tuple[dict[str, Any], int]
) -> None:
    header, size = made
    content = raw(header, bytes(size))
    file = tmp_path_factory.mktemp("h") / "x.safetensors"
    file.write_bytes(content)
    try:
        deserialize(content)
    except SafetensorError:
        with pytest.raises(HeaderError):
            read_file_header(file, known_dtypes=True)
    else:
        assert {one.name for one in read_file_header(file, known_dtypes=True).tensors} == set(header)
