"""A Reshape with an open axis may cut across the batch's rows: refused then, whatever puts them back.

The oracle numbers the rows: numpy does the same steps on batches of several sizes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from branch_graphs import refused, run_bank
from peft import LoraConfig, get_peft_model
from small_graphs import adapter, delta, graph, linear, random, save
from torch import nn

from lora_export import SiteError, bank_onnx

LENGTH, DIM = 3, 8
BATCHES = (4, 6, 12)
# Shape, permutation and shape after it, of values (batch, 3, 8).
STEPS = {
    "halves": ((2, -1, 3, 8), (1, 0, 2, 3), (-1, 3, 8)),
    "halves, not turned": ((2, -1, 3, 8), (0, 1, 2, 3), (-1, 3, 8)),
    "pairs": ((-1, 2, 3, 8), (1, 0, 2, 3), (-1, 3, 8)),
    "frames": ((-1, 2, 3, 8), (0, 2, 1, 3), (-1, 3, 8)),
    "tokens of two rows": ((-1, 6, 2, 4), (0, 2, 1, 3), (-1, 3, 8)),
    "as many as tokens": ((3, -1, 8), (1, 0, 2), (-1, 3, 8)),
    "pairs of tokens": ((-1, 2, 8), (0, 1, 2), (-1, 3, 8)),
    "heads": ((-1, 3, 2, 4), (0, 2, 1, 3), (-1, 3, 8)),
    "lines": ((-1, 8), (0, 1), (-1, 3, 8)),
    "halves of tokens": ((-1, 6, 4), (0, 1, 2), (-1, 3, 8)),
    "one in front": ((1, -1, 3, 8), (1, 0, 2, 3), (-1, 3, 8)),
}


def _steps(values: np.ndarray, name: str) -> np.ndarray:
    shape, order, back = STEPS[name]
    return values.reshape(shape).transpose(order).reshape(back)


def _together(name: str) -> bool:
    """Return whether the first Reshape has whole rows along its open axis, and all end where they were."""
    shape, _, _ = STEPS[name]
    for batch in BATCHES:
        rows = np.broadcast_to(np.arange(batch)[:, None, None], (batch, LENGTH, DIM))
        along = np.moveaxis(rows.reshape(shape), shape.index(-1), 0).reshape(
            rows.reshape(shape).shape[shape.index(-1)], -1
        )
        if (along != along[:, :1]).any() or (_steps(rows, name) != rows).any():
            return False
    return True


def _base(folder: Path, name: str) -> tuple[Path, dict[str, np.ndarray]]:
    shape, order, back = STEPS[name]
    weights = {"a.weight": random(DIM, DIM, seed=1), "o.weight": random(DIM, DIM, seed=2)}
    text = f"""g (float[rows, {LENGTH}, {DIM}] x) => (float[r, s, d] y) {{
        a_t = Transpose<perm=[1, 0]>(a_weight)
        h = MatMul(x, a_t)
        w = Tanh(h)
        s = Constant<value = int64[{len(shape)}] {{{", ".join(map(str, shape))}}}>()
        g = Reshape(w, s)
        t = Transpose<perm=[{", ".join(map(str, order))}]>(g)
        b = Constant<value = int64[{len(back)}] {{{", ".join(map(str, back))}}}>()
        z = Reshape(t, b)
        o_t = Transpose<perm=[1, 0]>(o_weight)
        y = MatMul(z, o_t)
    }}"""
    return save(graph(text, weights), folder), weights


@pytest.mark.parametrize("name", STEPS)
def test_groups_of_rows(name: str, tmp_path: Path) -> None:
    base, weights = _base(tmp_path, name)
    given = adapter(linear("a", DIM, DIM), linear("o", DIM, DIM, seed=4))
    if not _together(name):
        caught = refused(bank_onnx, base, {"one": given}, checkpoint=False)
        assert isinstance(caught, SiteError)
        assert [problem.split(":")[0] for problem in caught.problems] == ["o"]
        return
    bank_onnx(base, {"one": given}, tmp_path / "bank.onnx", checkpoint=False)
    changes = {module.path: delta(module) for module in given.modules.values()}
    for batch in BATCHES:
        x = random(batch, LENGTH, DIM, seed=batch)
        on = np.arange(batch) % 2
        (actual,) = run_bank(tmp_path / "bank.onnx", on[:, None], {"x": x})
        expected = []
        for row, share in enumerate(on):
            a, o = (weights[f"{path}.weight"].astype(np.float64) + share * changes[path] for path in "ao")
            expected.append(_steps(np.tanh(x[row : row + 1] @ a.T), name) @ o.T)
        assert tiny.relative_error(actual, np.concatenate(expected)) < 1e-5


class Frames(nn.Module):
    """Attention over time, of frames that come as a batch (TimeSformer)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.a(x)).reshape(-1, 2, LENGTH, DIM).transpose(1, 2).reshape(-1, 2, DIM)
        y = torch.softmax(y @ y.transpose(1, 2), -1) @ y
        z: torch.Tensor = self.o(y)
        return z.reshape(-1, LENGTH, 2, DIM).transpose(1, 2).reshape(-1, LENGTH, DIM)


class Shuffled(Frames):
    """Groups of rows that exchange their places."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.a(x)).reshape(2, -1, LENGTH, DIM).transpose(0, 1).reshape(-1, LENGTH, DIM)
        z: torch.Tensor = self.o(y)
        return z


@pytest.mark.parametrize("kind", [Frames, Shuffled])
def test_exported_groups_are_refused(kind: type[nn.Module], tmp_path: Path) -> None:
    model = kind().eval()
    axes = {"x": {0: "rows"}}
    torch.onnx.export(
        model, (torch.randn(4, LENGTH, DIM),), str(tmp_path / "m.onnx"), input_names=["x"], dynamic_axes=axes,
        dynamo=False, verbose=False,
    )  # fmt: skip
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["a", "o"], init_lora_weights=False))
    peft.save_pretrained(tmp_path / "a")
    caught = refused(bank_onnx, tmp_path / "m.onnx", {"one": tmp_path / "a"}, checkpoint=False)
    assert [problem.split(":")[0] for problem in caught.problems] == ["o"]


class Towers(nn.Module):
    """Two inputs, each with rows of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = torch.tanh(self.a(x)) @ torch.tanh(self.b(y)).T
        return scores


class Words(Towers):
    """One of them looks its rows up."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Embedding(9, DIM)


@pytest.mark.parametrize("first", ["x", "y", None])
@pytest.mark.parametrize("kind", [Towers, Words])
def test_hints_of_two_towers_do_not_point_at_each_other(
    kind: type[nn.Module], first: str | None, tmp_path: Path
) -> None:
    model = kind().eval()
    y = torch.arange(5) if kind is Words else torch.randn(5, DIM)
    path = tmp_path / "m.onnx"
    torch.onnx.export(
        model, (torch.randn(4, DIM), y), str(path), input_names=["x", "y"], dynamo=False, verbose=False,
        dynamic_axes={"x": {0: "pictures"}, "y": {0: "texts"}},
    )  # fmt: skip
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["a", "b"], init_lora_weights=False))
    peft.save_pretrained(tmp_path / "a")
    caught = refused(bank_onnx, path, {"one": tmp_path / "a"}, checkpoint=False, batch_input=first)
    assert "--batch-input" not in caught.hint
    assert "a bank has one batch" in caught.hint
    assert "swap-onnx" in caught.hint
