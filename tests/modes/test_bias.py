"""A bias of zeros that the exporter dropped comes back when an adapter sets it; nothing is added twice."""

import copy

import numpy as np
import onnx_ir as ir
import peft
import pytest
import tiny
import torch
from torch import nn

from lora_export import Adapter, SiteError, export_onnx, merge_onnx

DROPPED = "dropped a bias of zeros"


class Model(nn.Module):
    """A body and a head; 2-D input gives the head a Gemm, 3-D input a MatMul."""

    def __init__(self, zeros=True):
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)
        if zeros:
            nn.init.zeros_(self.head.bias)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def trained(module, folder, **options):
    """Return a PEFT model of a copy of ``module`` whose trained values are random, saved to ``folder``."""
    config = peft.LoraConfig(r=2, target_modules=["body"], **options)
    model = peft.get_peft_model(copy.deepcopy(module), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model.eval()


def exported(module, x, folder):
    """Export with onnxscript's own optimiser, which our captures are not given to."""
    path = folder / "base.onnx"
    torch.onnx.export(module, (x,), path, dynamo=True, optimize=True, verbose=False)
    return path


@pytest.mark.parametrize("shape", [(3, 8), (3, 4, 8)], ids=["gemm", "matmul"])
@pytest.mark.parametrize("zeros", [True, False], ids=["fresh head", "trained head"])
def test_modules_to_save_of_a_fresh_head(shape, zeros, tmp_path):
    torch.manual_seed(0)
    module = Model(zeros).eval()
    model = trained(module, tmp_path, modules_to_save=["head"])
    x = torch.randn(*shape)
    report = merge_onnx(exported(module, x, tmp_path), tmp_path, tmp_path / "m.onnx")
    # onnxscript's optimiser drops zeros from a Gemm, not from an Add.
    dropped = zeros and len(shape) == 2
    assert sum(DROPPED in row.reason for row in report.plan.rows) == dropped
    got = tiny.run(tmp_path / "m.onnx", {"x": x.numpy()})
    with torch.no_grad():
        assert tiny.relative_error(got, model(x).numpy()) < 2e-6


def test_lora_bias_on_a_bias_of_zeros(tmp_path):
    torch.manual_seed(0)
    module = Model().eval()
    nn.init.zeros_(module.body.bias)
    model = trained(module, tmp_path, lora_bias=True)
    x = torch.randn(3, 8)
    report = merge_onnx(exported(module, x, tmp_path), tmp_path, tmp_path / "m.onnx")
    assert [row.action for row in report.plan.rows if DROPPED in row.reason] == ["add to bias"]
    got = tiny.run(tmp_path / "m.onnx", {"x": x.numpy()})
    with torch.no_grad():
        assert tiny.relative_error(got, model(x).numpy()) < 2e-6


def test_our_own_captures_keep_it(tmp_path):
    torch.manual_seed(0)
    module = Model().eval()
    model = trained(module, tmp_path, modules_to_save=["head"])
    x = torch.randn(3, 8)
    report = export_onnx(module, tmp_path, (x,), tmp_path / "m.onnx")
    assert not [row for row in report.plan.rows if DROPPED in row.reason]
    with torch.no_grad():
        got = tiny.run(tmp_path / "m.onnx", {"x": x.numpy()})
        assert tiny.relative_error(got, model(x).numpy()) < 2e-6


HEAD = """<ir_version: 10, opset_import: ["" : 20]>
g (float[B, 4] x) => (float[B, 3] y)
<float[4, 3] "head.weight" = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, float[3] other = {1, 2, 3}> {
  BODY
}"""


def graph(path, body):
    model = ir.from_onnx_text(HEAD.replace("BODY", body))
    for node in model.graph:
        if node.op_type == "MatMul":
            node.name = "/head/MatMul"
    ir.save(model, path)
    return path


def replacement():
    values = {"head.weight": np.ones((3, 4), np.float32), "head.bias": np.arange(3, dtype=np.float32)}
    return Adapter("head", "head", "peft", {}, extras=values, tensor_names=tuple(values))


def test_a_graph_output_keeps_its_name(tmp_path):
    base = graph(tmp_path / "b.onnx", 'h = MatMul (x, "head.weight")\n  y = Identity (h)')
    merge_onnx(base, replacement(), tmp_path / "m.onnx")
    x = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)
    wanted = x.astype(np.float64) @ np.ones((4, 3)) + np.arange(3)
    assert tiny.relative_error(tiny.run(tmp_path / "m.onnx", {"x": x}), wanted) < 1e-6


def test_the_product_itself_is_the_output(tmp_path):
    base = graph(tmp_path / "b.onnx", 'y = MatMul (x, "head.weight")')
    merge_onnx(base, replacement(), tmp_path / "m.onnx")
    assert [value.name for value in ir.load(tmp_path / "m.onnx").graph.outputs] == ["y"]
    x = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)
    wanted = x.astype(np.float64) @ np.ones((4, 3)) + np.arange(3)
    assert tiny.relative_error(tiny.run(tmp_path / "m.onnx", {"x": x}), wanted) < 1e-6


@pytest.mark.parametrize(
    "body",
    [
        'h = MatMul (x, "head.weight")\n  y = Add (h, other)',
        'y = Gemm <alpha = 0.5> (x, "head.weight")',
        'y = Gemm (x, "head.weight", other)',
    ],
    ids=["another vector is added", "the product is scaled", "there is a bias of another name"],
)
def test_no_second_bias_where_there_may_be_one(body, tmp_path):
    base = graph(tmp_path / "b.onnx", body)
    with pytest.raises(SiteError, match=r"head\.bias"):
        merge_onnx(base, replacement(), tmp_path / "m.onnx")
    assert not list(tmp_path.glob("m.*"))
