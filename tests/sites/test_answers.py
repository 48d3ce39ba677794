"""A tool that computes a module's call into a constant: refused; constants of other kinds: no obstacle."""

from __future__ import annotations

import math
import re
from pathlib import Path

import changed_graphs as changed
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers
from changed_graphs import EXPORTERS, MODES, TOOLS
from onnx import helper
from onnxruntime.capi import onnxruntime_pybind11_state
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from torch import nn

from lora_export import LoraExportError, SiteError, merge_onnx
from lora_export.sites import OPERATORS
from lora_export.sites.doubts.answers import _are_sines
from lora_export.sites.operators.quantized import SCALES

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


class OnScale(Base):
    """The scale of a norm that is written out, which tools join to one node."""

    def scaled(self, x, scale):
        gaps = x - x.mean(-1, keepdim=True)
        return gaps / torch.sqrt((gaps**2).mean(-1, keepdim=True) + 1e-5) * scale

    def forward(self, x):
        y = torch.tanh(self.proj(x))
        return self.out(self.scaled(y, self.proj(self.table[0])))


class Scored(Base):
    """An answer that further layers have reduced: its size is nobody's."""

    def score(self, x):
        return (torch.tanh(self.proj(x)) @ self.table.T)[..., :5]

    def forward(self, x):
        anchor = self.score(self.table[None]).softmax(-1).mean(1, keepdim=True)
        return self.out(x) * (self.score(x) - anchor).sum(-1, keepdim=True)


class Reduced(Base):
    """One number that was computed."""

    def forward(self, x):
        return self.out(torch.tanh(self.proj(x))) / self.proj(self.table[None]).norm()


class Averaged(Base):
    def forward(self, x):
        return self.out(torch.tanh(self.proj(x)) * torch.sigmoid(self.proj(self.table[None])).mean())


class FewGates(Base):
    """An answer of three values is no mask."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(D, 3)

    def forward(self, x):
        gates = torch.sigmoid(self.proj(self.table[None, :1]))
        return self.out(x) + (torch.tanh(self.proj(x)) * gates).sum(-1, keepdim=True)


class Chosen(Base):
    """Rows of something adapted, and what a layer makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Embedding(ROWS, D)

    def forward(self, x):
        ids = x[..., 0].abs().long() % ROWS
        at = torch.tanh(self.proj(torch.arange(x.shape[1]) % ROWS))
        null = torch.tanh(self.proj(torch.tensor([[0]])))
        return self.out(self.proj(ids)) - self.out(null) + at


class Scalars(Base):
    """Numbers of the code, and of the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale, self.gate = nn.Parameter(torch.tensor(2.6592)), nn.Parameter(torch.randn(2))

    def forward(self, x):
        y = self.out(self.proj(x) / math.sqrt(D) * self.logit_scale.exp())
        return y * torch.sigmoid(self.gate)[0] + F.gelu(y, approximate="tanh") * 0.044715 / math.sqrt(
            math.log(3)
        )


class Steps(Base):
    """Frequencies and grids."""

    def forward(self, x):
        frequencies = torch.exp(-math.log(10000) * torch.arange(D) / D)
        grid = (torch.arange(x.shape[1]) + 0.5) / x.shape[1]
        # DETR's: each one for a sine and a cosine.
        pairs = 10000 ** (2 * torch.div(torch.arange(D), 2, rounding_mode="floor") / D)
        return self.out(torch.sin(self.proj(x) * frequencies) / pairs) + grid[:, None]


class GemmaNorm(OnScale):
    """The scale is a parameter's, plus 1; the mask holds the smallest number of float32."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(0.3 * torch.randn(D))

    def forward(self, x):
        q = self.scaled(self.proj(x), 1 + self.scale)
        mask = torch.full((x.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)
        return self.out(torch.softmax(q @ q.transpose(1, 2) + mask, -1) @ q)


class Positions(Base):
    """Rows of a table, picked and split into heads."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(12, D)

    def forward(self, x):
        at = self.positions(torch.arange(x.shape[1])).view(-1, 4, D // 4).transpose(0, 1)
        y = self.proj(x + self.positions(torch.arange(x.shape[1]) + 2))
        return self.out(y) * at[0, :, 1][None, :, None]


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


class Patches(Base):
    """DINOv3's: cosines and sines of angles that follow no row, and an embedding of one time."""

    def forward(self, x):
        at = torch.cartesian_prod(torch.arange(4), torch.arange(2)) / 3 - 0.4
        angles = (at[:, :, None] * 2 * math.pi / 100 ** (torch.arange(4) / 4)).flatten(1)
        cos, sin = (torch.cat([t, t], -1) for t in (angles.cos(), angles.sin()))
        time = 7 * torch.exp(-math.log(100) * torch.arange(D // 2) / (D // 2))
        y = torch.tanh(self.proj(x)) + torch.cat([time.cos(), time.sin()])
        turned = torch.cat([-y[..., D // 2 :], y[..., : D // 2]], -1)
        return self.out(y * cos + turned * sin)


class FewSteps(Base):
    """ALiBi's slopes, of which some have many digits, and four frequencies."""

    def forward(self, x):
        slopes = 2.0 ** (-2 * torch.arange(1, 5))
        few = torch.exp(-torch.arange(4) / 4 * 2.3)
        y = self.proj(x).view(*x.shape[:2], 4, -1) * slopes[:, None]
        return self.out((y * few).flatten(-2))


class PositionalConvolution(Base):
    """wav2vec2's: the lengths that a weight norm gives are along the last axis."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv1d(D, D, 3, padding=1, groups=2)
        self.conv = nn.utils.parametrizations.weight_norm(conv, dim=2)
        with torch.no_grad():
            self.conv.parametrizations.weight.original0.mul_(torch.rand(3) + 0.5)

    def forward(self, x):
        return self.out(torch.tanh(self.conv(self.proj(x).transpose(1, 2)).transpose(1, 2)))


class FrozenNorm(Base):
    """DETR's: a batch norm of buffers, written out."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(f"bn.{name}".replace(".", "_"), torch.rand(D) + 0.3)

    def forward(self, x):
        scale = self.bn_weight * (self.bn_running_var + 1e-5).rsqrt()
        shift = self.bn_bias - self.bn_running_mean * scale
        return self.out(torch.tanh(self.proj(x)) * scale + shift)


class Recurrent(Base):
    """Tools join the biases of inputs and states, gates in another order."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.rnn = kind(D, D // 2, batch_first=True, bidirectional=True)

    def forward(self, x):
        return self.out(self.rnn(torch.relu(self.proj(x)))[0])


class Gru(Recurrent):
    def __init__(self) -> None:
        super().__init__(nn.GRU)


ANSWERS = (OnTable, OnNorm, OnHeads, OnSines, OnScale, Scored, Reduced, Averaged, FewGates, Chosen)
OTHERS = (
    FrozenNorm,
    Patches,
    FewSteps,
    PositionalConvolution,
    Recurrent,
    Gru,
    GemmaNorm,
    Positions,
    Rotary,
    RelativeBias,
    Latents,
    Alibi,
    Scalars,
    Steps,
)
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


@pytest.mark.parametrize("tool", FOLDING)
@pytest.mark.parametrize("exporter", ["dynamo-noopt", "torchscript"])
@pytest.mark.parametrize("kind", ANSWERS)
def test_a_computed_call_is_refused(kind, exporter, tool, made, tmp_path):
    folder, _, x, _ = case = made(kind)
    graph = changed.changed_graph(case, exporter, tool, tmp_path)
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


@pytest.mark.filterwarnings("error::RuntimeWarning:numpy")
@pytest.mark.parametrize("tool", FOLDING)
@pytest.mark.parametrize("exporter", ["dynamo-noopt", "torchscript"])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_constants_are_no_obstacle(kind, exporter, tool, made, tmp_path):
    folder, _, x, wanted = case = made(kind)
    graph = changed.changed_graph(case, exporter, tool, tmp_path)
    merge_onnx(graph, folder / "adapter", tmp_path / "out.onnx", checkpoint=folder / "base")
    got = changed.run(tmp_path / "out.onnx", {"x": x.numpy()})
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


class Folded(Base):
    """Two layers, of which one is adapted; the table stays out."""

    def forward(self, x):
        return self.out(torch.tanh(self.proj(x)))


class Gated(Base):
    def forward(self, x):
        return self.proj(x) * torch.sigmoid(self.out(x))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", [Folded, Gated])
def test_scales_of_a_quantised_weight_are_no_answers(kind, symmetric, bits, tmp_path):
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(2, 3, D)
    changed.saved(model, x, tmp_path)
    EXPORTERS["torchscript"](model, x, tmp_path / "raw.onnx")
    quantiser = MatMulNBitsQuantizer(
        onnx.load(tmp_path / "raw.onnx"), bits=bits, block_size=16, is_symmetric=symmetric
    )
    quantiser.process()
    onnx.save(quantiser.model.model, tmp_path / "graph.onnx")
    graph, adapter, out = tmp_path / "graph.onnx", tmp_path / "adapter", tmp_path / "out.onnx"
    base = changed.run(graph, {"x": x.numpy()})
    got = changed.outcome("swap", graph, adapter, x.numpy(), out, checkpoint=tmp_path / "base")
    assert not isinstance(got, LoraExportError), str(got)
    # What the adapter adds in PyTorch, in the model that has the quantised weights' answers.
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (torch.from_numpy(factors[f"base_model.model.proj.lora_{side}.weight"]) for side in "AB")
    weights = dequantised(graph)
    assert len(weights) == 2
    with torch.no_grad():
        model.proj.weight.copy_(weights[0])
        model.out.weight.copy_(weights[1])
        assert changed.error(base, model(x).numpy()) < 1e-5
        model.proj.weight.add_(4 * b @ a)
        assert changed.error(got, model(x).numpy()) < 1e-5


def dequantised(path: Path) -> list[torch.Tensor]:
    """Return what each MatMulNBits multiplies with: its answer to the unit vectors."""
    model, found = onnx.load(path), []
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        sizes = {attribute.name: attribute.i for attribute in node.attribute}
        x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [sizes["K"], sizes["K"]])
        y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [sizes["K"], sizes["N"]])
        one = onnx.NodeProto()
        one.CopyFrom(node)
        one.input[0], one.output[0] = "x", "y"
        used = [tensor for tensor in model.graph.initializer if tensor.name in one.input]
        alone = helper.make_model(helper.make_graph([one], "g", [x], [y], used))
        alone.opset_import.extend(model.opset_import[1:])
        alone.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        alone.ir_version = model.ir_version
        answer = ort.InferenceSession(alone.SerializeToString()).run(
            None, {"x": np.eye(sizes["K"], dtype=np.float32)}
        )[0]
        found.append(torch.from_numpy(answer.T.copy()))
    return found


def test_positions_of_scales_are_onnxruntimes():
    """Of every quantised operator that is known, as ONNX Runtime names its inputs."""
    told = re.compile(r"scale|zero_point|absmax|g_idx|_zp$")
    schemas = {
        (schema.domain, schema.name): [entry.name.lower() for entry in schema.inputs]
        for schema in onnxruntime_pybind11_state.get_all_operator_schema()
    }
    schemas |= {
        ("", name): [entry.name.lower() for entry in onnx.defs.get_schema(name).inputs]
        for name in SCALES
        if onnx.defs.has(name)
    }
    for (domain, name), inputs in schemas.items():
        if name in SCALES and domain in ("", "com.microsoft"):
            assert SCALES[name] == {n for n, entry in enumerate(inputs) if told.search(entry)}, name
    known = {name for (_, name), target in OPERATORS.items() if "quantized" in target}
    assert known <= SCALES.keys()


SMALL = {"vocab_size": 48, "d_model": 32, "max_position_embeddings": 32, "use_cache": False}
LAYERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
HEADS = {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}


class Named(nn.Module):
    """Gives a model its inputs by name, which the TorchScript exporter can't."""

    def __init__(self, model, inputs):
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, *given):
        return self.model(**dict(zip(self.inputs, given, strict=True)), return_dict=False)[0]


@pytest.mark.parametrize("kind", ["XGLM", "M2M100"])
def test_a_table_of_positions_is_no_answer(kind, tmp_path):
    """It is a buffer that no checkpoint stores, of sines but for the row of the padding token."""
    torch.manual_seed(0)
    if kind == "XGLM":
        config = transformers.XGLMConfig(**SMALL, ffn_dim=48, num_layers=1, attention_heads=4)
        model, inputs = transformers.XGLMForCausalLM(config).eval(), ["input_ids"]
    else:
        config = transformers.M2M100Config(**SMALL, **LAYERS, **HEADS)
        model = transformers.M2M100ForConditionalGeneration(config).eval()
        inputs = ["input_ids", "attention_mask", "decoder_input_ids"]
    ids = torch.arange(6, 18).reshape(2, 6)
    feeds = {name: torch.ones_like(ids) if "mask" in name else ids for name in inputs}
    model.save_pretrained(tmp_path / "base")
    with tiny.quiet(), torch.no_grad():
        named, given = Named(model, inputs), tuple(feeds.values())
        torch.onnx.export(named, given, tmp_path / "graph.onnx", input_names=inputs, dynamo=False)
        peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        for name, value in peft.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn(value.shape) * 0.3)
        peft.save_pretrained(tmp_path / "adapter")
        wanted = peft.eval()(**feeds)[0].numpy()
    out = tmp_path / "out.onnx"
    merge_onnx(tmp_path / "graph.onnx", tmp_path / "adapter", out, checkpoint=tmp_path / "base")
    arrays = {name: value.numpy() for name, value in feeds.items()}
    known = {value.name for value in onnx.load(out).graph.input}
    got = changed.run(out, {name: value for name, value in arrays.items() if name in known})
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_rows_of_zeros_make_no_table_of_positions():
    """An answer of a table with a row of zeros is none of sines; neither are zeros alone."""
    values = np.random.default_rng(0).normal(size=(16, 8))
    values[1] = 0
    assert not _are_sines(values)
    values[2:] = 0
    assert not _are_sines(values)
