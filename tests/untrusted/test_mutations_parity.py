"""Structured mutations of what `parity` reads beside graphs: feeds, saved outputs, baselines."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mutators
import numpy as np
import peaks
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from small_graphs import graph, random, save

from lora_export.cli import main

# Seconds that a run on files of a few kilobytes may take: a hang is what is looked for.
HANG_S = 20.0
# One entry for each run on a mutated file.
TRIED: list[int] = []
TEXT = """g (int64[batch,sequence] input_ids, int64[batch,sequence] attention_mask,
    float[batch,sequence,4] bias) => (float[batch,sequence,4] logits) {
    rows = Gather(table, input_ids)  last = Unsqueeze(attention_mask, axis)  mask = Cast<to = 1>(last)
    kept = Mul(rows, mask)  logits = Add(kept, bias)
}"""
FEEDS: mutators.Tensors = {
    "input_ids": np.array([[1, 2, 3], [4, 5, 6]]),
    "attention_mask": np.array([[1, 1, 1], [1, 1, 0]]),
    "bias": random(2, 3, 4, seed=5),
}
KINDS = [".npz", ".safetensors"]


def mutating(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def counted(record_property: Callable[[str, int], None]) -> Iterator[None]:
    TRIED.clear()
    yield
    record_property("tried", len(TRIED))


class Place:
    """A graph, good feeds, its outputs for them, and a report; and one hostile file at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        weights = {"table": random(16, 4, seed=6), "axis": np.array([-1])}
        self.graph, self.reference = (save(graph(TEXT, weights), folder, f"{name}.onnx") for name in "gr")
        self.feeds, self.right = self.file(".npz", FEEDS, "feeds"), folder / "report.json"
        self.parity("--feeds", self.feeds, "--report", self.right, codes=(0,))

    def file(self, kind: str, tensors: mutators.Tensors, name: str = "now") -> Path:
        path = self.folder / f"{name}{kind}"
        if kind == ".npz":
            with zipfile.ZipFile(path, "w") as archive:
                for key, values in tensors.items():
                    archive.writestr(f"{key}.npy", npy(values))
        else:
            save_file({key: np.ascontiguousarray(values) for key, values in tensors.items()}, path)
        return path

    def parity(self, *options: object, codes: tuple[int, ...] = (0, 1, 3), reference: object = None) -> int:
        TRIED.append(1)
        begin = time.monotonic()
        words = ["parity", "--reference", reference or self.reference, "--candidate", self.graph, "--quiet"]
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in [*words, *options]])
        assert int(stop.value.code or 0) in codes, f"exit code {stop.value.code}"
        assert time.monotonic() - begin < HANG_S
        return int(stop.value.code or 0)

    def hostile(self, path: Path, *options: object, reference: object = None) -> int:
        with peaks.within(path):
            return self.parity(*options, reference=reference)


def npy(values: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_feeds(kind: str, place: Place) -> None:
    codes = set()

    @mutating(80)
    @given(mutators.tensors(FEEDS), st.sampled_from(["", "", "one/", "base/"]))
    def check(tensors: mutators.Tensors, label: str) -> None:
        path = place.file(kind, {f"{label}{key}": values for key, values in tensors.items()})
        codes.add(place.hostile(path, "--feeds", path))

    check()
    assert codes == {0, 1}


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_saved_outputs(kind: str, place: Place) -> None:
    rows = random(16, 4, seed=6)[FEEDS["input_ids"]] * FEEDS["attention_mask"][..., None] + FEEDS["bias"]
    good = {"logits": rows.astype(np.float32), "base/logits": rows.astype(np.float32)}
    codes = set()

    @mutating(80)
    @given(mutators.tensors(good))
    def check(tensors: mutators.Tensors) -> None:
        path = place.file(kind, tensors)
        codes.add(place.hostile(path, "--feeds", place.feeds, reference=path))

    check()
    assert {1, 3} <= codes


# What an array's header says of it (numpy.lib.format); None stands for the right words.
SHAPES = ["()", "(0,)", "(2, 3)", "(2, 3, 4)", "(2, 30000000)", "(2, 1000000000000)", "(-2, -3)", "(True, 6)",
          "2", "(0, 10**30)", "[2, 3]", "'x'", "None", "(2.0, 3)", "(6,) * 70", "()" + "," * 3000,
          "(" * 5000]  # fmt: skip
TYPES = ["<i8", ">i8", "<f4", "|b1", "|O", "|V0", "<U0", "|S0", "<U900000000", "|V2000000000", "<M8[s]",
         "<c16", "V2", "[('a', '<i8')]", "i8, i8", "(1000000000,)i8", "", "x"]  # fmt: skip


@st.composite
def arrays(draw: st.DrawFn) -> bytes:
    """Return a file of `numpy.save`, one to three things in its header or around it changed."""
    values = FEEDS[draw(st.sampled_from(["input_ids", "bias"]))]
    shape, dtype, order = str(values.shape), repr(values.dtype.str), "False"
    version, body, length, magic = 1, values.tobytes(), 0, b"\x93NUMPY"
    for _ in range(draw(st.integers(1, 3))):
        how = draw(
            st.sampled_from(
                ["shape", "shape", "dtype", "dtype", "order", "version", "body", "length", "magic"]
            )
        )
        if how == "shape":
            shape = draw(st.sampled_from(SHAPES))
        elif how == "dtype":
            name = draw(st.sampled_from(TYPES))
            dtype = name if name.startswith("[") else repr(name)
        elif how == "order":
            order = draw(st.sampled_from(["True", "0", "None", "'x'"]))
        elif how == "version":
            version = draw(st.sampled_from([0, 2, 3, 9]))
        elif how == "body":
            body = draw(st.sampled_from([b"", b"\0", values.tobytes()[:-1], values.tobytes() * 2]))
        elif how == "magic":
            magic = draw(st.sampled_from([b"", b"x", b"PK\3\4", b"\x80\2]."]))
        else:
            length = draw(st.sampled_from([-1, 1, 60_000, 2**31]))
    text = f"{{'descr': {dtype}, 'fortran_order': {order}, 'shape': {shape}, }}".ljust(117) + "\n"
    width = 2 if version == 1 else 4
    size = min(max(len(text) + length, 0), 256**width - 1)
    return magic + bytes([version, 0]) + size.to_bytes(width, "little") + text.encode() + body


@st.composite
def archives(draw: st.DrawFn, good: Path) -> bytes:
    """Return an archive with one to three bytes of its directory and of its members' headers changed."""
    raw = bytearray(good.read_bytes())
    marks = [at for mark in (b"PK\1\2", b"PK\3\4", b"PK\5\6") for at in found(bytes(raw), mark)]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from(marks)) + draw(st.integers(0, 45))
        if at < len(raw):
            raw[at] = draw(st.sampled_from([0, 1, 8, 9, 12, 14, 64, 127, 128, 255]))
    return bytes(raw)


def found(raw: bytes, mark: bytes) -> list[int]:
    return [at for at in range(len(raw)) if raw.startswith(mark, at)]


@pytest.mark.parametrize("which", ["feeds", "reference"])
def test_arrays_in_npz(which: str, place: Place) -> None:
    @mutating(150)
    @given(arrays(), st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]), st.booleans())
    def check(array: bytes, compression: int, bare: bool) -> None:
        path = place.folder / "now.npz"
        if bare:
            path.write_bytes(array)
        else:
            name = "input_ids.npy" if which == "feeds" else "logits.npy"
            with zipfile.ZipFile(path, "w", compression) as archive:
                archive.writestr(name, array)
                for key, values in FEEDS.items() if which == "feeds" else ():
                    if key != "input_ids":
                        archive.writestr(f"{key}.npy", npy(values))
        if which == "feeds":
            place.hostile(path, "--feeds", path)
        else:
            place.hostile(path, "--feeds", place.feeds, reference=path)

    check()


def test_archives(place: Place) -> None:
    good = place.file(".npz", FEEDS, "good")

    @mutating(150)
    @given(archives(good))
    def check(raw: bytes) -> None:
        path = place.folder / "now.npz"
        path.write_bytes(raw)
        place.hostile(path, "--feeds", path)

    check()


def test_baselines(place: Place) -> None:
    good = json.loads(place.right.read_text())
    codes = set()

    @mutating(200)
    @given(mutators.plain_data(good, ("format", "verdicts", "metrics", "feeds", "passed", "value", "q")))
    def check(data: Any) -> None:
        path = place.folder / "now.json"
        path.write_text(json.dumps(data))
        codes.add(place.hostile(path, "--feeds", place.feeds, "--baseline", path))

    check()
    assert {0, 1} <= codes
