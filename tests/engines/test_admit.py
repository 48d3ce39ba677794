"""What becomes of a graph before a TensorRT parser sees it; the compiler is the judge of each verdict."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import rtx_compiler
import tiny
from exposed_models import group
from rtx_compiler import INSTALLED
from small_graphs import graph, random, save

from lora_export import bank_onnx, swap_onnx
from lora_export.engines.prepare.dtypes import NEEDS, TAKEN
from lora_export.engines.prepare.operators import ABSENT
from lora_export.engines.prepare.prepare import admit
from lora_export.errors import EngineBuildError
from lora_export.graph.exposed import KEY, WEIGHTS_INPUT, ExposedModule, LoraRecord, Member, lora_record_of
from lora_export.graph.onnx_file import load_graph, save_graph
from lora_export.sites.node_text import find_node, module_of, node_text

needs_compiler = pytest.mark.skipif(not INSTALLED, reason="tensorrt-rtx-cu13 is not installed")
HEAD = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1, "my.domain" : 1]>'
D = ir.DataType


def model(text, weights=(), folder=None, head=HEAD, **more):
    """Save a graph of ONNX text; return its path."""
    return save(graph(text, dict(weights), head=head, **more), folder, "model.onnx")


def verdict(path: Path, *capabilities: str, backend: str = "tensorrt-rtx"):
    """Return what was admitted, or the error."""
    try:
        return admit(load_graph(path), {backend: capabilities or ("8.9",)})
    except EngineBuildError as error:
        return error


def refused(path: Path, *capabilities: str, backend: str = "tensorrt-rtx") -> EngineBuildError:
    found = verdict(path, *capabilities, backend=backend)
    assert isinstance(found, EngineBuildError)
    assert found.hint
    assert found.message.startswith("model.onnx can't be built by TensorRT")
    return found


def given(path: Path, *capabilities: str) -> Path:
    """Admit a graph and write what the compiler would get, beside the original file."""
    admitted = admit(load_graph(path), {"tensorrt-rtx": capabilities or ("8.9",)})
    out = path.with_name("given.onnx")
    save_graph(admitted.graph.model, out)
    return out


# --- inputs with a default ---------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize(
    ("arch", "options"),
    [
        pytest.param("llama", {}, marks=group("llama")),
        pytest.param("bert", {"pack": True}, marks=group("bert")),
        pytest.param("gpt2", {"dora": True}, marks=group("gpt2")),
    ],
)
def test_lora_tensors_with_a_default_become_plain_inputs(arch, options, tmp_path):
    """The engine takes every one of them; of the file as it is none, and is the base without an error."""
    path = tmp_path / "m.onnx"
    report = swap_onnx(tiny.base_onnx(arch, "dynamo"), path, adapter=tiny.adapter(arch), **options)
    wanted = set(report.exposed.tensor_names())
    before = path.read_bytes()
    admitted = admit(load_graph(path), {"tensorrt-rtx": ["8.9"]})
    assert path.read_bytes() == before
    assert admitted.notes
    assert admitted.graph.path == path
    assert any(f"{len(wanted)} LoRA tensors" in note for note in admitted.notes)
    assert admitted.exposed is not None
    assert admitted.exposed.flavour == "tensorrt"
    assert lora_record_of(admitted.graph.model.metadata_props, "it") == admitted.exposed
    assert wanted <= rtx_compiler.engine_inputs(given(path))
    assert not wanted & rtx_compiler.engine_inputs(path)


@group("llama")
def test_it_is_what_swap_onnx_would_have_written(tmp_path):
    made = {}
    for flavour in ("ort", "tensorrt"):
        path = tmp_path / flavour / "m.onnx"
        path.parent.mkdir()
        base = tiny.base_onnx("llama", "dynamo")
        swap_onnx(base, path, adapter=tiny.adapter("llama"), flavour=flavour)
        made[flavour] = admit(load_graph(path), {"tensorrt-rtx": ["8.9"]})
    texts = [ir.to_proto(found.graph.model).SerializeToString(deterministic=True) for found in made.values()]
    assert texts[0] == texts[1]
    assert not made["tensorrt"].notes


@group("llama")
@pytest.mark.parametrize("resident", ["initializers", "inputs"])
def test_a_bank_gets_the_batchs_dimension(resident, tmp_path):
    path = tmp_path / "m.onnx"
    report = bank_onnx(
        tiny.base_onnx("llama", "dynamo"), {"a": tiny.adapter("llama")}, path, resident=resident
    )
    admitted = admit(load_graph(path), {"tensorrt-rtx": ["8.9"]})
    inputs = {str(value.name): value for value in admitted.graph.graph.inputs}
    assert str(inputs[WEIGHTS_INPUT].shape[0]) == str(inputs["input_ids"].shape[0])
    assert not [node for node in admitted.graph.graph if node.name == "lora.weights_of_batch.Split"]
    onnx.checker.check_model(str(given(path)))
    if resident == "inputs":
        assert not any(inputs[name].is_initializer() for name in report.exposed.tensor_names())
        assert any("load a into it" in note for note in admitted.notes)
    if INSTALLED:
        wanted = set(report.exposed.tensor_names()) if resident == "inputs" else set()
        assert wanted | {WEIGHTS_INPUT} <= rtx_compiler.engine_inputs(given(path))


@group("conv")
def test_a_convolution_needs_its_rank(tmp_path):
    base, checkpoint = tiny.base_onnx("conv", "dynamo"), tiny.checkpoint("conv")
    path = tmp_path / "model.onnx"
    options = {"adapter": tiny.adapter("conv"), "checkpoint": checkpoint}
    swap_onnx(base, path, **options)
    error = refused(path)
    assert "module conv: TensorRT can't build a convolution" in error.problems[0]
    assert "--flavour tensorrt --adapter" in error.hint
    assert not any("default" in problem for problem in error.problems)
    swap_onnx(base, path, flavour="tensorrt", force=True, **options)
    assert not verdict(path).notes


@group("llama")
def test_a_record_that_the_graph_does_not_keep(tmp_path):
    """Some tool has folded the LoRA inputs away: the engine would be the base."""
    path = tmp_path / "model.onnx"
    swap_onnx(tiny.base_onnx("llama", "dynamo"), path, adapter=tiny.adapter("llama"))
    found = load_graph(path)
    for value in list(found.graph.inputs):
        if value.is_initializer():
            found.graph.inputs.remove(value)
    save_graph(found.model, path)
    error = refused(path)
    assert "'model.layers.0.mlp.down_proj.lora_A.weight': the graph's LoRA record names it" in str(error)
    assert "… and 25 more" in error.problems[-1]


def test_a_float64_module_is_float32_in_the_engine(tmp_path):
    path = model(
        "g (double[b,4] x, double[4,r] w_lora_A_weight, double[r,3] w_lora_B_weight) => (double[b,3] y) "
        "{ [d] t = MatMul(x, w_lora_A_weight) [u] y = MatMul(t, w_lora_B_weight) }",
        folder=tmp_path,
    )
    found = load_graph(path)
    for value in list(found.graph.inputs)[1:]:
        value.name = str(value.name).replace("_lora_", ".lora_").replace("_weight", ".weight")
    module = ExposedModule(
        name="w",
        kind="linear",
        in_dim=4,
        out_dim=3,
        dtype="float64",
        members=(Member(path="w", start=0, out_dim=3),),
    )
    found.model.metadata_props[KEY] = LoraRecord(
        mode="swap", base="b", base_sha256="0", modules=(module,), max_rank=8, flavour="tensorrt"
    ).to_json()
    admitted = admit(found, {"tensorrt-rtx": ["8.9"]})
    assert admitted.exposed is not None
    assert admitted.exposed.modules[0].dtype == "float32"
    (note,) = admitted.notes
    assert "takes and gives float32 for x, w.lora_A.weight, w.lora_B.weight, y" in note


DEFAULT = "g (float[b,2] x, float[2] w) => (float[b,2] y) { [n] y = Add(x, w) }"


def test_another_default_is_asked_about(tmp_path):
    path = model(DEFAULT, {"w": random(2)}, tmp_path)
    error = refused(path)
    assert error.problems == ("input 'w': TensorRT would build its default in as a constant",)
    assert "swap-onnx" in error.hint
    assert "remove the initializers" in error.hint
    if INSTALLED:  # the trap: it is built, and `w` can't be fed
        assert rtx_compiler.engine_inputs(path) == {"x"}


def test_an_old_file_lists_its_weights_as_inputs(tmp_path):
    old = '<ir_version: 3, opset_import: ["" : 9]>'
    path = model(DEFAULT, {"w": random(2)}, tmp_path, head=old)
    admitted = verdict(path)
    assert [value.name for value in admitted.graph.graph.inputs] == ["x"]
    assert admitted.notes == ("1 weights that an old file format lists as inputs are constants",)
    onnx.checker.check_model(ir.to_proto(admitted.graph.model))


@pytest.mark.parametrize(
    ("name", "shape"), [("q_LoRA_A", (2,)), ("empty", (0,))], ids=["named lora", "of rank 0"]
)
def test_an_old_file_with_an_adapters_default(name, shape, tmp_path):
    old = '<ir_version: 3, opset_import: ["" : 9]>'
    inputs = f"float[b,2] x, float[{shape[0]}] {name}"
    text = f"g ({inputs}) => (float[b,n] y) {{ [n] y = Concat<axis=1>(x, {name}) }}"
    error = refused(model(text, {name: random(*shape)}, tmp_path, head=old))
    assert f"input '{name}': it looks like an adapter's" in error.problems[0]


# --- outputs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [[1] * 9, [1, -5]], ids=["nine axes", "a size below 0"])
def test_a_shape_that_no_engine_has(shape, tmp_path):
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    given = helper.make_tensor_value_info("x", kind, shape)
    whole = helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)
    made = helper.make_graph([whole], "g", [given], [helper.make_tensor_value_info("y", kind, [])])
    opset = helper.make_opsetid("", 18)
    onnx.save(helper.make_model(made, opset_imports=[opset], ir_version=10), tmp_path / "model.onnx")
    assert "input 'x': TensorRT takes at most 8 axes" in refused(tmp_path / "model.onnx").problems[0]


def test_an_output_that_is_an_input(tmp_path):
    path = model("g (float[b,2] x) => (float[b,2] y, float[b,2] x) { [n] y = Add(x, x) }", folder=tmp_path)
    assert "output 'x': it is an input as well" in refused(path).problems[0]
    if INSTALLED:  # the trap: the engine's input has another name
        assert rtx_compiler.engine_inputs(path) == {"__x"}


# --- operators ---------------------------------------------------------------------------------------


@needs_compiler
def test_the_list_of_operators_is_the_parsers_own():
    names = sorted(schema.name for schema in onnx.defs.get_all_schemas() if schema.domain in ("", "ai.onnx"))
    script = (
        "import tensorrt_rtx as t; l = t.Logger(t.Logger.ERROR); b = t.Builder(l); n = b.create_network(0)\n"
        f"p = t.OnnxParser(n, l); print(*(x for x in {names!r} if not p.supports_operator(x)))"
    )
    assert set(rtx_compiler.ask(script).split()) == ABSENT & set(names)


ROWS = "float16[b,s,64] "
OWN = [
    ("Gelu", ROWS + "x", "x", ""),
    ("SimplifiedLayerNormalization", ROWS + "x, float16[64] w", "x, w", "<axis=-1, epsilon=1e-5>"),
    ("SkipSimplifiedLayerNormalization", f"{ROWS}x, {ROWS}k, float16[64] w", "x, k, w", "<epsilon=1e-5>"),
    ("MultiHeadAttention", f"{ROWS}q, {ROWS}k, {ROWS}v", "q, k, v", "<num_heads=4>"),
]


@pytest.mark.parametrize(("operator", "inputs", "arguments", "attributes"), OWN, ids=[o[0] for o in OWN])
def test_operators_that_mean_the_same(operator, inputs, arguments, attributes, tmp_path):
    text = f"g ({inputs}) => ({ROWS}y) {{ [n] y = com.microsoft.{operator} {attributes} ({arguments}) }}"
    path = model(text, folder=tmp_path)
    admitted = verdict(path)
    assert not admitted.notes
    if INSTALLED:
        assert not rtx_compiler.refusal(path)
    assert (
        "ONNX Runtime's own operator, which TensorRT does not have"
        in refused(path, backend="tensorrt").problems[0]
    )


FOREIGN = {
    # The parser looks at the name alone, and builds these three as something else.
    "another Relu": ("my.domain.Relu(x)", "", True, "domain 'my.domain'"),
    "ORT's Attention": (
        "com.microsoft.Attention<num_heads=4, q_num_heads=4, kv_num_heads=4>(x, k, v)",
        f", {ROWS}k, {ROWS}v",
        True,
        "ONNX Runtime's own operator, which TensorRT-RTX does not have",
    ),
    "ORT's RotaryEmbedding": (
        "com.microsoft.RotaryEmbedding<num_heads=4>(x, p, c, c)",
        ", int64[b,s] p, float16[128,8] c",
        True,
        "ONNX Runtime's own operator, which TensorRT-RTX does not have",
    ),
    "fused": (
        "com.microsoft.FastGelu(x)",
        "",
        False,
        "ONNX Runtime's own operator, which TensorRT-RTX does not have",
    ),
    "unknown": ("Relux(x)", "", False, "has no such operator"),
    "absent": ("Det(x)", "", False, "has no such operator"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_operators_of_other_domains(case, tmp_path):
    call, more, compiles, reason = FOREIGN[case]
    path = model(f"g ({ROWS}x{more}) => ({ROWS}y) {{ [n] y = {call} }}", folder=tmp_path)
    assert reason in refused_lines(path)
    if INSTALLED:
        assert bool(rtx_compiler.refusal(path)) is not compiles


def refused_lines(path: Path, *capabilities: str) -> str:
    found = verdict(path, *capabilities)
    assert isinstance(found, EngineBuildError)
    return "\n".join(found.problems)


@group("llama")
def test_genais_graph_is_refused_by_name(tmp_path):
    error = refused(tiny.base_onnx("llama", "genai"))
    (first, second) = error.problems
    assert first.startswith(
        "node '/model/layers.0/attn/GroupQueryAttention' (com.microsoft.GroupQueryAttention)"
    )
    assert "module model.layers.0.attn: ONNX Runtime's own" in first
    assert "model.layers.1.attn" in second
    assert "capture-onnx HF_FOLDER --kv-cache" in error.hint


@group("llama")
def test_genais_quantised_weights_are_no_problem(tmp_path):
    """Of its int4 graph only the attention is in the way (and K = 48 is no multiple of the block of 32)."""
    from onnxruntime_genai.models import builder

    source, cache = str(tiny.checkpoint("llama")), str(tmp_path / "cache")
    options = builder.parse_extra_options(None, source, str(tmp_path), "int4", "cpu", cache, [])
    with tiny.quiet():
        builder.create_model(None, source, str(tmp_path), "int4", "cpu", cache, **options)
    assert any(node.op_type == "MatMulNBits" for node in load_graph(tmp_path / "model.onnx").graph)
    error = refused(tmp_path / "model.onnx")
    assert all("GroupQueryAttention" in line for line in error.problems)


@group("bert")
def test_fused_and_dynamically_quantised_graphs(tmp_path):
    """All that is wrong at once, each kind with its first nodes and a number, each hint once."""
    from onnxruntime.quantization import quantize_dynamic

    path = tmp_path / "model.onnx"
    with tiny.quiet():
        quantize_dynamic(tiny.base_onnx("bert", "torchscript"), path)
    error = refused(path)
    kinds = {line.partition("(")[2].partition(")")[0] for line in error.problems if "(" in line}
    assert {"DynamicQuantizeLinear", "MatMulInteger"} <= kinds
    assert sum("… and" in line for line in error.problems) == 2
    assert error.hint.count("own kernels") == 1


# --- types -------------------------------------------------------------------------------------------

CODES = np.arange(64 * 32).reshape(64, 32) % 7
CAPABILITIES = ("7.5", "8.0", "8.9", "12.0")


def weight_of(dtype: ir.DataType, folder: Path) -> Path:
    """A product with a weight of this type before DequantizeLinear."""
    codes = ir.tensor(CODES.astype(dtype.numpy()), dtype=dtype, name="w")
    text = (
        "g (float16[b,64] x) => (float16[b,32] y) "
        "{ [d] v = DequantizeLinear<axis=0, block_size=16>(w, s) [m] y = MatMul(x, v) }"
    )
    return model(text, {"w": codes, "s": np.full((4, 32), 0.1, np.float16)}, folder)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [D.INT8, *(d for d in NEEDS if d is not D.BFLOAT16)], ids=lambda d: d.name)
def test_types_of_weights(dtype, capability, tmp_path):
    path = weight_of(dtype, tmp_path)
    found = verdict(path, capability)
    if isinstance(found, EngineBuildError):
        assert f"constant 'w': {dtype.name.lower()} needs compute capability" in found.problems[0]
    if INSTALLED:
        assert isinstance(found, EngineBuildError) is bool(rtx_compiler.refusal(path, capability))


def converted(dtype: ir.DataType, folder: Path) -> Path:
    """A graph with an input of this type."""
    text = f"g (float[b,4] x) => (float[b,4] y) {{ [n] y = Cast<to={D.FLOAT.value}>(x) }}"
    made = graph(text, {}, head=HEAD)
    made.graph.inputs[0].dtype = dtype
    return save(made, folder, "model.onnx")


@pytest.mark.parametrize("dtype", [d for d in D if d not in (D.UNDEFINED, D.FLOAT6E2M3, D.FLOAT6E3M2)])
def test_types_of_inputs(dtype, tmp_path):
    path = converted(dtype, tmp_path)
    found = verdict(path, "12.0")
    assert isinstance(found, EngineBuildError) is (
        dtype not in TAKEN or dtype in (D.INT4, D.FLOAT8E4M3FN, D.FLOAT4E2M1)
    )
    if isinstance(found, EngineBuildError):
        assert found.problems[0].startswith("input 'x': TensorRT-RTX has")
    if INSTALLED:
        assert isinstance(found, EngineBuildError) is bool(rtx_compiler.refusal(path, "12.0"))


@pytest.mark.parametrize(
    "dtype", [D.INT16, D.UINT16, D.UINT32, D.UINT64, D.FLOAT8E5M2, D.INT4, D.DOUBLE, D.FLOAT16]
)
def test_types_that_are_cast_to(dtype, tmp_path):
    text = (
        "g (float[b,4] x) => (float[b,4] y) "
        f"{{ [n] a = Cast<to={dtype.value}>(x) [m] y = Cast<to={D.FLOAT.value}>(a) }}"
    )
    path = model(text, folder=tmp_path)
    found = verdict(path)
    if isinstance(found, EngineBuildError):
        assert found.problems[0].startswith("node 'n' (Cast): TensorRT-RTX")
    if INSTALLED:
        assert isinstance(found, EngineBuildError) is bool(rtx_compiler.refusal(path))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [D.BFLOAT16, D.FLOAT, D.FLOAT16])
@pytest.mark.parametrize("operator", ["MatMul", "Gemm", "Conv"])
def test_products(operator, dtype, capability, tmp_path):
    """TensorRT-RTX has no bfloat16 and no float32 products (but convolutions) for Turing."""
    shapes = {"Conv": ("b,4,8,8", (8, 4, 3, 3), "b,8,6,6")}.get(operator, ("b,64", (64, 32), "b,32"))
    kind = {D.BFLOAT16: "bfloat16", D.FLOAT: "float", D.FLOAT16: "float16"}[dtype]
    text = f"g ({kind}[{shapes[0]}] x) => ({kind}[{shapes[2]}] y) {{ [n] y = {operator}(x, w) }}"
    path = model(text, {"w": ir.tensor(random(*shapes[1]).astype(dtype.numpy()), name="w")}, tmp_path)
    found = verdict(path, capability)
    wrong = capability == "7.5" and (dtype is D.BFLOAT16 or (dtype is D.FLOAT and operator != "Conv"))
    assert isinstance(found, EngineBuildError) is wrong
    if wrong:
        assert "make the graph in float16" in found.hint
    if INSTALLED:
        assert wrong is bool(rtx_compiler.refusal(path, capability))


def test_inputs_that_are_no_tensors(tmp_path):
    text = "g (seq(float[b,4]) x, int64 i) => (float[b,4] y) { [n] y = SequenceAt(x, i) }"
    first, second = refused(model(text, folder=tmp_path)).problems
    assert first == "node 'n' (SequenceAt): TensorRT-RTX has no such operator"
    assert second == "input 'x': TensorRT-RTX takes only tensors"


def test_one_of_several_targets_is_too_old(tmp_path):
    error = refused(weight_of(D.FLOAT8E4M3FN, tmp_path), "7.5", "8.9", "8.6")
    assert error.problems[0] == (
        "constant 'w': float8e4m3fn needs compute capability 8.9, but a target has 7.5, 8.6"
    )


# --- quantisation ------------------------------------------------------------------------------------

QUANTISED = {
    # Zero point (or type, without one) → is it right in an engine, does the compiler build it?
    "int8": (np.int8(0), "", True, True),
    "int8 by type": (None, f"<output_dtype={D.INT8.value}>", True, True),
    "float8": (ml_dtypes.float8_e4m3fn(0), "", True, True),
    "int8 asymmetric": (np.int8(5), "", False, False),
    "uint8": (np.uint8(128), "", False, False),
    "uint8 zero": (np.uint8(0), "", False, True),  # the trap: built as int8
    "nothing said": (None, "", False, True),  # the same: uint8 by ONNX's definition
}


@pytest.mark.parametrize("case", QUANTISED)
def test_quantised_activations(case, tmp_path):
    zero, attributes, right, compiles = QUANTISED[case]
    weights = {"s": np.float32(0.1).reshape(())}
    if zero is not None:
        weights["z"] = np.asarray(zero)
    third = ", z" if zero is not None else ""
    text = (
        f"g (float[b,4] x) => (float[b,4] y) {{ [q] c = QuantizeLinear {attributes} (x, s{third}) "
        f"[d] y = DequantizeLinear(c, s{third}) }}"
    )
    path = model(text, weights, tmp_path)
    found = verdict(path)
    assert isinstance(found, EngineBuildError) is not right
    if not right:
        assert found.problems[0].startswith("node 'q' (QuantizeLinear): ")
        assert "symmetrically with int8" in found.hint
    if INSTALLED:
        assert compiles is not bool(rtx_compiler.refusal(path))


def test_a_quantised_bias_and_a_computed_zero_point(tmp_path):
    path = model(
        "g (float[b,4] x, int8[b,4] c, int8 z) => (float[b,4] y, float[b,4] u) "
        "{ [d] v = DequantizeLinear(w, s) [a] y = Add(x, v) [e] u = DequantizeLinear(c, s, z) }",
        {"w": np.arange(4, dtype=np.int32), "s": np.float32(0.1).reshape(())},
        tmp_path,
    )
    error = refused(path)
    assert error.problems == (
        "node 'd' (DequantizeLinear): TensorRT-RTX can't dequantise int32",
        "node 'e' (DequantizeLinear): its zero point is computed, but TensorRT-RTX needs a constant",
    )
    assert "'QuantizeBias': False" in error.hint


# --- names -------------------------------------------------------------------------------------------


@group("llama")
def test_nodes_are_known_by_module(tmp_path):
    swap_onnx(tiny.base_onnx("llama", "dynamo"), tmp_path / "m.onnx", adapter=tiny.adapter("llama"))
    found = load_graph(tmp_path / "m.onnx")
    path = "model.layers.0.self_attn.q_proj"
    ours = find_node(found, f"{path}.lora.down.MatMul")
    assert ours is not None
    assert node_text(ours) == f"node '{path}.lora.down.MatMul' (MatMul), module {path}"
    theirs = find_node(found, "node_linear")
    assert theirs is not None
    assert module_of(theirs) == path
    assert find_node(found, "") is None
    assert find_node(found, "another") is None


def test_nodes_with_few_names(tmp_path):
    made = graph(
        "g (float[b,2] x) => (float[b,2] y) { t = MatMul(x, w) y = com.microsoft.Gelu(t) }",
        {"layers.0.fc.weight": random(2, 2)},
    )
    first, second = made.graph
    first.replace_input_with(1, made.graph.initializers["layers.0.fc.weight"])
    first.name = second.name = None
    assert node_text(first) == "the node that makes 't' (MatMul), module layers.0.fc"
    assert node_text(second) == "the node that makes 'y' (com.microsoft.Gelu)"
