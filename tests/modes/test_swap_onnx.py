"""`swap-onnx` on the zoo: feature × architecture × exporter, against PEFT; without an adapter, the base."""

import json

import exposed_models as exposed
import numpy as np
import onnx
import pytest
import tiny
from exposed_models import EXPORTERS, FOLDED_NORM, group

from lora_export import AdapterSession, GraphError, SiteError, convert_adapter, load_adapter, swap_onnx
from lora_export.cli import _run

TOLERANCE = 2e-6
# What has no low-rank branch: norms trained whole, stacked experts.
NORM_HEADS = {"qwen2", "gpt2", "t5"}
# Features whose tensors lie in a pack in a way of their own.
PACKED = {"patterns", "dora", "lora_bias"}
FORMS = ("", "pack", "fuse_base")
WITH_NORMS = {"gpt2", "bert", "vit", "conv"}


def check_base(arch, graph, base):
    """Without an adapter a graph is its base: bit for bit, where ONNX Runtime fuses both alike."""
    feeds = tiny.feeds(arch, base)
    if arch == "conv":  # a norm is folded into a convolution, but not behind a branch
        got, wanted = exposed.run_swapped(arch, graph, None), tiny.run(base, feeds)
        assert tiny.relative_error(got, wanted) < 1e-6
        with tiny.unoptimised():
            assert np.array_equal(exposed.run_swapped(arch, graph, None), tiny.run(base, feeds))
    else:
        assert np.array_equal(exposed.run_swapped(arch, graph, None), tiny.run(base, feeds))


def refused(arch, exporter, feature):
    """What PEFT can train here and a graph with exposed LoRA can't take: it says so and writes nothing."""
    return (
        feature == "target_parameters"
        or (feature == "modules_to_save" and arch in NORM_HEADS)
        or (feature == "bias" and arch in WITH_NORMS)
        or (feature == "dora" and (arch, exporter) in FOLDED_NORM)
    )


def table():
    """Every feature of every graph. The forms take turns: each meets every feature of an architecture."""
    archs = list(tiny.ARCHITECTURES)
    for arch, exporter in tiny.pairs(*EXPORTERS):
        for number, feature in enumerate(tiny.ARCHITECTURES[arch].features):
            turn = (archs.index(arch) + EXPORTERS.index(exporter) + number) % len(FORMS)
            how = FORMS[turn] if feature in PACKED else ""
            name = f"{arch}-{exporter}-{feature}-{how}".rstrip("-")
            yield pytest.param(arch, exporter, feature, how, marks=group(arch), id=name)


def options(arch, exporter, feature):
    found = {"dora": True} if feature == "dora" else {}
    if (arch, exporter) in FOLDED_NORM or (arch, exporter, feature) == ("qwen2", "genai", "modules_to_save"):
        found["checkpoint"] = tiny.checkpoint(arch)
    return found


@pytest.mark.parametrize(("arch", "exporter", "feature", "how"), table())
def test_swap_agrees_with_peft(arch, exporter, feature, how, tmp_path):
    adapter = tiny.adapter(arch, feature)
    more = options(arch, exporter, feature) | ({how: True} if how else {})
    if refused(arch, exporter, feature):
        with pytest.raises(SiteError):
            exposed.swapped_tensors(arch, exporter, adapter, tmp_path, **more)
        return
    graph = exposed.swap(arch, exporter, adapter, tmp_path, **more)
    got = exposed.run_swapped(arch, graph, adapter)
    assert tiny.relative_error(got, tiny.reference(arch, adapter, merged=False)) < TOLERANCE
    # The oracle can tell: the base without the adapter is far off.
    assert tiny.relative_error(tiny.base_reference(arch), tiny.reference(arch, adapter)) > 1e3 * TOLERANCE
    base = tiny.base_onnx(arch, exporter)
    check_base(arch, graph, base)


@pytest.mark.parametrize(
    ("arch", "exporter"),
    [pytest.param(*pair, marks=group(pair[0]), id="-".join(pair)) for pair in tiny.pairs(*EXPORTERS)],
)
def test_another_adapter_of_other_ranks_fits(arch, exporter, tmp_path):
    """The graph is made like one adapter; rank is free in each module, up to the largest."""
    graph = exposed.swap(
        arch, exporter, tiny.adapter(arch), tmp_path, **options(arch, exporter, "plain"), max_rank=8
    )
    for feature, seed in (("patterns", 1), ("rslora", 2), ("plain", 3)):
        adapter = tiny.adapter(arch, feature, seed)
        got = exposed.run_swapped(arch, graph, adapter)
        assert tiny.relative_error(got, tiny.reference(arch, adapter, merged=False)) < TOLERANCE


@pytest.mark.parametrize("arch", [pytest.param(a, marks=group(a)) for a in ("llama", "qwen2", "bert")])
@pytest.mark.parametrize("pack", [False, True], ids=["", "pack"])
def test_fused_weights_without_names_are_found_by_content(arch, pack, tmp_path):
    adapter = tiny.adapter(arch, "patterns")
    graph = exposed.swap(arch, "ort_fusions", adapter, tmp_path, checkpoint=tiny.checkpoint(arch), pack=pack)
    got = exposed.run_swapped(arch, graph, adapter)
    assert tiny.relative_error(got, tiny.reference(arch, adapter, merged=False)) < TOLERANCE
    base = tiny.base_onnx(arch, "ort_fusions")
    check_base(arch, graph, base)


@group("llama")
def test_names_layout_and_defaults(tmp_path):
    """What ONNX Runtime, Olive and TensorRT-Edge-LLM share: names, shapes, one rank symbol a module."""
    adapter = tiny.adapter("llama", "patterns")
    graph = exposed.swap("llama", "dynamo", adapter, tmp_path)
    proto = onnx.load(graph).graph
    defaults = {tensor.name: tuple(tensor.dims) for tensor in proto.initializer}
    inputs = {value.name: value.type.tensor_type for value in proto.input}
    symbols = set()
    for module in load_adapter(adapter).modules.values():
        for leaf, rank_axis, size in (("A", 1, module.lora_a.shape[1]), ("B", 0, module.lora_b.shape[0])):
            name = f"{module.path}.lora_{leaf}.weight"
            dims = inputs[name].shape.dim
            assert dims[rank_axis].dim_param == f"{module.path}.rank"
            assert dims[1 - rank_axis].dim_value == size
            assert defaults[name] == ((size, 0) if leaf == "A" else (0, size))
        symbols.add(f"{module.path}.rank")
    assert len(symbols) == len(load_adapter(adapter).modules)
    old = {node.name for node in onnx.load(tiny.base_onnx("llama", "dynamo")).graph.node}
    added = [node.name for node in proto.node if node.name not in old]
    assert old <= {node.name for node in proto.node}
    assert all(".lora." in name for name in added)
    assert len(added) == 3 * len(symbols)


@group("llama")
def test_a_pack_has_two_products_where_siblings_had_six(tmp_path):
    adapter = tiny.adapter("llama")
    graph = exposed.swap("llama", "genai", adapter, tmp_path, pack=True)
    added = [node for node in onnx.load(graph).graph.node if ".lora." in node.name]
    names = {node.name.partition(".lora.")[0].rpartition(".")[2] for node in added}
    assert names == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    qkv = [node.op_type for node in added if ".layers.0.self_attn.qkv_proj." in node.name]
    # d = x·A, then Gemm(d, B, C=y): the others move nothing.
    assert qkv == ["MatMul", "Flatten", "Flatten", "Gemm", "Shape", "Reshape"]
    gate_up = [node.op_type for node in added if ".layers.0.mlp.gate_up_proj." in node.name]
    assert gate_up == ["MatMul", *["Flatten", "Flatten", "Gemm", "Shape", "Reshape"] * 2]
    inputs = {value.name: value.type.tensor_type.shape.dim for value in onnx.load(graph).graph.input}
    assert "model.layers.0.self_attn.qkv_proj.lora_B.weight" in inputs
    # gate and up are read apart: their B are two tensors, so that no product has to be split.
    widths = [inputs[f"model.layers.0.mlp.gate_up_proj.lora_B.{n}.weight"][1].dim_value for n in (0, 1)]
    assert widths == [48, 48]


@group("bert")
def test_fuse_base_computes_q_k_and_v_at_once(tmp_path):
    """One product in place of three, the weights side by side, and the base's names for what is read."""
    adapter = tiny.adapter("bert")
    graph = exposed.swap("bert", "torchscript", adapter, tmp_path, fuse_base=True)
    nodes = [node for node in onnx.load(graph).graph.node if "layer.0.attention.self" in node.name]
    assert [node.op_type for node in nodes if ".lora." in node.name] == [
        *("MatMul", "MatMul", "Flatten", "Flatten", "Gemm", "Shape", "Reshape", "Split")
    ]
    old = {
        name for node in onnx.load(tiny.base_onnx("bert", "torchscript")).graph.node for name in node.output
    }
    split = next(node for node in nodes if node.op_type == "Split")
    assert set(split.output) <= old
    weights = {tensor.name: list(tensor.dims) for tensor in onnx.load(graph).graph.initializer}
    assert [64, 3 * 64] in [dims for name, dims in weights.items() if name.endswith(".lora.base.weight")]
    total = sum(np.prod(dims) for name, dims in weights.items() if ".lora_" not in name)
    before = onnx.load(tiny.base_onnx("bert", "torchscript")).graph.initializer
    # The weights are there once: no copy of q, k and v is left. What is added are sizes of the Split.
    assert total - sum(np.prod(list(tensor.dims)) for tensor in before) == 3 * 2


@group("llama")
def test_tensorrt_flavour_has_plain_inputs(tmp_path):
    """A TensorRT parser takes an input with an initializer for a constant: the engine would be the base."""
    adapter = tiny.adapter("llama")
    graph = exposed.swap("llama", "dynamo", adapter, tmp_path, flavour="tensorrt")
    proto = onnx.load(graph).graph
    inputs = {value.name for value in proto.input}
    lora = {f"{m.path}.lora_{x}.weight" for m in load_adapter(adapter).modules.values() for x in "AB"}
    assert lora <= inputs
    assert not inputs & {tensor.name for tensor in proto.initializer}
    got = exposed.run_swapped("llama", graph, adapter)
    assert tiny.relative_error(got, tiny.reference("llama", adapter, merged=False)) < TOLERANCE


@group("llama")
@pytest.mark.parametrize("exporter", ["dynamo", "genai"])
def test_target_modules_instead_of_an_adapter(exporter, tmp_path):
    """The same graph as with an adapter; a builder's fused weight is known by its parts."""
    base = tiny.base_onnx("llama", exporter)
    targets = ",".join(tiny.ARCHITECTURES["llama"].targets)
    arguments = ["swap-onnx", "--base", str(base), "--target-modules", targets, "--max-rank", "8"]
    assert _run([*arguments, "-o", str(tmp_path / "named.onnx"), "--quiet"], False) == 0
    adapter = tiny.adapter("llama", "patterns")
    got = exposed.run_swapped("llama", tmp_path / "named.onnx", adapter)
    assert tiny.relative_error(got, tiny.reference("llama", adapter, merged=False)) < TOLERANCE


@group("bert")
def test_what_several_adapters_change_is_exposed_together(tmp_path):
    """A classifier's head in one, its branches in another, more modules by name."""
    head, wide = tiny.adapter("bert", "modules_to_save"), tiny.adapter("bert", "lora_bias", 1)
    graph = exposed.swap("bert", "dynamo", [head, wide], tmp_path, target_modules=["pooler.dense"])
    for adapter in (head, wide, tiny.adapter("bert", "modules_to_save", 2), tiny.adapter("bert", "patterns")):
        got = exposed.run_swapped("bert", graph, adapter)
        assert tiny.relative_error(got, tiny.reference("bert", adapter, merged=False)) < TOLERANCE
    base = tiny.base_onnx("bert", "dynamo")
    assert np.array_equal(exposed.run_swapped("bert", graph, None), tiny.run(base, tiny.feeds("bert", base)))


@group("llama")
def test_all_linear_needs_every_name(tmp_path):
    """A quantiser that drops names must not leave modules out in silence."""
    import contextlib
    import io

    from onnxruntime.quantization import quantize_dynamic

    with contextlib.redirect_stdout(io.StringIO()):
        quantize_dynamic(tiny.base_onnx("llama", "dynamo"), tmp_path / "q.onnx")
    with pytest.raises(SiteError, match="has no name any more") as caught:
        swap_onnx(tmp_path / "q.onnx", tmp_path / "m.onnx", target_modules="all-linear")
    assert caught.value.problems


@group("llama")
def test_dora_beside_quantised_weights_is_refused_when_the_graph_is_made(tmp_path):
    import contextlib
    import io

    from onnxruntime.quantization import quantize_dynamic

    with contextlib.redirect_stdout(io.StringIO()):
        quantize_dynamic(tiny.base_onnx("llama", "torchscript"), tmp_path / "q.onnx")
    with pytest.raises(SiteError, match="14 parameters") as caught:
        swap_onnx(tmp_path / "q.onnx", tmp_path / "m.onnx", adapter=tiny.adapter("llama", "dora"), dora=True)
    assert all("needs W0" in line for line in caught.value.problems)


@group("llama")
def test_all_linear_is_refused_where_a_fused_weight_may_be_either(tmp_path):
    with pytest.raises(SiteError, match="has fused weights"):
        swap_onnx(tiny.base_onnx("llama", "genai"), tmp_path / "m.onnx", target_modules=["all-linear"])
    report = swap_onnx(tiny.base_onnx("llama", "dynamo"), tmp_path / "m.onnx", target_modules=["all-linear"])
    assert len(report.exposed.modules) == 2 * 7


@group("llama")
def test_share_base_keeps_w0_once(tmp_path):
    import onnx_ir as ir

    ir.save(ir.load(tiny.base_onnx("llama", "dynamo")), tmp_path / "base.onnx", external_data="base.data")
    before = (tmp_path / "base.data").read_bytes()
    adapter = tiny.adapter("llama")
    report = swap_onnx(tmp_path / "base.onnx", tmp_path / "swap.onnx", adapter=adapter, share_base=True)
    assert report.shared_bytes >= len(before) * 0.9
    # What is written besides is alignment and what was in the protobuf.
    assert report.size_bytes < 4096
    got = exposed.run_swapped("llama", tmp_path / "swap.onnx", adapter)
    assert tiny.relative_error(got, tiny.reference("llama", adapter, merged=False)) < TOLERANCE
    assert (tmp_path / "base.data").read_bytes() == before
    # Weights that are not those the graph was made with: the record, and DoRA's factors, would be another's.
    (tmp_path / "base.data").write_bytes(before[:-4] + b"\0\0\0\1")
    for open_it in (
        lambda: AdapterSession(tmp_path / "swap.onnx"),
        lambda: convert_adapter(adapter, tmp_path / "swap.onnx", tmp_path / "a.safetensors"),
    ):
        with pytest.raises(GraphError, match="have changed since it was made"):
            open_it()
    assert not (tmp_path / "a.safetensors").exists()


@group("llama")
def test_manifest_and_dry_run_say_the_same(tmp_path, capsys):
    adapter = tiny.adapter("llama")
    base = tiny.base_onnx("llama", "dynamo")
    arguments = ["swap-onnx", "--base", str(base), "--adapter", str(adapter), "-o", str(tmp_path / "m.onnx")]
    assert _run([*arguments, "--dry-run", "--json"], False) == 0
    planned = json.loads(capsys.readouterr().out)
    assert not list(tmp_path.iterdir())
    assert _run([*arguments, "--quiet"], False) == 0
    manifest = json.loads((tmp_path / "m.lora.json").read_text())
    assert manifest["plan"] == planned["plan"]
    assert manifest["exposed"] == planned["exposed"]
    spoken = {name for row in manifest["plan"]["rows"] for name in row["tensors"]}
    assert spoken == set(load_adapter(adapter).tensor_names)


@group("llama")
def test_a_graph_with_lora_inputs_is_refused(tmp_path):
    graph = exposed.swap("llama", "dynamo", tiny.adapter("llama"), tmp_path)
    with pytest.raises(GraphError, match="has exposed LoRA already"):
        swap_onnx(graph, tmp_path / "twice.onnx", adapter=tiny.adapter("llama"))
    assert not (tmp_path / "twice.onnx").exists()


@group("llama")
def test_unmatched_modules_are_listed_or_left_out_when_asked(tmp_path, capsys):
    base, adapter = tiny.base_onnx("gpt2", "torchscript"), tiny.adapter("llama")
    arguments = ["swap-onnx", "--base", str(base), "--adapter", str(adapter), "-o", str(tmp_path / "m.onnx")]
    for more in ([], ["--allow-unmatched"]):
        assert _run([*arguments, *more], False) == 1
        said = capsys.readouterr().err
        assert "none of its 14 parameters" in said
        assert "and 11 more  not found: " in said  # of 14, three are named
    assert not list(tmp_path.iterdir())
    with pytest.raises(SiteError, match="no modules of these names") as caught:
        swap_onnx(base, tmp_path / "m.onnx", target_modules=["c_attn", "q_proj"])
    assert caught.value.problems == ("q_proj",)


@pytest.mark.parametrize("rank", [0, 3])
@group("llama")
def test_a_rank_above_the_largest_is_refused(rank, tmp_path):
    from lora_export import AdapterError

    with pytest.raises(AdapterError, match=f"max_rank is {rank}"):
        swap_onnx(
            tiny.base_onnx("llama", "dynamo"),
            tmp_path / "m.onnx",
            adapter=tiny.adapter("llama"),
            max_rank=rank,
        )
    graph = exposed.swap("llama", "dynamo", tiny.adapter("llama"), tmp_path, max_rank=4)
    with pytest.raises(SiteError) as caught:
        exposed.tensors(graph, tiny.adapter("llama", "patterns"))
    assert "rank 6, the graph takes 4 at most" in str(caught.value)
