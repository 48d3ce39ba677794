"""Members of an ``.npz``: their streams hold what the archive states, and are unpacked within it."""

from __future__ import annotations

import io
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import onnx
import peaks
import pytest
from onnx import helper, numpy_helper

from lora_export.errors import BackendError
from lora_export.parity.feeds.array_files import read_arrays

SMALL = np.random.default_rng(0).standard_normal((1024, 8)).astype(np.float32)
MORE = 1 << 29
METHODS = {"stored": zipfile.ZIP_STORED, "deflated": zipfile.ZIP_DEFLATED, "bzip2": zipfile.ZIP_BZIP2,
           "lzma": zipfile.ZIP_LZMA}  # fmt: skip


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def archive(method: int, array: np.ndarray, more: int = 0) -> bytes:
    """Return an archive of one array; its stream holds so many zeros more than its directory states."""
    content, buffer = npy(array), io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as made, made.open("x.npy", "w") as member:
        member.write(content)
        for _ in range(more >> 24):
            member.write(bytes(1 << 24))
        member.write(bytes(more & 0xFFFFFF))
    raw, (entry,) = bytearray(buffer.getvalue()), zipfile.ZipFile(buffer).infolist()
    # The checksum fits to one byte more, so that it does not tell.
    stated = struct.pack("<III", zlib.crc32(content + bytes(more > 0)), entry.compress_size, len(content))
    # In front of the entry, and in the directory: CRC, packed and unpacked size.
    raw[14:26] = stated
    at = raw.rindex(b"PK\1\2")
    raw[at + 16 : at + 28] = stated
    return bytes(raw)


@pytest.mark.parametrize("more", [0, 1, 70_000])
@pytest.mark.parametrize("name", METHODS)
def test_a_stream_is_as_long_as_stated(name: str, more: int, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(archive(METHODS[name], SMALL, more))
    if not more and name in ("stored", "deflated"):
        assert np.array_equal(read_arrays(path)["x"], np.load(path)["x"])
        return
    with pytest.raises(BackendError) as caught:
        read_arrays(path)
    wanted = "packed by method" if name in ("bzip2", "lzma") else "more than the 32768 bytes"
    assert wanted in str(caught.value)
    assert caught.value.hint


def test_a_stream_that_is_shorter_is_refused(tmp_path: Path) -> None:
    path, raw = tmp_path / "a.npz", archive(zipfile.ZIP_DEFLATED, SMALL)
    at = raw.rindex(b"PK\1\2")
    longer = SMALL.nbytes + 128 + 32
    header = npy(np.zeros((1025, 8), np.float32))[:128]
    content = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = content.compress(header + SMALL.tobytes()) + content.flush()
    stated = struct.pack("<III", zlib.crc32(header + SMALL.tobytes()), len(packed), longer)
    start, entry = raw[:14] + stated + raw[26:35], raw[at : at + 16] + stated + raw[at + 28 : -22]
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(entry), len(start) + len(packed), 0)
    path.write_bytes(start + packed + entry + end)
    with pytest.raises(BackendError, match=rf"unpacks to {longer - 32 - 128} bytes"):
        read_arrays(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("dtype", ["<f4", ">f4", ">i8", "<f2", "?", "u1", ">c8"])
def test_arrays_are_those_of_numpy(dtype: str, order: str, method: int, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    for shape in ((3, 5), (), (0, 4), (2, 3, 4)):
        values = np.arange(np.prod(shape)).reshape(shape).astype(dtype, order=order)
        path.write_bytes(archive(method, values))
        found, wanted = read_arrays(path)["x"], np.load(path)["x"]
        assert found.dtype == wanted.dtype.newbyteorder("=")
        assert np.array_equal(found, wanted)
        assert found.flags.writeable


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_members_are_unpacked_within_their_size(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.eye(8, dtype=np.float32), "w")
    inputs, outputs = (
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 8])] for name in "xy"
    )
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph, other = tmp_path / "a.onnx", tmp_path / "b.onnx"
    made = helper.make_graph([product], "g", inputs, outputs, [weight])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), graph)
    onnx.save(onnx.load(graph), other)
    good, feeds = tmp_path / "good.npz", ["parity", "--reference", graph, "--candidate", other, "--feeds"]
    good.write_bytes(archive(zipfile.ZIP_STORED, SMALL))
    runs, paths, says = [], [], []
    for name in ("deflated", "bzip2", "lzma"):
        paths.append(tmp_path / f"{name}.npz")
        paths[-1].write_bytes(archive(METHODS[name], SMALL, MORE))
        says.append("more than the 32768 bytes" if name == "deflated" else "packed by method")
    for name, dtype in (("doubles", "<f8"), ("swapped", ">f8")):
        paths.append(tmp_path / f"{name}.npz")
        # All that the archive may unpack to, in values that the graph does not take.
        paths[-1].write_bytes(archive(zipfile.ZIP_DEFLATED, np.zeros(((1 << 19) - 500, 8), dtype)))
        says.append("")
    for path in paths:
        runs.append([*feeds, path])
    wrong = []
    found = peaks.measured([[*feeds, good]], runs)
    for path, said, (code, _, err, peak, seconds) in zip(paths, says, found, strict=True):
        print(f"{path.name:20} {code} {peak / 1e6:.1f} MB of {peaks.allowed(path) / 1e6:.1f} {seconds:.1f} s")
        if code != 1 or peak > peaks.allowed(path) or said not in err or seconds > 10:
            wrong.append(f"{path.name}: code {code}, peak {peak / 1e6:.0f} MB, {seconds:.0f} s\n{err[:600]}")
    assert not wrong, "\n".join(wrong)
