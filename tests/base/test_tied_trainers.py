"""LoRA on a tied embedding means what its trainer does: mlx-lm adds it in the head as well, PEFT does not."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file
from tied_graphs import FEEDS, KINDS, answer, base_of, graph_of, loaded, ran

from lora_export import (
    AdapterError,
    SiteError,
    bank_onnx,
    check_parity,
    convert_adapter,
    load_adapter,
    merge_checkpoint,
    merge_onnx,
    save_adapter,
    swap_onnx,
)

SCALE = 3.0


def factors(kind: str, base: Path) -> tuple[str, torch.Tensor, torch.Tensor]:
    """Return the embedding's path, lora_a and lora_b."""
    model = loaded(kind, base)
    table = model.get_input_embeddings()
    (path,) = (name for name, module in model.named_modules() if module is table)
    generator = torch.Generator().manual_seed(5)
    rows, cols = table.weight.shape
    return path, torch.randn(rows, 2, generator=generator) * 0.2, torch.randn(2, cols, generator=generator)


def mlx(kind: str, base: Path, folder: Path, **more: torch.Tensor) -> Path:
    path, a, b = factors(kind, base)
    folder.mkdir()
    save_file({f"{path}.lora_a": a, f"{path}.lora_b": b, **more}, folder / "adapters.safetensors")
    parameters = {"rank": 2, "scale": SCALE, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def by_mlx(kind: str, base: Path) -> np.ndarray:
    """As ``LoRAEmbedding`` computes: rows plus (a[x] @ b)·scale, and the head plus ((x @ bᵀ) @ aᵀ)·scale."""
    model = loaded(kind, base)
    _, a, b = factors(kind, base)

    def lookup(_: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
        return out + SCALE * (a[given[0]] @ b)

    def as_linear(_: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
        return out + SCALE * ((given[0] @ b.T) @ a.T)

    model.get_input_embeddings().register_forward_hook(lookup)
    if model.config.tie_word_embeddings:
        model.get_output_embeddings().register_forward_hook(as_linear)
    return answer(model)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_as_mlx_computes(kind: str, tied: bool, tmp_path: Path) -> None:
    base = base_of(kind, tmp_path / "base", tied)
    given, wanted = mlx(kind, base, tmp_path / "mlx"), by_mlx(kind, base)
    merge_checkpoint(base, given, tmp_path / "merged")
    assert tiny.relative_error(answer(loaded(kind, tmp_path / "merged")), wanted) < 2e-6
    assert loaded(kind, tmp_path / "merged").config.tie_word_embeddings == tied
    merge_onnx(base, given, tmp_path / "folder.onnx")
    assert tiny.relative_error(ran(tmp_path / "folder.onnx"), wanted) < 2e-6
    report = check_parity(base, tmp_path / "folder.onnx", given)
    assert report.passed


@pytest.mark.parametrize("exporter", ["dynamo", "TorchScript"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph(kind: str, exporter: str, tmp_path: Path) -> None:
    base = base_of(kind, tmp_path / "base")
    given, wanted = mlx(kind, base, tmp_path / "mlx"), by_mlx(kind, base)
    path = graph_of(kind, base, tmp_path / "graph.onnx", exporter)
    merge_onnx(path, given, tmp_path / "merged.onnx", checkpoint=base)
    assert tiny.relative_error(ran(tmp_path / "merged.onnx"), wanted) < 2e-6
    # Two constants of equal values: no name tells whether they are tied.
    with contextlib.suppress(SiteError):
        merge_onnx(path, given, tmp_path / "names.onnx", checkpoint=False)
        assert tiny.relative_error(ran(tmp_path / "names.onnx"), wanted) < 2e-6


def test_no_branch(tmp_path: Path) -> None:
    kind = next(iter(KINDS))
    base = base_of(kind, tmp_path / "base")
    given = mlx(kind, base, tmp_path / "mlx")
    path = graph_of(kind, base, tmp_path / "graph.onnx", "dynamo")
    for write in (
        lambda: swap_onnx(path, tmp_path / "s.onnx", adapter=given),
        lambda: bank_onnx(path, {"a": given}, tmp_path / "b.onnx", batch_input=next(iter(FEEDS))),
    ):
        with pytest.raises(SiteError) as caught:
            write()
        assert "tied to it as well" in caught.value.problems[0]
        assert "merge-onnx" in caught.value.hint
    embedding = KINDS[kind][1]
    swap_onnx(path, tmp_path / "s.onnx", target_modules=[embedding])
    with pytest.raises(SiteError, match="tied to it as well"):
        convert_adapter(given, tmp_path / "s.onnx", tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="tied head"):
        save_adapter(load_adapter(given), tmp_path / "peft")


def test_with_lora_on_a_head_the_base_ties_nothing(tmp_path: Path) -> None:
    """The file is of a model with two weights: each change stays where it is."""
    kind = next(iter(KINDS))
    base = base_of(kind, tmp_path / "base")
    _, a, b = factors(kind, base)
    head = KINDS[kind][2]
    more = {f"{head}.lora_a": b.T.contiguous(), f"{head}.lora_b": -a.T.contiguous()}
    given = mlx(kind, base, tmp_path / "mlx", **more)
    merge_checkpoint(base, given, tmp_path / "merged")
    model, plain = loaded(kind, tmp_path / "merged"), loaded(kind, base).get_input_embeddings().weight
    change = SCALE * (a @ b)
    for module, sign in ((model.get_input_embeddings(), 1), (model.get_output_embeddings(), -1)):
        assert torch.allclose(module.weight, plain + sign * change, atol=1e-5)


def test_loralib_says_where_it_is_added(tmp_path: Path) -> None:
    kind = next(iter(KINDS))
    base = base_of(kind, tmp_path / "base")
    path, a, b = factors(kind, base)
    tensors = {f"{path}.lora_A": a.T.contiguous(), f"{path}.lora_B": b.T.contiguous()}
    torch.save(tensors, tmp_path / "lora.pt")
    adapter = load_adapter(tmp_path / "lora.pt", alpha=2, format="loralib")
    assert any("eval()" in note and path in note for note in adapter.notes)
    merge_checkpoint(base, adapter, tmp_path / "merged")
    model, plain = loaded(kind, tmp_path / "merged"), loaded(kind, base).get_input_embeddings().weight
    assert torch.allclose(model.get_input_embeddings().weight, plain + a @ b, atol=1e-5)
    assert torch.equal(model.get_output_embeddings().weight, plain)
