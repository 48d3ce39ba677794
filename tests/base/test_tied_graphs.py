"""PEFT's stored copies of a tied weight in graphs: every reader of the tie gets them, or they are refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tied_graphs import EXPORTERS, KINDS, H, V, answer, base_of, graph_of, loaded, ran

from lora_export import SiteError, merge_onnx


def stored(kind: str, base: Path, folder: Path, case: str, both: bool = False) -> Path:
    """Save an adapter with PEFT's copies of a shared weight that is another than the base's."""
    _, embedding, head, linear = KINDS[kind]
    options: dict[str, Any] = {
        "linear": {"target_modules": [linear]},
        "embedding": {"target_modules": [linear, embedding]},
        "head": {"target_modules": [linear, head]},
        "trained head": {"target_modules": [linear], "modules_to_save": [head]},
    }[case]
    model = loaded(kind, base)
    generator = torch.Generator().manual_seed(3)
    model.get_input_embeddings().weight.data += torch.randn(V, H, generator=generator)
    with tiny.quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, **options))
        for values in peft.parameters():
            if values.requires_grad:
                values.data.copy_(0.2 * torch.randn(values.shape, generator=generator))
        peft.save_pretrained(folder, save_embedding_layers=True)
    if case == "linear" and not both:
        # Of one end alone, as where only that was resized or targeted.
        file = folder / "adapter_model.safetensors"
        save_file({k: v for k, v in load_file(file).items() if f".{head}." not in k}, file)
    return folder


def by_peft(kind: str, base: Path, adapter: Path) -> np.ndarray:
    with tiny.quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return answer(PeftModel.from_pretrained(loaded(kind, base), adapter).eval())


@pytest.mark.parametrize("case", ["linear", "embedding", "head", "trained head"])
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_reader_of_the_tie_gets_the_copy(tmp_path: Path, kind: str, exporter: str, case: str) -> None:
    base = base_of(kind, tmp_path / "base")
    adapter = stored(kind, base, tmp_path / "adapter", case)
    graph = graph_of(kind, base, tmp_path / "base.onnx", exporter)
    expected = by_peft(kind, base, adapter)
    merge_onnx(graph, adapter, tmp_path / "out.onnx", checkpoint=base)
    assert tiny.relative_error(ran(tmp_path / "out.onnx"), expected) <= 2e-6
    # Without the checkpoint: where the exporter keeps one constant, or the adapter has the head's as well.
    heads = any(f".{KINDS[kind][2]}." in name for name in load_file(adapter / "adapter_model.safetensors"))
    known = exporter == "plain" or (heads and case != "head")
    if not known:
        with pytest.raises(SiteError) as refused:
            merge_onnx(graph, adapter, tmp_path / "named.onnx", checkpoint=False)
        assert "--checkpoint" in refused.value.hint
        return
    merge_onnx(graph, adapter, tmp_path / "named.onnx", checkpoint=False)
    assert tiny.relative_error(ran(tmp_path / "named.onnx"), expected) <= 2e-6


@pytest.mark.parametrize("exporter", ["dynamo", "plain"])
@pytest.mark.parametrize("kind", ["Olmo2ForCausalLM", "GPTNeoXForCausalLM"])
def test_a_weight_of_its_own_with_the_same_values_stays(tmp_path: Path, kind: str, exporter: str) -> None:
    """The base's config ties nothing: PEFT loads the copy into the embedding alone."""
    base = base_of(kind, tmp_path / "base", tied=False)
    adapter = stored(kind, base, tmp_path / "adapter", "linear")
    graph = graph_of(kind, base, tmp_path / "base.onnx", exporter)
    merge_onnx(graph, adapter, tmp_path / "out.onnx", checkpoint=base)
    assert tiny.relative_error(ran(tmp_path / "out.onnx"), by_peft(kind, base, adapter)) <= 2e-6
    with pytest.raises(SiteError, match="holds the same values") as refused:
        merge_onnx(graph, adapter, tmp_path / "named.onnx", checkpoint=False)
    assert "--checkpoint" in refused.value.hint


@pytest.mark.parametrize("kind", ["Olmo2ForCausalLM", "GPTNeoXForCausalLM"])
def test_two_copies_of_the_one_weight_are_refused(tmp_path: Path, kind: str) -> None:
    base = base_of(kind, tmp_path / "base")
    adapter = stored(kind, base, tmp_path / "adapter", "linear", both=True)
    graph = graph_of(kind, base, tmp_path / "base.onnx", "plain")
    merge_onnx(graph, adapter, tmp_path / "out.onnx", checkpoint=base)
    assert tiny.relative_error(ran(tmp_path / "out.onnx"), by_peft(kind, base, adapter)) <= 2e-6
    file = adapter / "adapter_model.safetensors"
    save_file({k: v + 1 if KINDS[kind][2] in k else v for k, v in load_file(file).items()}, file)
    with pytest.raises(SiteError, match="copies with other values"):
        merge_onnx(graph, adapter, tmp_path / "no.onnx", checkpoint=base)


@pytest.mark.parametrize("case", ["linear", "embedding", "head", "trained head"])
@pytest.mark.parametrize("kind", ["GPTNeoXForCausalLM", "GraniteForCausalLM"])
def test_a_folder_is_merged_before_it_is_captured(tmp_path: Path, kind: str, case: str) -> None:
    base = base_of(kind, tmp_path / "base")
    adapter = stored(kind, base, tmp_path / "adapter", case)
    merge_onnx(base, adapter, tmp_path / "out.onnx")
    assert tiny.relative_error(ran(tmp_path / "out.onnx"), by_peft(kind, base, adapter)) <= 2e-6
