"""The batch's rows followed through a graph: each row its adapter as PEFT gives it alone, or a refusal."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from branch_graphs import lora, refused, run_bank, table_lora
from peft import LoraConfig, get_peft_model
from small_graphs import adapter, graph, random, save
from torch import nn

from lora_export import SiteError, bank_onnx

IN, OUT, BATCH, LENGTH = 8, 6, 3, 4
X = random(BATCH, LENGTH, IN, seed=9)


class Base(nn.Module):
    """``a`` is in the middle, ``o`` behind it."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(IN, IN), nn.Linear(IN, OUT)

    def forward(self, x):
        return self.o(self.between(x))


class Heads(Base):
    """Attention with heads in the batch, as older BART has it: (batch · heads, sequence, dim)."""

    def between(self, x):
        batch, length, dim = x.shape
        q = self.a(x).view(batch, length, 2, dim // 2).transpose(1, 2).reshape(batch * 2, length, dim // 2)
        mixed = torch.softmax(q @ q.transpose(1, 2), -1) @ q
        return mixed.view(batch, 2, length, dim // 2).transpose(1, 2).reshape(batch, length, dim)


class Windows(Base):
    """Swin's windows, with the batch outside of them."""

    def between(self, x):
        batch, length, dim = x.shape
        windows = torch.roll(x, 1, 1).view(batch, 2, length // 2, dim).reshape(-1, length // 2, dim)
        windows = torch.tanh(self.a(windows))
        return windows.view(batch, 2, length // 2, dim).reshape(batch, length, dim)


class Token(Base):
    """A token in front, and the first row of each answer."""

    def between(self, x):
        token = torch.zeros(1, 1, IN).expand(x.shape[0], -1, -1)
        return self.a(torch.cat([token, x], 1).mean(2, keepdim=True) + x.mean(1, keepdim=True))[:, 1:]


class Packed(Base):
    """q, k and v unpacked along an axis in front of the batch's."""

    def between(self, x):
        batch, length, dim = x.shape
        q, k = self.a(x).reshape(batch, length, 2, 2, dim // 4).permute(2, 0, 3, 1, 4).unbind(0)
        return torch.cat([q + k, k], -1).transpose(1, 2).reshape(batch, length, dim)


class Folded(Base):
    """(sequence · batch), as nn.MultiheadAttention's projection has it."""

    def between(self, x):
        batch, length, dim = x.shape
        y = torch.tanh(self.a(x.transpose(0, 1).reshape(batch * length, dim)))
        return y.reshape(length, batch, dim).transpose(0, 1)


class WindowsOutside(Base):
    def between(self, x):
        batch, length, dim = x.shape
        windows = x.view(batch, 2, length // 2, dim).transpose(0, 1).reshape(2 * batch, length // 2, dim)
        windows = torch.tanh(self.a(windows)).view(2, batch, length // 2, dim)
        return windows.transpose(0, 1).reshape(batch, length, dim)


class Behind(Base):
    """Two versions of each row behind one another along the batch, as SegGPT and guidance have it."""

    def between(self, x):
        first, second = torch.tanh(self.a(torch.cat([x, x.flip(-1)], 0))).chunk(2, 0)
        return first + 2 * second


class SequenceFirst(Base):
    def between(self, x):
        return torch.tanh(self.a(torch.sigmoid(x.transpose(0, 1)))).transpose(0, 1)


# In the last ones ``o`` has its rows in front.
RIGHT = [(kind, ("a", "o")) for kind in (Heads, Windows, Token, Packed)]
RIGHT += [(kind, ("o",)) for kind in (Folded, WindowsOutside, SequenceFirst)]
WRONG = [Folded, WindowsOutside, Behind, SequenceFirst]


def exported(kind, exporter, folder):
    torch.manual_seed(0)
    model, path = kind().eval(), folder / "base.onnx"
    options = {
        "dynamo": {"dynamo": True, "optimize": False, "dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)},
        "torchscript": {"dynamo": False, "dynamic_axes": {"x": {0: "rows"}}},
        "static": {"dynamo": False},
    }[exporter]
    with tiny.quiet(), torch.no_grad():
        torch.onnx.export(model, (torch.tensor(X),), path, input_names=["x"], output_names=["y"], **options)
    return model, path


def adapters(model, targets, folder):
    """Save two adapters; return their folders and PEFT's answer with each."""
    found = {}
    for number, name in enumerate(("one", "two")):
        copy = type(model)().eval()
        copy.load_state_dict(model.state_dict())
        peft = get_peft_model(
            copy, LoraConfig(r=2 + number, lora_alpha=4, target_modules=list(targets))
        ).eval()
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for key, values in peft.named_parameters():
                if "lora_" in key:
                    values.copy_(0.4 * torch.randn(values.shape, generator=generator))
            found[name] = folder / name, peft(torch.tensor(X)).numpy()
        peft.save_pretrained(folder / name)
    return {name: path for name, (path, _) in found.items()}, [answer for _, answer in found.values()]


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize(("kind", "targets"), RIGHT, ids=[f"{k.__name__}-{'-'.join(t)}" for k, t in RIGHT])
def test_rows_that_are_followed(kind, targets, exporter, tmp_path):
    """Nothing is left to say, and each row has what PEFT computes with its adapter."""
    model, base = exported(kind, exporter, tmp_path)
    given, answers = adapters(model, targets, tmp_path)
    report = bank_onnx(base, given, tmp_path / "bank.onnx", checkpoint=False)
    assert not [note for note in report.plan.notes if "first axis" in note]
    shares = np.array([[1, 0], [0, 1], [0, 0]], np.float32)
    (actual,) = run_bank(tmp_path / "bank.onnx", shares, {"x": X})
    with torch.no_grad():
        plain = model(torch.tensor(X)).numpy()
    expected = np.stack([answers[0][0], answers[1][1], plain[2]])
    assert tiny.relative_error(actual, expected) <= 2e-6


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript", "static"])
@pytest.mark.parametrize("kind", WRONG)
def test_rows_with_something_outside_of_them(kind, exporter, tmp_path):
    model, base = exported(kind, exporter, tmp_path)
    given, _ = adapters(model, ("a", "o"), tmp_path)
    caught = refused(bank_onnx, base, given, checkpoint=False)
    assert isinstance(caught, SiteError)
    assert "a: " in str(caught)
    assert "batch" in str(caught)
    assert "swap-onnx" in caught.hint or "free batch axis" in caught.hint


@pytest.mark.parametrize(
    ("before", "is_known"),
    [
        ("f = Identity (x)", True),
        ("f = Tanh (x)", True),
        ("f = my.domain.Mix (x)", False),
    ],
    ids=["same", "elementwise", "foreign"],
)
def test_what_can_not_be_followed_is_said(before, is_known, tmp_path):
    text = f"g (float[b,s,8] x) => (float[c,s,6] y) {{ {before} e = Relu (f) y = MatMul (e, fc_weight) }}"
    head = '<ir_version: 10, opset_import: ["" : 20, "my.domain" : 1]>'
    base = save(graph(text, {"fc.weight": random(IN, OUT)}, head=head), tmp_path)
    report = bank_onnx(base, {"a": adapter(lora("fc", OUT, IN))}, tmp_path / "bank.onnx")
    assert any("doesn't tell the first axis" in note for note in report.plan.notes) is not is_known


@pytest.mark.parametrize("operator", ["Identity", "Abs"])
def test_one_number_for_the_whole_batch_is_refused(operator, tmp_path):
    text = (
        f"g (int64[b,s] x, int64 n) => (float[b,s,6] y) {{ m = {operator} (n) [one] u = Gather (t_weight, m) "
        "[all] v = Gather (t_weight, x) y = Add (v, u) }"
    )
    names = {"one": "t", "all": "t"}
    base = save(graph(text, {"t.weight": random(9, OUT)}, names), tmp_path)
    caught = refused(bank_onnx, base, {"a": adapter(table_lora("t", 9, OUT))})
    assert "t: its activation is one number" in str(caught)
