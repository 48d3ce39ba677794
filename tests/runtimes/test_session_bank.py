"""`AdapterSession` with a bank: an adapter for each row, blends, and slots that are replaced."""

import dataclasses

import numpy as np
import onnxruntime as ort
import pytest
from session_graphs import Q, bank, base, both, feeds, fitting, wanted_blend
from small_graphs import error, random

from lora_export import AdapterError, AdapterSession, BackendError, GraphError, SiteError
from lora_export.modes.bank_onnx import bank_onnx

E, S, N = fitting(1, 0), fitting(2, 1), fitting(3, 2)


def open_bank(tmp_path, tensors, *residents, **record):
    return AdapterSession(bank(tmp_path, tensors, *residents, record=record), threads=1)


def check_rows(session, rows):
    """Compare each row with the oracle; a row is (adapters with weights, what the request says)."""
    inputs = feeds(len(rows))
    got = session.run(inputs, adapters=[said for _, said in rows])["y"]
    for row, (weights, _) in enumerate(rows):
        assert error(got[row], wanted_blend(weights, inputs, row)) < 2e-6


ROWS = [([(E, 1.0)], "emotion"), ([], None), ([(E, 0.7), (S, 0.3)], {"emotion": 0.7, "summary": 0.3})]


@pytest.mark.parametrize("tensors", ["constants", "defaults"])
def test_each_row_has_its_own_adapter(tmp_path, tensors):
    session = open_bank(tmp_path, tensors, E, S)
    check_rows(session, [*ROWS, ([(S, 1.0)], "summary"), ([(S, -2.0)], {"summary": -2})])
    check_rows(session, ROWS[::-1])
    assert session.adapters == session.on_device == ["emotion", "summary"]


def test_no_rows_said_is_the_base_for_all(tmp_path):
    session = open_bank(tmp_path, "constants", E, S)
    inputs = feeds(3)
    got = session.run(inputs)["y"]
    assert np.array_equal(got, session.run(inputs, adapters=[None] * 3)["y"])
    for row in range(3):
        assert error(got[row], wanted_blend([], inputs, row)) < 2e-6


def test_weights_as_an_array(tmp_path):
    session = open_bank(tmp_path, "constants", E, S)
    inputs = feeds(3)
    for dtype in (np.float32, np.float64, np.int64):
        weights = np.array([[1, 0, 0], [0, 0, 0], [2, -1, 0]], dtype)
        got = session.run(inputs, adapters=weights)["y"]
        said = session.run(inputs, adapters=["emotion", None, {"emotion": 2, "summary": -1}])["y"]
        assert np.array_equal(got, said)


def test_the_batch_may_be_a_tensor(tmp_path):
    session = open_bank(tmp_path, "constants", E, S)
    inputs = feeds(2)
    tensor = {**inputs, "x": ort.OrtValue.ortvalue_from_numpy(inputs["x"])}
    rows = ["summary", "emotion"]
    assert np.array_equal(session.run(tensor, adapters=rows)["y"], session.run(inputs, adapters=rows)["y"])


# --- wrong requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (["emotion", "joy"], "row 1: no adapter 'joy'"),
        ([{"emotion": 1, "joy": 1}, None], "row 0: no adapter 'joy'"),
        ([{"emotion": np.nan}, None], "row 0: emotion: weight nan, wanted a finite number"),
        ([None, {"emotion": np.inf}], "row 1: emotion: weight inf, wanted a finite number"),
        ([None, {"emotion": 1e39}], "row 1: emotion: weight 1e+39, wanted a finite number"),
        ([None, {"emotion": "1"}], "row 1: emotion: weight '1', wanted a finite number"),
        ([3, None], "row 0: int, wanted a name, None, or a dict of names and weights"),
        (["spare", None], "row 0: no adapter 'spare'"),
    ],
)
def test_rows_that_can_not_be_used(tmp_path, rows, problem):
    session = open_bank(tmp_path, "defaults", E, S)
    with pytest.raises(AdapterError) as refused:
        session.run(feeds(2), adapters=rows)
    assert len(refused.value.problems) == 1
    assert refused.value.problems[0].startswith(problem)
    assert "emotion, summary" in refused.value.hint


def test_every_wrong_row_is_said(tmp_path):
    session = open_bank(tmp_path, "constants", E, S)
    with pytest.raises(AdapterError) as refused:
        session.run(feeds(3), adapters=["joy", "emotion", {"grief": 1}])
    assert refused.value.problems == ("row 0: no adapter 'joy'", "row 2: no adapter 'grief'")
    assert refused.value.hint == "it has: emotion, summary"
    with pytest.raises(AdapterError) as refused:
        session.run(feeds(3), adapters=["emotoin", {"sumary": 1}, None])
    assert refused.value.hint == "did you mean 'emotion', 'summary'? it has: emotion, summary"


def test_the_number_of_rows_is_the_batch(tmp_path):
    session = open_bank(tmp_path, "constants", E, S)
    with pytest.raises(AdapterError, match="adapters has 2 entries, 'x' has 3 rows"):
        session.run(feeds(3), adapters=["emotion", None])
    for single in ("emotion", {"emotion": 1.0}, 3):
        with pytest.raises(AdapterError, match="wanted a list with one entry for each row"):
            session.run(feeds(3), adapters=single)


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        (np.zeros((2, 4), np.float32), "shape (2, 4), wanted (2, 3)"),
        (np.zeros((1, 3), np.float32), "shape (1, 3), wanted (2, 3)"),
        (np.full((2, 3), np.nan, np.float32), "values that are NaN"),
        (np.full((2, 3), 1e39), "values that are NaN, infinite or too large for float32"),
        (np.array([["a"] * 3] * 2), "<U1, wanted float32"),
    ],
)
def test_arrays_that_can_not_be_used(tmp_path, weights, problem):
    session = open_bank(tmp_path, "constants", E, S)
    with pytest.raises(AdapterError, match="array of adapter weights") as refused:
        session.run(feeds(2), adapters=weights)
    assert refused.value.problems[0].startswith(problem)


def test_one_adapter_for_all_is_refused(tmp_path):
    session = open_bank(tmp_path, "constants", E, S)
    with pytest.raises(AdapterError, match="is a bank") as refused:
        session.run(feeds(2), "emotion")
    assert "adapters=['emotion', …]" in refused.value.hint


def test_weights_are_no_feed(tmp_path):
    session = open_bank(tmp_path, "constants", E, S)
    with pytest.raises(BackendError) as refused:
        session.run({"lora.adapter_weights": np.zeros((2, 3), np.float32), "x": feeds(2)["x"]})
    assert refused.value.problems == (
        "lora.adapter_weights: run(adapters=…) sets it",
        "shift: missing, tensor(float)",
    )


def test_a_bank_of_constants_can_not_be_changed(tmp_path):
    session = open_bank(tmp_path, "constants", E, S)
    for change in (lambda: session.load_adapter("n", N), lambda: session.unload_adapter("emotion")):
        with pytest.raises(AdapterError, match="are constants") as refused:
            change()
        assert "--resident inputs" in refused.value.hint


def test_a_record_without_the_batch(tmp_path):
    with pytest.raises(GraphError, match="lacks") as refused:
        open_bank(tmp_path, "constants", E, batch_input="ids")
    assert refused.value.problems == ("ids",)


# --- slots ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensors", ["defaults", "inputs"])
def test_slots_are_filled_replaced_and_emptied(tmp_path, tensors):
    session = open_bank(tmp_path, tensors, E, S)
    if tensors == "inputs":  # without defaults a bank starts empty
        assert session.adapters == []
        session.load_adapter("emotion", E)
        session.load_adapter("summary", S)
    check_rows(session, ROWS)
    session.load_adapter("new", N)
    assert session.adapters == ["emotion", "summary", "new"]
    check_rows(session, [*ROWS, ([(N, 1.0)], "new")])
    other = fitting(8, 0)
    session.load_adapter("joy", other, slot="emotion", replace=True)
    assert session.adapters == ["joy", "summary", "new"]
    check_rows(session, [([(other, 1.0)], "joy"), ([(S, 0.5), (N, 2.0)], {"summary": 0.5, "new": 2.0})])
    session.unload_adapter("summary")
    check_rows(session, [([(other, 1.0)], "joy"), ([], None), ([(N, 1.0)], "new")])
    with pytest.raises(AdapterError) as refused:
        session.run(feeds(1), adapters=["summary"])
    assert refused.value.problems == ("row 0: no adapter 'summary'",)
    # Nothing of the last adapter is left: a smaller one in the same slot is itself alone.
    small = fitting(9, 2)
    session.load_adapter("small", small, slot="summary")
    check_rows(session, [([(small, 1.0)], "small"), ([(other, 1.0)], "joy")])
    session.load_adapter("summary", S, slot="summary", replace=True)
    check_rows(session, [([(S, 1.0)], "summary")])


def test_taken_slots(tmp_path):
    session = open_bank(tmp_path, "defaults", E, S)
    with pytest.raises(AdapterError, match="slot 'emotion' holds adapter 'emotion'"):
        session.load_adapter("joy", fitting(8, 0), slot="emotion")
    with pytest.raises(AdapterError, match="slot 'emotion' holds adapter 'emotion'"):
        session.load_adapter("emotion", fitting(8, 0))
    with pytest.raises(AdapterError, match="adapter 'emotion' is in slot 'emotion'"):
        session.load_adapter("emotion", fitting(8, 1), slot="summary", replace=True)
    with pytest.raises(AdapterError, match="no slot 'attic'") as refused:
        session.load_adapter("joy", fitting(8, 0), slot="attic")
    assert refused.value.hint == "it has: emotion, summary, spare"
    session.load_adapter("new", N)
    with pytest.raises(AdapterError, match="no free slot for 'more'") as refused:
        session.load_adapter("more", N)
    assert "slot 'spare': adapter 'new'" in refused.value.problems
    check_rows(session, ROWS)


def test_an_adapter_that_does_not_fit_its_slot_changes_nothing(tmp_path):
    session = open_bank(tmp_path, "defaults", E, S)
    with pytest.raises(SiteError, match="no place"):  # the spare slot has no room for q
        session.load_adapter("new", fitting(4, 1))
    poisoned = fitting(5, 2)
    poisoned.modules["p.weight"].lora_b[0, 0] = np.nan
    with pytest.raises(AdapterError, match="values that can't be used"):
        session.load_adapter("new", poisoned)
    # Its change is an ordinary one, but x·A would be infinite in all rows.
    large = fitting(5, 2)
    large.modules["p.weight"].lora_a[:] *= np.float32(1e37)
    large.modules["p.weight"].lora_b[:] *= np.float32(1e-37)
    with pytest.raises(AdapterError, match="values that can't be used") as refused:
        session.load_adapter("new", large)
    assert "may overflow in rows of other adapters" in refused.value.problems[0]
    assert session.adapters == ["emotion", "summary"]
    check_rows(session, ROWS)


def test_unknown_adapter_of_a_bank(tmp_path):
    session = open_bank(tmp_path, "defaults", E, S)
    with pytest.raises(AdapterError, match="no adapter is called 'joy'") as refused:
        session.unload_adapter("joy")
    assert "emotion, summary" in refused.value.hint
    with pytest.raises(AdapterError, match="no adapter is called"):
        session.unload_adapter(["emotion"])


def test_rows_of_a_run_do_not_touch_each_other(tmp_path):
    """A row's answer is the same whatever its neighbours use."""
    session = open_bank(tmp_path, "constants", E, S)
    inputs = {**feeds(3), "x": np.repeat(random(1, 4, seed=77), 3, axis=0)}
    alone = session.run(inputs, adapters=["emotion"] * 3)["y"][0]
    mixed = session.run(inputs, adapters=["summary", "emotion", None])["y"]
    assert np.array_equal(mixed[1], alone)
    assert mixed.shape == (3, len(Q))


@pytest.mark.parametrize("flavour", ["ort", "tensorrt"])
@pytest.mark.parametrize("resident", ["initializers", "inputs"])
def test_banks_of_bank_onnx(tmp_path, flavour, resident):
    """The graphs that the tool itself writes are driven in the same way."""
    adapters = {name: dataclasses.replace(both(seed), sha256=name) for name, seed in (("e", 1), ("s", 2))}
    path = tmp_path / "made.onnx"
    bank_onnx(base(tmp_path), adapters, path, resident=resident, flavour=flavour, batch_input="x")
    session = AdapterSession(path, threads=1)
    if resident == "inputs" and flavour == "tensorrt":
        for name, given in adapters.items():
            session.load_adapter(name, given)
    check_rows(session, [([(adapters["e"], 1.0)], "e"), ([], None), ([(adapters["s"], 0.5)], {"s": 0.5})])
    if resident == "inputs":
        session.load_adapter("e", both(3), replace=True)
        check_rows(session, [([(both(3), 1.0)], "e"), ([(adapters["s"], 1.0)], "s")])
