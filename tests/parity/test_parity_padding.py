"""Models that read one token for a whole text: in rows where it is padding, its values mean nothing."""

import numpy as np
import onnx
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from lora_export import capture_onnx, check_parity, merge_onnx
from lora_export.parity.feeds.feed import Feed
from lora_export.parity.padding import read_from_padding, without_padding

TEXT = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def modernbert():
    config = transformers.ModernBertConfig(**TEXT, cls_token_id=1, sep_token_id=2, local_attention=8)
    return transformers.ModernBertForSequenceClassification(config)


def clip():
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)
    return transformers.CLIPModel(config)


@pytest.fixture(scope="module", params=[modernbert, clip], ids=["modernbert", "clip"])
def merged(request, tmp_path_factory):
    """Return a folder with a checkpoint, an adapter and the merged graph."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    torch.manual_seed(0)
    model = request.param().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder / "base")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    get_peft_model(model, LoraConfig(**settings)).save_pretrained(folder / "adapter")
    capture_onnx(folder / "base", folder / "base.onnx")
    merge_onnx(folder / "base.onnx", folder / "adapter", folder / "merged.onnx")
    return folder


def test_a_good_graph_passes_and_says_what_was_left_out(merged):
    report = check_parity(merged / "base", merged / "merged.onnx", merged / "adapter", samples=8)
    assert report.passed, report
    assert any("the model reads padding in some rows" in note for note in report.notes)


def test_the_rest_is_compared(merged, tmp_path):
    """A graph that takes padding for tokens is wrong in rows that end with it as well."""
    proto = onnx.load(merged / "merged.onnx")
    ones = onnx.helper.make_node("Not", ["nothing"], ["everything"])
    nothing = onnx.helper.make_node("Less", ["attention_mask", "attention_mask"], ["nothing"])
    seen = onnx.helper.make_node("Cast", ["everything"], ["seen"], to=onnx.TensorProto.INT64)
    for node in proto.graph.node:
        for place, name in enumerate(node.input):
            if name == "attention_mask":
                node.input[place] = "seen"
    for node in (seen, ones, nothing):
        proto.graph.node.insert(0, node)
    onnx.save(proto, tmp_path / "wrong.onnx")
    report = check_parity(merged / "base", tmp_path / "wrong.onnx", merged / "adapter", localise=False)
    assert not report.passed


def test_what_is_read_from_padding_is_told_by_other_ids():
    def first(feed):
        ids = feed.values["input_ids"].astype(np.float64)
        return {"pooled": ids[:, :1] * [1.0, 0.0], "hidden": ids[..., None]}

    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    feed = Feed("f", {"input_ids": np.arange(12).reshape(3, 4), "attention_mask": mask})
    padding = read_from_padding(feed, first(feed), first)
    assert padding.keys() == {"pooled"}
    assert padding["pooled"].tolist() == [[True, False], [False, False], [False, False]]
    wrong = {"scores": np.full((3, 2), 9.0)}
    kept = without_padding(wrong, first(feed), padding, {"scores": "pooled"})
    assert kept["scores"].tolist() == [[0.0, 9.0], [9.0, 9.0], [9.0, 9.0]]


@pytest.mark.parametrize("mask", [None, np.ones((3, 4), np.int64)], ids=["no mask", "no padding"])
def test_without_padding_the_reference_is_not_run_again(mask):
    values = {"input_ids": np.arange(12).reshape(3, 4)} | ({} if mask is None else {"attention_mask": mask})
    assert not read_from_padding(Feed("f", values), {"pooled": np.ones((3, 2))}, lambda _: pytest.fail("ran"))
