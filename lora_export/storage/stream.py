"""Write one file of any size from pieces: bytes that are copied in the kernel, and matrices that are merged.

Two threads take small jobs in file order; each reads, computes and writes its block through a few reusable
buffers, so that memory stays at some tens of megabytes for any size of the model. numpy's loops release
Python's lock, so the threads do run in parallel. A block's result depends only on its input: equal pieces
give equal bytes.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from lora_export.adapter import Array
from lora_export.errors import CheckpointError
from lora_export.machines.blas import one_blas_thread
from lora_export.storage.blocks import Block, Buffers, Findings, Matrix, MergePiece, blocks_of
from lora_export.storage.outputs import output_errors
from lora_export.storage.requantised import RequantisedPiece
from lora_export.storage.rounding import Mode, Rounding, collect
from lora_export.storage.workers import run_in_threads

__all__ = ["BytesPiece", "CopyPiece", "MergePiece", "Piece", "RequantisedPiece", "Rounding", "write_pieces"]

COPY_BYTES = 16 << 20
# Errors with which the kernel can't copy between two files itself: we read and write instead.
_NO_KERNEL_COPY = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EBADF}
_NO_FALLOCATE = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV}


@dataclass(frozen=True)
class CopyPiece:
    """A range of another file, copied unchanged.

    Attributes:
        source: The file.
        offset: First byte of the range.
        length: Number of bytes.
        at: Its place in the output, in bytes.
    """

    source: Path
    offset: int
    length: int
    at: int


@dataclass(frozen=True, eq=False)
class BytesPiece:
    """Bytes in memory, such as a header.

    Attributes:
        data: The bytes.
        at: Their place in the output, in bytes.
    """

    data: bytes | memoryview
    at: int

    @property
    def length(self) -> int:
        """Number of bytes."""
        return memoryview(self.data).nbytes


Piece = CopyPiece | BytesPiece | MergePiece | RequantisedPiece


def write_pieces(
    path: Path,
    size: int,
    pieces: Iterable[Piece],
    *,
    threads: int = 2,
    progress: Callable[[int], None] | None = None,
    rounding: Mode = "sample",
    nonfinite: list[str] | None = None,
) -> dict[str, Rounding]:
    """Write ``path`` from pieces; bytes that no piece covers are zero.

    The file takes its full size on the disk before anything is written, so that a full disk shows at
    once. Nothing is renamed or synced: give a path from `OutputSet.stage`.

    Args:
        path: The file to create or truncate.
        size: Its size in bytes.
        pieces: The pieces; taken one by one, so that a generator need not hold them all.
        threads: Number of workers.
        progress: Function called with the number of bytes just written, one call at a time.
        rounding: ``sample`` measures large matrices on evenly spaced blocks, ``exact`` on all.
        nonfinite: If given, list to which values that are or became NaN or infinite are added, for a caller
            that writes several files and then raises; otherwise this function raises.

    Returns:
        `Patch.label` → the loss by rounding, in file order.

    Raises:
        CheckpointError: A source can't be read or is too short; or a value of a patched tensor, or of
            one that changes its dtype, is not finite.
        OutputError: The file can't be written, for example because the disk is full.
    """
    handle = _create(path, size)
    # Some file systems say only when a file is closed that it could not be written.
    with output_errors(path):
        try:
            writer = _Writer(handle, size, pieces=pieces, progress=progress, rounding=rounding)
            with one_blas_thread():
                writer.run(threads)
        finally:
            os.close(handle)
    problems = writer.problems()
    if nonfinite is not None:
        nonfinite.extend(problems)
    elif problems:
        raise nonfinite_error(problems)
    samples = (sample for findings in writer.findings for sample in findings.samples)
    return collect(writer.parts, samples)


def nonfinite_error(problems: list[str]) -> CheckpointError:
    """Return the error for values that are, or became, NaN or infinite."""
    return CheckpointError(
        f"{len(problems)} tensors would hold values that are not finite; nothing was replaced",
        "beyond float16's 65504: write bfloat16 or float32 (merge --dtype, or a graph of that type); "
        "NaN in the base: use an undamaged copy of it",
        problems,
    )


def _create(path: Path, size: int) -> int:
    with output_errors(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            _reserve(handle, size)
        except BaseException:
            os.close(handle)
            raise
    return handle


def _reserve(handle: int, size: int) -> None:
    if size == 0:
        return
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in _NO_FALLOCATE:
            raise
        os.ftruncate(handle, size)


class _Writer:
    """The state that the workers of one `write_pieces` share."""

    def __init__(
        self,
        handle: int,
        size: int,
        pieces: Iterable[Piece],
        progress: Callable[[int], None] | None,
        rounding: Mode,
    ) -> None:
        self._handle, self._size, self._pieces = handle, size, pieces
        self._progress, self._rounding = progress, rounding
        self._lock = threading.Lock()
        self._sources: dict[Path, int] = {}
        self._error: BaseException | None = None
        self._kernel_copies = hasattr(os, "copy_file_range")
        self.parts: list[tuple[str, str, int]] = []
        self.findings: list[Findings] = []

    def run(self, threads: int) -> None:
        """Do every job; raise the first error after all workers have stopped."""
        jobs = self._jobs()
        self.findings = [Findings() for _ in range(threads)]
        try:
            run_in_threads([partial(self._work, jobs, found) for found in self.findings], self._stop)
        finally:
            for handle in self._sources.values():
                os.close(handle)
        if self._error is not None:
            raise self._error

    def problems(self) -> list[str]:
        """Return a line for each tensor with values that are not finite."""
        base: dict[str, int] = {}
        overflow: dict[tuple[str, str, str], int] = {}
        for found in self.findings:
            for name, count in found.bad_base.items():
                base[name] = base.get(name, 0) + count
            for key, count in found.overflow.items():
                overflow[key] = overflow.get(key, 0) + count
        lines = [f"{name}   {n} values of the base are NaN or infinite" for name, n in sorted(base.items())]
        for (label, name, dtype), count in sorted(overflow.items()):
            where = label if label == name else f"{label} (tensor {name})"
            lines.append(f"{where}   {count} values are beyond what {dtype} can hold, or NaN")
        return lines

    def _work(self, jobs: Iterator[Callable[[Buffers, Findings], int]], findings: Findings) -> None:
        buffers = Buffers()
        # Every block is checked for overflow; numpy's own warnings would only add noise.
        with np.errstate(all="ignore"):
            while True:
                with self._lock:
                    job = None if self._error is not None else next(jobs, None)
                if job is None:
                    return
                written = job(buffers, findings)
                if self._progress is not None:
                    with self._lock:
                        self._progress(written)

    def _stop(self, error: BaseException) -> None:
        # Without the lock: a signal's handler must not wait for it.
        self._error = self._error or error

    def _refuse_stopped(self) -> None:
        """End a job over many blocks with the error that has stopped the writer."""
        if self._error is not None:
            raise self._error

    def _jobs(self) -> Iterator[Callable[[Buffers, Findings], int]]:
        for piece in self._pieces:
            if isinstance(piece, RequantisedPiece):
                self.parts += piece.parts()
                yield partial(self._requantise, piece)
                continue
            if piece.at < 0 or piece.at + piece.length > self._size:
                raise ValueError(f"piece at {piece.at}, {piece.length} bytes, in a file of {self._size}")
            if isinstance(piece, MergePiece):
                yield from self._merge_jobs(piece)
            else:
                act = self._copy if isinstance(piece, CopyPiece) else self._put
                for start in range(0, piece.length, COPY_BYTES):
                    length = min(COPY_BYTES, piece.length - start)
                    yield partial(act, piece, start, length)  # type: ignore[arg-type]

    def _requantise(self, piece: RequantisedPiece, _: Buffers, findings: Findings) -> int:
        return piece.write(self._write, findings)

    def _merge_jobs(self, piece: MergePiece) -> Iterator[Callable[[Buffers, Findings], int]]:
        matrix = Matrix(piece, self._rounding)
        self.parts += [(patch.label, piece.name, patch.height * patch.width) for patch in matrix.patches]
        if matrix.needs_norms:
            matrix.measure_norms(partial(self._read_block, piece))
        for block in blocks_of(*piece.shape):
            yield partial(self._merge, matrix, block)

    def _merge(self, matrix: Matrix, block: Block, buffers: Buffers, findings: Findings) -> int:
        piece = matrix.piece
        out = matrix.merge(self._read_block(piece, block, buffers), block, buffers, findings)
        start = piece.at + (block.row * piece.shape[1] + block.col) * piece.dtype_out.itemsize
        return self._write(out.view(np.uint8).data, start)

    def _read_block(self, piece: MergePiece, block: Block, buffers: Buffers) -> Array:
        """Return the block as stored, ``(size,)``."""
        self._refuse_stopped()
        if isinstance(piece.source, np.ndarray):
            matrix = piece.source.reshape(piece.shape)
            rows = matrix[block.row : block.row + block.height, block.col : block.col + block.width]
            return np.ascontiguousarray(rows).reshape(-1).view(piece.dtype_in)
        stored = buffers.take("stored", piece.dtype_in, block.size)
        start = piece.offset + (block.row * piece.shape[1] + block.col) * piece.dtype_in.itemsize
        read_into(self._source(piece.source), piece.source, stored.view(np.uint8).data, start)
        return stored

    def _put(self, piece: BytesPiece, start: int, length: int, _b: Buffers, _f: Findings) -> int:
        return self._write(memoryview(piece.data).cast("B")[start : start + length], piece.at + start)

    def _copy(self, piece: CopyPiece, start: int, length: int, buffers: Buffers, _f: Findings) -> int:
        source = self._source(piece.source)
        done = 0
        while self._kernel_copies and done < length:
            here, there = piece.offset + start + done, piece.at + start + done
            try:
                step = os.copy_file_range(
                    source, self._handle, length - done, offset_src=here, offset_dst=there
                )
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                self._kernel_copies = False
                break
            if step == 0:
                raise _too_short(piece.source, here)
            done += step
        while done < length:
            step = min(1 << 20, length - done)
            view = buffers.take("stored", np.dtype(np.uint8), step).data
            read_into(source, piece.source, view, piece.offset + start + done)
            done += self._write(view, piece.at + start + done)
        return length

    def _source(self, path: Path) -> int:
        handle = self._sources.get(path)
        if handle is None:
            try:
                opened = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise _unreadable(path, error) from error
            # Two workers may open the same file at once: the second handle is closed.
            handle = self._sources.setdefault(path, opened)
            if handle != opened:
                os.close(opened)
        return handle

    def _write(self, view: memoryview, at: int) -> int:
        self._refuse_stopped()
        done = 0
        while done < view.nbytes:
            done += os.pwrite(self._handle, view[done:], at + done)
        return done


def read_into(handle: int, path: Path, view: memoryview, offset: int) -> None:
    """Fill a view with a file's bytes.

    Args:
        handle: The open file.
        path: Its path, for messages.
        view: Memory that is filled.
        offset: Of the first byte in the file.

    Raises:
        CheckpointError: The file ends before, or can't be read.
    """
    done = 0
    while done < view.nbytes:
        try:
            step = os.preadv(handle, [view[done:]], offset + done)
        except OSError as error:
            raise _unreadable(path, error) from error
        if step == 0:
            raise _too_short(path, offset + done)
        done += step


def _too_short(path: Path, offset: int) -> CheckpointError:
    return CheckpointError(
        f"{path} ends before byte {offset}, where weights are expected", "download or save the base again"
    )


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot read {path}: {error.strerror or error}", "check the path and its permissions"
    )
