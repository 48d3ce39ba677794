"""lora_export.storage.stream: pieces become one file, merged in float32 and rounded once."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import lora_export.storage.blocks as blocks
import lora_export.storage.stream as stream
from lora_export.errors import CheckpointError, OutputError
from lora_export.storage.patch import Patch
from lora_export.storage.rounding import total_of
from lora_export.storage.stream import BytesPiece, CopyPiece, MergePiece, write_pieces

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


def weights(shape, dtype=F32, seed=0, scale=0.05):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(dtype)


def low_rank(row, col, height, width, rank=4, seed=1, scale=0.05, **more):
    rng = np.random.default_rng(seed)
    left = (rng.standard_normal((height, rank)) * scale).astype(np.float32)
    right = (rng.standard_normal((rank, width)) * scale).astype(np.float32)
    return Patch(
        label=f"m{seed}", row=row, col=col, height=height, width=width, left=left, right=right, **more
    )


def merged(tmp_path, matrix, patches, dtype_out, **options):
    """Write ``matrix`` with ``patches`` behind 7 bytes of header; return the result and the figures."""
    source = tmp_path / "in.bin"
    source.write_bytes(b"header." + matrix.tobytes())
    out = tmp_path / "out.bin"
    size = 7 + matrix.size * dtype_out.itemsize
    piece = MergePiece(
        name="w",
        source=source,
        offset=7,
        at=7,
        shape=matrix.shape,
        dtype_in=matrix.dtype,
        dtype_out=dtype_out,
        patches=patches,
    )
    report = write_pieces(out, size, [BytesPiece(b"HEADER.", 0), piece], **options)
    data = out.read_bytes()
    assert data[:7] == b"HEADER."
    assert len(data) == size
    return np.frombuffer(data[7:], dtype_out).reshape(matrix.shape), report


def rounded_by_torch(exact, dtype):
    torch = pytest.importorskip("torch")
    if (exact.dtype, dtype) == (F64, F16):
        return exact.astype(F16).astype(F64)  # torch rounds to float32 on the way, numpy does not
    kinds = {BF16: torch.bfloat16, F16: torch.float16, F32: torch.float32, F64: torch.float64}
    return torch.from_numpy(exact).to(kinds[dtype]).to(torch.float64).numpy()


@pytest.mark.parametrize("dtype_in", [F32, F64, F16, BF16], ids=str)
@pytest.mark.parametrize("dtype_out", [F32, F64, F16, BF16], ids=str)
def test_sum_is_rounded_once(tmp_path, dtype_in, dtype_out):
    matrix, patch = weights((700, 513), dtype_in), low_rank(0, 0, 700, 513)
    wide = F64 if F64 in (dtype_in, dtype_out) else F32
    exact, _ = merged(tmp_path, matrix, [patch], wide)
    result, _ = merged(tmp_path, matrix, [patch], dtype_out)
    assert np.array_equal(result.astype(F64), rounded_by_torch(exact, dtype_out))
    oracle = matrix.astype(F64) + patch.left.astype(F64) @ patch.right.astype(F64)
    tolerance = 1e-14 if wide == F64 else 1e-7
    assert np.abs(exact - oracle).max() <= tolerance


@pytest.mark.parametrize("dtype_out", [F32, F64, F16, BF16], ids=str)
def test_no_patch_is_a_conversion(tmp_path, dtype_out):
    for dtype_in in (F32, F16, BF16, FP8):
        matrix = weights((64, 33), dtype_in)
        result, report = merged(tmp_path, matrix, [], dtype_out)
        assert np.array_equal(result, matrix.astype(F32).astype(dtype_out))
        assert report == {}


def test_every_bfloat16_pattern_survives_a_conversion(tmp_path):
    patterns = np.arange(1 << 16, dtype=np.uint16).view(BF16)
    patterns = patterns[np.isfinite(patterns.astype(F32))].reshape(-1, 2)
    widened, _ = merged(tmp_path, patterns, [], F32)
    assert np.array_equal(widened.view(np.uint32) >> 16, patterns.view(np.uint16))
    back, _ = merged(tmp_path, widened.copy(), [], BF16)
    assert np.array_equal(back.view(np.uint16), patterns.view(np.uint16))


def test_rectangles_of_a_fused_weight(tmp_path):
    matrix = weights((900, 700))
    patches = [
        low_rank(0, 0, 500, 700, seed=1),
        low_rank(500, 100, 128, 300, seed=2),
        low_rank(700, 0, 200, 700, seed=3),
    ]
    expected = matrix.copy()
    for p in patches:
        expected[p.row : p.row + p.height, p.col : p.col + p.width] += p.left @ p.right
    result, report = merged(tmp_path, matrix, patches, F32)
    assert np.allclose(result, expected, atol=1e-7)
    assert np.array_equal(result[628:700], matrix[628:700])
    assert list(report) == ["m1", "m2", "m3"]
    assert [r.elements for r in report.values()] == [p.height * p.width for p in patches]


def test_replacement_comes_first_and_blends_add(tmp_path):
    matrix, values = weights((40, 30)), weights((40, 30), seed=9)
    patches = [
        low_rank(0, 0, 40, 30, seed=1),
        low_rank(0, 0, 40, 30, seed=2),
        Patch(label="v", row=0, col=0, height=40, width=30, values=values),
    ]
    result, _ = merged(tmp_path, matrix, patches, F32)
    expected = values + patches[0].left @ patches[0].right + patches[1].left @ patches[1].right
    assert np.allclose(result, expected, atol=1e-7)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("wide", [False, True])
def test_dora(tmp_path, monkeypatch, axis, wide):
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    monkeypatch.setattr(blocks, "WIDE", 200 if wide else 1 << 20)
    matrix = weights((60, 300))
    rng = np.random.default_rng(5)
    row, col, height, width = 10, 40, 45, 250
    magnitude = rng.uniform(0.5, 2, height if axis == 0 else width).astype(np.float32)
    patch = low_rank(row, col, height, width, magnitude=magnitude, magnitude_axis=axis)
    inner = matrix[row : row + height, col : col + width].astype(F64) + patch.left.astype(F64) @ patch.right
    norms = np.linalg.norm(inner, axis=1 - axis, keepdims=True)
    expected = matrix.astype(F64)
    expected[row : row + height, col : col + width] = (
        inner / norms * (magnitude[:, None] if axis == 0 else magnitude)
    )
    result, _ = merged(tmp_path, matrix, [patch], F32)
    assert np.abs(result - expected).max() < 1e-6


def test_rows_wider_than_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 64)
    monkeypatch.setattr(blocks, "WIDE", 128)
    matrix, patch = weights((5, 300), BF16), low_rank(1, 17, 3, 200)
    expected = matrix.astype(F32)
    expected[1:4, 17:217] += patch.left @ patch.right
    result, report = merged(tmp_path, matrix, [patch], BF16)
    assert np.array_equal(result, expected.astype(BF16))
    assert report["m1"].measured == report["m1"].elements


def test_source_may_be_an_array(tmp_path):
    matrix, patch = weights((6, 5), F16), low_rank(0, 0, 6, 5)
    out = tmp_path / "o"
    write_pieces(
        out,
        60,
        [
            MergePiece(
                name="w",
                source=matrix,
                offset=0,
                at=0,
                shape=(6, 5),
                dtype_in=F16,
                dtype_out=F16,
                patches=[patch],
            )
        ],
    )
    expected = (matrix.astype(F32) + patch.left @ patch.right).astype(F16)
    assert np.array_equal(np.frombuffer(out.read_bytes(), F16).reshape(6, 5), expected)


def test_rounding_figures(tmp_path):
    matrix, patch = weights((1000, 64), BF16), low_rank(0, 0, 1000, 64, scale=0.01)
    result, report = merged(tmp_path, matrix, [patch], BF16, rounding="exact")
    base, delta = matrix.astype(F32), patch.left @ patch.right
    exact = base + delta
    figures = report["m1"]
    error = np.linalg.norm(result.astype(F64) - exact)
    assert figures.relative == pytest.approx(error / np.linalg.norm(delta.astype(F64)), rel=1e-4)
    assert figures.lost == np.count_nonzero((result.astype(F32) == base) & (delta != 0))
    assert 0.1 < figures.lost_share < 1
    assert figures.sampled_share == 1


def test_sampled_figures_are_near_the_exact_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 4096)
    matrix, patch = weights((2000, 128), BF16), low_rank(0, 0, 2000, 128, scale=0.02)
    _, exact = merged(tmp_path, matrix, [patch], BF16, rounding="exact")
    _, sample = merged(tmp_path, matrix, [patch], BF16)
    assert 0.05 < sample["m1"].sampled_share < 0.2
    assert sample["m1"].relative == pytest.approx(exact["m1"].relative, rel=0.05)
    total = total_of(sample.values())
    assert total.error_squared == pytest.approx(exact["m1"].error_squared, rel=0.1)


def test_dora_and_float32_figures(tmp_path):
    matrix = weights((50, 60))
    magnitude = np.linalg.norm(matrix, axis=1) * 1.1
    patch = low_rank(0, 0, 50, 60, magnitude=magnitude)
    result, report = merged(tmp_path, matrix, [patch], F32)
    assert report["m1"].relative == 0
    assert report["m1"].delta_squared == pytest.approx(np.sum((result - matrix) ** 2, dtype=F64), rel=1e-4)


def test_overflow_lists_every_module(tmp_path):
    matrix = weights((600, 700))
    matrix[3, 4], matrix[590, 0], matrix[300, 300] = 70000, -65504, 65519
    patches = [low_rank(0, 0, 100, 700, seed=1), low_rank(580, 0, 20, 700, seed=2)]
    patches[1].left[10, :] = 0
    patches[1].left[10, 0], patches[1].right[0, 0] = -16, 1.5
    with pytest.raises(CheckpointError) as caught:
        merged(tmp_path, matrix, patches, F16)
    assert [line.split(" ")[0] for line in caught.value.problems] == ["m1", "m2"]
    assert "--dtype" in caught.value.hint
    found: list[str] = []
    merged(tmp_path, matrix, patches, F16, nonfinite=found)
    assert len(found) == 2


def test_nan_in_the_base(tmp_path):
    matrix = weights((9, 9), BF16)
    matrix[5, 5] = np.nan
    with pytest.raises(CheckpointError, match="w   1 values of the base"):
        merged(tmp_path, matrix, [low_rank(0, 0, 4, 9)], BF16)
    # A tensor that is only converted keeps what it held (-inf is a usual attention mask).
    matrix[5, 5] = -np.inf
    result, _ = merged(tmp_path, matrix, [], F32)
    assert result[5, 5] == -np.inf


@pytest.mark.parametrize("fails_with", [None, errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS])
def test_copied_ranges(tmp_path, monkeypatch, fails_with):
    monkeypatch.setattr(stream, "COPY_BYTES", 1000)
    if fails_with:

        def refuse(*_, **__):
            raise OSError(fails_with, os.strerror(fails_with))

        monkeypatch.setattr(os, "copy_file_range", refuse)
    data = np.random.default_rng(0).bytes(4321)
    source, out, seen = tmp_path / "s", tmp_path / "o", []
    source.write_bytes(data)
    pieces = [CopyPiece(source, 21, 4000, 100), CopyPiece(source, 0, 21, 0)]
    write_pieces(out, 4100, pieces, progress=seen.append)
    assert out.read_bytes() == data[:21] + bytes(79) + data[21:4021]
    assert sum(seen) == 4021


def test_short_and_missing_sources(tmp_path):
    (tmp_path / "s").write_bytes(bytes(10))
    for length, name, says in ((11, "s", "ends before byte 10"), (5, "gone", "cannot read")):
        with pytest.raises(CheckpointError, match=says):
            write_pieces(tmp_path / "o", 11, [CopyPiece(tmp_path / name, 0, length, 0)])
    with pytest.raises(CheckpointError, match="ends before byte 10"):
        write_pieces(
            tmp_path / "o",
            12,
            [
                MergePiece(
                    name="w", source=tmp_path / "s", offset=0, at=0, shape=(1, 3), dtype_in=F32, dtype_out=F32
                )
            ],
        )


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "copy_file_range"])
def test_full_disk(tmp_path, monkeypatch, call):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    (tmp_path / "s").write_bytes(bytes(10))
    with pytest.raises(OutputError, match=r"No space left.*nothing was replaced"):
        write_pieces(tmp_path / "o", 20, [BytesPiece(bytes(10), 0), CopyPiece(tmp_path / "s", 0, 10, 10)])


def test_file_system_without_fallocate(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    write_pieces(tmp_path / "o", 20, [BytesPiece(b"ab", 3)])
    assert (tmp_path / "o").read_bytes() == b"\0\0\0ab" + bytes(15)


def test_an_error_in_the_pieces_stops_the_workers(tmp_path):
    def pieces():
        yield BytesPiece(b"x", 0)
        raise KeyError("from the generator")

    with pytest.raises(KeyError, match="from the generator"):
        write_pieces(tmp_path / "o", 10, pieces())
    with pytest.raises(ValueError, match="piece at 8"):
        write_pieces(tmp_path / "o", 10, [BytesPiece(b"xxx", 8)])


def test_same_pieces_same_bytes_and_figures(tmp_path):
    matrix, patch = weights((3000, 400), BF16), low_rank(5, 7, 2900, 300)
    first = merged(tmp_path, matrix, [patch], BF16, threads=1)
    for _ in range(3):
        again = merged(tmp_path, matrix, [patch], BF16, threads=3)
        assert again[0].tobytes() == first[0].tobytes()
        assert again[1] == first[1]


@pytest.fixture
def handled():
    """Set handlers as a program's own; the old ones are back behind the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}

    def handle(number, handler):
        signal.signal(number, handler)

    yield handle
    for number, handler in before.items():
        signal.signal(number, handler)


def slow_disk(monkeypatch, then):
    """Let each block take its time, the one thread's longer; return the calls that are under way."""
    own, running, lock = os.pwrite, [], threading.Lock()

    def pwrite(handle, data, at):
        with lock:
            running.append(handle)
            number = len(running)
        if number == 2:
            then()
        time.sleep(0.4 if number == 1 else 0.1)
        try:
            return own(handle, data, at)
        finally:
            with lock:
                running.remove(handle)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return running


def open_files():
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def of_ones(count):
    return [BytesPiece(bytes([1]) * 8, 8 * number) for number in range(count)]


@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
def test_ctrl_c_waits_for_the_workers(tmp_path, monkeypatch, handled, times):
    """Later writes would go to whatever file has got the closed one's number by then."""
    main = threading.main_thread().ident

    def interrupt():
        for number in range(times):
            threading.Timer(0.05 * (number + 1), signal.pthread_kill, (main, signal.SIGINT)).start()

    running = slow_disk(monkeypatch, interrupt)
    handled(signal.SIGINT, signal.default_int_handler)
    opened = open_files()
    with pytest.raises(KeyboardInterrupt):
        write_pieces(tmp_path / "o", 8 * 40, of_ones(40))
    assert running == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert open_files() == opened
    # It ended soon: most was not written.
    assert (tmp_path / "o").read_bytes().count(1) < 8 * 20


def test_a_signal_that_raises_nothing_stops_nothing(tmp_path, monkeypatch, handled):
    seen, main = [], threading.main_thread().ident
    slow_disk(monkeypatch, lambda: signal.pthread_kill(main, signal.SIGUSR1))
    handled(signal.SIGUSR1, lambda number, _frame: seen.append(number))
    write_pieces(tmp_path / "o", 8 * 6, of_ones(6))
    assert (tmp_path / "o").read_bytes() == bytes([1]) * 48
    assert set(seen) == {signal.SIGUSR1}
