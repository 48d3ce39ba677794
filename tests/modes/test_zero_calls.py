"""A module that is called on zeros as well: there its weight has no effect, and the adapter's bias has."""

import copy

import numpy as np
import pytest
import torch
from changed_graphs import EXPORTERS, error, outcome, run
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_export import bank_onnx

D = 8


class Recurrent(nn.Module):
    """The first step of an unrolled network starts from zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.out = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 4)

    def forward(self, x):
        state = torch.zeros(x.shape[0], D)
        for step in range(x.shape[1]):
            state = torch.tanh(self.first(x[:, step]) + self.again(state))
        return self.out(state)


class OnRows(Recurrent):
    """Zeros of three dimensions: MatMul and Add instead of Gemm, with the product moved between."""

    def forward(self, x):
        nothing = self.again(torch.zeros_like(x)).transpose(0, 1)
        return self.out(torch.tanh(self.again(self.first(x))) + nothing.transpose(0, 1))


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.again, self.out = nn.Conv2d(3, D, 3), nn.Linear(D, 4)

    def forward(self, x):
        nothing = self.again(torch.zeros(1, *x.shape[1:]))
        return self.out((torch.tanh(self.again(x)) + torch.tanh(nothing)).mean((2, 3)))


class DroppedBias(Recurrent):
    """A bias of zeros, which onnxscript's optimiser drops, so that it is added to the product again."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.again.bias)


KINDS = (Recurrent, OnRows, Convolution, DroppedBias)
CONFIGS = {
    "lora_bias": {"target_modules": ["again"], "lora_bias": True},
    "lora_only": {"target_modules": ["again"], "bias": "lora_only"},
    "saved": {"target_modules": ["out"], "modules_to_save": ["again"]},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("exporter", ["dynamo", "dynamo-noopt", "torchscript"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bias_of_a_call_on_zeros(kind, exporter, config, tmp_path):
    if kind is Convolution and "modules_to_save" in config:
        pytest.skip("a whole kernel of 3×3 has no branch")
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(2, 3, 6, 6) if kind is Convolution else torch.randn(2, 3, D)
    peft = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, **config)).eval()
    with torch.no_grad():
        for values in peft.parameters():
            if values.requires_grad:
                values.add_(0.4 * torch.randn(values.shape))
        wanted = peft(x).numpy()
        weights_alone = model(x).numpy()
    peft.save_pretrained(tmp_path / "adapter")
    graph, adapter = tmp_path / "graph.onnx", tmp_path / "adapter"
    EXPORTERS[exporter](model, x, graph)
    assert error(weights_alone, wanted) > 1e-2
    for mode in ("merge", "swap"):
        got = outcome(mode, graph, adapter, x.numpy(), tmp_path / f"{mode}.onnx")
        if isinstance(got, Exception):
            # Computed by the exporter, or zeros that are a constant of the graph, which may be a weight.
            assert exporter != "dynamo-noopt", got
            return
        assert error(got, wanted) < 1e-5, mode
    if kind is not Convolution:
        bank_onnx(graph, {"one": adapter}, tmp_path / "bank.onnx")
        feeds = {"x": x.numpy(), "lora.adapter_weights": np.ones((2, 1), np.float32)}
        assert error(run(tmp_path / "bank.onnx", feeds), wanted) < 1e-5
