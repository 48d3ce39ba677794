"""MatMulNBits as DequantizeLinear and MatMul: the same numbers, in a graph that the compiler builds."""

from __future__ import annotations

import logging
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import rtx_compiler
import tiny
from exposed_models import group, tensors
from rtx_compiler import INSTALLED
from small_graphs import graph, random, save

from lora_export import swap_onnx
from lora_export.engines.prepare import lower_nbits
from lora_export.engines.prepare.opset import opset_of, raise_opset
from lora_export.engines.prepare.prepare import admit
from lora_export.errors import EngineBuildError
from lora_export.graph.onnx_file import GraphFile, load_graph, save_graph
from lora_export.sites.node_text import find_node, module_of

HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
N, K = 32, 128


class Weight:
    """A weight quantised at random, packed as ONNX Runtime's ``ContribOperators.md`` says it."""

    def __init__(self, bits=4, block=32, n=N, k=K, dtype=np.float32, seed=0):
        self.bits, self.block, self.n, self.k = bits, block, n, k
        self.blocks = -(-k // block)
        generator = np.random.default_rng(seed)
        self.codes = generator.integers(0, 2**bits, (n, self.blocks * block)).astype(np.uint8)
        self.scales = (0.1 + generator.random((n, self.blocks))).astype(dtype)

    @property
    def packed(self):
        codes = self.codes
        if self.bits == 4:
            codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
        return codes.reshape(self.n, self.blocks, -1)

    @property
    def attributes(self):
        return f"bits={self.bits}, block_size={self.block}, K={self.k}, N={self.n}"

    def values(self):
        """Return ``(N, K)``, rounded as DequantizeLinear and MatMulNBits do: once, in the scales' type."""
        wide = self.codes.astype(np.float64) - 2 ** (self.bits - 1)
        scaled = wide * np.repeat(self.scales.astype(np.float64), self.block, axis=1)
        return scaled[:, : self.k].astype(self.scales.dtype)


def one(weight, folder, more="", arguments="", weights=None, kind="float", attributes=""):
    """Save a graph of one MatMulNBits."""
    text = (
        f"g ({kind}[b,{weight.k}] x) => ({kind}[b,{weight.n}] y) "
        f"{{ [n] y = com.microsoft.MatMulNBits<{weight.attributes}{attributes}>(x, w, s{arguments}) {more} }}"
    )
    scales = ir.tensor(weight.scales, name="s")
    made = graph(text, {"w": weight.packed, "s": scales} | (weights or {}), head=HEAD)
    return save(made, folder, "model.onnx")


def lowered(path: Path, *capabilities: str):
    """Admit a graph; return its file and the notes."""
    admitted = admit(load_graph(path), {"tensorrt-rtx": capabilities or ("8.9",)})
    assert admitted.notes
    out = path.with_name("lowered.onnx")
    save_graph(admitted.graph.model, out)
    onnx.checker.check_model(str(out))
    left = {node.op_type for node in admitted.graph.model.graph.all_nodes()}
    assert "MatMulNBits" not in left
    return out, admitted.notes


def run(path: Path, **feeds):
    """Run as the graph says: optimised, it would become MatMulNBits again, with activations of 8 bits."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def refused(path: Path, *capabilities: str) -> EngineBuildError:
    with pytest.raises(EngineBuildError) as caught:
        admit(load_graph(path), {"tensorrt-rtx": capabilities or ("8.9",)})
    return caught.value


SHAPES = [
    *(
        pytest.param(bits, block, N, K, id=f"{bits} bits, blocks of {block}")
        for bits in (4, 8)
        for block in (16, 32, 64, 128)
    ),
    pytest.param(4, 32, 33, 64, id="4 bits, odd N"),
    pytest.param(8, 32, 33, 64, id="8 bits, odd N"),
    pytest.param(4, 32, N, 72, id="4 bits, padded K"),
    pytest.param(4, 32, 7, 33, id="4 bits, odd everything"),
    pytest.param(8, 32, N, 72, id="8 bits, padded K"),
]


@pytest.mark.parametrize(("bits", "block", "n", "k"), SHAPES)
def test_the_weight_is_the_same_to_the_bit(bits, block, n, k, tmp_path):
    """Rows of the identity choose the weight's columns; the compiler builds it."""
    weight = Weight(bits, block, n, k)
    path = one(weight, tmp_path)
    out, _ = lowered(path)
    np.testing.assert_array_equal(run(out, x=np.eye(k, dtype=np.float32)), weight.values().T)
    x = random(3, k)
    assert tiny.relative_error(run(out, x=x), run(path, x=x)) < 1e-6
    if INSTALLED:
        assert not rtx_compiler.refusal(out)


@pytest.mark.parametrize(("kind", "dtype"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)])
@pytest.mark.parametrize("bits", [4, 8])
def test_types_of_scales(bits, kind, dtype, tmp_path):
    weight = Weight(bits, dtype=dtype)
    out, _ = lowered(one(weight, tmp_path, kind=kind))
    model = load_graph(out).model
    assert {str(value.dtype.name).lower() for node in model.graph for value in node.outputs} == {kind}
    if kind == "float16":
        np.testing.assert_array_equal(run(out, x=np.eye(K, dtype=dtype)), weight.values().T)
    if INSTALLED:
        assert not rtx_compiler.refusal(out)


def test_of_turing(tmp_path):
    """4-bit codes exist from compute capability 8.0 on, 8-bit ones on Turing too, products in float16."""
    error = refused(one(Weight(dtype=np.float16), tmp_path, kind="float16"), "7.5", "8.9")
    assert error.problems == (
        "node 'n' (com.microsoft.MatMulNBits): int4 needs compute capability 8.0, but a target has 7.5",
    )
    assert "8 bits" in error.hint
    out, _ = lowered(one(Weight(8, dtype=np.float16), tmp_path, kind="float16"), "7.5", "8.9")
    if INSTALLED:
        assert not rtx_compiler.refusal(out, "7.5", "8.9")
    assert "float32 matrices" in str(refused(one(Weight(8), tmp_path), "7.5"))


def packed_zeros(weight, value):
    zeros = np.full((weight.n, weight.blocks + weight.blocks % 2), value, np.uint8)
    zeros[:, weight.blocks :] = 3  # padding says nothing
    return zeros[:, 0::2] | (zeros[:, 1::2] << 4)


@pytest.mark.parametrize("k", [128, 96])
def test_zero_points_that_are_the_middle(k, tmp_path):
    weight = Weight(k=k)
    out, _ = lowered(one(weight, tmp_path, arguments=", z", weights={"z": packed_zeros(weight, 8)}))
    np.testing.assert_array_equal(run(out, x=np.eye(k, dtype=np.float32)), weight.values().T)
    floats = {"z": np.full((N, weight.blocks), 8, np.float32)}
    out, _ = lowered(one(weight, tmp_path, arguments=", z", weights=floats))
    bytes_ = {"z": np.full((N, weight.blocks), 128, np.uint8)}
    out, _ = lowered(one(Weight(8, k=k), tmp_path, arguments=", z", weights=bytes_))
    assert {str(name) for name in load_graph(out).graph.initializers} == {
        "n.lora_export.weight_int8",
        "n.lora_export.scales",
    }


@pytest.mark.parametrize("bits", [4, 8])
def test_negative_scales_and_blocks_of_zeros(bits, tmp_path):
    """ONNX Runtime's own quantiser writes them; TensorRT takes them with 4 bits only."""
    weight = Weight(bits, k=72)
    weight.scales[::2] *= -1
    weight.scales[:, 1] = 0
    out, _ = lowered(one(weight, tmp_path))
    np.testing.assert_array_equal(run(out, x=np.eye(72, dtype=np.float32)), weight.values().T)
    assert any(node.op_type == "Mul" for node in load_graph(out).graph) is (bits == 8)
    if INSTALLED:
        assert not rtx_compiler.refusal(out)


def test_bias_and_names(tmp_path):
    """The product keeps its node's name and output; the compiler's messages lead back to it."""
    weight, bias = Weight(), random(N)
    path = one(weight, tmp_path, arguments=",,, c", weights={"c": bias}, more="[r] u = Relu(y)")
    out, notes = lowered(path)
    assert notes == ("1 MatMulNBits of 4 bits are DequantizeLinear (int4) and MatMul now",)
    found = load_graph(out)
    node = find_node(found, "n")
    assert node is not None
    assert node.op_type == "Add"
    assert node.outputs[0].name == "y"
    assert {value.name for value in found.graph.initializers.values()} == {
        *("n.lora_export.weight_int4", "n.lora_export.scales", "c")
    }
    x = random(3, K)
    assert tiny.relative_error(run(out, x=x), run(path, x=x)) < 1e-6


def test_the_engine_does_not_round_activations(tmp_path):
    _, notes = lowered(one(Weight(), tmp_path, attributes=", accuracy_level=4"))
    assert "1 of them let ONNX Runtime round activations to 8 bits" in notes[1]


def test_a_weight_that_two_products_share_is_made_once(tmp_path):
    weight = Weight(n=K)
    again = f"[m] u = com.microsoft.MatMulNBits<{weight.attributes}>(y, w, s) [a] v = Add(u, y)"
    path = one(weight, tmp_path, more=again)
    found = load_graph(path)
    found.graph.outputs[0] = next(node for node in found.graph if node.name == "a").outputs[0]
    found.graph.outputs[0].dtype, found.graph.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(["b", K])
    save_graph(found.model, path)
    out, notes = lowered(path)
    assert "2 MatMulNBits" in notes[0]
    assert sum(node.op_type == "DequantizeLinear" for node in load_graph(out).graph) == 1
    x = random(3, K)
    assert tiny.relative_error(run(out, x=x), run(path, x=x)) < 1e-6


@pytest.mark.parametrize("opset", [17, 21])
def test_in_a_subgraph(opset, tmp_path):
    weight = Weight()
    call = f"com.microsoft.MatMulNBits<{weight.attributes}>"
    text = (
        f"g (float[b,{K}] x, bool c) => (float[b,{N}] y) {{ [i] y = If(c) <"
        f"then_branch = t () => (float[b,{N}] p) {{ [n] p = {call}(x, w, s) }}, "
        f"else_branch = e () => (float[b,{N}] q) {{ [m] r = {call}(x, w, s) [o] q = Neg(r) }}> }}"
    )
    weights, head = {"w": weight.packed, "s": weight.scales}, HEAD.replace("21", str(opset))
    path = save(graph(text, weights, head=head), tmp_path, "model.onnx")
    out, _ = lowered(path)
    for choice in (True, False):
        feeds = {"x": random(3, K), "c": np.array(choice)}
        assert tiny.relative_error(run(out, **feeds), run(path, **feeds)) < 1e-6
    assert not {"w", "s"} & set(load_graph(out).graph.initializers)
    if INSTALLED:
        assert not rtx_compiler.refusal(out)


# --- what is refused ---------------------------------------------------------------------------------


def asymmetric(weight):
    return {"arguments": ", z", "weights": {"z": packed_zeros(weight, 7)}}


def with_input(dtype):
    return lambda weight: {"arguments": ", u", "more": f"[k] u = Cast<to={dtype}>(x)"}


REFUSED = {
    "asymmetric": ({}, asymmetric, "asymmetric (its zero points are not all 8)"),
    "2 bits": ({"bits": 2}, lambda w: {}, "it has 2 bits"),
    "blocks": (
        {"block": 256, "k": 256},
        lambda w: {},
        "its block size is 256, wanted one of 16, 32, 64, 128",
    ),
    "order": ({}, lambda w: {"arguments": ",, o", "weights": {"o": np.arange(K, dtype=np.int32)}}, "(g_idx)"),
    "prepacked": ({}, lambda w: {"attributes": ", weight_prepacked=1"}, "packed for one processor"),
    "attribute": ({}, lambda w: {"attributes": ", mystery=1"}, "the unknown attribute mystery"),
    "scales": ({}, lambda w: {"weights": {"s": np.ones(3, np.float32)}}, "its scales are float (3,)"),
    "weight": (
        {},
        lambda w: {"weights": {"w": np.ones((0, 4, 16), np.uint8)}},
        "its weight is uint8 (0, 4, 16)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_is_not_for(case, tmp_path):
    options, more, reason = REFUSED[case]
    weight = Weight(**options)
    (problem,) = (error := refused(one(weight, tmp_path, **more(weight)))).problems
    assert problem.startswith("node 'n' (com.microsoft.MatMulNBits): ")
    assert reason in problem
    assert "quantise it again" in error.hint


@pytest.mark.parametrize(("name", "reason"), [("w", "its weight or its scales"), ("z", "its zero points")])
def test_computed_constants(name, reason, tmp_path):
    weight = Weight()
    path = one(weight, tmp_path, arguments=", z", weights={"z": packed_zeros(weight, 8)})
    found = load_graph(path)
    value = found.graph.initializers.pop(name)
    value.const_value = None
    found.graph.inputs.append(value)
    save_graph(found.model, path)
    assert f"{reason} are computed" in refused(path).problems[0]


def test_more_than_a_protobuf_holds(tmp_path, monkeypatch):
    weight = Weight()
    path = one(weight, tmp_path)
    monkeypatch.setattr(lower_nbits, "LIMIT_BYTES", N * K // 2)
    lowered(path)
    monkeypatch.setattr(lower_nbits, "LIMIT_BYTES", N * K // 2 - 1)
    assert f"its weights take {N * K // 2} bytes" in refused(path).problems[0]


# --- whole models, and their opset -------------------------------------------------------------------


def quantised(path: Path, folder: Path, bits: int = 4) -> Path:
    """Quantise a graph's products with ONNX Runtime's own tool, symmetrically; float32 inside."""
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    config = DefaultWeightOnlyQuantConfig(block_size=16, is_symmetric=True, accuracy_level=1, bits=bits)
    previous, logging.root.manager.disable = logging.root.manager.disable, logging.INFO
    with tiny.quiet():
        quantizer = MatMulNBitsQuantizer(onnx.load(path), algo_config=config)
        quantizer.process()
    logging.root.manager.disable = previous
    folder.mkdir(exist_ok=True)
    out = folder / "quantised.onnx"
    onnx.save(quantizer.model.model, out)
    return out


CASES = [
    *((arch, exporter, 4) for arch in ("llama", "bert") for exporter in ("dynamo", "torchscript")),
    ("t5", "torchscript", 8),
]


@pytest.mark.parametrize(
    ("arch", "exporter", "bits"),
    [pytest.param(*c, marks=group(c[0]), id=f"{c[0]}-{c[1]}-{c[2]}") for c in CASES],
)
def test_a_model_computes_the_same(arch, exporter, bits, tmp_path):
    """Also with its opset raised (17 → 21 changes ReduceMean, 20 → 21 nothing)."""
    path = quantised(tiny.base_onnx(arch, exporter), tmp_path, bits)
    before = load_graph(path)
    out, notes = lowered(path)
    assert notes[0] == f"opset {opset_of(before.model)} was raised to 21"
    assert f"MatMulNBits of {bits} bits" in notes[1]
    feeds = tiny.feeds(arch, path)
    assert tiny.relative_error(run(out, **feeds), run(path, **feeds)) < 1e-5
    if INSTALLED:
        assert not rtx_compiler.refusal(out)


@group("llama")
def test_lora_stays_beside_quantised_weights(tmp_path):
    """Quantise, expose, admit: the branches are where they were, and adapters work."""
    base = quantised(tiny.base_onnx("llama", "torchscript"), tmp_path)
    path, adapter = tmp_path / "swap.onnx", tiny.adapter("llama")
    report = swap_onnx(base, path, adapter=adapter)
    out, notes = lowered(path)
    assert notes[0].startswith(f"{len(report.exposed.tensor_names())} LoRA tensors are plain inputs")
    feeds = tiny.feeds("llama", path) | tensors(path, adapter)
    assert tiny.relative_error(run(out, **feeds), run(path, **feeds)) < 1e-5
    assert tiny.relative_error(run(path, **tiny.feeds("llama", path)), run(path, **feeds)) > 0.1
    found = load_graph(out)
    ours = [node for node in found.graph if ".lora." in (node.name or "")]
    assert {module_of(node) for node in ours} == {module.name for module in report.exposed.modules}
    if INSTALLED:
        assert set(report.exposed.tensor_names()) <= rtx_compiler.engine_inputs(out)


@group("llama")
def test_raising_the_opset_keeps_everything_else(tmp_path):
    """The same nodes, names, modules, shapes; weights are where they were."""
    found, again = (load_graph(tiny.base_onnx("llama", "dynamo")) for _ in range(2))
    found.model.metadata_props["who"] = again.model.metadata_props["who"] = "me"
    assert raise_opset(found, 21) == ""
    assert opset_of(found.model) == 21
    assert dict(found.model.metadata_props) == dict(again.model.metadata_props)
    for new, old in zip(found.graph, again.graph, strict=True):
        assert (new.name, new.op_type, new.domain) == (old.name, old.op_type, old.domain)
        assert dict(new.metadata_props) == dict(old.metadata_props)
        assert module_of(new) == module_of(old)
        assert [(o.name, o.dtype, o.shape) for o in new.outputs] == [
            (o.name, o.dtype, o.shape) for o in old.outputs
        ]
    assert [str(value) for value in found.graph.inputs] == [str(value) for value in again.graph.inputs]
    assert [value.name for value in found.graph.outputs] == [value.name for value in again.graph.outputs]
    assert list(found.graph.initializers) == list(again.graph.initializers)
    for name, value in again.graph.initializers.items():
        other = found.graph.initializers[name]
        assert type(other.const_value) is type(value.const_value)
        assert dict(other.metadata_props) == dict(value.metadata_props)
        if isinstance(value.const_value, ir.ExternalTensor):
            assert other.const_value.offset == value.const_value.offset


OLD = {
    "Resize": (10, "float[1,1,4,4] i", "o = Resize(i, f)", "it is older than 13"),
    "GroupNormalization": (
        18,
        "float[1,4,2,2] i, float[2] k",
        "o = GroupNormalization<num_groups=2>(i, k, k)",
        "GroupNormalization means something else there",
    ),
}


@pytest.mark.parametrize("operator", OLD)
def test_an_opset_that_cannot_be_raised(operator, tmp_path):
    """ONNX's converter changes the meaning of these without a word."""
    opset, inputs, call, reason = OLD[operator]
    weight = Weight()
    text = (
        f"g ({inputs}, float[b,{K}] x) => (float[a,b,c,d] o, float[b,{N}] y) "
        f"{{ {call} [n] y = com.microsoft.MatMulNBits<{weight.attributes}>(x, w, s) }}"
    )
    weights = {"w": weight.packed, "s": weight.scales, "f": np.array([1, 1, 2, 2], np.float32)}
    made = graph(text, weights, head=HEAD.replace('"" : 21', f'"" : {opset}'))
    error = refused(save(made, tmp_path, "model.onnx"))
    assert error.problems[0].startswith(f"opset {opset} can't be raised to 21: {reason}")
    assert error.hint == "export with opset 21 or newer"


def test_what_the_converter_refuses(tmp_path):
    """Such as an operator of a domain that the file does not import; the graph stays as it was."""
    text = "g (float[2,3] x) => (float[2,3] y) { y = com.unknown.Copy(x) }"
    found = GraphFile(graph(text, {}), tmp_path / "m.onnx")
    before = found.model
    assert raise_opset(found, 21).startswith("opset 20 can't be raised to 21: ")
    assert found.model is before


def test_a_newer_opset_stays(tmp_path):
    made = ir.load(one(Weight(), tmp_path))
    made.opset_imports[""], made.ir_version = 23, 8
    found = GraphFile(made, tmp_path / "model.onnx")
    assert raise_opset(found, 21) == ""
    assert opset_of(found.model) == 23
    assert found.model.ir_version == 10
