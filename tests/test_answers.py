"""A tool that computes a module's call into a constant: refused; constants of other kinds: no obstacle."""

from __future__ import annotations

from pathlib import Path

import changed_graphs as changed
import numpy as np
import pytest
import torch
from changed_graphs import EXPORTERS, MODES, TOOLS
from torch import nn

from lora_export import SiteError, merge_onnx

D, ROWS = 16, 6


class Base(nn.Module):
    """Something adapted, and a table of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(D, D), nn.Linear(D, D)
        self.table = nn.Parameter(torch.randn(ROWS, D))


class OnTable(Base):
    def forward(self, x):
        return self.out(self.proj(x) @ self.proj(self.table[None]).transpose(1, 2) @ self.table)


class OnNorm(Base):
    """The table passes a norm first, so that no row of the checkpoint is in the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)

    def forward(self, x):
        keys = self.proj(self.norm(self.table[None]))
        return self.out(torch.softmax(self.proj(x) @ keys.transpose(1, 2), -1) @ self.table)


class OnHeads(Base):
    """DeBERTa's: the answer is split into heads and repeated over the batch."""

    def heads(self, x):
        return x.view(-1, x.shape[1], 4, D // 4).transpose(1, 2).reshape(-1, x.shape[1], D // 4)

    def forward(self, x):
        positions = self.heads(self.proj(self.table[None])).repeat(len(x), 1, 1)
        return self.out((self.heads(self.proj(x)) @ positions.transpose(1, 2)).sum(-1).view(len(x), -1, D))


class OnSines(Base):
    """DAB-DETR's: an MLP on sines of positions."""

    def forward(self, x):
        sines = torch.sin(torch.arange(x.shape[1])[:, None] * torch.logspace(0, -2, D))
        return self.out(torch.relu(self.proj(x))) * self.out(torch.relu(self.proj(sines[None])))


class Positions(Base):
    """Rows of a table, picked and split into heads."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(12, D)

    def forward(self, x):
        at = self.positions(torch.arange(x.shape[1])).view(-1, 4, D // 4).transpose(0, 1)
        y = self.proj(x + self.positions(torch.arange(x.shape[1]) + 2))
        return self.out(y) * at.sum(0).sum(-1)[None, :, None]


class Rotary(Base):
    def forward(self, x):
        angles = torch.arange(x.shape[1])[:, None] * torch.logspace(0, -2, D // 2)
        cos, sin = (torch.cat([t, t], -1) for t in (angles.cos(), angles.sin()))
        y = self.proj(x)
        turned = torch.cat([-y[..., D // 2 :], y[..., : D // 2]], -1)
        return self.out(y * cos + turned * sin)


class RelativeBias(Base):
    """Swin's: entries of a small table in another order; and a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.bias_table = nn.Parameter(torch.randn(2 * 8 - 1, 4))

    def forward(self, x):
        n = x.shape[1]
        index = torch.arange(n)[:, None] - torch.arange(n)[None] + 7
        bias = self.bias_table[index.reshape(-1)].view(n, n, 4).permute(2, 0, 1)
        bias = bias + torch.full((n, n), -100.0).triu(1)
        q = self.proj(x).view(-1, n, 4, D // 4).transpose(1, 2)
        scores = torch.softmax(q @ q.transpose(-1, -2) + self.bias_table[:n].T[:, None], -1)
        return self.out((scores @ q).transpose(1, 2).reshape(-1, n, D)) + bias.mean() * 0


class Latents(Base):
    """Learned queries, transposed and times a factor."""

    def forward(self, x):
        return self.out(self.proj(x) @ (self.table.T * 0.25) @ self.table)


class Alibi(Base):
    def forward(self, x):
        slopes = 2.0 ** -torch.arange(1, 5)
        bias = slopes[:, None, None] * torch.arange(x.shape[1])[None, None]
        q = self.proj(x).view(-1, x.shape[1], 4, D // 4).transpose(1, 2)
        scores = torch.softmax(q @ q.transpose(-1, -2) + bias, -1)
        return self.out((scores @ q).transpose(1, 2).reshape(x.shape))


ANSWERS = (OnTable, OnNorm, OnHeads, OnSines)
OTHERS = (Positions, Rotary, RelativeBias, Latents, Alibi)
FOLDING = ("onnxsim", "onnxslim", "ort-basic")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return what makes a model, its checkpoint, its adapter, an input and PEFT's answer."""
    cases = {}

    def make(kind):
        if kind not in cases:
            folder = tmp_path_factory.mktemp(kind.__name__)
            torch.manual_seed(0)
            model, x = kind().eval(), torch.randn(2, 8, D)
            cases[kind] = folder, model, x, changed.saved(model, x, folder, ("proj", "out"))
        return cases[kind]

    return make


def changed_graph(case, exporter: str, tool: str, tmp_path: Path) -> Path:
    _, model, x, _ = case
    EXPORTERS[exporter](model, x, tmp_path / "raw.onnx")
    TOOLS[tool](tmp_path / "raw.onnx", tmp_path / "graph.onnx")
    return tmp_path / "graph.onnx"


@pytest.mark.parametrize("tool", FOLDING)
@pytest.mark.parametrize("exporter", ["dynamo-noopt", "torchscript"])
@pytest.mark.parametrize("kind", ANSWERS)
def test_a_computed_call_is_refused(kind, exporter, tool, made, tmp_path):
    folder, _, x, _ = case = made(kind)
    graph = changed_graph(case, exporter, tool, tmp_path)
    for mode in MODES:
        for options in ({}, {"checkpoint": folder / "base"}):
            got = changed.outcome(
                mode, graph, folder / "adapter", x.numpy(), tmp_path / "out.onnx", **options
            )
            assert isinstance(got, SiteError), (mode, options)
            assert any(how in got.hint for how in ("its exporter wrote it", "--checkpoint", "export the"))
            assert not options or "computed" in str(got) or "ambiguous" in str(got), got
            assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("exporter", ["dynamo-noopt", "torchscript"])
@pytest.mark.parametrize("kind", ANSWERS)
def test_the_hint_leads_to_the_right_answer(kind, exporter, made, tmp_path):
    """Merge into the exporter's graph first, then let the tool compute."""
    folder, model, x, wanted = made(kind)
    EXPORTERS[exporter](model, x, tmp_path / "raw.onnx")
    merge_onnx(tmp_path / "raw.onnx", folder / "adapter", tmp_path / "merged.onnx")
    TOOLS["onnxsim"](tmp_path / "merged.onnx", tmp_path / "out.onnx")
    got = changed.run(tmp_path / "out.onnx", {"x": x.numpy()})
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tool", FOLDING)
@pytest.mark.parametrize("exporter", ["dynamo-noopt", "torchscript"])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_constants_are_no_obstacle(kind, exporter, tool, made, tmp_path):
    folder, _, x, wanted = case = made(kind)
    graph = changed_graph(case, exporter, tool, tmp_path)
    merge_onnx(graph, folder / "adapter", tmp_path / "out.onnx", checkpoint=folder / "base")
    got = changed.run(tmp_path / "out.onnx", {"x": x.numpy()})
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
