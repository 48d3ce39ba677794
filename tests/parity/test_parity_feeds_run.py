"""Graphs run with feeds that were made."""

import functools

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny

from lora_export.base.capture.capture import capture_checkpoint
from lora_export.graph.captured import Captured
from lora_export.graph.onnx_file import load_graph
from lora_export.parity.feeds.made import Feed, make_feeds, ports_of_graph, rows_of


def answers(path, feed):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feed.values))


def other_padding(feed):
    """Return the same feed with other ids where there is padding."""
    values = dict(feed.values)
    mask = values["attention_mask"][:, -values["input_ids"].shape[1] :] == 1
    values["input_ids"] = np.where(mask, values["input_ids"], (values["input_ids"] + 7) % tiny.VOCAB)
    return Feed(feed.label, values, feed.shared)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=pytest.mark.xdist_group(arch)) for arch in tiny.ARCHITECTURES]
)
def test_every_architecture_runs_and_rows_keep_their_answers(arch):
    path = tiny.base_onnx(arch, "dynamo")
    feeds = make_feeds(ports_of_graph(load_graph(path)), samples=4)
    assert {feed.batch for feed in feeds} == {1, 4}
    for feed in feeds:
        _check_answers(path, feed)


def _check_answers(path, feed):
    wanted = answers(path, feed)[0]
    shown = np.ones(wanted.shape[:1], bool) if feed.mask is None or wanted.ndim < 3 else feed.mask
    assert np.isfinite(wanted[shown]).all()
    order = list(reversed(range(feed.batch)))
    turned = answers(path, rows_of(feed, order))[0][order]
    assert tiny.relative_error(turned[shown], wanted[shown]) < 1e-5
    if "attention_mask" in feed.values and wanted.ndim == 3:
        # Padding does not count: what is compared does not depend on what stands there. (A classifier looks
        # at the first token, whatever it is.)
        again = answers(path, other_padding(feed))[0]
        assert tiny.relative_error(again[shown], wanted[shown]) < 1e-5


@functools.cache
def cached_decoder():
    folder = tiny.cache_folder() / "llama" / "parity_feeds"
    folder.mkdir(parents=True)
    return capture_checkpoint(tiny.checkpoint("llama"), folder / "model.onnx", kv_cache=True)


@pytest.mark.slow
@pytest.mark.xdist_group("llama")
def test_a_captured_decoder_with_its_cache_runs():
    path = cached_decoder()
    captured = Captured.from_metadata(ir.load(path).metadata_props)
    ports = ports_of_graph(load_graph(path))
    feeds = make_feeds(ports, captured, samples=8)
    assert {feed.past > 0 for feed in feeds} == {True, False}
    for feed in feeds:
        _check_answers(path, feed)
        logits, state = answers(path, feed)[:2]
        assert logits.shape[:2] == feed.mask.shape
        assert state.shape[2] == feed.past + logits.shape[1]
        if feed.past:
            _check_past_counts(path, feed, logits)
    long = make_feeds(ports, captured, [1], [captured.largest["sequence"]], samples=1)
    assert np.isfinite(answers(path, long[0])[0]).all()


def _check_past_counts(path, feed, logits):
    zeros = {n: np.zeros_like(v) if n.startswith("past") else v for n, v in feed.values.items()}
    without = answers(path, Feed("zeros", zeros, feed.shared))[0]
    assert tiny.relative_error(without[feed.mask], logits[feed.mask]) > 1e-2
