"""A model's file that is replaced while a session opens it, or afterwards: never a mixture of the two."""

from __future__ import annotations

import dataclasses
import os
import shutil
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
from session_graphs import bank, feeds, fitting, linear, swap, wanted_blend
from small_graphs import adapter, error, graph, save
from small_graphs import linear as small_linear

from lora_export import AdapterSession, InputChangedError, bank_onnx, swap_onnx
from lora_export.runtimes.ort import mapped

E, S, N = fitting(1, 0), fitting(2, 1), fitting(3, 0)


def replace(path, other):
    """Give another model this one's names, the graph last, as a commit does."""
    for file in sorted(other.parent.iterdir(), reverse=True):
        shutil.move(file, path.parent / file.name)


def test_a_bank_keeps_the_slots_that_it_was_opened_with(tmp_path):
    (tmp_path / "other").mkdir()
    path = bank(tmp_path, "defaults", E, S)
    session = AdapterSession(path, threads=1)
    replace(path, bank(tmp_path / "other", "defaults", fitting(8, 0), fitting(9, 1)))
    with pytest.raises(InputChangedError, match="since the session was opened") as refused:
        session.load_adapter("emotion", N, replace=True)
    assert refused.value.problems == (f"{path}: replaced by another file",)
    inputs = feeds(1)
    for name, given in (("emotion", E), ("summary", S)):
        got = session.run(inputs, adapters=[name])["y"]
        assert error(got[0], wanted_blend([(given, 1.0)], inputs, 0)) < 2e-6


def with_dora(seed):
    module = linear("p", seed)
    magnitude = np.linspace(0.5, 2, module.lora_b.shape[0]).astype(np.float32)
    made = adapter(dataclasses.replace(module, magnitude=magnitude))
    return dataclasses.replace(made, name=f"a{seed}", sha256=str(seed))


def test_w0_of_the_graph_that_was_opened(tmp_path):
    """For an adapter that is loaded, and for one that comes back after it was evicted."""
    (tmp_path / "other").mkdir()
    path = swap(tmp_path, dora=True)
    session = AdapterSession(path, threads=1, max_adapters=1)
    session.load_adapter("a", with_dora(1))
    answer = session.run(feeds(), adapter="a")["y"]
    session.load_adapter("b", with_dora(2))
    assert session.on_device == ["b"]
    assert np.array_equal(session.run(feeds(), adapter="a")["y"], answer)
    replace(path, swap(tmp_path / "other", dora=True))
    assert np.array_equal(session.run(feeds(), adapter="a")["y"], answer)
    for ask in (
        lambda: session.load_adapter("c", with_dora(3)),
        lambda: session.run(feeds(), adapter="b"),
    ):
        with pytest.raises(InputChangedError, match="since the session was opened"):
            ask()


def test_a_graph_replaced_while_it_is_opened(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    path, other = swap(tmp_path), swap(tmp_path / "other")
    own = ort.InferenceSession

    def late(*given, **options):
        session = own(*given, **options)
        replace(path, other)
        return session

    monkeypatch.setattr(ort, "InferenceSession", late)
    with pytest.raises(InputChangedError, match="changed while"):
        AdapterSession(path, threads=1)


# --- data that are written to in place, while a session has them mapped ----------------------------------

WIDTH = 32


def with_data(folder, mode, value):
    """Write a swap graph or a bank of one product, its weights in a file beside it, all of one value."""
    folder.mkdir()
    text = f"g (float[b,{WIDTH}] x) => (float[b,{WIDTH}] y) {{ y = MatMul(x, p_weight) }}"
    save(graph(text, {"p.weight": np.full((WIDTH, WIDTH), value, np.float32)}), folder)
    path = folder / "m.onnx"
    if mode == "swap":
        swap_onnx(folder / "base.onnx", path, target_modules=["p"], max_rank=4)
    else:
        bank_onnx(folder / "base.onnx", {"a": adapter(small_linear("p", WIDTH, WIDTH))}, path)
    data = folder / "m.onnx.data"
    assert data.is_file()
    return path, data


@pytest.fixture
def clock(monkeypatch):
    """Return a clock that a test sets: seconds."""
    now = [1000.0]
    monkeypatch.setattr(mapped, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


IN_PLACE = {
    "other values": lambda data, other: data.open("r+b").write(other.read_bytes()),
    "opened to write": lambda data, other: data.write_bytes(other.read_bytes()),
    "longer": lambda data, other: data.open("ab").write(b"more"),
    "half": lambda data, other: os.truncate(data, data.stat().st_size // 2),
    "nothing": lambda data, other: os.truncate(data, 0),
}


@pytest.mark.parametrize("mode", ["swap", "bank"])
@pytest.mark.parametrize("how", IN_PLACE)
def test_data_written_to_in_place_are_refused_by_the_next_look(how, mode, tmp_path, clock):
    path, data = with_data(tmp_path / "one", mode, 1.0)
    session = AdapterSession(path, threads=1)
    x = {"x": np.ones((2, WIDTH), np.float32)}
    before = session.run(x)["y"]
    clock[0] += 10
    assert np.array_equal(session.run(x)["y"], before)
    IN_PLACE[how](data, with_data(tmp_path / "two", mode, 2.0)[1])
    os.utime(data, ns=(1, 1))  # another time, which clocks of file systems may not tell
    clock[0] += 1.5
    for run in (session.run, session.run_on_device, session.run):
        with pytest.raises(InputChangedError, match="since the session was opened") as refused:
            run(x)
        assert str(data) in str(refused.value.problems)


@pytest.mark.parametrize("how", ["renamed over", "deleted", "the graph written to"])
def test_data_that_were_replaced_stay_mapped(how, tmp_path, clock):
    path, data = with_data(tmp_path / "one", "swap", 1.0)
    other, other_data = with_data(tmp_path / "two", "swap", 2.0)
    session = AdapterSession(path, threads=1)
    x = {"x": np.ones((2, WIDTH), np.float32)}
    before = session.run(x)["y"]
    if how == "renamed over":
        other_data.rename(data)
    elif how == "deleted":
        data.unlink()
    else:
        path.write_bytes(other.read_bytes())
    clock[0] += 1.5
    assert np.array_equal(session.run(x)["y"], before)


def test_data_are_looked_at_once_a_second(tmp_path, clock, monkeypatch):
    path, data = with_data(tmp_path / "one", "swap", 1.0)
    session = AdapterSession(path, threads=1)
    x, looks = {"x": np.ones((2, WIDTH), np.float32)}, []
    own = mapped.FileState.of
    monkeypatch.setattr(mapped.FileState, "of", lambda path: looks.append(path) or own(path))
    for _ in range(20):  # a quarter of a second apart
        session.run(x)
        clock[0] += 0.25
    assert set(looks) == {data}
    assert 4 <= len(looks) / 2 <= 5, "two states are compared in each look"
