"""What tests of parity feeds share."""

import ml_dtypes
import numpy as np
import pytest

from lora_export import BackendError
from lora_export.graph.captured import Captured
from lora_export.parity.feeds.made import InputPort

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


TEXT = ("batch", "sequence")


def port(name, shape, dtype=np.int64, rows=None):
    return InputPort(name, np.dtype(dtype).name, tuple(shape), rows)


IDS, MASK = port("input_ids", TEXT), port("attention_mask", TEXT)


PLAIN = [IDS, MASK, port("token_type_ids", TEXT), port("position_ids", TEXT)]


CACHED = [
    IDS,
    port("attention_mask", ("batch", "total_sequence")),
    port("position_ids", TEXT),
    port("cache_position", ("sequence",)),
    *(port(f"past_key_values.0.{p}", ("batch", 2, "past_sequence", 8), np.float16) for p in ("key", "value")),
]


PAIR = [IDS, MASK, port("decoder_input_ids", ("batch", "decoder_sequence"))]


DECODER = Captured(
    kind="decoder",
    kv_cache=True,
    dtype="float16",
    vocab_size=50,
    largest={"sequence": 20, "past_sequence": 20, "total_sequence": 20},
)


PLAIN_RECORD = Captured(
    kind="encoder", kv_cache=False, dtype="float32", vocab_size=50, largest={"sequence": 20}
)


def refused(call, *words, count=None):
    """Run a call that must be refused with all of the words; return its problems."""
    with pytest.raises(BackendError) as caught:
        call()
    assert caught.value.hint
    assert caught.value.exit_code == 1
    for word in words:
        assert word in str(caught.value), word
    assert count is None or len(caught.value.problems) == count, caught.value.problems
    return caught.value.problems


def _check_shapes(feed, ports):
    sizes = {}
    assert list(feed.values) == [p.name for p in ports]
    for p in ports:
        values = feed.values[p.name]
        assert values.dtype == p.dtype
        assert values.flags["C_CONTIGUOUS"]
        assert values.ndim == len(p.dims)
        for dim, size in zip(p.dims, values.shape, strict=True):
            assert size == (dim if isinstance(dim, int) else sizes.setdefault(dim, size)), (p.name, dim)
    if "total_sequence" in sizes:
        assert sizes["total_sequence"] == sizes["past_sequence"] + sizes["sequence"] <= 20
        assert feed.past == sizes["past_sequence"]
    assert feed.shapes == {name: list(values.shape) for name, values in feed.values.items()}


def contents(feed):
    return feed.label, {name: values.tobytes() for name, values in feed.values.items()}
