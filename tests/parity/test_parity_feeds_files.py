"""Feeds from files: read, written, damaged."""

import zipfile

import numpy as np
import pytest
from feed_cases import (
    BFLOAT16,
    CACHED,
    DECODER,
    IDS,
    PAIR,
    PLAIN,
    PLAIN_RECORD,
    TEXT,
    _check_shapes,
    contents,
    port,
    refused,
)

from lora_export import BackendError
from lora_export.formats.reading.tensors import write_safetensors
from lora_export.parity.feeds.made import make_feeds, read_feeds

FEED = {
    "input_ids": np.array([[1, 2, 3], [4, 5, 6]]),
    "attention_mask": np.array([[1, 1, 1, 1], [0, 1, 1, 1]]),
    "past_key_values.0.key": np.full((2, 2, 1, 8), 0.5, np.float16),
}


PORTS = [
    IDS,
    port("attention_mask", ("batch", "total_sequence")),
    port("past_key_values.0.key", ("batch", 2, "past_sequence", 8), np.float16),
]


def written(folder, tensors, suffix=".npz"):
    path = folder / f"mine{suffix}"
    if suffix == ".npz":
        np.savez(path, **tensors)
    else:
        write_safetensors(path, tensors, {})
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_feeds_are_read(tmp_path, suffix):
    (feed,) = read_feeds(written(tmp_path, FEED, suffix), PORTS, DECODER)
    assert (feed.label, feed.batch, feed.past) == ("mine", 2, 1)
    assert feed.mask.all()
    _same(feed, FEED)
    several = {
        f"{label}/{name}": values + 1 * (label == "b" and name == "input_ids")
        for label in ("a", "b")
        for name, values in FEED.items()
    }
    one, two = read_feeds(written(tmp_path, several, suffix), PORTS, DECODER)
    assert (one.label, two.label) == ("a", "b")
    _same(one, FEED)
    _same(two, FEED | {"input_ids": FEED["input_ids"] + 1})


def _same(feed, wanted):
    assert set(feed.values) == set(wanted)
    for name, values in wanted.items():
        assert feed.values[name].dtype == values.dtype
        assert feed.values[name].flags.writeable
        np.testing.assert_array_equal(feed.values[name], values)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_what_is_made_can_be_written_and_read(tmp_path, suffix):
    wide = [*PLAIN, port("x", ("batch", 3), BFLOAT16)]
    for ports, record in ((wide, PLAIN_RECORD), (CACHED, DECODER), (PAIR, PLAIN_RECORD)):
        made = make_feeds(ports, record)
        flat = {f"{feed.label}/{name}": v for feed in made for name, v in feed.values.items()}
        read = {feed.label: feed for feed in read_feeds(written(tmp_path, flat, suffix), ports, record)}
        assert {label: contents(feed) for label, feed in read.items()} == {f.label: contents(f) for f in made}
        assert {feed.shared for feed in read.values()} == {made[0].shared}


def test_other_byte_order_is_read(tmp_path):
    swapped = FEED | {"input_ids": FEED["input_ids"].astype(">i8")}
    _same(read_feeds(written(tmp_path, swapped), PORTS)[0], FEED)


def test_names_with_slashes_are_read(tmp_path):
    ports = [port("serving/ids", TEXT), port("ids", TEXT, np.int32)]
    values = {"serving/ids": FEED["input_ids"], "ids": FEED["input_ids"].astype(np.int32)}
    _same(read_feeds(written(tmp_path, values), ports)[0], values)
    labelled = {f"a/b/{name}": array for name, array in values.items()}
    (feed,) = read_feeds(written(tmp_path, labelled), ports)
    assert feed.label == "a/b"
    _same(feed, values)


def changed(**changes):
    """Return the good feed with values replaced, or left out where the change is None."""
    return {name: v for name, v in (FEED | changes).items() if v is not None}


def with_value(name, index, value):
    values = FEED[name].copy()
    values[index] = value
    return {name: values}


BAD = {
    "missing": (changed(input_ids=None), ["input_ids: missing, int64 [batch, sequence]"]),
    "unknown": (changed(inputs_ids=FEED["input_ids"]), ["inputs_ids: not an input of the graph"]),
    "dtype": (changed(input_ids=np.ones((2, 3), np.int32)), ["int32, wanted int64", "astype('int64')"]),
    "float dtype": (
        FEED | {"past_key_values.0.key": FEED["past_key_values.0.key"].astype(np.float32)},
        ["float32, wanted float16"],
    ),
    "rank": (changed(input_ids=FEED["input_ids"][0]), ["shape [3], wanted int64 [batch, sequence]"]),
    "fixed size": (FEED | {"past_key_values.0.key": np.zeros((2, 2, 1, 4), np.float16)}, ["[2, 2, 1, 4]"]),
    "batches differ": (changed(input_ids=np.ones((3, 3), np.int64)), ["'batch' is 2, in input_ids it is 3"]),
    "total": (changed(input_ids=np.ones((2, 2), np.int64)), ["4 tokens, but 1 past", "2 new"]),
    "no rows": ({name: v[:0] for name, v in FEED.items()}, ["holds no values"]),
    "nan": (FEED | with_value("past_key_values.0.key", (0, 0, 0, 0), np.nan), ["1 of 32 values are NaN"]),
    "inf": (FEED | with_value("past_key_values.0.key", (1, 0, 0, 0), -np.inf), ["1 of 32 values are NaN"]),
    "vocabulary": (FEED | with_value("input_ids", (0, 0), 50), ["from 2 to 50, wanted 0 to 49"]),
    "negative": (FEED | with_value("input_ids", (0, 0), -1), ["from -1 to 6"]),
    "mask values": (FEED | with_value("attention_mask", (0, 0), 2), ["other than 0 and 1"]),
    "empty row": (FEED | with_value("attention_mask", 1, 0), ["no token in row 1"]),
    "too long": (
        changed(input_ids=np.ones((2, 21), np.int64), attention_mask=np.ones((2, 22), np.int64)),
        ["input_ids: 21 tokens, the model takes 20", "attention_mask: 22 tokens, the model takes 20"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_bad_feeds(tmp_path, case, suffix):
    tensors, words = BAD[case]
    refused(lambda: read_feeds(written(tmp_path, tensors, suffix), PORTS, DECODER), "mine", *words)


def test_all_that_is_wrong_is_listed_with_the_feed_that_it_is_in(tmp_path):
    bad = {
        "a/input_ids": FEED["input_ids"].astype(np.int32)[0],
        "a/attention_mask": FEED["attention_mask"] * 3,
        "b/input_ids": FEED["input_ids"] - 9,
        "b/attention_mask": FEED["attention_mask"],
        "b/past_key_values.0.key": FEED["past_key_values.0.key"],
        "b/other": FEED["input_ids"],
        "stray": FEED["input_ids"],
    }
    problems = refused(lambda: read_feeds(written(tmp_path, bad), PORTS, DECODER), count=7)
    assert sum(problem.startswith("a: ") for problem in problems) == 4
    assert sum(problem.startswith("b: ") for problem in problems) == 2
    assert sum(problem.startswith("stray: ") for problem in problems) == 1


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files_that_can_not_be_read(tmp_path, suffix):
    whole = written(tmp_path, FEED, suffix)
    data = whole.read_bytes()
    path = tmp_path / f"bad{suffix}"
    refused(lambda: read_feeds(path, PORTS), "no file")
    refused(lambda: read_feeds(tmp_path, PORTS), "folder")
    for damaged in (b"", b"x", data[: len(data) // 2], data[:-3], b"no such format at all" * 9):
        path.write_bytes(damaged)
        refused(lambda: read_feeds(path, PORTS), "bad")
    other = whole.rename(tmp_path / "feeds.bin")
    refused(lambda: read_feeds(other, PORTS), "neither .npz nor .safetensors")
    refused(lambda: read_feeds(written(tmp_path, {}, suffix), PORTS), "empty")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_damaged_bytes_give_feeds_or_an_error_of_ours(tmp_path, suffix):
    data = written(tmp_path, FEED, suffix).read_bytes()
    bad, refusals = tmp_path / f"bad{suffix}", 0
    random = np.random.default_rng(0)
    for place in range(len(data)):
        bad.write_bytes(data[:place] + random.bytes(1) + data[place + 1 :])
        try:
            (feed,) = read_feeds(bad, PORTS, DECODER)
        except BackendError as error:
            refusals += 1
            assert error.hint  # noqa: PT017 - feeds are right as well
        else:
            _check_shapes(feed, PORTS)
    assert refusals > len(data) // 4


def test_pickled_arrays_are_not_loaded(tmp_path):
    path = written(tmp_path, FEED | {"input_ids": np.array([{"a": 1}], object)})
    refused(lambda: read_feeds(path, PORTS), "input_ids", "holds object", count=1)


def test_a_zip_of_something_else_is_refused(tmp_path):
    path = tmp_path / "mine.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "hello")
    refused(lambda: read_feeds(path, PORTS), "readme.txt")
