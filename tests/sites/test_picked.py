"""Answers that are an adapter's own rows, vectors or kernels, put into the graph as constants: refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from changed_graphs import EXPORTERS, MODES, TOOLS, error, outcome
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from lora_export import SiteError

D, ROWS = 16, 12


class Base(nn.Module):
    """A table, a Linear and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.proj, self.out = nn.Embedding(ROWS, D), nn.Linear(D, D), nn.Linear(D, 5)


class First(Base):
    """A first token before the others."""

    def forward(self, ids):
        tokens = torch.cat([self.table(torch.full((len(ids), 1), 3)), self.table(ids)], 1)
        return self.out(torch.tanh(self.proj(tokens)))


class Positions(Base):
    """Positions, also times a factor, beside a look-up."""

    def forward(self, ids):
        at = torch.arange(ids.shape[1])
        return self.out(self.table(ids) + self.table(at) * 0.5)


class Sines(Positions):
    """A table of sines is one that the model may be trained with."""

    def __init__(self) -> None:
        super().__init__()
        at = torch.arange(ROWS)[:, None] / 100 ** (torch.arange(D // 2)[None] / (D // 2))
        self.table.weight.data = torch.cat([at.sin(), at.cos()], 1)

    def forward(self, ids):
        return self.out(self.table(ids) + torch.tanh(self.table(torch.arange(ids.shape[1]))))


class Units(Base):
    """A Linear on unit vectors answers with its columns."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(D, D, bias=False)

    def forward(self, ids):
        return self.out(torch.tanh(self.proj(self.table(ids))) + self.proj(torch.eye(D)[: ids.shape[1]]))


class Centred(Base):
    """A call on zeros of one axis answers with the bias."""

    def forward(self, ids):
        return self.out(torch.tanh(self.proj(self.table(ids))) - torch.tanh(self.proj(torch.zeros(D))))


class Kernel(Base):
    """A Linear that makes the kernel of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.latent = nn.Linear(D, 3 * D * 3), nn.Parameter(torch.randn(D))

    def forward(self, ids):
        x = self.table(ids).transpose(1, 2)
        kernel = self.proj(self.latent).view(3 * D // D, D, 3)
        return F.conv1d(x, kernel).mean(-1) + self.proj(x.mean(-1))[:, :3]


class Outer(nn.Module):
    """A wrapper, whose prefix the graph has and the checkpoint has not."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


def plain(model: nn.Module) -> nn.Module:
    return model


TABLE, PROJ = {"target_modules": ["table"]}, {"target_modules": ["proj"]}
SAVED = {"target_modules": ["out"], "modules_to_save": ["table"]}
BIASED = {**PROJ, "bias": "lora_only"}
ANSWERS = {
    "first": (First, TABLE, ("dynamo", "dynamo-noopt+ort-basic", "torchscript+onnxsim")),
    "positions": (Positions, TABLE, ("torchscript", "dynamo-noopt+onnxslim", "dynamo")),
    "positions saved": (Positions, SAVED, ("torchscript", "torchscript+ort-basic")),
    "sines": (Sines, TABLE, ("torchscript", "dynamo-noopt+ort-basic")),
    "units": (Units, PROJ, ("dynamo", "dynamo-noopt+ort-basic", "torchscript+onnxsim")),
    "zeros": (Centred, BIASED, ("dynamo", "dynamo-noopt+ort-basic", "torchscript+onnxsim")),
    "kernel": (Kernel, PROJ, ("dynamo", "dynamo-noopt+ort-basic", "torchscript+ort-basic")),
}
# The same models with an adapter that does not change the answer.
OTHERS = {
    "first": (First, PROJ, ("dynamo-noopt+ort-basic", "torchscript+onnxsim")),
    "positions": (Positions, {"target_modules": ["out"]}, ("torchscript", "dynamo-noopt+ort-basic")),
    "zeros": (Centred, PROJ, ("dynamo-noopt+ort-basic", "torchscript+onnxsim")),
}


def listed(cases):
    return [
        pytest.param(*case[:2], how, id=f"{name}-{how}") for name, case in cases.items() for how in case[2]
    ]


def made(kind, config, how, wrapper, folder):
    """Save a graph, its checkpoint and an adapter; return an input, the base's answer and PEFT's."""
    torch.manual_seed(0)
    model, ids = kind().eval(), torch.randint(0, ROWS, (2, 6))
    peft = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, lora_alpha=4, **config)).eval()
    with torch.no_grad():
        for values in peft.parameters():
            if values.requires_grad:
                values.add_(0.3 * torch.randn(values.shape))
        wanted, before = peft(ids).numpy(), model(ids).numpy()
    peft.save_pretrained(folder / "adapter")
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text('{"model_type": "x"}')
    save_file(model.state_dict(), folder / "base" / "model.safetensors")
    exporter, _, tool = how.partition("+")
    EXPORTERS[exporter](wrapper(model), ids, folder / "raw.onnx")
    TOOLS[tool or "none"](folder / "raw.onnx", folder / "graph.onnx")
    return ids.numpy(), before, wanted


@pytest.mark.parametrize("wrapper", [plain, Outer])
@pytest.mark.parametrize(("kind", "config", "how"), listed(ANSWERS))
def test_an_answer_that_the_adapter_changes(kind, config, how, wrapper, tmp_path):
    x, before, wanted = made(kind, config, how, wrapper, tmp_path)
    assert error(before, wanted) > 1e-2
    for mode in MODES:
        for checkpoint in (tmp_path / "base", False):
            graph, adapter, out = (tmp_path / name for name in ("graph.onnx", "adapter", "out.onnx"))
            got = outcome(mode, graph, adapter, x, out, checkpoint=checkpoint)
            if isinstance(got, SiteError):
                # Without a checkpoint the wrapper's prefix or a node without a name may come first.
                assert not checkpoint or "comput" in str(got) or "ambiguous" in str(got), got
                if any("holds an answer" in line for line in got.problems):
                    # A checkpoint explains no constant that is an answer.
                    assert "--checkpoint" not in got.hint
                assert not out.exists()
            else:
                # The exporter has left the call in the graph.
                assert error(got, wanted) < 1e-5, (mode, checkpoint)


@pytest.mark.parametrize(("kind", "config", "how"), listed(OTHERS))
def test_an_answer_that_the_adapter_leaves_alone(kind, config, how, tmp_path):
    x, _, wanted = made(kind, config, how, plain, tmp_path)
    for mode in MODES:
        graph, adapter, out = (tmp_path / name for name in ("graph.onnx", "adapter", "out.onnx"))
        got = outcome(mode, graph, adapter, x, out, checkpoint=tmp_path / "base")
        assert not isinstance(got, SiteError), got
        assert error(got, wanted) < 1e-5, mode
