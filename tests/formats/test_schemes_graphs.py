"""Adapters in their trainers' names, merged into and exposed in graphs of diffusers models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import scheme_transformers as models
import torch
from safetensors.numpy import load_file
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file
from scheme_bases import State, converted, delta, kohya, modules_of, run, trained, write_base

from lora_export.runtimes.session import AdapterSession

pytestmark = pytest.mark.xdist_group("diffusers")
Feeds = Mapping[str, torch.Tensor]
FEW = ("output_blocks_1_1_transformer_blocks_1_attn1", "double_blocks_0_txt_attn_qkv")


class _UNet(torch.nn.Module):
    """A UNet with plain inputs, behind an outer prefix of its own as exporters' wrappers have it."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample, timestep, states, text, sizes):
        added = {"text_embeds": text, "time_ids": sizes}
        return self.unet(sample, timestep, states, added_cond_kwargs=added, return_dict=False)[0]


class _Flux(torch.nn.Module):
    def __init__(self, transformer: torch.nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, sample, timestep, states, pooled, guidance, text_ids, image_ids):
        return self.transformer(
            sample,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=timestep,
            guidance=guidance,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]


def unet_feeds() -> Feeds:
    return {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([7.0]),
        "states": torch.randn(1, 5, 12),
        "text": torch.randn(1, 10),
        "sizes": torch.randn(1, 6),
    }


def flux_feeds() -> Feeds:
    return {
        "sample": torch.randn(1, 6, 8),
        "timestep": torch.tensor([0.3]),
        "states": torch.randn(1, 5, 12),
        "pooled": torch.randn(1, 10),
        "guidance": torch.tensor([0.5]),
        "text_ids": torch.randn(5, 3),
        "image_ids": torch.randn(6, 3),
    }


@dataclass(frozen=True)
class Export:
    """A graph, the model that it was made of, and an adapter's file for it.

    Attributes:
        graph: The ONNX file.
        folder: The diffusers folder.
        adapter: A kohya file in original names.
        feeds: Inputs.
        base: The model's own output.
        expected: That of the model with the adapter merged in its original names, then converted.
        original: The original names' modules that the adapter changes.
    """

    graph: Path
    folder: Path
    adapter: Path
    feeds: dict[str, np.ndarray]
    base: np.ndarray
    expected: np.ndarray
    original: list[str]


EXPORTS = {
    "unet-dynamo": (lambda: models.unet("sdxl-small"), _UNet, unet_feeds, True),
    "unet-torchscript": (lambda: models.unet("sdxl-small"), _UNet, unet_feeds, False),
    "flux-dynamo": (lambda: models.flux(1, 1), _Flux, flux_feeds, True),
}


@pytest.fixture(scope="module", params=list(EXPORTS))
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Export:
    make, wrapper, make_feeds, dynamo = EXPORTS[request.param]
    torch.manual_seed(0)
    family, folder = make(), tmp_path_factory.mktemp(request.param)
    state, paths = family.random(), modules_of(family)
    pairs, feeds = trained(family, paths), make_feeds()
    model = family.model().eval()
    base = write_base(folder / "base", converted(family, state), model)
    save_file(kohya(pairs), folder / "style.safetensors")
    wrapped = wrapper(model).eval()
    with torch.no_grad():
        without = wrapped(*feeds.values()).numpy()
        torch.onnx.export(
            wrapped,
            tuple(feeds.values()),
            folder / "base.onnx",
            input_names=list(feeds),
            dynamo=dynamo,
            opset_version=18,
        )
        model.load_state_dict(converted(family, merged(state, pairs)))
        expected = wrapped(*feeds.values()).numpy()
    return Export(
        folder / "base.onnx",
        base,
        folder / "style.safetensors",
        {name: values.numpy() for name, values in feeds.items()},
        without,
        expected,
        paths,
    )


def merged(state: State, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> State:
    values = dict(state)
    for path, (a, b) in pairs.items():
        values[f"{path}.weight"] = (values[f"{path}.weight"].double() + delta(a, b)).float()
    return values


def outputs(graph: Path, export: Export, **more: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return session.run(None, {**feeds_of(graph, export), **more})[0]


def feeds_of(graph: Path, export: Export) -> dict[str, np.ndarray]:
    """Return the feeds that the graph still takes."""
    wanted = {value.name for value in onnx.load(graph, load_external_data=False).graph.input}
    return {name: values for name, values in export.feeds.items() if name in wanted}


def close(actual: np.ndarray, export: Export) -> None:
    """Compare with the effect: what the adapter changes has to be there to a thousandth."""
    effect = np.linalg.norm(export.expected - export.base)
    assert effect > 1e-2 * np.linalg.norm(export.base)
    assert np.linalg.norm(actual - export.expected) < 1e-3 * effect


@pytest.mark.parametrize("checkpoint", [False, True], ids=["names", "values"])
def test_merged_into_a_graph(export: Export, checkpoint: bool, tmp_path: Path) -> None:
    more = ["--checkpoint", export.folder] if checkpoint else []
    out = tmp_path / "merged.onnx"
    arguments = ["merge-onnx", "--base", export.graph, "--adapter", export.adapter, "-o", out, *more]
    assert run(*arguments) == 0
    close(outputs(out, export), export)


def test_exposed_in_a_graph_and_converted_for_it(export: Export, tmp_path: Path) -> None:
    out, file = tmp_path / "swap.onnx", tmp_path / "style.lora.safetensors"
    assert run("swap-onnx", "--base", export.graph, "--adapter", export.adapter, "-o", out) == 0
    assert run("convert-adapter", export.adapter, "--for", out, "-o", file) == 0
    np.testing.assert_allclose(outputs(out, export), outputs(export.graph, export), rtol=1e-3, atol=1e-5)
    close(outputs(out, export, **load_file(file)), export)
    with AdapterSession(out, threads=1) as session:
        session.load_adapter("style", export.adapter)
        (actual,) = session.run(feeds_of(out, export), adapter="style").values()
        close(actual, export)


def test_a_graph_that_exposes_a_few_modules_takes_its_own_adapter(export: Export, tmp_path: Path) -> None:
    """What a UNet's blocks are like is then read off the graph's constants, not off what is exposed."""
    few = {name: values for name, values in load_file(export.adapter).items() if any(x in name for x in FEW)}
    out, file, adapter = (
        tmp_path / "swap.onnx",
        tmp_path / "few.lora.safetensors",
        tmp_path / "few.safetensors",
    )
    assert few
    save_numpy(few, adapter)
    assert run("swap-onnx", "--base", export.graph, "--adapter", adapter, "-o", out) == 0
    assert run("convert-adapter", adapter, "--for", out, "-o", file) == 0
    assert (
        run("merge-onnx", "--base", export.graph, "--adapter", adapter, "-o", tmp_path / "merged.onnx") == 0
    )
    expected = outputs(tmp_path / "merged.onnx", export)
    effect = np.linalg.norm(expected - export.base)
    assert effect > 1e-3 * np.linalg.norm(export.base)
    assert np.linalg.norm(outputs(out, export, **load_file(file)) - expected) < 1e-3 * effect
