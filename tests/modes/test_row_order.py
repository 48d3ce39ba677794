"""Rows that a model puts into another order along the batch: refused; those that it leaves there: as PEFT."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import tiny
import torch
from branch_graphs import refused, run_bank
from peft import LoraConfig, get_peft_model
from small_graphs import random
from torch import nn

from lora_export import SiteError, bank_onnx

BATCH, LENGTH, DIM = 3, 4, 8
X = torch.tensor(random(BATCH, LENGTH, DIM, seed=9))
PICTURES = torch.tensor(random(BATCH, 4, 6, 6, seed=8))
LENGTHS = torch.tensor([1, 3, 2])
EXPORTERS = {
    "dynamo": {"dynamo": True, "optimize": False},
    "dynamo-static": {"dynamo": True, "optimize": True},
    "torchscript": {"dynamo": False},
    "static": {"dynamo": False},
}


class Net(nn.Module):
    """``a`` reads what the model has put into some order, ``o`` what it has put back."""

    inputs = (X,)

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(DIM, DIM), nn.Linear(DIM, 6)
        self.register_buffer("order", torch.tensor([2, 0, 1]))
        self.register_buffer("back", torch.argsort(self.order))

    def mid(self, x):
        return torch.tanh(self.a(torch.sigmoid(x)))


class ByLength(Net):
    """As for packed sequences."""

    inputs = (X, LENGTHS)

    def forward(self, x, lengths):
        order = torch.argsort(lengths, descending=True)
        return self.o(self.mid(x[order])[torch.argsort(order)])


class Permuted(Net):
    def forward(self, x):
        return self.o(self.mid(x[self.order])[self.back])


class Flipped(Net):
    def forward(self, x):
        return self.o(self.mid(x.flip(0)).flip(0))


class Rolled(Net):
    def forward(self, x):
        return self.o(torch.roll(self.mid(torch.roll(x, 1, 0)), -1, 0))


class Beams(Net):
    """A beam search's choice."""

    inputs = (X, torch.tensor([1, 1, 0]))

    def forward(self, x, beams):
        return self.o(self.mid(x.index_select(0, beams)))


class Matrix(Net):
    def forward(self, x):
        turned = torch.eye(BATCH)[self.order] @ x[:, 0]
        return self.o(self.mid(turned))


class Gathered(Net):
    """By each element's own index."""

    def forward(self, x):
        index = self.order[:, None, None].expand(-1, LENGTH, DIM)
        return self.o(self.mid(torch.gather(x, 0, index)))


class Scattered(Net):
    def forward(self, x):
        return self.o(self.mid(torch.zeros_like(x).index_copy(0, self.order, x)))


class Summed(Net):
    def forward(self, x):
        return self.o(x) + self.o(self.mid(x.sum(0, keepdim=True)))


class Running(Net):
    def forward(self, x):
        return self.o(self.mid(x.cumsum(0)))


class Shifted(Net):
    """Each row's predecessor, and zeros for the first."""

    def forward(self, x):
        return self.o(self.mid(nn.functional.pad(x, (0, 0, 0, 0, 1, 0))[:-1]))


class Versions(Net):
    """Behind one another along the batch."""

    def forward(self, x):
        first, second = self.mid(x.repeat(2, 1, 1)).chunk(2, 0)
        return self.o(first - second * 2)


class Hidden(Net):
    """The order is lost in an operand beside rows that are in theirs."""

    def forward(self, x):
        return self.o(self.mid(x[self.order] * torch.sigmoid(x.mean())) + x)


class Pictures(Net):
    inputs = (PICTURES,)

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.o(self.mid(x.flip(0)).flip(0))


MOVED = [ByLength, Permuted, Flipped, Rolled, Beams, Matrix, Gathered, Scattered, Summed, Running]
MOVED += [Shifted, Versions, Hidden, Pictures]


class Last(Net):
    """The token that each row's own number says, as CLIP's text model has it."""

    inputs = (X, LENGTHS)

    def forward(self, x, lengths):
        return self.o(self.mid(x)[torch.arange(x.shape[0]), lengths])


class LastOfMask(Net):
    """The last token of each row that its mask has."""

    inputs = (X, (torch.arange(LENGTH) < LENGTHS[:, None]).long())

    def forward(self, x, mask):
        return self.o(self.mid(x)[torch.arange(x.shape[0]), mask.sum(1) - 1])


class Masked(Net):
    """A mask read element by element, for rows of tokens that came as one line, as transformers does."""

    inputs = (X[:, :, :5].abs().long(), (torch.arange(LENGTH) < LENGTHS[:, None]).long())

    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(9, DIM)

    def forward(self, ids, mask):
        x = self.e(ids[..., 0].reshape(-1, ids.shape[1]))
        rows, columns = torch.arange(x.shape[0]), torch.arange(mask.shape[1])
        seen = mask[rows[:, None], columns[None]].bool()[:, None]
        scores = torch.where(seen, x @ x.transpose(1, 2), -1e4)
        return self.o(self.mid(torch.softmax(scores, -1) @ x))


class Turned(Net):
    """Along the sequence."""

    def forward(self, x):
        turned = torch.roll(x.flip(1), 1, 1)[:, torch.tensor([3, 1, 0, 2])]
        return self.o(self.mid(turned).cumsum(1)[:, 1:].softmax(1))


class Tables(Net):
    """Tokens, positions and Swin's relative bias, looked up along axis 0 of what is not the batch."""

    inputs = (torch.tensor([[1, 4, 2, 0], [3, 3, 1, 5], [0, 5, 2, 2]]),)

    def __init__(self):
        super().__init__()
        self.e, self.p, self.bias = nn.Embedding(6, DIM), nn.Embedding(9, DIM), nn.Parameter(torch.randn(7))
        index = torch.arange(LENGTH)
        self.register_buffer("relative", (index[:, None] - index[None]) + LENGTH - 1)

    def forward(self, ids):
        x = self.mid(self.e(ids) + self.p(torch.arange(ids.shape[1])))
        bias = self.bias[self.relative.view(-1)].view(LENGTH, LENGTH)
        return self.o(torch.softmax(x @ x.transpose(1, 2) + bias, -1) @ x)


class Right(Net):
    """Shifted right as a decoder's input, written into zeros."""

    def forward(self, x):
        shifted = x.new_zeros(x.shape)
        shifted[:, 1:] = x[:, :-1].clone()
        shifted[:, 0] = 0.5
        return self.o(self.mid(shifted))


class Repeated(Net):
    """Each row several times, next to one another."""

    def forward(self, x):
        several = self.mid(x.repeat_interleave(2, 0) + torch.arange(DIM))
        return self.o(several.view(x.shape[0], 2, LENGTH, DIM).mean(1))


class Routed(Net):
    """The best of some experts, of each token."""

    def forward(self, x):
        flat = x.reshape(-1, DIM)
        weights, chosen = torch.topk(flat[:, :4], 2, -1)
        shares = torch.zeros_like(flat[:, :4]).scatter(1, chosen, weights)
        y = self.mid(flat).view(-1, 4, 2) * shares[..., None]
        return self.o(y.view(x.shape))


class Along(Net):
    """Each element's own index, along the sequence."""

    inputs = (X, LENGTHS)

    def forward(self, x, lengths):
        index = ((lengths[:, None] + torch.arange(LENGTH)) % LENGTH)[..., None].expand(-1, -1, DIM)
        return self.o(self.mid(torch.gather(x, 1, index)))


class Resized(Pictures):
    def forward(self, x):
        padded = nn.functional.pad(x, (1, 1, 0, 0), mode="reflect")
        return self.o(nn.functional.interpolate(self.mid(padded), scale_factor=2.0))


KEPT = [Last, LastOfMask, Masked, Turned, Tables, Right, Repeated, Routed, Along, Resized]


@functools.cache
def built(kind):
    torch.manual_seed(0)
    return kind().eval()


def exported(kind, exporter, folder):
    model, path, options = built(kind), folder / "base.onnx", EXPORTERS[exporter]
    names = [f"in{number}" for number in range(len(kind.inputs))]
    if exporter == "dynamo":
        options = options | {"dynamic_shapes": tuple({0: torch.export.Dim("rows")} for _ in names)}
    if exporter == "torchscript":
        options = options | {"dynamic_axes": {name: {0: "rows"} for name in names}}
    with tiny.quiet(), torch.no_grad():
        torch.onnx.export(model, kind.inputs, path, input_names=names, output_names=["y"], **options)
    return model, path, dict(zip(names, (value.numpy() for value in kind.inputs), strict=True))


@functools.cache
def adapted(kind, alone=True):
    """Save two adapters once; return their folders and PEFT's answers of each row alone with each."""
    found, answers, folder = {}, [], tiny.cache_folder() / "row-order" / kind.__qualname__
    for number, name in enumerate(("one", "two")):
        copy = kind().eval()
        copy.load_state_dict(built(kind).state_dict())
        config = LoraConfig(r=2 + number, lora_alpha=4, target_modules=["a", "o"])
        peft = get_peft_model(copy, config).eval()
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for key, values in peft.named_parameters():
                if "lora_" in key:
                    values.copy_(0.4 * torch.randn(values.shape, generator=generator))
            if alone:
                rows = [peft(*(value[row : row + 1] for value in kind.inputs)) for row in range(BATCH)]
                answers.append(torch.cat(rows).numpy())
        peft.save_pretrained(folder / name)
        found[name] = folder / name
    return found, answers


def test_every_row_has_a_length_of_its_own():
    """An order that happens to be the batch's would prove nothing."""
    assert torch.argsort(LENGTHS, descending=True).tolist() != list(range(BATCH))


CASES = [(kind, exporter, {}) for kind in MOVED for exporter in EXPORTERS]
# Their batch is fixed.
CASES = [case for case in CASES if case[0] not in (Matrix, Gathered) or "static" in case[1]]
CASES += [(Flipped, "dynamo", {"pack": True}), (Permuted, "static", {"pack": True, "fuse_base": True})]


@pytest.mark.parametrize(
    ("kind", "exporter", "more"), CASES, ids=lambda part: getattr(part, "__name__", None)
)
def test_rows_in_another_order_are_refused(kind, exporter, more, tmp_path):
    _, base, _ = exported(kind, exporter, tmp_path)
    given, _ = adapted(kind, alone=False)
    caught = refused(bank_onnx, base, given, checkpoint=False, **more)
    assert isinstance(caught, SiteError)
    assert "a: " in str(caught)
    assert "rows" in str(caught)
    assert "swap-onnx" in caught.hint or "free batch axis" in caught.hint


# Of fixed sizes, the batch and what is inside of it are one number.
FOLLOWED = [(kind, exporter) for kind in KEPT for exporter in EXPORTERS]
FOLLOWED = [case for case in FOLLOWED if case[0] not in (Repeated, Routed) or "static" not in case[1]]
# TorchScript flattens what it has read, and shapes it by a result's own sizes: said, but not followed.
FOLLOWED.remove((Masked, "torchscript"))


@pytest.mark.parametrize(("kind", "exporter"), FOLLOWED)
def test_rows_in_their_order_are_followed(kind, exporter, tmp_path):
    """Nothing is left to say, and each row is what PEFT computes of it alone with its adapter."""
    model, base, feeds = exported(kind, exporter, tmp_path)
    given, answers = adapted(kind)
    report = bank_onnx(base, given, tmp_path / "bank.onnx", checkpoint=False)
    assert not [note for note in report.plan.notes if "first axis" in note]
    (actual,) = run_bank(tmp_path / "bank.onnx", [[1, 0], [0, 1], [0, 0]], feeds)
    with torch.no_grad():
        plain = model(*kind.inputs).numpy()
    expected = np.stack([answers[0][0], answers[1][1], plain[2]])
    assert tiny.relative_error(actual, expected) <= 2e-6


SQUARE = torch.tensor(random(BATCH, BATCH, DIM, seed=3))


class State(Net):
    """A state of several layers beside the input, of as many as the batch has rows."""

    inputs = (X, SQUARE)

    def forward(self, x, state):
        return self.o(x) + self.a(state).mean(0)[:, None, :6]


class StateFirst(State):
    inputs = (SQUARE, X)

    def forward(self, state, x):
        return super().forward(x, state)


class StateTurned(State):
    """Nodes between the state and the module: it is from the state alone all the same."""

    def forward(self, x, state):
        return self.o(x) + self.a(torch.sigmoid(state.transpose(0, 1)) * 2).mean(1)[:, None, :6]


@pytest.mark.parametrize("exporter", ["dynamo-static", "static"])
@pytest.mark.parametrize("kind", [State, StateFirst, StateTurned])
def test_a_module_on_an_input_with_two_axes_of_the_batchs_size_is_refused(kind, exporter, tmp_path):
    """Which axis has the batch's rows nothing tells: each row would get another row's adapter."""
    _, base, _ = exported(kind, exporter, tmp_path)
    given, _ = adapted(kind, alone=False)
    caught = refused(bank_onnx, base, given, checkpoint=False)
    assert [problem.split(":")[0] for problem in caught.problems] == ["a"]
    assert "several axes of the batch's size (3, of " in caught.problems[0]
    assert "free batch axis" in caught.hint


class Both(Net):
    """What is from the state and from the input has the input's rows."""

    inputs = (X, SQUARE)

    def forward(self, x, state):
        return self.o(self.mid(x) + state.mean(1)[:, None])


@pytest.mark.parametrize("exporter", ["dynamo-static", "static"])
def test_a_module_on_that_input_and_on_the_batchs_is_not_refused(exporter, tmp_path):
    _, base, feeds = exported(Both, exporter, tmp_path)
    given, answers = adapted(Both)
    bank_onnx(base, given, tmp_path / "bank.onnx", checkpoint=False)
    (actual,) = run_bank(tmp_path / "bank.onnx", [[1, 0], [0, 1], [0, 1]], feeds)
    assert tiny.relative_error(actual, np.stack([answers[0][0], answers[1][1], answers[1][2]])) <= 2e-6


class Square(Net):
    """As long as the batch: the first axis of the batch's own input is the batch."""

    inputs = (SQUARE,)

    def forward(self, x):
        return self.o(self.mid(x))


@pytest.mark.parametrize("exporter", ["dynamo-static", "static"])
def test_a_square_batch_alone_is_followed(exporter, tmp_path):
    _, base, feeds = exported(Square, exporter, tmp_path)
    given, answers = adapted(Square)
    bank_onnx(base, given, tmp_path / "bank.onnx", checkpoint=False)
    (actual,) = run_bank(tmp_path / "bank.onnx", [[1, 0], [0, 1], [0, 1]], feeds)
    assert tiny.relative_error(actual, np.stack([answers[0][0], answers[1][1], answers[1][2]])) <= 2e-6
