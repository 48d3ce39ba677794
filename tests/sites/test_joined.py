"""Copies of a network with equal values, whose calls tools join: each changed alone, or refused."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from changed_graphs import EXPORTERS, MODES, TOOLS, error, outcome, run, saved
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from torch import nn

from lora_export import SiteError, merge_onnx

D = 16


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 8))


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))


class Copies(nn.Module):
    """Two networks on one input, the second a copy of the first."""

    def __init__(self, one: str, two: str, inner: nn.Module) -> None:
        super().__init__()
        self.names = one, two
        self.add_module(one, inner)
        self.add_module(two, copy.deepcopy(inner))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = (getattr(self, name)(x) for name in self.names)
        return torch.cat([one, 2 * two], 1)


class Heads(nn.Module):
    """Two heads on one feature: of equal weights, and of biases that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.left = nn.Linear(D, D), nn.Linear(D, 8)
        self.right = copy.deepcopy(self.left)
        nn.init.normal_(self.right.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.body(x))
        return torch.cat([self.left(x), self.right(x)], 1)


ROWS, IMAGE = (2, 3, D), (2, 4, 6, 6)
COPIES = {
    "policy": (lambda: Copies("policy", "reference", net()), ROWS, ("policy.0", "policy.2")),
    "target": (lambda: Copies("online", "target", net()), ROWS, ("target.2",)),
    "convolutions": (lambda: Copies("student", "teacher", convolutions()), IMAGE, ("student.0", "student.2")),
    "heads": (Heads, ROWS, ("body", "right")),
}
MADE = [
    ("dynamo", "none"),
    ("dynamo-noopt", "onnxslim"),
    ("torchscript", "onnxsim"),
    ("torchscript", "ort-basic"),
    ("dynamo-noopt", "onnxsim+stripped"),
    ("dynamo", "fp16"),
]


def exported(name: str, exporter: str, tool: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Save a graph, its checkpoint and an adapter; return an input and what PEFT answers."""
    torch.manual_seed(0)
    make, shape, targets = COPIES[name]
    model, x = make().eval(), torch.randn(shape)
    wanted = saved(model, x, folder, targets)
    EXPORTERS[exporter](model, x, folder / "raw.onnx")
    TOOLS[tool](folder / "raw.onnx", folder / "graph.onnx")
    return x.numpy(), wanted


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("exporter", "tool"), MADE)
@pytest.mark.parametrize("name", COPIES)
def test_a_joined_copy_is_not_changed(name, exporter, tool, mode, tmp_path):
    x, wanted = exported(name, exporter, tool, tmp_path)
    got = outcome(
        mode,
        tmp_path / "graph.onnx",
        tmp_path / "adapter",
        x,
        tmp_path / "out.onnx",
        checkpoint=tmp_path / "base",
    )
    # Not every tool joins every pair, and some leave two places without a name.
    if not isinstance(got, SiteError):
        assert error(got, wanted) < (2e-3 if tool == "fp16" else 1e-5)
        return
    assert "ambiguous" in str(got)
    assert "optimize=False" in got.hint
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", COPIES)
def test_ort_joins_copies(name, mode, tmp_path):
    """What the test above must have seen at least once for each model."""
    x, _ = exported(name, "torchscript", "ort-basic", tmp_path)
    out = tmp_path / "out.onnx"
    graph, adapter = tmp_path / "graph.onnx", tmp_path / "adapter"
    got = outcome(mode, graph, adapter, x, out, checkpoint=tmp_path / "base")
    assert isinstance(got, SiteError)
    assert "has the same values, and the graph has one place for both" in str(got)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", COPIES)
def test_copies_that_have_a_place_each(name, mode, tmp_path):
    """The graph that the hint asks for."""
    x, wanted = exported(name, "dynamo-noopt", "none", tmp_path)
    out = tmp_path / "out.onnx"
    graph, adapter = tmp_path / "graph.onnx", tmp_path / "adapter"
    got = outcome(mode, graph, adapter, x, out, checkpoint=tmp_path / "base")
    assert not isinstance(got, SiteError), str(got)
    assert error(got, wanted) < 1e-5


class Gated(nn.Module):
    """A gate and a value that began as one, with biases that did not."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"gate": nn.Linear(D, D), "value": nn.Linear(D, D)})
        with torch.no_grad():
            self.mlp["value"].weight.copy_(self.mlp["gate"].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.mlp["gate"](x)) * self.mlp["value"](x)


class Biased(nn.Module):
    """What is no copy: one product, to which the model adds its bias, and one of another module's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.other = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = x @ self.fc.weight.T
        return torch.tanh(product + self.fc.bias) * (product + self.other.bias) + self.other(x)


APART = {
    "heads": (Heads, {"left": "right", "right": "left"}),
    "gated": (Gated, {"mlp.gate": "mlp.value", "mlp.value": "mlp.gate"}),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("exporter", "tool"), [("dynamo", "none"), ("torchscript", "onnxsim"), ("torchscript", "ort-basic")]
)
@pytest.mark.parametrize(
    ("name", "target"), [(name, one) for name, (_, both) in APART.items() for one in both]
)
def test_joined_modules_with_biases_of_their_own_without_a_checkpoint(
    name, target, exporter, tool, mode, tmp_path
):
    """One product and two biases tell: right where the tool left both weights, refused where it did not."""
    torch.manual_seed(0)
    make, both = APART[name]
    model, x = make().eval(), torch.randn(ROWS)
    wanted = saved(model, x, tmp_path, (target,))
    EXPORTERS[exporter](model, x, tmp_path / "raw.onnx")
    TOOLS[tool](tmp_path / "raw.onnx", tmp_path / "graph.onnx")
    got = outcome(
        mode,
        tmp_path / "graph.onnx",
        tmp_path / "adapter",
        x.numpy(),
        tmp_path / "out.onnx",
        checkpoint=False,
    )
    if not isinstance(got, SiteError):
        assert error(got, wanted) < 1e-5
        return
    assert not (tmp_path / "out.onnx").exists()
    if "joined" in str(got):
        assert f"{both[target]}.bias is added to its product as well" in str(got)
        assert "optimize=False" in got.hint


def test_a_second_bias_on_a_product_is_no_copy(tmp_path):
    torch.manual_seed(0)
    model, x = Biased().eval(), torch.randn(ROWS)
    saved(model, x, tmp_path, ("other",))
    EXPORTERS["dynamo"](model, x, tmp_path / "graph.onnx")
    merge_onnx(tmp_path / "graph.onnx", tmp_path / "adapter", tmp_path / "out.onnx", checkpoint=False)


class Alone(nn.Module):
    """One of the copies as a model of its own."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.policy(x)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_a_graph_without_the_copy(exporter, tmp_path):
    """Both ways that the hint names for a copy that is not in the graph."""
    torch.manual_seed(0)
    both, x = Copies("policy", "reference", net()).eval(), torch.randn(ROWS)
    saved(both, x, tmp_path, ("policy.0", "policy.2"))
    alone = Alone(both.policy)
    config = LoraConfig.from_pretrained(tmp_path / "adapter")
    peft = get_peft_model(copy.deepcopy(alone), config).eval()
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    with torch.no_grad():
        for key, values in peft.named_parameters():
            if "lora_" in key:
                values.copy_(torch.from_numpy(state[key.replace(".default", "")]))
        wanted = peft(x).numpy()
    EXPORTERS[exporter](alone, x, tmp_path / "graph.onnx")
    graph, adapter, out = tmp_path / "graph.onnx", tmp_path / "adapter", tmp_path / "out.onnx"
    with pytest.raises(SiteError, match=r"reference\.0\.weight is not in the graph") as refused:
        merge_onnx(graph, adapter, out, checkpoint=tmp_path / "base")
    assert "--no-checkpoint" in refused.value.hint
    assert "a folder without it" in refused.value.hint
    merge_onnx(graph, adapter, out, checkpoint=False)
    assert error(run(out, {"x": x.numpy()}), wanted) < 1e-5
    weights = load_file(tmp_path / "base" / "model.safetensors")
    kept = {key: values for key, values in weights.items() if key.startswith("policy")}
    save_file(kept, tmp_path / "base" / "model.safetensors")
    merge_onnx(graph, adapter, out, checkpoint=tmp_path / "base", force=True)
    assert error(run(out, {"x": x.numpy()}), wanted) < 1e-5


class Experts(nn.Module):
    """Experts that began as copies of one, as in upcycled models."""

    def __init__(self) -> None:
        super().__init__()
        self.router, first = nn.Linear(D, 3), nn.Linear(D, D)
        self.experts = nn.ModuleList(copy.deepcopy(first) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shares = self.router(x).softmax(-1)
        return sum(one(x * shares[..., n, None]) for n, one in enumerate(self.experts))


class Layers(nn.Module):
    """Layers that were put in twice, as in models made deeper."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Linear(D, D)
        self.layers = nn.ModuleList(copy.deepcopy(first) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Momentum(nn.Module):
    """A network, and its average over time, which is stored and not called."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = net()
        self.encoder_m = copy.deepcopy(self.encoder)
        with torch.no_grad():
            for values in self.encoder_m.parameters():
                values.mul_(0.9999)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)


class Zeros(nn.Module):
    """A matrix of zeros that is called, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.zero, self.spare = (nn.Linear(D, D) for _ in range(3))
        for module in (self.zero, self.spare):
            nn.init.zeros_(module.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.body(x)) + self.zero(x)


class Tied(nn.Module):
    """A head that is tied to the table; the graph is the model's without its head, or with it."""

    def __init__(self, headed: bool) -> None:
        super().__init__()
        self.embed_tokens, self.body = nn.Embedding(11, D), nn.Linear(D, D)
        self.lm_head, self.headed = nn.Linear(D, 11, bias=False), headed
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.body(self.embed_tokens(ids))
        return self.lm_head(torch.tanh(x)) if self.headed else x


USUAL = {
    "experts": (Experts, ROWS, ("experts.0", "experts.2")),
    "layers": (Layers, ROWS, ("layers.1",)),
    "momentum": (Momentum, ROWS, ("encoder.0", "encoder.2")),
    "zeros": (Zeros, ROWS, ("zero", "body")),
    "tied head": (lambda: Tied(True), None, ("lm_head", "body")),
    "tied table": (lambda: Tied(False), None, ("embed_tokens",)),
}


@pytest.mark.parametrize(
    ("exporter", "tool"),
    [("dynamo", "none"), ("dynamo-noopt", "none"), ("torchscript", "none"), ("torchscript", "ort-basic")],
)
@pytest.mark.parametrize("name", USUAL)
def test_equal_values_that_are_no_joined_copies(name, exporter, tool, tmp_path):
    torch.manual_seed(0)
    make, shape, targets = USUAL[name]
    model = make().eval()
    x = torch.randn(shape) if shape else torch.randint(0, 11, (5,))
    wanted = saved(model, x, tmp_path, targets)
    EXPORTERS[exporter](model, x, tmp_path / "raw.onnx")
    TOOLS[tool](tmp_path / "raw.onnx", tmp_path / "graph.onnx")
    graph, out = tmp_path / "graph.onnx", tmp_path / "out.onnx"
    merge_onnx(graph, tmp_path / "adapter", out, checkpoint=tmp_path / "base")
    assert error(run(out, {"x": x.numpy()}), wanted) < 1e-5


class First(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids)[0]


SMALL = {"vocab_size": 64, "max_position_embeddings": 32, "attn_implementation": "eager"}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def bart() -> nn.Module:
    sizes = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in SIDE.items()}
    return transformers.BartModel(transformers.BartConfig(d_model=32, **sizes, **SMALL))


SIDE = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}
# Class, and what an adapter changes: each stores a weight under two names or more, of one parameter.
TIED = {
    "bart": (bart, ["fc1", "encoder.embed_tokens"]),
    "llama": (
        lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(num_key_value_heads=2, tie_word_embeddings=True, **SIZES, **SMALL)
        ),
        ["q_proj", "lm_head"],
    ),
    "bert": (
        lambda: transformers.BertModel(transformers.BertConfig(**SIZES, **SMALL)),
        ["query", "word_embeddings"],
    ),
}


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("name", TIED)
def test_one_parameter_under_several_names(name, exporter, tmp_path):
    """Checkpoints that store each tied name, and one that holds old names beside the new ones."""
    torch.manual_seed(0)
    make, targets = TIED[name]
    model, ids = make().eval(), torch.randint(3, 64, (2, 7))
    model.save_pretrained(tmp_path / "base")
    weights = {key: values.numpy().copy() for key, values in model.state_dict().items()}
    if name == "bert":
        query = "encoder.layer.0.attention.self.query.weight"
        weights |= {f"bert.{query}": weights[query].copy(), "old.query.weight": weights[query].copy()}
        table = "embeddings.word_embeddings.weight"
        weights["cls.predictions.decoder.weight"] = weights[table].copy()
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert told["target_modules"]
    with torch.no_grad():
        wanted = First(adapted)(ids).numpy()
    EXPORTERS[exporter](First(model), ids, tmp_path / "graph.onnx")
    out = tmp_path / "out.onnx"
    merge_onnx(tmp_path / "graph.onnx", tmp_path / "adapter", out, checkpoint=tmp_path / "base")
    assert error(run(out, {"x": ids.numpy()}), wanted) < 1e-5
