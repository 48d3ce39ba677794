"""Files that don't say which modules are embeddings: the base does, where a square matrix leaves it open.

The oracle is each format's own formula in float64: a Linear changes by ``B·A``, an Embedding by ``(B·A)ᵀ``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from lora_export import convert_adapter, export_onnx, merge_checkpoint, swap_onnx
from lora_export.adapter import Adapter
from lora_export.errors import LoraExportError, SiteError
from lora_export.formats import load_adapter
from lora_export.runtimes.torch.find_parameters import ModelParameters
from lora_export.runtimes.torch.hooks import applied, bind

SIZE, RANK, SCALE = 8, 2, 2.0


def _clip() -> nn.Module:
    small = {"vocab_size": 40, "hidden_size": SIZE, "intermediate_size": 12, "num_hidden_layers": 1}
    config = transformers.CLIPTextConfig(**small, num_attention_heads=2, max_position_embeddings=SIZE)
    return transformers.CLIPTextModel(config)


def _t5() -> nn.Module:
    small = {
        "vocab_size": 40,
        "d_model": SIZE,
        "d_kv": 4,
        "d_ff": 12,
        "num_layers": 1,
        "num_decoder_layers": 1,
    }
    config = transformers.T5Config(**small, num_heads=SIZE, relative_attention_num_buckets=SIZE)
    return transformers.T5ForConditionalGeneration(config)


def _patches() -> nn.Module:
    small = {"d_model": SIZE, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 12}
    config = transformers.PatchTSTConfig(
        num_input_channels=1, context_length=32, patch_length=SIZE, patch_stride=SIZE, **small
    )
    return transformers.PatchTSTForPrediction(config)


def _llama() -> nn.Module:
    small = {"vocab_size": SIZE, "hidden_size": SIZE, "intermediate_size": 12, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**small, num_attention_heads=2, tie_word_embeddings=False)
    return transformers.LlamaForCausalLM(config)


FOLDERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "CLIP, positions": (_clip, "embeddings.position_embedding"),
    "T5, positions": (_t5, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
    "T5, a Linear": (_t5, "encoder.block.0.layer.1.DenseReluDense.wi"),
    "PatchTST, a Linear": (_patches, "model.encoder.embedder.input_embedding"),
    "Llama, customary": (_llama, "model.embed_tokens"),
    "Llama, a Linear": (_llama, "model.layers.0.self_attn.q_proj"),
}


def _path(model: nn.Module, ending: str) -> str:
    return next(name for name, _ in model.named_modules() if name == ending or name.endswith(f".{ending}"))


def _loralib(path: str, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{path}.lora_A": a, f"{path}.lora_B": b}


def _mlx(path: str, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{path}.lora_a": a.T.contiguous(), f"{path}.lora_b": b.T.contiguous()}


def _olive(path: str, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    scaled = (SCALE * b).T.contiguous()
    return {f"{path}.lora_A.weight": a.T.contiguous(), f"{path}.lora_B.weight": scaled}


def _plain(path: str, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{path}.A.weight": a, f"{path}.B.weight": b}


FORMATS: dict[str, tuple[Callable[..., dict[str, torch.Tensor]], dict[str, Any]]] = {
    "loralib": (_loralib, {"alpha": SCALE * RANK}),
    "mlx": (_mlx, {"alpha": SCALE * RANK}),
    "converted": (_olive, {"format": "converted"}),
}


def _adapter(form: str, module: nn.Module, path: str, folder: Path) -> tuple[Adapter, np.ndarray]:
    """Return an adapter of one module, and the module's weight with its change."""
    torch.manual_seed(1)
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    table = isinstance(module, nn.Embedding)
    rows, cols = weight.shape
    a, b = torch.randn(RANK, rows if table else cols), torch.randn(cols if table else rows, RANK)
    write, options = {**FORMATS, "plain": (_plain, {"alpha": SCALE * RANK})}[form]
    save_file(write(path, a, b), folder / "a.safetensors")
    change = SCALE * (b.double() @ a.double())
    expected = weight.detach().double() + (change.T if table else change)
    return load_adapter(folder / "a.safetensors", **options), expected.numpy()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", FOLDERS)
def test_a_folders_class_decides(case: str, form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, ending = FOLDERS[case]
    model = make().eval()
    path = _path(model, ending)
    model.save_pretrained(tmp_path / "base")
    adapter, expected = _adapter(form, model.get_submodule(path), path, tmp_path)
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    (name,) = (name for name in merged if f".{name}".endswith(f".{path}.weight"))
    np.testing.assert_allclose(merged[name].numpy(), expected, atol=1e-5)


def _unknown(folder: Path, path: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "of_their_own"}))
    save_file({f"{path}.weight": torch.randn(SIZE, SIZE)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("form", FORMATS)
def test_without_a_class_a_square_matrix_that_may_be_a_table_is_refused(form: str, tmp_path: Path) -> None:
    base = _unknown(tmp_path / "base", "net.item_emb")
    adapter, _ = _adapter(form, nn.Linear(SIZE, SIZE), "net.item_emb", tmp_path)
    with pytest.raises(SiteError, match="whether it is a Linear or an Embedding") as caught:
        merge_checkpoint(base, adapter, tmp_path / "merged")
    assert "lora_embedding_A" in caught.value.hint
    _unknown(tmp_path / "other", "net.up")
    adapter, _ = _adapter(form, nn.Linear(SIZE, SIZE), "net.up", tmp_path)
    merge_checkpoint(tmp_path / "other", adapter, tmp_path / "merged")


def test_two_linears_beside_a_square_table_are_refused(tmp_path: Path) -> None:
    model = _clip()
    path = _path(model, "embeddings.position_embedding")
    model.save_pretrained(tmp_path / "base")
    adapter, _ = _adapter("plain", model.get_submodule(path), path, tmp_path)
    with pytest.raises(SiteError, match="two Linears change it by B·A or by its transpose") as caught:
        merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged")
    assert "lora_embedding_A" in caught.value.hint


class _Net(nn.Module):
    """A table and a Linear under names that say the contrary, or nothing."""

    def __init__(self, table: str, linear: str, tokens: int) -> None:
        super().__init__()
        self.names = table, linear
        self.add_module(table, nn.Embedding(tokens, SIZE))
        self.add_module(linear, nn.Linear(SIZE, SIZE, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table, linear = (self.get_submodule(name) for name in self.names)
        changed: torch.Tensor = linear(table(x))
        return changed


NETS = {
    "square": ("item_emb", "embedding", SIZE),
    "not square": ("rows", "word_embeddings", SIZE + 3),
}
X = torch.arange(6).reshape(2, 3)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("net", NETS)
def test_a_models_class_decides(net: str, which: int, form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Net(*NETS[net]).eval()
    path = model.names[which]
    adapter, changed = _adapter(form, model.get_submodule(path), path, tmp_path)
    plain = model(X).detach().numpy()
    bound, problems = bind(model, adapter, ModelParameters(model))
    assert not problems
    with applied([(bound, 1.0)]), torch.no_grad():
        hooked = model(X).numpy()
    with torch.no_grad():
        model.get_submodule(path).weight.copy_(torch.from_numpy(changed))
        expected = model(X).numpy()
    assert np.abs(expected - plain).max() > 0.1
    np.testing.assert_allclose(hooked, expected, atol=1e-4)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("net", NETS)
def test_a_graphs_operator_decides(net: str, which: int, form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Net(*NETS[net]).eval()
    path = model.names[which]
    adapter, changed = _adapter(form, model.get_submodule(path), path, tmp_path)
    graph = tmp_path / "base.onnx"
    torch.onnx.export(model, (X,), str(graph), input_names=["x"], dynamo=False, verbose=False)
    export_onnx(model, adapter, (X,), tmp_path / "merged.onnx")
    weight = model.get_submodule(path).weight
    with torch.no_grad():
        weight.copy_(torch.from_numpy(changed))
        expected = model(X).numpy()
    np.testing.assert_allclose(_run(tmp_path / "merged.onnx"), expected, atol=1e-4)
    if form == "mlx" and which == 0:
        with pytest.raises(LoraExportError, match="mlx-lm adds LoRA on an embedding in the output head"):
            swap_onnx(graph, tmp_path / "swap.onnx", adapter=adapter)
        return
    swap_onnx(graph, tmp_path / "swap.onnx", adapter=adapter)
    convert_adapter(adapter, tmp_path / "swap.onnx", tmp_path / "c.safetensors")
    feed = {name: values.numpy() for name, values in load_file(tmp_path / "c.safetensors").items()}
    np.testing.assert_allclose(_run(tmp_path / "swap.onnx", feed), expected, atol=1e-4)


def _run(path: Path, more: dict[str, np.ndarray] | None = None) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: X.numpy(), **(more or {})}
    (result,) = session.run(None, feed)
    return np.asarray(result)
