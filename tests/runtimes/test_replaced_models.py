"""A model's file that is replaced while a session opens it, or afterwards: never a mixture of the two."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import onnxruntime as ort
import pytest
from session_graphs import bank, feeds, fitting, linear, swap, wanted_blend
from small_graphs import adapter, error

from lora_export import AdapterSession, InputChangedError

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
