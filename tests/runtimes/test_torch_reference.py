"""lora_export.runtimes.torch.reference: PEFT's own branches, unmerged, are the oracle."""

from __future__ import annotations

import dataclasses
import functools

import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import Experts
from tiny_models import ARCHITECTURES, build
from torch import nn
from torch_cases import ONE, feeds_of, float64_throughout, peft_answer, reference

from lora_export.adapter import Adapter, LoraModule
from lora_export.errors import AdapterError, BackendError
from lora_export.formats import load_adapter
from lora_export.formats.reading.scope import part_of
from lora_export.runtimes.torch.reference import TorchReference

CASES = [
    pytest.param(arch, feature, marks=pytest.mark.xdist_group(arch), id=f"{arch}-{feature}")
    for arch, spec in ARCHITECTURES.items()
    for feature in spec.features
]


def state_of(module):
    return {name: values.clone() for name, values in module.state_dict().items()}


def same_state(module, before):
    after = module.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


# --- agrees with PEFT --------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "feature"), CASES)
def test_as_peft_in_float64(arch, feature):
    path = tiny.adapter(arch, feature)
    model = reference(arch, a=path)
    before = state_of(model._model)
    base = model.run(feeds_of(arch))["logits"]
    got = model.run(feeds_of(arch), ONE)["logits"]
    assert got.dtype == np.float64
    assert tiny.relative_error(got, peft_answer(arch, path)) < 1e-13
    assert tiny.relative_error(got, base) > 1e-3
    assert same_state(model._model, before)
    assert np.array_equal(model.run(feeds_of(arch))["logits"], base)


@pytest.mark.parametrize(("arch", "feature"), CASES)
def test_as_peft_in_float32(arch, feature):
    path = tiny.adapter(arch, feature)
    got = reference(arch, "float32", a=path).run(feeds_of(arch), ONE)["logits"]
    assert got.dtype == np.float32
    assert tiny.relative_error(got, tiny.reference(arch, path, merged=False)) < 1e-6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("arch", "feature"),
    [
        ("llama", "plain"),
        ("llama", "dora"),
        ("t5", "plain"),
        ("vit", "plain"),
        ("qwen2_moe", "target_parameters"),
    ],
)
def test_as_peft_in_a_half(arch, feature, dtype):
    """PEFT with the adapter in the same dtype; both round a product or two elsewhere."""
    path = tiny.adapter(arch, feature)
    got = reference(arch, dtype, a=path).run(feeds_of(arch), ONE)["logits"]
    folder, kind = tiny.checkpoint(arch), type(build(arch))
    with tiny.quiet(), torch.no_grad():
        base = kind.from_pretrained(folder, dtype=getattr(torch, dtype))
        model = PeftModel.from_pretrained(base, path, autocast_adapter_dtype=False).eval()
        inputs = ARCHITECTURES[arch].inputs().items()
        output = model(**{n: t.to(base.dtype) if t.is_floating_point() else t for n, t in inputs})
    wanted = output.logits.double().numpy()
    exact = peft_answer(arch, path)
    assert got.dtype == (np.float16 if dtype == "float16" else ml_dtypes.bfloat16)
    assert 0 < tiny.relative_error(got, exact) < 2 * tiny.relative_error(wanted, exact)


def test_float64_is_not_left_in_the_model():
    """RMSNorm and the rotations are computed in float32 by the model's own code."""
    inputs = ARCHITECTURES["llama"].inputs()
    model = build("llama").double()
    with torch.no_grad():
        plain = model(**inputs).logits.numpy()
        with float64_throughout():
            wanted = model(**inputs).logits.numpy()
    got = reference("llama").run(feeds_of("llama"))["logits"]
    assert tiny.relative_error(got, wanted) < 1e-13
    assert tiny.relative_error(plain, wanted) > 1e-9


# --- layers that the zoo has not ---------------------------------------------------------------------


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.series = nn.Conv1d(4, 6, 3, stride=2, padding=1)
        self.grouped = nn.Conv1d(6, 8, 3, padding=1, groups=2, bias=False)
        self.volume = nn.Conv3d(2, 3, 2, padding=1)

    def forward(self, x):
        y = self.grouped(torch.tanh(self.series(x)))
        return self.volume(y.reshape(len(y), 2, 2, 2, -1))


def run_experts(experts, x):
    up, down = experts.gate_up_proj, experts.down_proj
    if not experts.is_transposed:
        up, down = up.mT, down.mT
    return torch.tanh(x @ up) @ down


class Square(nn.Module):
    """Experts whose matrices are square, in either order: only the module itself says which."""

    def __init__(self, transposed):
        super().__init__()
        self.experts = Experts()
        self.experts.gate_up_proj = nn.Parameter(torch.randn(3, 8, 8))
        self.experts.down_proj = nn.Parameter(torch.randn(3, 8, 8))
        self.experts.is_transposed = transposed
        self.experts.forward = functools.partial(run_experts, self.experts)

    def forward(self, x):
        return self.experts(x)


def saved(make, folder, **config):
    """Return a base in float64, PEFT's model on an equal one, and the adapter's file as we read it."""
    torch.manual_seed(3)
    base = make().double()
    other = make().double()
    other.load_state_dict(base.state_dict())
    with tiny.quiet():
        model = get_peft_model(other, LoraConfig(r=4, lora_alpha=6, **config)).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(parameter + 0.3 * torch.randn_like(parameter)).copy_(parameter.float())
        model.save_pretrained(folder)
    return base, model, load_adapter(folder)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["series", "grouped", "volume"]},
        {"target_modules": ["series", "volume"], "use_dora": True},
        {"target_modules": ["series", "volume"], "lora_bias": True},
    ],
    ids=["plain", "dora", "lora_bias"],
)
def test_convolutions(tmp_path, config):
    base, model, adapter = saved(Convolutions, tmp_path, **config)
    x = torch.randn(2, 4, 12, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x).numpy()
    got = TorchReference.of_module(base, {"a": adapter}, ["y"]).run({"x": x.numpy()}, ONE)["y"]
    assert tiny.relative_error(got, wanted) < 1e-13


@pytest.mark.parametrize("transposed", [False, True])
def test_square_experts(tmp_path, transposed):
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    base, model, adapter = saved(
        lambda: Square(transposed), tmp_path, target_modules=[], target_parameters=targets
    )
    x = torch.randn(5, 8, dtype=torch.float64)
    with torch.no_grad():
        wanted, without = model(x).numpy(), base(x).numpy()
    ours = TorchReference.of_module(base, {"a": adapter})
    assert tiny.relative_error(ours.run({"x": x.numpy()}, ONE)["output_0"], wanted) < 1e-13
    assert tiny.relative_error(without, wanted) > 1e-2


def test_a_blend_on_experts_that_run_twice(tmp_path):
    targets = {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}
    base, _, first = saved(lambda: Square(False), tmp_path / "a", **targets)
    _, _, second = saved(lambda: Square(False), tmp_path / "b", **targets)
    second = dataclasses.replace(
        second, modules={k: dataclasses.replace(m, lora_a=m.lora_a[::-1]) for k, m in second.modules.items()}
    )
    base.forward = lambda x: base.experts(base.experts(x))
    x = torch.randn(5, 8, dtype=torch.float64)
    ours = TorchReference.of_module(base, {"a": first, "b": second})
    got = ours.run({"x": x.numpy()}, (("a", 1.0), ("b", 0.5)))["output_0"]
    with torch.no_grad():
        for adapter, weight in ((first, 1.0), (second, 0.5)):
            for lora in adapter.modules.values():
                add_delta(base, lora, weight)
        wanted = base(x).numpy()
    assert tiny.relative_error(got, wanted) < 1e-13


def test_factors_of_a_1x1_convolution_fit_a_linear_and_back():
    plain = load_adapter(tiny.adapter("conv"))
    changed = {}
    for key, lora in plain.modules.items():
        shape = () if lora.path == "pointwise" else (1, 1)
        if lora.path in ("pointwise", "head"):
            a, b = (part.reshape(*part.shape[:2], *shape) for part in (lora.lora_a, lora.lora_b))
            lora = dataclasses.replace(lora, lora_a=a, lora_b=b, kind="conv" if shape else "linear")
        changed[key] = lora
    model = reference("conv", a=plain, b=dataclasses.replace(plain, modules=changed))
    wanted = model.run(feeds_of("conv"), ONE)["logits"]
    assert np.array_equal(model.run(feeds_of("conv"), (("b", 1.0),))["logits"], wanted)


# --- blends ------------------------------------------------------------------------------------------


@pytest.mark.xdist_group("llama")
def test_a_blend_is_pefts(tmp_path):
    paths, weights = [tiny.adapter("llama"), tiny.adapter("llama", seed=1)], [0.7, -0.3]
    with tiny.quiet():
        model = PeftModel.from_pretrained(build("llama").double(), paths[0], adapter_name="a")
        model.load_adapter(paths[1], adapter_name="b")
        model.add_weighted_adapter(["a", "b"], weights, "ab", combination_type="cat")
        model.set_adapter("ab")
        model = model.double().eval()
    with torch.no_grad(), float64_throughout():
        wanted = model(**ARCHITECTURES["llama"].inputs()).logits.numpy()
    ours = reference("llama", a=paths[0], b=paths[1])
    got = ours.run(feeds_of("llama"), tuple(zip("ab", weights, strict=True)))["logits"]
    assert tiny.relative_error(got, wanted) < 1e-6  # PEFT rounds the new factors to float32


@pytest.mark.parametrize(
    ("arch", "feature"),
    [
        pytest.param(arch, feature, marks=pytest.mark.xdist_group(arch))
        for arch, feature in [("gpt2", "lora_bias"), ("bert", "plain"), ("qwen2_moe", "target_parameters")]
    ],
)
def test_a_blend_is_the_sum_of_deltas(arch, feature):
    adapters = [load_adapter(tiny.adapter(arch, feature, seed)) for seed in (0, 1)]
    weights = (0.7, -0.3)
    model = build(arch).double()
    if arch == "qwen2_moe":
        model.set_experts_implementation("eager")
    with torch.no_grad(), float64_throughout():
        for adapter, weight in zip(adapters, weights, strict=True):
            for lora in adapter.modules.values():
                add_delta(model, lora, weight)
        wanted = model(**ARCHITECTURES[arch].inputs()).logits.numpy()
    ours = reference(arch, a=adapters[0], b=adapters[1])
    got = ours.run(feeds_of(arch), tuple(zip("ab", weights, strict=True)))["logits"]
    assert tiny.relative_error(got, wanted) < 1e-13


def add_delta(model, lora, weight):
    module = model.get_submodule(lora.path)
    values = getattr(module, lora.parameter)
    for expert in range(lora.experts):
        left, right = lora.factors(expert, np.float64)
        delta = torch.from_numpy(weight * (left @ right))
        target = values[expert] if lora.experts > 1 else values
        target += delta.T if type(module).__name__ == "Conv1D" else delta
    if lora.lora_bias is not None:
        module.bias += torch.from_numpy(lora.lora_bias.astype(np.float64)) * weight * lora.scaling


@pytest.mark.xdist_group("bert")
def test_what_is_no_sum_is_refused_in_a_blend():
    names = {"dora": "dora", "head": "modules_to_save", "plain": "plain"}
    model = reference("bert", "float32", **{n: tiny.adapter("bert", f) for n, f in names.items()})
    feeds = feeds_of("bert")
    for state in ((("dora", 0.5),), (("dora", 1.0), ("plain", 1.0)), (("plain", 1.0), ("head", 0.5))):
        with pytest.raises(AdapterError, match="can't be active together"):
            model.run(feeds, state)
    with pytest.raises(AdapterError) as caught:
        model.run(feeds, (("dora", 0.5), ("head", 0.5)))
    assert len(caught.value.problems) == 2
    both = model.run(feeds, (("plain", 0.5), ("head", 1.0)))["logits"]
    assert np.isfinite(both).all()
    assert not np.array_equal(both, model.run(feeds, (("head", 1.0),))["logits"])


# --- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", ["embedding", "target_parameters", "modules_to_save"])
@pytest.mark.xdist_group("qwen2_moe")
def test_the_base_is_as_before_when_a_run_fails(feature, monkeypatch):
    model = reference("qwen2_moe", a=tiny.adapter("qwen2_moe", feature))
    inner = model._model
    before = state_of(inner)
    pointers = {name: values.data_ptr() for name, values in inner.state_dict().items()}

    def fail(*_, **__):
        raise ValueError("in the middle")

    for broken in (inner.model.layers[1].mlp.experts, inner.lm_head):
        with monkeypatch.context() as patch:
            patch.setattr(broken, "forward", fail)
            with pytest.raises(BackendError, match="in the middle"):
                model.run(feeds_of("qwen2_moe"), ONE)
        assert same_state(inner, before)
        assert {name: values.data_ptr() for name, values in inner.state_dict().items()} == pointers
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in inner.modules())


def linear(path, out_dim, in_dim, **more):
    a, b = np.ones((2, in_dim), np.float32), np.ones((out_dim, 2), np.float32)
    return LoraModule(path, "linear", a, b, alpha=4.0, rank=2, **more)


def adapter_of(*modules, **more):
    return Adapter("task", "", "peft", {module.key: module for module in modules}, **more)


@pytest.mark.xdist_group("bert")
def test_all_that_does_not_fit_is_listed():
    layer = "bert.encoder.layer.0.attention"
    first = adapter_of(
        linear(f"{layer}.self.query", 64, 63),
        linear(f"{layer}.self.nothing", 64, 64),
        linear("dense", 64, 64),
        linear("bert.embeddings.word_embeddings", 100, 64),
        linear(f"{layer}.self.key", 64, 64, scale=np.ones(64, np.float32)),
        extras={"classifier.weight": np.ones((3, 64)), "score.weight": np.ones((3, 64))},
    )
    second = adapter_of(linear(f"{layer}.output.LayerNorm", 64, 64))
    with pytest.raises(AdapterError) as caught:
        reference("bert", "float32", first=first, second=second)
    wanted = [
        ("first: classifier.weight", "(5, 64)", "(3, 64)"),
        ("first: score.weight", "no parameter of that name"),
        (f"first: {layer}.self.query", "(64, 64)", "(64, 63)"),
        (f"first: {layer}.self.nothing", "no parameter of that name"),
        # One change of names holds for the whole adapter: alone it would be ambiguous.
        ("first: dense", "no parameter of that name"),
        ("first: bert.embeddings.word_embeddings", "Embedding (100, 64)", "linear"),
        (f"first: {layer}.self.key", "DoRA"),
        (f"second: {layer}.output.LayerNorm", "(64,)", "(64, 64)"),
    ]
    assert len(caught.value.problems) == len(wanted)
    for problem, parts in zip(caught.value.problems, wanted, strict=True):
        assert all(part in problem for part in parts), problem


@pytest.mark.parametrize(
    ("parts", "path"),
    [(("model.encoder", "model.decoder"), "layers.0.q"), (("text_model", "vision_model"), "blocks.0.mlp.fc")],
)
def test_the_part_that_belongs_is_the_hint(parts, path):
    """Of an encoder and decoder, or of two towers, the model is one."""
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)})])
    mlp = nn.ModuleDict({"fc": nn.Linear(4, 4)})
    model.blocks = nn.ModuleList([nn.ModuleDict({"mlp": mlp})])
    whole = adapter_of(*(linear(f"{part}.{path}", 4, 4) for part in parts))
    with pytest.raises(AdapterError) as caught:
        TorchReference.of_module(model, {"a": whole})
    assert all(f"--component {part}" in caught.value.hint for part in parts)
    assert "trained on" not in caught.value.hint
    assert not any("--component" in problem for problem in caught.value.problems)
    TorchReference.of_module(model, {"a": part_of(whole, parts[0])})


def test_groups_and_experts_have_to_fit():
    grouped = nn.Module()
    grouped.conv = nn.Conv1d(6, 8, 3, groups=2)
    grouped.experts = Experts()
    factors = np.ones((4, 6, 3), np.float32), np.ones((8, 4, 1), np.float32)
    conv = LoraModule("conv", "conv", *factors, alpha=4.0, rank=4)
    three = np.ones((2 * 2, 8), np.float32), np.ones((10, 2 * 2), np.float32)
    experts = LoraModule(
        "experts", "parameter", *three, alpha=4.0, rank=2, parameter="gate_up_proj", experts=2
    )
    with pytest.raises(AdapterError) as caught:
        TorchReference.of_module(grouped, {"a": adapter_of(conv, experts)})
    assert "2 groups" in caught.value.problems[0]
    assert "3 experts, the adapter 2" in caught.value.problems[1]


@pytest.mark.parametrize("kernel", [(2,), (2, 2), (1, 4)])
def test_a_kernel_that_is_not_of_ones_has_no_place_in_a_linear(kernel):
    """Flattened it has as many columns as the weight, of a Linear and of any other module's matrix."""
    model = nn.Module()
    model.head = nn.Linear(4, 6)
    model.table = nn.Module()
    model.table.weight = nn.Parameter(torch.ones(6, 4))
    a = np.ones((2, 4 // int(np.prod(kernel)), *kernel), np.float32)
    b = np.ones((6, 2, *(1 for _ in kernel)), np.float32)
    modules = [LoraModule(path, "conv", a, b, alpha=4.0, rank=2) for path in ("head", "table")]
    with pytest.raises(AdapterError) as caught:
        TorchReference.of_module(model, {"a": adapter_of(*modules)})
    assert len(caught.value.problems) == 2
    assert all("(6, 4), the adapter fits (6," in problem for problem in caught.value.problems)
