"""Small models, exporters and the tools that change a graph's constants; what an adapter does to the result.

Each model has a place where a tool multiplies or adds something into a constant, and keeps the module's name
on the node or on the constant.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from torch import nn

from lora_export import LoraExportError, convert_adapter, merge_onnx, swap_onnx

D = 8


class Chain(nn.Module):
    """Two linear layers with something between, before or behind them."""

    def __init__(self, *middle: nn.Module, first: nn.Module | None = None, last: bool = True) -> None:
        super().__init__()
        self.before = first or nn.Identity()
        self.fc1 = nn.Linear(D, D)
        self.middle = nn.ModuleList(middle)
        self.fc2 = nn.Linear(D, D) if last else nn.Identity()

    def forward(self, x):
        x = self.fc1(self.before(x))
        for module in self.middle:
            x = module(x)
        return self.fc2(x)


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


class Over(Times):
    def forward(self, x):
        return x / self.factor


class Plus(Times):
    def forward(self, x):
        return x + self.factor


class LayerScale(nn.Module):
    """A trained factor per channel (ConvNeXt, DINOv2)."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x):
        return x * self.gamma


class Shift(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return x + self.beta


class RmsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(D) + 0.5)

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class GemmaNorm(RmsNorm):
    """Gemma's: the factor is one more than the parameter, which exporters fold into one constant."""

    def forward(self, x):
        return (1.0 + self.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class FunctionalNorm(nn.Module):
    """A batch norm that is no module: the node of the folded convolution names the block around it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.fc1 = nn.Conv2d(4, 4, 3), nn.Linear(4, D)
        for name, size in (("a", 4), ("b", D)):
            self.register_buffer(f"{name}_running_mean", torch.zeros(size))
            self.register_buffer(f"{name}_running_var", torch.ones(size))

    def forward(self, x):
        x = nn.functional.batch_norm(self.conv1(x), self.a_running_mean, self.a_running_var)
        return nn.functional.batch_norm(self.fc1(x.mean((2, 3))), self.b_running_mean, self.b_running_var)


class Attention(nn.Module):
    """Scores of two heads, the query scaled as T5's or OPT's, or the product as everybody's."""

    def __init__(self, scaled: str, biases: bool = True) -> None:
        super().__init__()
        self.scaled = scaled
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, D, bias=biases) for _ in range(3))
        self.out_proj = nn.Linear(D, D, bias=biases)

    def forward(self, x):
        batch, length = x.shape[:2]
        q, k, v = (
            module(x) if module is not self.q_proj or self.scaled != "query" else module(x) * 0.5
            for module in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k, v = (t.view(batch, length, 2, D // 2).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2)
        if self.scaled == "scores":
            scores = scores / 2.0
        out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, D)
        return self.out_proj(out)


class Inside(nn.Module):
    """A model around another: names have a parent."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.block = inner

    def forward(self, x):
        return self.block(x)


class Convs(nn.Module):
    def __init__(self, *middle: nn.Module, bias: bool = True, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=bias, groups=groups)
        self.middle = nn.ModuleList(middle)
        self.conv2 = nn.Conv2d(4, 4, 1, bias=bias)

    def forward(self, x):
        x = self.conv1(x)
        for module in self.middle:
            x = module(x)
        return self.conv2(torch.relu(x))


class Tied(nn.Module):
    def __init__(self, scale: float = 1.0, tied: bool = True) -> None:
        super().__init__()
        self.embed, self.lm_head, self.scale = nn.Embedding(11, D), nn.Linear(D, 11, bias=False), scale
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        hidden = self.embed(ids)
        if self.scale != 1.0:
            hidden = hidden * self.scale
        return self.lm_head(torch.tanh(hidden))


class Equal(nn.Module):
    """Two modules whose weights are equal by chance (both copied from a third)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)
        self.b.load_state_dict(self.a.state_dict())

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Gpt2Like(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.c_attn, self.c_proj = Conv1D(2 * D, D), Conv1D(D, D)

    def forward(self, x):
        a, b = self.c_attn(x).chunk(2, -1)
        return self.c_proj(a * 0.25 * b.tanh())


@dataclass(frozen=True)
class Model:
    """A model, its input and what an adapter changes in it.

    Attributes:
        make: Returns the model.
        shape: Of the input; integers for token ids where it is one-dimensional.
        targets: PEFT's ``target_modules``.
        config: More of `LoraConfig`.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    targets: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict)


FLAT, ROWS, IMAGE, IDS = (3, D), (2, 3, D), (1, 4, 5, 5), (5,)
FC = ("fc1", "fc2")
CONVS = ("conv1", "conv2")


MODELS = {
    "plain": Model(lambda: Chain(nn.ReLU()), ROWS, FC),
    "factor-behind": Model(lambda: Chain(Times(0.25)), ROWS, FC),
    "factor-behind-2d": Model(lambda: Chain(Times(0.25)), FLAT, FC),
    "factor-behind-relu": Model(lambda: Chain(Times(0.25), nn.ReLU()), FLAT, FC),
    "divided-2d": Model(lambda: Chain(Over(3.0), nn.ReLU()), FLAT, FC),
    "negated-2d": Model(lambda: Chain(Times(-1.0), nn.ReLU()), FLAT, FC),
    "factor-before-2d": Model(lambda: Chain(nn.ReLU(), first=Times(0.25)), FLAT, FC),
    "factor-before": Model(lambda: Chain(nn.ReLU(), first=Times(0.25)), ROWS, FC),
    "layer-scale": Model(lambda: Chain(LayerScale(D), nn.ReLU()), ROWS, FC),
    "layer-scale-2d": Model(lambda: Chain(LayerScale(D), nn.ReLU()), FLAT, FC),
    "layer-scale-before-2d": Model(lambda: Chain(nn.ReLU(), first=LayerScale(D)), FLAT, FC),
    "constant-added-2d": Model(lambda: Chain(Plus(0.5), nn.ReLU()), FLAT, FC, {"bias": "all"}),
    "shift-2d": Model(lambda: Chain(Shift(D), nn.ReLU()), FLAT, FC, {"bias": "all"}),
    "shift": Model(lambda: Chain(Shift(D), nn.ReLU()), ROWS, FC, {"bias": "all"}),
    "factor-bias-2d": Model(lambda: Chain(Times(0.25), nn.ReLU()), FLAT, FC, {"bias": "all"}),
    "attention-query": Model(
        lambda: Inside(Attention("query")), ROWS, ("q_proj", "k_proj", "v_proj", "out_proj")
    ),
    "attention-scores": Model(lambda: Inside(Attention("scores")), ROWS, ("q_proj", "k_proj", "v_proj")),
    "attention-no-bias": Model(
        lambda: Inside(Attention("query", False)), ROWS, ("q_proj", "k_proj", "v_proj")
    ),
    "linear-bn-2d": Model(lambda: Chain(nn.BatchNorm1d(D), nn.ReLU()), FLAT, FC),
    "linear-bn-bias-2d": Model(lambda: Chain(nn.BatchNorm1d(D), nn.ReLU()), FLAT, FC, {"bias": "all"}),
    "bn-linear-2d": Model(lambda: Chain(nn.ReLU(), first=nn.BatchNorm1d(D)), FLAT, FC),
    "linear-bn-linear-2d": Model(lambda: Chain(nn.BatchNorm1d(D)), FLAT, FC),
    "layer-norm": Model(lambda: Chain(nn.LayerNorm(D), first=nn.LayerNorm(D)), ROWS, FC),
    "rms-norm": Model(lambda: Chain(RmsNorm(), first=RmsNorm()), ROWS, FC),
    "linear-linear": Model(lambda: Chain(), ROWS, FC),
    "linear-linear-2d": Model(lambda: Chain(), FLAT, FC),
    "conv-bn": Model(lambda: Convs(nn.BatchNorm2d(4)), IMAGE, CONVS),
    "conv-bn-no-bias": Model(lambda: Convs(nn.BatchNorm2d(4), bias=False), IMAGE, CONVS),
    "conv-bn-bias": Model(lambda: Convs(nn.BatchNorm2d(4)), IMAGE, CONVS, {"bias": "all"}),
    "conv-mul": Model(lambda: Convs(LayerScale(4, 1, 1)), IMAGE, CONVS),
    "conv-scalar": Model(lambda: Convs(Times(0.25)), IMAGE, CONVS),
    "conv-add": Model(lambda: Convs(Shift(4, 1, 1)), IMAGE, CONVS, {"bias": "all"}),
    "conv-add-no-bias": Model(lambda: Convs(Shift(4, 1, 1), bias=False), IMAGE, CONVS),
    "conv-mul-dora": Model(lambda: Convs(LayerScale(4, 1, 1)), IMAGE, CONVS, {"use_dora": True}),
    "linear-dora-2d": Model(lambda: Chain(Times(0.25), nn.ReLU()), FLAT, FC, {"use_dora": True}),
    "tied": Model(lambda: Tied(), IDS, ("lm_head",)),
    "scaled-embedding": Model(lambda: Tied(2.5, False), IDS, ("lm_head", "embed")),
    "equal": Model(lambda: Equal(), ROWS, ("a",)),
    "equal-2d": Model(lambda: Equal(), FLAT, ("b",)),
    "conv1d": Model(lambda: Gpt2Like(), ROWS, ("c_attn", "c_proj"), {"fan_in_fan_out": True}),
    "functional-norm": Model(lambda: Inside(FunctionalNorm()), IMAGE, ("conv1", "fc1")),
    "norm-saved": Model(lambda: Chain(nn.ReLU(), first=RmsNorm()), ROWS, FC, {"modules_to_save": ["before"]}),
    "gemma-norm-saved": Model(
        lambda: Chain(nn.ReLU(), first=GemmaNorm()), ROWS, FC, {"modules_to_save": ["before"]}
    ),
    "layer-norm-saved": Model(
        lambda: Chain(nn.ReLU(), first=nn.LayerNorm(D)), ROWS, FC, {"modules_to_save": ["before"]}
    ),
    "head-saved-2d": Model(
        lambda: Chain(Times(0.25), nn.ReLU()), FLAT, ("fc2",), {"modules_to_save": ["fc1"]}
    ),
}


def _torch_onnx(**options: Any) -> Callable[[nn.Module, torch.Tensor, Path], None]:
    def export(model: nn.Module, x: torch.Tensor, path: Path) -> None:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (x,), str(path), input_names=["x"], verbose=False, **options)

    return export


EXPORTERS = {
    "dynamo": _torch_onnx(dynamo=True),
    "dynamo-noopt": _torch_onnx(dynamo=True, optimize=False),
    "torchscript": _torch_onnx(dynamo=False, opset_version=17),
    "torchscript-nofold": _torch_onnx(dynamo=False, opset_version=17, do_constant_folding=False),
}


def _slim(source: Path, out: Path) -> None:
    import onnxslim

    onnx.save(onnxslim.slim(onnx.load(source)), out)


def _sim(source: Path, out: Path) -> None:
    import onnxsim

    onnx.save(onnxsim.simplify(onnx.load(source))[0], out)


def _half(keep: bool) -> Callable[[Path, Path], None]:
    def convert(source: Path, out: Path) -> None:
        from onnxconverter_common import float16

        onnx.save(float16.convert_float_to_float16(onnx.load(source), keep_io_types=keep), out)

    return convert


def _ort(level: str) -> Callable[[Path, Path], None]:
    def optimise(source: Path, out: Path) -> None:
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
        options.optimized_model_filepath = str(out)
        ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])

    return optimise


def _version(source: Path, out: Path) -> None:
    from onnx import version_converter

    model = onnx.load(source)
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    onnx.save(version_converter.convert_version(model, opset + 1), out)


def _strip(source: Path, out: Path) -> None:
    """Drop the nodes' metadata, as tools do that rebuild a graph."""
    model = onnx.load(source)
    del model.metadata_props[:]
    for item in [*model.graph.node, *model.graph.initializer, *model.graph.value_info]:
        del item.metadata_props[:]
    onnx.save(model, out)


def _nameless(source: Path, out: Path) -> None:
    _strip(source, out)
    model = onnx.load(out)
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, out)


def _anonymous(source: Path, out: Path) -> None:
    """Give every constant and value a number for a name."""
    _nameless(source, out)
    model = onnx.load(out)
    fixed = {"", *(value.name for value in [*model.graph.input, *model.graph.output])}
    numbers: dict[str, str] = {}

    def number(name: str) -> str:
        return name if name in fixed else numbers.setdefault(name, f"v{len(numbers)}")

    for tensor in model.graph.initializer:
        tensor.name = number(tensor.name)
    for node in model.graph.node:
        node.input[:] = [number(name) for name in node.input]
        node.output[:] = [number(name) for name in node.output]
    del model.graph.value_info[:]
    onnx.save(model, out)


def _then(*tools: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    def run(source: Path, out: Path) -> None:
        for number, tool in enumerate(tools):
            between = out.with_name(f"{out.stem}.{number}.onnx") if number + 1 < len(tools) else out
            tool(source, between)
            source = between

    return run


TOOLS: dict[str, Callable[[Path, Path], None]] = {
    "none": lambda source, out: onnx.save(onnx.load(source), out),
    "onnxslim": _slim,
    "onnxsim": _sim,
    "fp16": _half(False),
    "fp16-keep-io": _half(True),
    "ort-basic": _ort("BASIC"),
    "ort-extended": _ort("EXTENDED"),
    "ort-layout": _ort("LAYOUT"),
    "ort-all": _ort("ALL"),
    "version": _version,
    "stripped": _strip,
    "nameless": _nameless,
    "anonymous": _anonymous,
    "onnxslim+anonymous": _then(_slim, _anonymous),
    "onnxsim+stripped": _then(_sim, _strip),
    "onnxsim+nameless": _then(_sim, _nameless),
    "onnxsim+onnxslim": _then(_sim, _slim),
    "onnxslim+onnxsim": _then(_slim, _sim),
    "ort-basic+onnxslim": _then(_ort("BASIC"), _slim),
    "ort-extended+nameless": _then(_ort("EXTENDED"), _nameless),
    "onnxslim+fp16": _then(_slim, _half(True)),
}


def made(name: str, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """Return a model whose norms do something, and its input."""
    torch.manual_seed(seed)
    case = MODELS[name]
    model = case.make().eval()
    with torch.no_grad():
        for key, values in [*model.named_parameters(), *model.named_buffers()]:
            if not values.is_floating_point():
                continue
            if "running_mean" in key:
                values.normal_()
            elif "running_var" in key:
                values.uniform_(0.5, 2)
            elif "middle" in key or "before" in key:
                values.uniform_(0.5, 1.5)
            elif key.endswith("bias") and not isinstance(model, Equal):
                values.normal_()
    if case.shape == IDS:
        return model, torch.randint(0, 11, case.shape)
    return model, torch.randn(case.shape)


def saved_adapter(name: str, folder: Path) -> tuple[Path, np.ndarray]:
    """Save an adapter; return its folder and PEFT's unmerged output."""
    model, x = made(name)
    case = MODELS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(
            copy.deepcopy(model),
            LoraConfig(r=2, lora_alpha=4, target_modules=list(case.targets), **case.config),
        ).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for key, values in peft.named_parameters():
            if "lora_" in key and "magnitude" not in key:
                values.copy_(torch.randn(values.shape) * 0.3)
            elif "magnitude" in key:
                values.mul_(torch.rand(values.shape) + 0.5)
            elif values.requires_grad:
                values.add_(0.3 * torch.randn(values.shape))
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.save_pretrained(folder / "adapter")
    with torch.no_grad():
        wanted = peft(x).numpy()
    return folder / "adapter", wanted


def saved_checkpoint(name: str, folder: Path) -> Path:
    model, _ = made(name)
    folder = folder / "checkpoint"
    folder.mkdir(exist_ok=True)
    seen: set[int] = set()
    tensors = {}
    for key, values in model.state_dict(keep_vars=True).items():
        if id(values) not in seen:
            tensors[key] = values.detach().numpy().copy()
        seen.add(id(values))
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def run(path: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    half = {i.name for i in session.get_inputs() if i.type == "tensor(float16)"}
    feeds = {name: v.astype(np.float16) if name in half else v for name, v in feeds.items()}
    return np.asarray(session.run(None, feeds)[0], np.float64)


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    wanted = np.asarray(wanted, np.float64)
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


MODES = ("merge", "swap")


def outcome(
    mode: str, base: Path, adapter: Path, x: np.ndarray, out: Path, **options: Any
) -> np.ndarray | LoraExportError:
    """Return what the graph with the adapter answers, or the refusal."""
    feeds = {"x": x}
    try:
        if mode == "merge":
            merge_onnx(base, adapter, out, force=True, **options)
        else:
            dora = '"use_dora": true' in (adapter / "adapter_config.json").read_text()
            swap_onnx(base, out, adapter=adapter, force=True, dora=dora, **options)
            tensors = out.with_suffix(".safetensors")
            convert_adapter(adapter, out, tensors, force=True)
            feeds |= load_file(tensors)
    except LoraExportError as refused:
        return refused
    return run(out, feeds)


def saved(
    model: nn.Module,
    x: torch.Tensor,
    folder: Path,
    targets: tuple[str, ...] = ("proj",),
    saves: list[str] | None = None,
    **options: Any,
) -> np.ndarray:
    """Save a model's checkpoint, ``base``, and an adapter of it; return what PEFT answers."""
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text('{"model_type": "x"}')
    values = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    save_file(values, folder / "base" / "model.safetensors")
    options |= {"target_modules": list(targets), "modules_to_save": saves, "init_lora_weights": False}
    config = LoraConfig(r=2, **options)
    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for name, values in adapted.named_parameters():
            if values.requires_grad and "lora_" not in name:
                values.add_(0.3 * torch.randn(values.shape))
    adapted.save_pretrained(folder / "adapter")
    with torch.no_grad():
        return adapted(x).numpy()


def changed_graph(
    case: tuple[Any, nn.Module, torch.Tensor, Any], exporter: str, tool: str, folder: Path
) -> Path:
    """Export a case's model, the second of four, and let a tool change the graph; return that."""
    _, model, x, _ = case
    EXPORTERS[exporter](model, x, folder / "raw.onnx")
    TOOLS[tool](folder / "raw.onnx", folder / "graph.onnx")
    return folder / "graph.onnx"
