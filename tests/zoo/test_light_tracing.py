"""What torch's tracing leaves out in tests has no effect: graphs are those of torch as it is installed."""

from __future__ import annotations

import pytest
import torch
import transformers
from light_tracing import REPLACED

from lora_export import capture_onnx


class Sizes(torch.nn.Module):
    """What computes with sizes that are not known: views, joins, windows, comparisons, halves."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = torch.nn.Conv2d(3, 4, 3, stride=2), torch.nn.Linear(4, 6)

    def forward(self, pixels, mask):
        patches = self.conv(pixels).flatten(2).transpose(1, 2)
        query, key, value = (self.fc(patches)[:, None, :, place : place + 2] for place in (0, 2, 4))
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value)[:, 0]
        half = mixed.shape[1] // 2
        rows = torch.cat([mixed[:, half:], -mixed[:, :half]], 1).repeat(2, 1, 1)
        places = torch.arange(mask.shape[1])[None] <= torch.arange(mask.shape[1])[:, None]
        return rows.mean(1), (places[None] & mask[:, None].bool()).expand(mask.shape[0], -1, -1)


def export_sizes(folder):
    module = Sizes().eval()
    dynamic = {"pixels": {0: "batch", 2: "height", 3: "width"}, "mask": {0: "batch", 1: "sequence"}}
    given = {"dynamic_shapes": dynamic, "external_data": False, "verbose": False, "optimize": False}
    inputs = (torch.ones(2, 3, 20, 24), torch.ones(2, 5, dtype=torch.int64))
    torch.onnx.export(module, inputs, folder / "m.onnx", **given, dynamo=True)


def capture_decoder(folder):
    config = transformers.LlamaConfig(
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=16,
        intermediate_size=24,
        vocab_size=32,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    capture_onnx(folder / "base", folder / "m.onnx", kv_cache=True)


@pytest.mark.parametrize("export", [export_sizes, capture_decoder])
def test_a_graph_is_the_same_byte_for_byte(export, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", torch.onnx.export.__wrapped__)
    torch.manual_seed(0)
    (tmp_path / "less").mkdir()
    export(tmp_path / "less")
    assert REPLACED
    for owner, name, value in REPLACED:
        assert vars(owner)[name] is not value  # it was in force
        monkeypatch.setattr(owner, name, value)
    torch.manual_seed(0)
    (tmp_path / "all").mkdir()
    export(tmp_path / "all")
    less, whole = ((tmp_path / name / "m.onnx").read_bytes() for name in ("less", "all"))
    assert less == whole
