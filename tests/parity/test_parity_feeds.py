"""Feeds of a parity check: what is made fits the graph and exercises it; what doesn't fit is refused."""

import numpy as np
import onnx_ir as ir
import pytest
import small_graphs as small
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
from hypothesis import given
from hypothesis import strategies as st

from lora_export import GraphError
from lora_export.graph.captured import Captured
from lora_export.graph.onnx_file import load_graph
from lora_export.parity.feeds.made import InputPort, make_feeds, ports_of_graph, rows_of

PIXELS = [port("pixel_values", ("batch", 3, 8, 8), np.float32)]


HUGE = {
    "one input": [port("pixel_values", ("batch", 1 << 20, 1 << 20), np.float32)],
    "tokens": [port("input_ids", (1, 1 << 40), np.int64, rows=8)],
}


@pytest.mark.parametrize("ports", HUGE.values(), ids=HUGE)
def test_a_graph_does_not_choose_how_much_memory_feeds_take(ports):
    """A graph's file holds nothing of its inputs but their sizes; of sounds, its metadata do."""
    refused(lambda: make_feeds(ports), "more than 536870912 values", "--samples")


def test_the_shortest_sound_does_not_choose_it_either():
    record = Captured(kind="audio", kv_cache=False, dtype="float32", smallest={"samples": 10**12})
    sound = [port("input_values", ("batch", "samples"), np.float32)]
    refused(lambda: make_feeds(sound, record), "more than 536870912 values")


@pytest.mark.parametrize(
    ("dims", "says"),
    [
        (("batch", -5), "a size below 0"),
        ((1,) * 70, "has 70 axes, at most 64"),
        ((0, 1 << 62, 1 << 62), "more than 536870912 values"),
    ],
)
def test_sizes_that_no_values_can_have(dims, says):
    refused(lambda: make_feeds([InputPort("x", "float32", dims)]), says)


# --- properties of what is made ----------------------------------------------------------------------


SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@given(
    graph=st.sampled_from(["plain", "cached", "pair"]),
    batches=SIZES,
    sequences=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    seed=st.integers(0, 5),
    more=st.integers(0, 9),
)
def test_what_is_made_fits_the_graph(graph, batches, sequences, seed, more):
    ports, record = {
        "plain": (PLAIN, PLAIN_RECORD),
        "cached": (CACHED, DECODER),
        "pair": (PAIR, PLAIN_RECORD),
    }[graph]
    samples = max(len(set(batches)), len(set(sequences))) + more
    feeds = make_feeds(ports, record, batches, sequences, seed, samples)
    assert len({feed.label for feed in feeds}) == len(feeds) == samples
    assert {feed.batch for feed in feeds} == set(batches)
    assert {feed.values["input_ids"].shape[1] for feed in feeds} == set(sequences)
    for feed in feeds:
        _check_shapes(feed, ports)
        _check_tokens(feed)


def _check_tokens(feed):
    ids, mask = feed.values["input_ids"], feed.values["attention_mask"]
    assert ids.min() >= 0
    assert ids.max() < 50
    for row in mask:
        tokens = np.flatnonzero(row)
        # One run of tokens: padding is on one side, and never everywhere.
        assert len(tokens)
        assert len(tokens) == tokens[-1] - tokens[0] + 1
        assert tokens[0] == 0 or tokens[-1] == len(row) - 1
    if ids.shape[1] == 1:
        assert mask[:, -1].all()
    if "position_ids" in feed.values:
        for row, tokens, places in zip(ids, mask, feed.values["position_ids"], strict=True):
            count = int(tokens.sum())
            first = int(tokens.argmax())
            wanted = np.clip(np.arange(len(tokens)) - first, 0, count - 1)
            assert (places == wanted[-len(row) :]).all()
    if "decoder_input_ids" not in feed.values:
        assert (feed.mask == (mask[:, feed.past :] == 1)).all()
        assert feed.mask.shape == ids.shape


def test_paddings_and_pasts_all_occur():
    feeds = make_feeds(CACHED, DECODER, [3], [6], samples=6)
    kinds = set()
    for feed in feeds:
        for row in feed.values["attention_mask"]:
            kinds.add((feed.past > 0, "left" if not row[0] else "none" if row[-1] else "right"))
    assert kinds == {(past, padding) for past in (True, False) for padding in ("none", "left", "right")}


@pytest.mark.parametrize(
    ("padding", "wanted"),
    [
        ("right", {(False, "none"), (False, "right"), (True, "none")}),
        ("none", {(False, "none"), (True, "none")}),
    ],
)
def test_graphs_that_take_less_padding_get_less(padding, wanted):
    """Behind a past no row has any: its cache would have to be without gaps."""
    kinds = set()
    for feed in make_feeds(CACHED, DECODER, [3], [6], samples=6, padding=padding, long_past=False):
        assert feed.past == 0 or feed.batch == 1 or feed.values["input_ids"].shape[1] == 1
        for row in feed.values["attention_mask"]:
            kinds.add((feed.past > 0, "left" if not row[0] else "none" if row[-1] else "right"))
    for feed in make_feeds(CACHED, DECODER, [3], [1], samples=4, padding=padding, long_past=False):
        for row in feed.values["attention_mask"]:
            kinds.add((feed.past > 0, "none" if row.all() else "padded"))
    assert kinds == wanted


def test_rows_alone_are_padded_on_both_sides_too():
    masks = [
        feed.values["attention_mask"][0] for feed in make_feeds(PLAIN, PLAIN_RECORD, [1], [6], samples=3)
    ]
    assert {(bool(mask[0]), bool(mask[-1])) for mask in masks} == {(True, True), (False, True), (True, False)}


def test_every_pair_of_sizes_occurs_and_each_has_both_pasts():
    feeds = make_feeds(CACHED, DECODER, [1, 3], [1, 4, 9], samples=12)
    found = [(feed.batch, feed.values["input_ids"].shape[1], feed.past > 0) for feed in feeds]
    assert len(set(found)) == 12


def test_token_ids_are_all_looked_at_before_one_comes_again():
    feeds = make_feeds(PLAIN, PLAIN_RECORD, [4], [10], samples=4)
    for feed in feeds:
        used = feed.values["input_ids"][feed.mask]
        assert len(used) <= 50
        assert len(set(used)) == len(used)
    together = np.concatenate([feed.values["input_ids"][feed.mask] for feed in feeds])
    assert set(together[:50]) == set(range(50))


def test_more_tokens_than_the_vocabulary_has():
    (feed,) = make_feeds([IDS], None, [4], [10], samples=1, vocab_size=7)
    _, counts = np.unique(feed.values["input_ids"], return_counts=True)
    # 40 = 5 · 7 + 5
    assert sorted(counts) == [5, 5, 6, 6, 6, 6, 6]


@pytest.mark.parametrize("ports", [PLAIN, CACHED, PAIR, PIXELS], ids=["plain", "cached", "pair", "pixels"])
def test_the_same_seed_gives_the_same_bytes(ports):
    one, two, other = (make_feeds(ports, PLAIN_RECORD, seed=seed, samples=5) for seed in (3, 3, 4))
    assert [contents(feed) for feed in one] == [contents(feed) for feed in two]
    assert [contents(feed) for feed in one] != [contents(feed) for feed in other]
    # More samples leave the first ones alone.
    longer = make_feeds(ports, PLAIN_RECORD, seed=3, samples=9)
    assert [contents(feed) for feed in longer[:5]] == [contents(feed) for feed in one]


def test_vocabulary_is_the_callers_else_the_records_else_the_tables():
    ids = port("input_ids", TEXT, rows=30)

    def largest(captured, vocab_size):
        feeds = make_feeds([ids], captured, [4], [20], samples=8, vocab_size=vocab_size)
        return max(int(feed.values["input_ids"].max()) for feed in feeds)

    assert largest(None, None) == 29
    assert largest(PLAIN_RECORD, None) == 49
    assert largest(PLAIN_RECORD, 60) == 59


def test_token_types_stay_within_the_graphs_table():
    for rows, wanted in ((None, {0, 1}), (2, {0, 1}), (1, {0}), (5, {0, 1, 2, 3, 4})):
        types = port("token_type_ids", TEXT, rows=rows)
        feeds = make_feeds([IDS, types], PLAIN_RECORD)
        assert set(np.concatenate([f.values["token_type_ids"].ravel() for f in feeds])) == wanted


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32, np.float64])
def test_floats_are_standard_normal_in_the_inputs_dtype(dtype):
    (feed,) = make_feeds([port("pixel_values", ("batch", 3, 32, 32), dtype)], batches=[4], samples=1)
    values = feed.values["pixel_values"]
    assert values.dtype == dtype
    wide = values.astype(np.float64)
    assert abs(wide.mean()) < 0.05
    assert abs(wide.std() - 1) < 0.05


def test_a_past_is_half_as_large():
    feeds = make_feeds(CACHED, DECODER, [6], [4], samples=8)
    past = np.concatenate([f.values["past_key_values.0.key"].astype(np.float64).ravel() for f in feeds])
    assert abs(past.std() - 0.5) < 0.05


def test_other_dtypes():
    ports = [
        port("input_ids", TEXT, np.int32),
        port("attention_mask", TEXT, np.bool_),
        port("image", ("batch", 4, 4, 3), np.uint8),
        port("flags", ("batch", 5), np.bool_),
    ]
    feed = make_feeds(ports, PLAIN_RECORD, [4], [6], samples=1)[0]
    assert [feed.values[p.name].dtype for p in ports] == [p.dtype for p in ports]
    assert feed.values["image"].max() > 127
    assert set(feed.values["flags"].ravel()) == {False, True}


def test_the_decoder_behind_an_encoder_has_a_length_of_its_own():
    feeds = make_feeds(PAIR, PLAIN_RECORD, [2], [3, 8], samples=4)
    for feed in feeds:
        assert {feed.values["input_ids"].shape[1], feed.values["decoder_input_ids"].shape[1]} == {3, 8}
        assert feed.mask is None  # the encoder's padding says nothing of the decoder's tokens
    masked = [*PAIR, port("decoder_attention_mask", ("batch", "decoder_sequence"))]
    for feed in make_feeds(masked, PLAIN_RECORD, [2], [3, 8], samples=4):
        assert (feed.mask == (feed.values["decoder_attention_mask"] == 1)).all()


def test_a_graph_that_is_a_decoder_alone():
    ports = [
        port("input_ids", ("batch", "decoder_sequence_length")),
        port("encoder_attention_mask", ("batch", "encoder_sequence_length")),
        port("encoder_hidden_states", ("batch", "encoder_sequence_length", 16), np.float32),
    ]
    for feed in make_feeds(ports, batches=[2], sequences=[3], vocab_size=9):
        shapes = feed.shapes
        assert shapes["input_ids"] == [2, 3]
        assert shapes["encoder_hidden_states"][:2] == shapes["encoder_attention_mask"]


# --- sizes that the graph fixes or limits ------------------------------------------------------------


def test_fixed_sizes_are_used_where_none_are_asked_for():
    ports = [port("input_ids", (2, 5)), port("attention_mask", (2, 5))]
    assert {(f.batch, f.values["input_ids"].shape[1]) for f in make_feeds(ports, vocab_size=9)} == {(2, 5)}
    assert make_feeds(ports, None, [2], [5], vocab_size=9)[0].shapes["input_ids"] == [2, 5]
    problems = refused(lambda: make_feeds(ports, None, [1, 4], [5, 16], vocab_size=9), count=3)
    assert all("fixes" in problem for problem in problems)


def test_a_fixed_cache_and_mask():
    def ports(past, total):
        return [
            port("input_ids", ("batch", "sequence")),
            port("attention_mask", ("batch", total)),
            port("past_key_values.0.key", ("batch", 2, past, 4), np.float32),
        ]

    feeds = make_feeds(ports(6, "total_sequence"), DECODER, samples=4)
    assert {feed.past for feed in feeds} == {6}
    assert {feed.values["input_ids"].shape[1] for feed in feeds} == {1, 14}  # of 20 positions
    feeds = make_feeds(ports("past_sequence", 12), DECODER, [1], [5, 12], samples=4)
    assert {(feed.past, feed.values["input_ids"].shape[1]) for feed in feeds} == {(7, 5), (0, 12)}
    refused(lambda: make_feeds(ports("past_sequence", 12), DECODER, [1], [13]), "total_sequence at 12")
    refused(lambda: make_feeds(ports(6, 12), DECODER, [1], [7]), "total_sequence at 12", count=1)
    assert make_feeds(ports(6, 12), DECODER)[0].shapes["input_ids"][1] == 6


def test_an_image_graph_does_not_look_at_sequences():
    feeds = make_feeds(PIXELS, None, [1, 4], [1, 16, 999])
    assert {feed.batch for feed in feeds} == {1, 4}
    assert feeds[0].mask is None
    assert feeds[0].past == 0


def test_usual_sequences_stay_within_the_models_positions():
    record = Captured(kind="encoder", kv_cache=False, dtype="float32", vocab_size=50, largest={"sequence": 8})
    assert {f.values["input_ids"].shape[1] for f in make_feeds(PLAIN, record)} == {1, 8}
    places = [IDS, port("position_ids", TEXT, rows=12)]
    assert {f.values["input_ids"].shape[1] for f in make_feeds(places, vocab_size=9)} == {1, 12}
    refused(lambda: make_feeds(places, vocab_size=9, sequences=[13]), "positions for 12")


def test_with_all_positions_taken_there_is_no_past():
    feeds = make_feeds(CACHED, DECODER, [2], [20, 19, 1], samples=12)
    for feed in feeds:
        assert feed.past + feed.values["input_ids"].shape[1] <= 20
    assert {f.past for f in feeds if f.values["input_ids"].shape[1] == 19} == {0, 1}


# --- bad requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"samples": 0}, ["samples 0"]),
        ({"samples": -1}, ["samples -1"]),
        ({"samples": 2, "sequences": [1, 2, 3]}, ["samples 2", "3 sizes"]),
        ({"batches": [0]}, ["batch 0"]),
        ({"batches": []}, ["no batch"]),
        ({"sequences": [-3]}, ["sequence -3"]),
        ({"sequences": []}, ["no sequence"]),
        ({"sequences": [21]}, ["sequence 21", "positions for 20"]),
        ({"seed": -1}, ["seed -1"]),
        ({"vocab_size": -2}, ["vocabulary of -2"]),
    ],
)
def test_bad_requests(asked, words):
    refused(lambda: make_feeds(CACHED, DECODER, **asked), *words, count=1)


def test_all_that_is_wrong_with_a_request_is_listed():
    refused(
        lambda: make_feeds(CACHED, DECODER, [0, 4], [-1, 21, 3], -1, 0),
        "batch 0",
        "sequence -1",
        "sequence 21",
        "seed",
        "samples 0",
        count=5,
    )


def test_inputs_that_are_not_understood_are_listed_with_the_way_out():
    ports = [
        IDS,
        port("lengths", ("batch",)),
        port("words", ("batch",), object),
        port("attention_mask", ("batch", 1, "sequence", "sequence")),
        port("past_key_values", (2, "batch", 2, "past", 8), np.float32),
        port("pixel_values", ("batch", 3, "height", "width"), np.float32),
        port("past_key_values.0.key", ("batch", 2, "past_sequence_length", "kv_cache_dim"), np.float32),
    ]
    refused(
        lambda: make_feeds(ports),
        *(f"{p.name}: " for p in ports),
        "the number of token ids is unknown",
        "--feeds",
        count=8,  # one for each input, and both axes of the image
    )
    refused(lambda: make_feeds([]), "no inputs")


def test_inputs_that_contradict_each_other():
    ports = [port("input_ids", (2, "sequence")), port("attention_mask", (3, "sequence"))]
    refused(lambda: make_feeds(ports, vocab_size=9), "fixes batch at 2", count=1)


# --- rows --------------------------------------------------------------------------------------------


def test_rows_are_chosen_of_every_input_that_has_rows():
    # As many new tokens as rows: what all rows share must not be mixed up.
    feed = next(f for f in make_feeds(CACHED, DECODER, [4], [4], samples=2) if f.past)
    turned = rows_of(feed, [3, 1, 1])
    assert turned.batch == 3
    assert turned.past == feed.past
    for name, values in feed.values.items():
        wanted = values if name == "cache_position" else np.stack([values[3], values[1], values[1]])
        assert (turned.values[name] == wanted).all(), name
    assert (turned.mask == feed.mask[[3, 1, 1]]).all()
    assert feed.label in turned.label


# --- inputs of a graph -------------------------------------------------------------------------------


def graph_file(folder, name="g.onnx"):
    text = """g (int64[batch, sequence] ids, float16[batch, 4] x, int64[N] lora_slot, float[4] w)
        => (float[batch, sequence, 3] y) {
      wide = Cast<to = 7>(ids)
      one = Gather(table, wide)
      y = Identity(one)
    }"""
    weights = {"table": small.random(11, 3), "w": small.random(4)}
    return small.save(small.graph(text, weights), folder, name)


def test_ports_are_the_inputs_without_defaults_and_without_those_left_out(tmp_path):
    assert ports_of_graph(load_graph(graph_file(tmp_path)), {"lora_slot"}) == [
        port("ids", TEXT, rows=11),
        port("x", ("batch", 4), np.float16),
    ]


def test_inputs_that_are_no_tensors_are_refused(tmp_path):
    path = graph_file(tmp_path)
    model = ir.load(path)
    model.graph.inputs[0].type = ir.SequenceType(ir.TensorType(ir.DataType.INT64))
    model.graph.inputs[1].shape = None
    ir.save(model, path)
    with pytest.raises(GraphError) as caught:
        ports_of_graph(load_graph(path))
    assert len(caught.value.problems) == 2
