"""What a model is run with: which workloads it has, and feeds of exactly their sizes."""

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from lora_export.bench.model import BenchModel, label_models
from lora_export.bench.workloads import (
    Workload,
    choose_sizes,
    has_cache,
    make_feeds,
    plan_workloads,
    shape_problems,
)
from lora_export.graph.port import Port


def model(*inputs, **more):
    return BenchModel(
        path=Path("m.onnx"),
        label="m.onnx",
        kind="graph",
        inputs=tuple(Port(*entry) for entry in inputs),
        **more,
    )


def decoder(
    batch="batch", sequence="sequence", past="past_sequence", total="total_sequence", dtype="float16"
):
    return model(
        ("input_ids", "int64", (batch, sequence)),
        ("attention_mask", "int64", (batch, total)),
        ("position_ids", "int64", (batch, sequence)),
        ("past_key_values.0.key", dtype, (batch, 3, past, 16)),
        ("past_key_values.0.value", dtype, (batch, 3, past, 16)),
        vocab_size=50,
    )


NAMES = [
    {},  # ours
    {  # optimum
        "batch": "batch_size",
        "sequence": "sequence_length",
        "past": "past_sequence_length",
        "total": "past_sequence_length + sequence_length",
    },
    {"batch": "s0", "sequence": "s7", "past": "s2", "total": "s2 + s7"},  # torch.export
    {"batch": None, "sequence": None, "past": None, "total": None},
]


@pytest.mark.parametrize("names", NAMES)
def test_feeds_of_a_decoder_have_exactly_the_sizes(names):
    made = decoder(**names)
    work = Workload("decode", 3, 1, 7)
    assert list(shape_problems(made, work)) == []
    feeds = make_feeds(made, work, 0)
    shapes = {name: values.shape for name, values in feeds.items()}
    assert shapes == {
        "input_ids": (3, 1),
        "attention_mask": (3, 8),
        "position_ids": (3, 1),
        "past_key_values.0.key": (3, 3, 7, 16),
        "past_key_values.0.value": (3, 3, 7, 16),
    }
    assert feeds["attention_mask"].all()
    assert (feeds["position_ids"] == 7).all()
    assert feeds["past_key_values.0.key"].dtype == np.float16
    assert feeds["past_key_values.0.key"].std() > 0.1
    assert not np.array_equal(feeds["past_key_values.0.key"], feeds["past_key_values.0.value"])


def test_a_prompt_has_an_empty_cache_and_ids_within_the_vocabulary():
    work = Workload("prefill", 2, 400)
    feeds = make_feeds(decoder(), work, 0)
    assert feeds["past_key_values.0.key"].shape == (2, 3, 0, 16)
    assert feeds["attention_mask"].shape == (2, 400)
    assert (feeds["position_ids"] == np.arange(400)).all()
    ids = feeds["input_ids"]
    assert ids.min() >= 0
    assert ids.max() == 49  # of 800 drawn, none beyond and the last among them
    assert np.array_equal(ids, make_feeds(decoder(), work, 0)["input_ids"])
    assert not np.array_equal(ids, make_feeds(decoder(), work, 1)["input_ids"])


def test_models_of_other_dtypes_get_the_same_values():
    work = Workload("decode", 1, 1, 9)
    full, half = (
        make_feeds(decoder(dtype=dtype), work, 0)["past_key_values.0.key"]
        for dtype in ("float32", "bfloat16")
    )
    assert half.dtype == ml_dtypes.bfloat16
    assert np.array_equal(full.astype(ml_dtypes.bfloat16), half)


def test_a_decoder_has_prompts_and_steps():
    made = plan_workloads(decoder(), [1, 4], [8, 16], [])
    assert made == (
        *(Workload("prefill", batch, length) for batch in (1, 4) for length in (8, 16)),
        *(Workload("decode", batch, 1, past) for batch in (1, 4) for past in (8, 16)),
    )
    assert [work.past for work in plan_workloads(decoder(), [1], [8], [0, 100])] == [0, 0, 100]


def test_what_has_no_cache_has_one_phase():
    encoder = model(
        ("input_ids", "int64", ("b", "s")),
        ("token_type_ids", "int64", ("b", "s")),
        ("attention_mask", "int64", ("b", "s")),
    )
    assert not has_cache(encoder)
    (work,) = plan_workloads(encoder, [2], [5], [])
    assert (work.phase, work.tokens, work.label) == ("run", 10, "run 2×5")
    feeds = make_feeds(encoder, work, 0)
    assert {values.shape for values in feeds.values()} == {(2, 5)}
    assert not feeds["token_type_ids"].any()
    images = model(("pixel_values", "float32", ("batch", 3, 32, 32)))
    (work,) = plan_workloads(images, [2], [5, 6], [])
    assert (work.size, work.sequence) == ("2", 0)
    assert make_feeds(images, work, 0)["pixel_values"].shape == (2, 3, 32, 32)


def test_problems_name_input_and_size():
    fixed = model(("input_ids", "int64", (1, 128)), ("image", "float32", ("batch", 3, "height")))
    assert list(shape_problems(fixed, Workload("run", 2, 64))) == [
        "input_ids has a fixed batch of 1, not 2: give --batch 1",
        "input_ids has a fixed sequence of 128, not 64: give --sequence 128",
        "image: the size of axis 2 (height) is unknown: give --shape NAME=SIZE",
    ]
    huge = model(("image", "float32", ("batch", 1 << 20, 1 << 20)))
    assert list(shape_problems(huge, Workload("run", 1, 0))) == [
        "with image of 1 × 1048576 × 1048576 values the feeds would have more than 536870912 values"
    ]


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ([("batch", "sequence", 1 << 23)], "with x0 of 2 × 64 × 8388608 values"),
        ([("batch", 1 << 26)] * 5, "with x4 of 2 × 67108864 values"),
        ([("batch", -5)], "x0 of 2 × -5 values has a size below 0"),
        ([("batch", *[1] * 69)], "x0 has 70 axes"),
        ([("batch", 0, 1 << 62, 1 << 62)], "with x0 of 2 × 0 × 4611686018427387904"),
    ],
)
def test_what_feeds_would_take_is_counted_with_every_size_of_every_input(shapes, says):
    inputs = [(f"x{number}", "float32", shape) for number, shape in enumerate(shapes)]
    (problem,) = shape_problems(model(*inputs), Workload("run", 2, 64))
    assert says in problem


def test_ids_of_a_small_dtype_stay_ids():
    few = dataclasses.replace(model(("input_ids", "uint8", ("batch", "sequence"))), vocab_size=1 << 40)
    ids = make_feeds(few, Workload("run", 4, 64), 0)["input_ids"]
    assert len(set(ids.ravel().tolist())) > 100
    small = decoder()
    small = BenchModel(
        path=small.path,
        label=small.label,
        kind="graph",
        inputs=small.inputs,
        largest={"sequence": 10, "total_sequence": 12},
    )
    assert list(shape_problems(small, Workload("prefill", 1, 11))) == [
        "input_ids: the model has positions for a sequence of 10, not 11: give --sequence 10 or less",
        "position_ids: the model has positions for a sequence of 10, not 11: give --sequence 10 or less",
    ]
    assert list(shape_problems(small, Workload("decode", 1, 1, 12))) == [
        "attention_mask: the model has positions for a total of 12, not 13: give --past 11 or less"
    ]
    # One token is decoded at a time: no option changes that.
    (problem,) = shape_problems(
        model(("input_ids", "int64", ("b", 8)), ("past.0.key", "float16", ("b", 1, "p", 4))),
        Workload("decode", 1, 1, 4),
    )
    assert problem == "input_ids has a fixed sequence of 8, not 1"


def limited(**largest):
    return dataclasses.replace(decoder(), largest=largest)


def test_sizes_that_the_user_leaves_to_us_fit_into_the_model():
    full = limited(sequence=128, past_sequence=128, total_sequence=128)
    sequences, pasts, notes = choose_sizes([full], None, ())
    assert (sequences, pasts) == ((128,), (127,))
    (note,) = notes
    assert "--past is 127, not 128" in note
    for work in plan_workloads(full, [1], sequences, pasts):
        assert list(shape_problems(full, work)) == []
    # Whoever has the fewest positions decides; the first model alone does not.
    small = limited(sequence=20, total_sequence=20)
    assert choose_sizes([full, small], None, ())[:2] == ((20,), (19,))
    assert choose_sizes([small], None, (3,))[:2] == ((20,), (3,))
    assert choose_sizes([decoder()], None, ()) == ((128,), (128,), ())
    one = limited(total_sequence=1)
    assert choose_sizes([one], None, ())[:2] == ((1,), (0,))


def test_sizes_that_the_user_gave_stay():
    assert choose_sizes([limited(total_sequence=128)], (128,), ()) == ((128,), (), ())


def test_a_model_without_a_cache_has_no_past():
    encoder = model(("input_ids", "int64", ("b", "s")), largest={"s": 64})
    sequences, pasts, notes = choose_sizes([encoder], None, ())
    assert (sequences, pasts) == ((64,), ())
    assert "--sequence is 64" in notes[0]


def test_labels_tell_models_apart(tmp_path):
    paths = [tmp_path / "a" / "model.onnx", tmp_path / "b" / "model.onnx", tmp_path / "b" / "other.onnx"]
    made = [BenchModel(path=path, label=path.name, kind="graph", inputs=()) for path in (*paths, paths[0])]
    assert [entry.label for entry in label_models(made)] == [
        "a/model.onnx",
        "b/model.onnx",
        "other.onnx",
        "a/model.onnx #2",
    ]
