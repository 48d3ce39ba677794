"""An ``.onnx_adapter`` is a FlatBuffer, whose tables may share bytes: that and odd names are refused."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import flatbuffers
import numpy as np
import peaks
import pytest

from lora_export.errors import AdapterError
from lora_export.formats.reading.ort_file import read_ort_file, write_ort_file

FLOAT = 1
A, B = np.arange(32, dtype=np.float32).reshape(8, 4), np.ones((4, 8), np.float32)
Tensor = tuple[bytes, Sequence[int], bytes]
GOOD: list[Tensor] = [
    (b"q.lora_A.weight", A.shape, A.tobytes()),
    (b"q.lora_B.weight", B.shape, B.tobytes()),
]


class Writer:
    """onnxruntime's schema, ``lora/adapter_format/adapter_schema.fbs``; equal bytes are written once."""

    def __init__(self) -> None:
        self._builder = flatbuffers.Builder(1 << 16)
        self._known: dict[tuple[bytes, int], int] = {}

    def bytes_of(self, data: bytes, wide: int, count: int) -> int:
        key = (data, wide)
        if key not in self._known:
            self._builder.StartVector(wide, count, 8)
            self._builder.head = self._builder.Head() - len(data)
            self._builder.Bytes[self._builder.Head() : self._builder.Head() + len(data)] = data
            self._known[key] = self._builder.EndVector()
        return self._known[key]

    def table(self, numbers: dict[int, int], places: dict[int, int]) -> int:
        self._builder.StartObject(4)
        for slot, number in numbers.items():
            self._builder.PrependInt32Slot(slot, number, 0)
        for slot, place in places.items():
            self._builder.PrependUOffsetTRelativeSlot(slot, place, 0)
        return int(self._builder.EndObject())

    def tensor(self, name: bytes, shape: Sequence[int], values: bytes) -> int:
        sizes = np.asarray(shape, np.int64).tobytes()
        places = {0: self._builder.CreateString(name), 1: self.bytes_of(sizes, 8, len(shape))}
        return self.table({2: FLOAT}, {**places, 3: self.bytes_of(values, 1, len(values))})

    def finish(self, tensors: Sequence[int]) -> bytes:
        self._builder.StartVector(4, len(tensors), 4)
        for place in reversed(tensors):
            self._builder.PrependUOffsetTRelative(place)
        listed = self._builder.EndVector()
        self._builder.Finish(self.table({0: 1, 1: 1, 2: 1}, {3: listed}), file_identifier=b"TORT")
        return bytes(self._builder.Output())


def written(path: Path, tensors: Sequence[Tensor]) -> Path:
    writer = Writer()
    path.write_bytes(writer.finish([writer.tensor(*tensor) for tensor in tensors]))
    return path


def test_what_the_tests_write_is_read(tmp_path: Path) -> None:
    tensors, versions = read_ort_file(written(tmp_path / "a.onnx_adapter", GOOD))
    np.testing.assert_array_equal(tensors["q.lora_A.weight"], A)
    np.testing.assert_array_equal(tensors["q.lora_B.weight"], B)
    assert versions == {"adapter_version": 1, "model_version": 1}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        pytest.param(
            [*GOOD, (b"q.lora_A.weight", A.shape, (2 * A).tobytes())],
            "names occur twice: 'q.lora_A.weight'",
            id="twice",
        ),
        pytest.param(
            [*GOOD, (b"\xff.lora_A.weight", A.shape, A.tobytes())],
            "the name '\N{REPLACEMENT CHARACTER}.lora_A.weight' is not UTF-8",
            id="no UTF-8",
        ),
        pytest.param(
            [*GOOD, (b"k.lora_A.weight", (1,) * 70 + A.shape, A.tobytes())],
            "a tensor has 72 axes, at most 8 are read",
            id="axes",
        ),
        pytest.param(
            [(b"%d.lora_A.weight" % i, (4,), b"\0" * 16) for i in range(80_000)],
            "it claims 80000 tensors",
            id="many",
        ),
    ],
)
def test_what_onnxruntime_lets_pass_is_refused(tensors: list[Tensor], said: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.onnx_adapter", tensors)
    with pytest.raises(AdapterError, match="is not a complete") as caught:
        read_ort_file(path)
    assert said in caught.value.message


def test_tensors_do_not_share_their_bytes(tmp_path: Path) -> None:
    """Each of a thousand tensors would be a copy of the same megabyte."""
    megabyte = b"\0" * (1 << 20)
    names = [f"{i}.lora_{side}.weight".encode() for i in range(500) for side in "AB"]
    path = written(tmp_path / "a.onnx_adapter", [(name, (512, 512), megabyte) for name in names])
    good = written(tmp_path / "good.onnx_adapter", GOOD)
    ((code, _, said, peak, seconds),) = peaks.measured([["inspect", good]], [["inspect", path]])
    assert code == 1
    assert "its tensors claim" in said
    assert peak < peaks.allowed(path)
    assert seconds < 10


def test_offsets_out_of_the_file(tmp_path: Path) -> None:
    """Each word of the file in turn is another offset: the user's error, or the file as it was."""
    good = written(tmp_path / "good.onnx_adapter", GOOD).read_bytes()
    path = tmp_path / "a.onnx_adapter"
    for place in range(0, len(good) - 3, 4):
        for word in (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0\0\0\0"):
            path.write_bytes(good[:place] + word + good[place + 4 :])
            with suppress(AdapterError):
                read_ort_file(path)


@pytest.mark.parametrize("count", [17_000, 30_000])
def test_very_many_small_tensors_are_read_again(count: int, tmp_path: Path) -> None:
    path = tmp_path / "x.onnx_adapter"
    values = {f"layers.{i}.q.lora_A.weight": np.full((1, 1), i % 7, np.float16) for i in range(count)}
    write_ort_file(path, values, model_version=1, only_this_base=False)
    found, _ = read_ort_file(path)
    assert found.keys() == values.keys()
    assert all(found[name] == values[name] for name in values)
