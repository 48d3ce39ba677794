"""Graphs that ONNX Runtime has saved load again after a change: no constant has a name that it gives."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from small_graphs import adapter, graph, linear, random, save
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    RoFormerConfig,
    RoFormerForSequenceClassification,
)

from lora_export import bank_onnx, convert_adapter, merge_onnx, swap_onnx

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
MODELS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES, attn_implementation="eager")),
    "roformer": lambda: RoFormerForSequenceClassification(RoFormerConfig(**SIZES, embedding_size=16)),
}


class Logits(nn.Module):
    """A classifier's logits, with nothing masked."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        """Return them."""
        return self.model(input_ids=x, attention_mask=torch.ones_like(x)).logits


def run(path, x, **more):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x, **more})[0]


def error(actual, expected):
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", MODELS)
def test_graphs_that_onnx_runtime_saved(name, tmp_path):
    torch.manual_seed(0)
    model, x = Logits(MODELS[name]()).eval(), torch.arange(1, 15).view(2, 7)
    raw, saved, swapped = (tmp_path / f"{stem}.onnx" for stem in ("raw", "saved", "swap"))
    with tiny.quiet(), torch.no_grad():
        torch.onnx.export(model, (x,), raw, input_names=["x"], dynamo=False)
        plain = model(x).numpy()
        settings = LoraConfig(r=2, target_modules=["query", "dense"], init_lora_weights=False)
        trained = get_peft_model(model, settings).eval()
        trained.save_pretrained(tmp_path / "peft")
        adapted = trained(x).numpy()
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(saved), 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    ort.InferenceSession(str(raw), options, providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match="existing tensor"):
        run(saved, x.numpy())
    swap_onnx(saved, swapped, adapter=tmp_path / "peft")
    convert_adapter(tmp_path / "peft", swapped, tmp_path / "a.safetensors")
    merge_onnx(saved, tmp_path / "peft", tmp_path / "merged.onnx")
    x = x.numpy()
    assert error(run(swapped, x), plain) < 1e-5
    assert error(run(swapped, x, **load_file(tmp_path / "a.safetensors")), adapted) < 1e-5
    assert error(run(tmp_path / "merged.onnx", x), adapted) < 1e-5
    kept = {
        constant.name: onnx.numpy_helper.to_array(constant) for constant in onnx.load(saved).graph.initializer
    }
    now = {constant.name for constant in onnx.load(swapped).graph.initializer}
    assert all(values.dtype == np.int64 for name, values in kept.items() if name not in now)


# What is left to fuse, after a Reshape that ONNX Runtime made, with the name that it gives again.
FUSED = "g (float[2,3,16] x) => (float[2,3,16] y) { m = MatMul (x, fc_weight) h = Reshape (m, NAME) "
LEFT = {
    "gemm_input_shape": "s = MatMul (h, other) y = Add (s, b) }",
    "gemm_output_shape": "s = MatMul (h, other) y = Add (s, b) }",
    "gemm_output_reshape_new_shape": (
        "s = MatMul (h, other) z = Add (s, b) r = Reshape (z, cut) y = Reshape (r, NAME) }"
    ),
}


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.parametrize("verb", ["merge-onnx", "swap-onnx", "bank-onnx"])
def test_each_name_and_verb(name, verb, tmp_path):
    weights = {"fc.weight": random(16, 16), "other": random(16, 16, seed=3), "b": random(16, seed=4)}
    shapes = {name: np.array([2, 3, 16]), "cut": np.array([2, 3, 4, 4])}
    base = save(graph((FUSED + LEFT[name]).replace("NAME", name), weights | shapes), tmp_path)
    with pytest.raises(Exception, match="existing tensor"):
        run(base, random(2, 3, 16))
    given, out = adapter(linear("fc", 16, 16)), tmp_path / "out.onnx"
    x, more = random(2, 3, 16), {}
    if verb == "merge-onnx":
        merge_onnx(base, given, out)
    elif verb == "bank-onnx":
        bank_onnx(base, {"a": given}, out)
        more = {"lora.adapter_weights": np.ones((2, 1), np.float32)}
    else:
        swap_onnx(base, out, adapter=given)
        convert_adapter(given, out, tmp_path / "a.safetensors")
        more = load_file(tmp_path / "a.safetensors")
    (module,) = given.modules.values()
    changed = weights["fc.weight"].astype(np.float64) + module.scaling * (module.lora_b @ module.lora_a).T
    assert error(run(out, x, **more), x @ changed @ weights["other"] + weights["b"]) < 1e-6
