"""Branches beside each operator, in small graphs: ONNX Runtime against numpy and torch in float64."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from branch_cases import BIAS, IN, LINEAR, OUT, RANKS, W, conv_base, linear_base
from branch_graphs import (
    TOLERANCE,
    bind,
    check_bits,
    check_swap,
    check_values,
    conv_lora,
    convolve,
    effective,
    lora,
    magnitude,
    reasons,
    refuse_swap,
    swapped,
    table_lora,
)
from small_graphs import adapter, graph, random, run, save


def linear_answer(case, weight, feeds):
    compute, x = LINEAR[case][3], feeds["x"].astype(np.float64)
    return lambda modules: [compute(x, effective(weight, modules.get("fc")), BIAS)]


@pytest.mark.parametrize("case", LINEAR)
def test_linear(case, tmp_path):
    base, weight, feeds = linear_base(case, tmp_path)
    given, *others = (adapter(lora("fc", *weight.shape, rank, seed=rank)) for rank in (2, *RANKS))
    check_swap(base, given, linear_answer(case, weight, feeds), feeds, *others)


@pytest.mark.parametrize("case", ["3-D", "gemm-alpha-beta", "loop"])
def test_linear_by_the_module_s_name(case, tmp_path):
    """There is no adapter when the graph is made, and any that fits comes later."""
    base, weight, feeds = linear_base(case, tmp_path)
    given, other = (adapter(lora("fc", *weight.shape, rank)) for rank in (3, 7))
    report = check_swap(
        base, given, linear_answer(case, weight, feeds), feeds, other, target_modules=["fc"], max_rank=7
    )
    assert report.exposed.max_rank == 7


@pytest.mark.parametrize("case", [case for case in LINEAR if case != "fused-gemm"])
def test_linear_dora(case, tmp_path):
    """A factor on the product alone, whatever scales it or is added to it; plain adapters have ones."""
    base, weight, feeds = linear_base(case, tmp_path)
    rows = len(weight)
    given, other = (adapter(lora("fc", *weight.shape, r, magnitude=magnitude(rows, r))) for r in (2, 3))
    if case == "loop":
        given = other = adapter(lora("fc", *weight.shape, magnitude=magnitude(rows) / 3))
    plain = adapter(lora("fc", *weight.shape, 5))
    check_swap(base, given, linear_answer(case, weight, feeds), feeds, other, plain, dora=True)


def test_dora_can_t_come_before_an_activation_inside(tmp_path):
    base, weight, _ = linear_base("fused-gemm", tmp_path)
    caught = refuse_swap(base, adapter(lora("fc", *weight.shape, magnitude=magnitude(OUT))), dora=True)
    assert reasons(caught)["fc.weight"].startswith("FusedGemm applies its activation inside")


def test_dora_without_dora_is_refused(tmp_path):
    base, weight, _ = linear_base("3-D", tmp_path)
    caught = refuse_swap(base, adapter(lora("fc", *weight.shape, magnitude=magnitude(OUT))))
    assert "DoRA" in reasons(caught)["fc.weight"]
    assert "give --dora" in caught.hint


# --- embeddings --------------------------------------------------------------------------------------


TABLE = random(11, 8, seed=3)


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize(
    "ids", [[1, -2, 10], [[1, 2], [3, -1]], [[[1], [2]], [[3], [-11]]]], ids=["1-D", "2-D", "3-D"]
)
def test_embedding(ids, dora, tmp_path):
    """Indices of any shape, negative ones too; a DoRA factor belongs to a column of the table."""
    ids = np.array(ids)
    axes = "abcd"[: ids.ndim]
    text = (
        f"g (int64[{','.join(axes)}] ids) => (float[{','.join(axes)},n] y) {{ y = Gather (e_weight, ids) }}"
    )
    base = save(graph(text, {"e.weight": TABLE}), tmp_path)

    def answer(modules):
        return [effective(TABLE, modules.get("e"))[ids]]

    more = {"magnitude": magnitude(8)} if dora else {}
    given, *others = (adapter(table_lora("e", 11, 8, rank, **more)) for rank in (2, *RANKS))
    check_swap(base, given, answer, {"ids": ids}, *others, dora=dora)
    check_swap(base, given, answer, {"ids": ids}, *others, dora=dora, target_modules=["e"])


@pytest.mark.parametrize("changed", [("e",), ("head",), ("e", "head")], ids="-".join)
def test_a_tied_embedding(changed, tmp_path):
    """One weight, two modules: each gets its own branch, the weight stays one."""
    text = (
        "g (int64[a,b] ids) => (float[a,b,n] y) { [n1] h = Gather (e_weight, ids) u = Tanh (h) "
        "t = Transpose <perm = [1, 0]> (e_weight) [n2] y = MatMul (u, t) }"
    )
    base = save(graph(text, {"e.weight": TABLE}, {"n1": "e", "n2": "head"}), tmp_path)
    ids = np.array([[1, 2, 3], [4, -1, 0]])

    def answer(modules):
        hidden = np.tanh(effective(TABLE, modules.get("e"))[ids])
        return [hidden @ effective(TABLE, modules.get("head")).T]

    modules = {"e": table_lora("e", 11, 8), "head": lora("head", 11, 8)}
    given = adapter(*(modules[name] for name in changed))
    check_swap(base, given, answer, {"ids": ids})
    assert len(ir.load(tmp_path / "swap.onnx").graph.initializers) == 1 + 2 * len(changed)


# --- PEFT's own forward ------------------------------------------------------------------------------


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb = torch.nn.Embedding(11, 8)
        self.fc = torch.nn.Linear(8, 12)
        self.conv = torch.nn.Conv1d(12, 6, 3, padding=1)
        self.out = torch.nn.Linear(6, 5)

    def forward(self, ids):
        hidden = torch.tanh(self.fc(self.emb(ids)))
        return self.out(torch.relu(self.conv(hidden.transpose(1, 2))).transpose(1, 2).flatten(0, 1))


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_dora_against_peft(exporter, tmp_path):
    """Embedding, MatMul with a bias, convolution and Gemm, all with DoRA; a plain adapter in that graph."""
    from peft import LoraConfig, get_peft_model

    from lora_export.formats import load_adapter

    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]])
    base = tmp_path / "base.onnx"
    dynamo = exporter == "dynamo"
    more = {"verbose": False} if dynamo else {}
    torch.onnx.export(Layers().eval(), (ids,), str(base), input_names=["ids"], dynamo=dynamo, **more)
    generator, wanted = torch.Generator().manual_seed(1), {}
    for name, rank in (("dora", 4), ("plain", 3)):
        targets = ["emb", "fc", "conv", "out"]
        options = {"r": rank, "lora_alpha": 6, "target_modules": targets, "use_dora": name == "dora"}
        model = get_peft_model(Layers(), LoraConfig(**options)).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(parameter * (1 + 0.3 * noise) if "magnitude" in key else 0.4 * noise)
            wanted[name] = model(ids).numpy()
        model.save_pretrained(tmp_path / name)
    given, plain = (load_adapter(tmp_path / name) for name in ("dora", "plain"))
    out, report = swapped(base, given, dora=True)
    feeds = {"ids": ids.numpy()}
    check_bits(run(base, **feeds), run(out, **feeds))
    for adapted, name in ((given, "dora"), (plain, "plain")):
        got = run(out, **feeds, **bind(adapted, report, base).tensors)
        check_values(got, [wanted[name]], TOLERANCE)


# --- other floats ------------------------------------------------------------------------------------


FLOATS = {"float16": 10, "bfloat16": 16, "double": 11}


# Half a unit in the last place of 11 bits, a few times; sums of 40 products in float64.
TOLERANCES = {"float16": 3e-3, "double": 1e-14}


def typed(text, dtype):
    return text.replace("float[", f"{dtype}[")


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("case", ["3-D", "bias", "gemm-alpha-beta", "gemm-relu"])
@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_other_floats(dtype, case, dora, tmp_path):
    text, store, x, compute = LINEAR[case]
    kind = np.dtype(dtype)
    weight = (W / 6).astype(kind)
    weights = {"fc.weight": np.ascontiguousarray(store(weight))}
    if "fc_bias" in text:
        weights["fc.bias"] = BIAS.astype(kind)
    base = save(graph(typed(text, dtype), weights), tmp_path)
    x, bias = x.astype(kind), BIAS.astype(kind).astype(np.float64)
    module = lora("fc", OUT, IN, **({"magnitude": magnitude(OUT)} if dora else {}))
    module = replace(module, lora_a=module.lora_a / 4, lora_b=module.lora_b / 4)

    def answer(modules):
        return [compute(x.astype(np.float64), effective(weight, modules.get("fc")), bias)]

    report = check_swap(base, adapter(module), answer, {"x": x}, tolerance=TOLERANCES[dtype], dora=dora)
    assert report.exposed.modules[0].dtype == ("float64" if dtype == "double" else dtype)


def test_bfloat16_is_written_but_not_run(tmp_path):
    """ONNX Runtime's CPU provider has no MatMul of bfloat16: types and names are all that can be checked."""
    text, store, *_ = LINEAR["bias"]
    weights = {
        name: ir.tensor(values.astype(ir.DataType.BFLOAT16.numpy()), dtype=ir.DataType.BFLOAT16)
        for name, values in (("fc.weight", np.ascontiguousarray(store(W))), ("fc.bias", BIAS))
    }
    base = save(graph(typed(text, "bfloat16"), weights), tmp_path)
    given = adapter(lora("fc", OUT, IN, magnitude=magnitude(OUT)))
    out, report = swapped(base, given, dora=True)
    model = ir.load(out)
    added = [v for v in model.graph.inputs if ".lora_" in str(v.name)]
    assert [v.dtype for v in added] == [ir.DataType.BFLOAT16] * 3
    assert {tensor.dtype.name for tensor in bind(given, report, base).tensors.values()} == {"bfloat16"}
    floats = {v.dtype for node in model.graph for v in node.outputs if ".lora." in str(v.name)}
    assert floats == {ir.DataType.BFLOAT16}


# --- TensorRT's flavour ------------------------------------------------------------------------------


def test_tensorrt_takes_plain_inputs(tmp_path):
    """No LoRA tensor has a default, which a TensorRT parser would build in; a convolution's rank is fixed."""
    text = (
        "g (int64[a,b] ids) => (float[a,n,b] y) { h = Gather (e_weight, ids) z = MatMul (h, fc_weight) "
        "t = Transpose <perm = [0, 2, 1]> (z) y = Conv <pads = [1, 1]> (t, c_weight, c_bias) }"
    )
    fc, kernel = random(12, 8, seed=2), random(6, 12, 3, seed=4)
    weights = {"e.weight": TABLE, "fc.weight": fc.T.copy(), "c.weight": kernel, "c.bias": random(6, seed=5)}
    base = save(graph(text, weights), tmp_path)
    ids = np.array([[1, 2, 3], [4, 5, -1]])

    def answer(modules):
        hidden = effective(TABLE, modules.get("e"))[ids] @ effective(fc, modules.get("fc")).T
        y = convolve(hidden.swapaxes(1, 2), effective(kernel, modules.get("c")), weights["c.bias"], padding=1)
        return [y]

    def made(rank):
        return adapter(
            table_lora("e", 11, 8, rank, magnitude=magnitude(8)),
            lora("fc", 12, 8, rank, magnitude=magnitude(12)),
            conv_lora("c", 6, 12, 3, rank=min(rank, 4), magnitude=magnitude(6)),
        )

    out, report = swapped(base, made(4), flavour="tensorrt", dora=True)
    session = ort.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    inputs = {port.name: port.shape for port in session.get_inputs()}
    assert set(inputs) == {"ids", *report.exposed.tensor_names()}
    assert not set(inputs) & set(ir.load(out).graph.initializers)
    assert not session.get_overridable_initializers()
    assert inputs["c.lora_A.weight"] == [4, 12, 3]
    assert inputs["c.lora_B.weight"] == [6, 4, 1]
    assert inputs["fc.lora_A.weight"] == [8, "fc.rank"]
    for rank in (4, 2, 6):
        bound = bind(made(rank), report, base)
        modules = {module.path: module for module in made(rank).modules.values()}
        check_values(run(out, ids=ids, **bound.tensors), answer(modules), TOLERANCE)


def test_tensorrt_needs_a_convolution_s_rank(tmp_path):
    base, *_ = conv_base(tmp_path, 4, 6, (3,), "")
    caught = refuse_swap(base, target_modules=["c"], flavour="tensorrt")
    assert "TensorRT needs a convolution's rank" in str(caught)
