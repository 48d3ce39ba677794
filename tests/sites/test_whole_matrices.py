"""Whole matrices that an adapter replaces go in as the module holds them: Conv1D's as ``(in, out)``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import build

from lora_export import AdapterSession
from lora_export.errors import SiteError
from lora_export.modes.bank_onnx import bank_onnx
from lora_export.modes.convert_adapter import convert_adapter
from lora_export.modes.merge_checkpoint import merge_checkpoint
from lora_export.modes.merge_onnx import merge_onnx
from lora_export.modes.swap_onnx import swap_onnx
from lora_export.sites.whole import is_like_transpose

NEAR, FAR = 0.002, 0.1
EXPORTERS = pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
# GPT-2's are Conv1Ds: a square one, and one that is not; Llama's is a square Linear.
SAVED = pytest.mark.parametrize(
    ("arch", "saved"), [("gpt2", "attn.c_proj"), ("gpt2", "mlp.c_proj"), ("llama", "o_proj")]
)
OTHER = {"gpt2": "c_fc", "llama": "down_proj"}


@functools.cache
def adapter(arch: str, saved: str, noise: float = FAR) -> Path:
    """Return a PEFT adapter that replaces a module whole, and changes another one."""
    folder = tiny.cache_folder() / f"whole-{arch}-{saved}-{noise}"
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=[OTHER[arch]], modules_to_save=[saved])
    generator = torch.Generator().manual_seed(5)
    with tiny.quiet(), torch.no_grad():
        model = get_peft_model(build(arch), config)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if "lora_" in name:
                tiny._randomise(name, parameter, generator)
            else:
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder)
    return folder


@functools.cache
def expected(arch: str, folder: Path) -> Any:
    """Return PEFT's answer in float64."""
    with tiny.quiet():
        model = PeftModel.from_pretrained(build(arch).double(), folder, autocast_adapter_dtype=False)
        return tiny._answer(model, arch)


def check(arch: str, folder: Path, got: Any) -> None:
    wanted = expected(arch, folder)
    assert tiny.relative_error(tiny.base_reference(arch), wanted) > 1e-3
    assert tiny.relative_error(np.asarray(got), wanted) < 2e-6


def of_session(arch: str, graph: Path, **how: Any) -> Any:
    """Return the output of a graph with exposed LoRA, run as `AdapterSession.run` is told."""
    session = AdapterSession(graph)
    for name, path in how.pop("load", {}).items():
        session.load_adapter(name, path)
    names = session._model.inputs
    feeds = {n: v for n, v in tiny.feeds(arch, graph).items() if n in names and "weights" not in n}
    return next(iter(session.run(feeds, *how.pop("args", ()), **how).values()))


@SAVED
@EXPORTERS
@pytest.mark.parametrize("with_checkpoint", [False, True])
def test_merged(arch: str, saved: str, exporter: str, with_checkpoint: bool, tmp_path: Path) -> None:
    if arch == "llama" and exporter == "torchscript" and not with_checkpoint:
        pytest.skip("nothing tells: test_refused_where_nothing_tells")
    folder, out = adapter(arch, saved), tmp_path / "m.onnx"
    checkpoint = tiny.checkpoint(arch) if with_checkpoint else None
    merge_onnx(tiny.base_onnx(arch, exporter), folder, out, checkpoint=checkpoint)
    check(arch, folder, tiny.run(out, tiny.feeds(arch, out)))


@SAVED
@EXPORTERS
def test_swapped_and_in_a_bank(arch: str, saved: str, exporter: str, tmp_path: Path) -> None:
    folder, base, out = adapter(arch, saved), tiny.base_onnx(arch, exporter), tmp_path / "m.onnx"
    swap_onnx(base, out, adapter=folder, checkpoint=tiny.checkpoint(arch))
    check(arch, folder, of_session(arch, out, load={"a": folder}, args=("a",)))
    bank = tmp_path / "bank.onnx"
    bank_onnx(base, {"a": folder}, bank, checkpoint=tiny.checkpoint(arch))
    check(arch, folder, of_session(arch, bank, adapters=["a", "a"]))


@SAVED
def test_of_a_folder(arch: str, saved: str, tmp_path: Path) -> None:
    folder, out = adapter(arch, saved), tmp_path / "m.onnx"
    merge_onnx(tiny.checkpoint(arch), folder, out)
    check(arch, folder, tiny.run(out, tiny.feeds(arch, out)))
    merge_checkpoint(tiny.checkpoint(arch), folder, tmp_path / "merged")
    with tiny.quiet():
        model = type(build(arch)).from_pretrained(tmp_path / "merged")
    check(arch, folder, tiny._answer(model, arch))


@SAVED
def test_converted(arch: str, saved: str, tmp_path: Path) -> None:
    folder, out = adapter(arch, saved), tmp_path / "m.onnx"
    swap_onnx(tiny.base_onnx(arch, "dynamo"), out, adapter=folder)
    convert_adapter(folder, out, tmp_path / "a.onnx_adapter")
    check(arch, folder, of_session(arch, out, load={"a": tmp_path / "a.onnx_adapter"}, args=("a",)))


def test_refused_where_nothing_tells(tmp_path: Path) -> None:
    """TorchScript's constant of a Linear has no name; values that are not like the base's tell nothing."""
    base, folder = tiny.base_onnx("llama", "torchscript"), adapter("llama", "o_proj")
    with pytest.raises(SiteError) as raised:
        merge_onnx(base, folder, tmp_path / "m.onnx")
    assert len(raised.value.problems) == 2
    assert all("o_proj" in line and "whole square matrix" in line for line in raised.value.problems)
    assert all("--checkpoint" in line for line in raised.value.problems)


def test_trained_values_tell(tmp_path: Path) -> None:
    base, folder = tiny.base_onnx("llama", "torchscript"), adapter("llama", "o_proj", NEAR)
    merge_onnx(base, folder, tmp_path / "m.onnx")
    check("llama", folder, tiny.run(tmp_path / "m.onnx", tiny.feeds("llama", tmp_path / "m.onnx")))


@pytest.mark.parametrize(
    ("arch", "exporter", "saved"), [("gpt2", "dynamo", "attn.c_proj"), ("llama", "torchscript", "o_proj")]
)
@pytest.mark.parametrize("noise", [NEAR, FAR])
def test_bound_to_the_graph_of_another(
    arch: str, exporter: str, saved: str, noise: float, tmp_path: Path
) -> None:
    """A graph made without the adapter knows a module by its class or its constant's name, or not."""
    base, folder, out = tiny.base_onnx(arch, exporter), adapter(arch, saved, noise), tmp_path / "m.onnx"
    plain = tmp_path / "plain"
    # The saved Conv1D has a bias as well.
    config = LoraConfig(r=2, target_modules=[saved, OTHER[arch]], lora_bias=arch == "gpt2")
    with tiny.quiet():
        get_peft_model(build(arch), config).save_pretrained(plain)
    swap_onnx(base, out, adapter=plain, max_rank=64)
    if arch == "llama" and noise == FAR:
        with pytest.raises(SiteError) as raised:
            of_session(arch, out, load={"a": folder}, args=("a",))
        assert any("whole square matrix" in line for line in raised.value.problems)
        return
    check(arch, folder, of_session(arch, out, load={"a": folder}, args=("a",)))


def test_base_layer_with_the_bases_own_values(tmp_path: Path) -> None:
    """A file of LoRA on a Conv1D with the weight below it as well, as a state dict of the whole model has."""
    folder, base, names = tmp_path / "a", build("gpt2"), [f"transformer.h.{n}.attn.c_proj" for n in range(2)]
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(5)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["attn.c_proj"])
    with tiny.quiet(), torch.no_grad():
        model = get_peft_model(build("gpt2"), config)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                tiny._randomise(name, parameter, generator)
        model.save_pretrained(folder)
    wanted = expected("gpt2", folder)
    file = folder / "adapter_model.safetensors"
    tensors, own = load_file(file), base.state_dict()
    for name in names:
        tensors[f"base_model.model.{name}.base_layer.weight"] = own[f"{name}.weight"].clone()
    save_file(tensors, file)
    graph, out, swapped = tiny.base_onnx("gpt2", "dynamo"), tmp_path / "m.onnx", tmp_path / "s.onnx"
    merge_onnx(graph, folder, out)
    assert tiny.relative_error(tiny.run(out, tiny.feeds("gpt2", out)), wanted) < 2e-6
    swap_onnx(graph, swapped, adapter=folder)
    got = of_session("gpt2", swapped, load={"a": folder}, args=("a",))
    assert tiny.relative_error(np.asarray(got), wanted) < 2e-6


def test_likeness() -> None:
    random = np.random.default_rng(0)
    base, noise = random.standard_normal((2, 32, 32)).astype(np.float32)
    assert is_like_transpose(base, base) is False
    assert is_like_transpose(base.T + 0.2 * noise, base) is True
    assert is_like_transpose(noise, base) is None
    # Values that are the same both ways fit either way.
    assert is_like_transpose(base + base.T, base) is False
    # A base that is almost its own transpose tells nothing.
    even = np.eye(32, dtype=np.float32)
    assert is_like_transpose(even + 0.01 * noise, even) is None
    assert is_like_transpose(noise, np.zeros_like(base)) is None
