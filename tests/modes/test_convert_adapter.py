"""Adapters converted for graphs: what onnxruntime computes with the files, against PEFT; every refusal."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny
from small_graphs import adapter as adapter_of
from small_graphs import conv, delta, graph, linear, random, save
from tiny_models import ARCHITECTURES

from lora_export import (
    AdapterError,
    AdapterSession,
    GraphError,
    LoraExportError,
    OutputError,
    SiteError,
    bank_onnx,
    convert_adapter,
    load_adapter,
    merge_onnx,
)
from lora_export.graph.exposed import KEY, ExposedModule, LoraRecord, Member, Slot, StoredRows
from lora_export.modes.swap_onnx import swap_onnx
from lora_export.reports.adapter.facts import inspect_adapter
from lora_export.storage.outputs import OutputSet

BASE = "ab" * 32


@pytest.fixture(scope="module")
def swaps(tmp_path_factory):
    """Make (once) the swap graph of an architecture's adapter."""
    made = {}

    def make(arch, feature="plain", exporter="dynamo"):
        key = arch, feature, exporter
        if key not in made:
            made[key] = tmp_path_factory.mktemp("swap") / f"{'-'.join(key)}.onnx"
            adapter = tiny.adapter(arch, feature)
            swap_onnx(tiny.base_onnx(arch, exporter), made[key], adapter=adapter, dora=feature == "dora")
        return made[key]

    return make


def run(model, inputs, adapter=None):
    """Return the first output as an outside client of onnxruntime gets it: `LoraAdapter` and `RunOptions`."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    run_options = ort.RunOptions()
    if adapter:
        active = ort.LoraAdapter()
        active.Load(str(adapter))
        run_options.add_active_adapter(active)
    return np.asarray(session.run([session.get_outputs()[0].name], inputs, run_options)[0])


def sizes_of(record):
    """Return the sizes of each tensor that a record names; the rank is free."""
    found = {}
    for module in record.modules:
        shapes = {module.lora_a: module.a_shape(0), module.lora_b: module.b_shape(0)}
        shapes |= {module.lora_bias: [module.out_dim]} if module.bias else {}
        shapes |= {module.scale: [module.out_dim]} if record.dora else {}
        found |= {name: [size or "r" for size in shape] for name, shape in shapes.items()}
    return found


def small(folder, record=None, **more):
    """Save y = x·W with exposed LoRA on it, written out by hand; W is ``(5, 6)``."""
    given, dims = set(more), more.pop("dims", ("r", "r"))
    model = graph(
        f"""small (float[n, 5] x, float[5, {dims[0]}] q_lora_A_weight, float[{dims[1]}, 6] q_lora_B_weight)
        => (float[n, 6] y) {{
            product = MatMul(x, q_weight)
            hidden = MatMul(x, q_lora_A_weight)
            change = MatMul(hidden, q_lora_B_weight)
            y = Add(product, change)
        }}""",
        {"q.weight": random(5, 6)},
    )
    for value in model.graph.inputs:
        value.name = value.name.replace("_", ".", 1).replace("_weight", ".weight")
    if record is None:
        module = ExposedModule(
            name="q",
            kind="linear",
            in_dim=5,
            out_dim=6,
            dtype="float32",
            members=(Member(path="q", start=0, out_dim=6),),
        )
        record = LoraRecord(
            mode="swap", base="base.onnx", base_sha256=BASE, modules=(module,), **({"max_rank": 8} | more)
        )
    if record:
        model.metadata_props[KEY] = record.to_json()
        inputs = {value.name: value for value in model.graph.inputs}
        for name, sizes in sizes_of(record).items():
            value = inputs.get(name)
            if value is None:
                value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))
                model.graph.inputs.append(value)
                model.graph.outputs.append(value)
            if "dims" not in given:
                value.shape = ir.Shape(sizes)
    return save(model, folder, "swap.onnx")


# --- what the files compute --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "feature", "exporter"),
    [
        ("llama", "plain", "dynamo"),
        ("llama", "rslora", "genai"),
        ("llama", "patterns", "torchscript"),
        ("llama", "embedding", "dynamo"),
        ("llama", "dora", "dynamo"),
        ("gpt2", "patterns", "dynamo"),
        ("gpt2", "dora", "dynamo"),
        ("bert", "embedding", "dynamo"),
        ("bert", "dora", "dynamo_noopt"),
        ("bert", "lora_bias", "dynamo"),
        ("bert", "modules_to_save", "dynamo"),
        ("llama", "modules_to_save", "dynamo"),
    ],
)
def test_onnxruntime_with_the_file_is_peft(swaps, tmp_path, arch, feature, exporter):
    model, adapter = swaps(arch, feature, exporter), tiny.adapter(arch, feature)
    inputs = tiny.feeds(arch, model)
    wanted = tiny.reference(arch, adapter)
    report = convert_adapter(adapter, model, tmp_path / "a.onnx_adapter")
    assert tiny.relative_error(run(model, inputs, report.output), wanted) < 3e-6
    assert tiny.relative_error(run(model, inputs), wanted) > 1e-3
    converted = convert_adapter(adapter, model, tmp_path / "a.safetensors").output
    assert not report.plan.refused
    # Of the other file the same tensors, through our own reader and writer.
    again = convert_adapter(converted, model, tmp_path / "b.onnx_adapter").output
    assert again.read_bytes() == report.output.read_bytes()


@pytest.mark.parametrize("suffix", [".safetensors", ".onnx_adapter"])
def test_a_plain_adapter_converted_for_a_dora_graph_goes_wherever_it_went(swaps, tmp_path, suffix):
    adapter, base = tiny.adapter("llama"), tiny.base_onnx("llama", "dynamo")
    wanted = tiny.reference("llama", adapter)
    report = convert_adapter(adapter, swaps("llama", "dora"), tmp_path / f"a{suffix}")
    file = report.output
    assert not [name for name in load_adapter(file).tensor_names if "scale" in name]
    assert inspect_adapter(load_adapter(file)).tuner == "LoRA"
    again = convert_adapter(file, swaps("llama"), tmp_path / "again.onnx_adapter").output
    for feature in ("plain", "dora"):
        model = swaps("llama", feature)
        assert tiny.relative_error(run(model, tiny.feeds("llama", model), again), wanted) < 3e-6
    merge_onnx(base, file, tmp_path / "m.onnx")
    merged = tiny.run(tmp_path / "m.onnx", tiny.feeds("llama", tmp_path / "m.onnx"))
    assert tiny.relative_error(merged, wanted) < 3e-6
    bank_onnx(base, {"a": tiny.adapter("llama", "plain", 1)}, tmp_path / "bank.onnx", resident="inputs")
    session = AdapterSession(tmp_path / "bank.onnx", threads=1)
    session.load_adapter("a", file, replace=True)
    inputs = tiny.feeds("llama", tmp_path / "bank.onnx")
    rows = session.run(inputs, adapters=["a"] * len(inputs["input_ids"]))
    assert tiny.relative_error(next(iter(rows.values())), wanted) < 3e-6
    edge = convert_adapter(file, swaps("llama", "dora"), tmp_path / "edge", format="edge-llm")
    assert edge.ranks == report.ranks


def test_three_adapters_of_one_graph_each_give_their_own_answer(swaps, tmp_path):
    model = swaps("llama")
    inputs = tiny.feeds("llama", model)
    for seed in range(3):
        adapter = tiny.adapter("llama", "plain", seed)
        file = convert_adapter(adapter, model, tmp_path / f"{seed}.onnx_adapter").output
        error = tiny.relative_error(run(model, inputs, file), tiny.reference("llama", adapter))
        assert error < 3e-6


def test_a_pack_takes_the_same_adapter(tmp_path):
    adapter = tiny.adapter("llama", "patterns")
    model = tmp_path / "pack.onnx"
    swap_onnx(tiny.base_onnx("llama", "dynamo"), model, adapter=adapter, pack=True)
    report = convert_adapter(adapter, model, tmp_path / "a.onnx_adapter")
    # q, k and v share a pair of tensors, and so do gate and up: 4 pairs a layer in place of 7.
    assert len(report.ranks) == 2 * 4
    got = run(model, tiny.feeds("llama", model), report.output)
    assert tiny.relative_error(got, tiny.reference("llama", adapter)) < 3e-6
    whole = convert_adapter(report.output, model, tmp_path / "b.onnx_adapter")
    assert whole.output.read_bytes() == report.output.read_bytes()


@pytest.mark.parametrize("flavour", ["ort", "tensorrt"])
@pytest.mark.parametrize("suffix", [".safetensors", ".onnx_adapter"])
def test_a_pack_whose_b_is_cut_gives_the_same_bits_from_either_file(tmp_path, flavour, suffix):
    """q, k and v are MatMuls of their own: each adds its part of the pack's product."""
    adapter, model = tiny.adapter("llama", "patterns"), tmp_path / "pack.onnx"
    swap_onnx(tiny.base_onnx("llama", "dynamo"), model, adapter=adapter, pack=True, flavour=flavour)
    report = convert_adapter(adapter, model, tmp_path / f"a{suffix}")
    assert any(name.endswith(".lora_B.2.weight") for name in load_adapter(report.output).tensor_names)
    session = AdapterSession(model, threads=1)
    session.load_adapter("folder", adapter)
    session.load_adapter("converted", report.output)
    inputs = tiny.feeds("llama", model)
    folder, converted, base = (session.run(inputs, name) for name in ("folder", "converted", None))
    assert all(np.array_equal(folder[name], converted[name]) for name in folder)
    (answer,) = folder.values()
    assert tiny.relative_error(answer, tiny.reference("llama", adapter)) < 3e-6
    original = tiny.base_onnx("llama", "dynamo")
    assert np.array_equal(*base.values(), tiny.run(original, inputs))
    with pytest.raises(SiteError, match=r"lora_B\.0\.weight  has no place in the format"):
        convert_adapter(adapter, model, tmp_path / "edge", format="edge-llm")


def test_a_graph_written_by_hand_computes_the_delta(tmp_path):
    model, module = small(tmp_path), linear("q", 6, 5)
    x = random(3, 5, seed=8)
    file = convert_adapter(adapter_of(module), model, tmp_path / "a.onnx_adapter").output
    wanted = x.astype(np.float64) @ (random(5, 6).astype(np.float64) + delta(module).T)
    empty = {"q.lora_A.weight": np.zeros((5, 0), np.float32), "q.lora_B.weight": np.zeros((0, 6), np.float32)}
    base = run(model, {"x": x, **empty})
    np.testing.assert_allclose(base, x @ random(5, 6), rtol=1e-5, atol=1e-5)
    parameters = ort.AdapterFormat.read_adapter(str(file)).get_parameters()
    got = run(model, {"x": x, **{name: value.numpy() for name, value in parameters.items()}})
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_graphs_of_onnxruntime_genais_own_builder(tmp_path):
    from onnxruntime_genai.models import builder

    source, adapter = str(tiny.checkpoint("llama")), tiny.adapter("llama")
    place = (source, str(tmp_path / "genai"), "fp32", "cpu", str(tmp_path / "cache"))
    with tiny.quiet():
        options = builder.parse_extra_options(None, *place, [f"adapter_path={adapter}"])
        builder.create_model(None, *place, **options)
    path = tmp_path / "genai" / "model.onnx"
    out = tmp_path / "a.onnx_adapter"
    with pytest.raises(GraphError, match="as constants, not as inputs"):
        convert_adapter(adapter, path, out)
    # What Olive's extract-adapters does.
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if ".lora_" in tensor.name:
            model.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    onnx.save(model, path)
    other = tiny.adapter("llama", "plain", 1)
    report = convert_adapter(other, path, out)
    assert report.format == "genai"
    assert "model.layers.0.attn.q_proj.lora_A.MatMul.weight" in load_adapter(out).tensor_names
    got = run(path, tiny.feeds("llama", path), out)
    assert tiny.relative_error(got, tiny.reference("llama", other)) < 3e-6
    with pytest.raises(OutputError, match="genai's own names"):
        convert_adapter(other, path, tmp_path / "a.safetensors")


def test_lora_inputs_of_another_tool_are_read_from_names_and_shapes(tmp_path):
    model = small(tmp_path, record=False)
    given = adapter_of(linear("base.q", 6, 5))
    report = convert_adapter(given, model, tmp_path / "edge", format="edge-llm")
    assert report.ranks == {"q": 2}
    assert report.notes[-1] == "converted from float32 to float16 (1 module)"
    (module,) = load_adapter(report.output).modules.values()
    assert module.lora_b.dtype == np.float16
    fixed = small(tmp_path / "fixed", record=False, dims=(1, 1))
    with pytest.raises(SiteError, match="rank 2, the graph fixes 1"):
        convert_adapter(given, fixed, tmp_path / "a.onnx_adapter")


# --- the report and the file system ------------------------------------------------------------------


def test_a_dry_run_checks_and_writes_nothing(tmp_path):
    model = small(tmp_path)
    report = convert_adapter(adapter_of(linear("q", 6, 5)), model, tmp_path / "a.safetensors", dry_run=True)
    assert not report.output.exists()
    assert report.as_dict()["ranks"] == {"q": 2}
    assert report.size_bytes == 4 * (5 * 2 + 2 * 6)


def test_an_existing_output_is_kept_unless_told(tmp_path):
    model, given = small(tmp_path), adapter_of(linear("q", 6, 5))
    for name, format in (("a.safetensors", None), ("edge", "edge-llm")):
        out = tmp_path / name
        convert_adapter(given, model, out, format=format)
        with pytest.raises(OutputError, match="exists already"):
            convert_adapter(given, model, out, format=format)
        convert_adapter(given, model, out, format=format, force=True)
        assert load_adapter(out).modules.keys() == {"q.weight"}
    (tmp_path / "edge" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds files that its record does not list"):
        convert_adapter(given, model, tmp_path / "edge", format="edge-llm", force=True)
    assert (tmp_path / "edge" / "notes.txt").read_text() == "mine"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(OutputError, match="is not a converted adapter that we wrote"):
        convert_adapter(given, model, tmp_path / "theirs", format="edge-llm", force=True)


def test_a_folder_to_which_something_came_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    model, given, out = small(tmp_path), adapter_of(linear("q", 6, 5)), tmp_path / "edge"
    convert_adapter(given, model, out, format="edge-llm")
    own = OutputSet.commit

    def late(outputs, *check):
        (out / "notes.txt").write_text("mine")
        own(outputs, *check)

    monkeypatch.setattr(OutputSet, "commit", late)
    with pytest.raises(OutputError, match="holds files that its record does not list"):
        convert_adapter(given, model, out, format="edge-llm", force=True)
    assert (out / "notes.txt").read_text() == "mine"


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(path, *_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_export.formats.converted.write_safetensors", fail)
    out = tmp_path / "out" / "a.safetensors"
    with pytest.raises(OutputError, match="No space left"):
        convert_adapter(adapter_of(linear("q", 6, 5)), small(tmp_path), out)
    assert list(out.parent.iterdir()) == []


def test_a_full_disk_is_an_output_error_and_leaves_nothing(tmp_path):
    """The real thing: the file may not become larger than 100 bytes."""
    model, out = small(tmp_path), tmp_path / "out" / "a.onnx_adapter"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OutputError) as caught:
            convert_adapter(adapter_of(linear("q", 6, 5)), model, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.message.startswith(f"cannot write {out}: onnxruntime: Failed to ")
    assert "(nothing was replaced)" in caught.value.message
    assert list(out.parent.iterdir()) == []


def test_the_output_never_replaces_the_adapter_that_is_read(tmp_path):
    model = small(tmp_path)
    out = convert_adapter(adapter_of(linear("q", 6, 5)), model, tmp_path / "a.safetensors").output
    with pytest.raises(OutputError, match="would replace a file that is read"):
        convert_adapter(out, model, out, force=True)


@pytest.mark.parametrize(
    ("name", "format", "reason"),
    [
        ("a.bin", None, "doesn't tell its format"),
        ("folder", None, "doesn't tell its format"),
        ("a.bin", "safetensors", "does not end in .safetensors"),
        ("a.safetensors", "onnx_adapter", "does not end in .onnx_adapter"),
        ("a.onnx_adapter", "genai", "would not fit them"),
        ("a.onnx_adapter", "gguf", "there is no format 'gguf'"),
    ],
)
def test_outputs_that_do_not_fit_their_format(tmp_path, name, format, reason):
    with pytest.raises(OutputError, match=reason):
        convert_adapter(adapter_of(linear("q", 6, 5)), small(tmp_path), tmp_path / name, format=format)


# --- bad input ---------------------------------------------------------------------------------------


def test_an_adapter_for_another_base_is_refused_by_hash(tmp_path):
    module = ExposedModule(
        name="q",
        kind="linear",
        in_dim=5,
        out_dim=6,
        dtype="float32",
        members=(Member(path="q", start=0, out_dim=6),),
    )
    other = small(
        tmp_path / "other",
        LoraRecord(mode="swap", base="other.onnx", base_sha256="cd" * 32, modules=(module,), max_rank=8),
    )
    for name in ("a.safetensors", "a.onnx_adapter"):
        file = convert_adapter(adapter_of(linear("q", 6, 5)), small(tmp_path), tmp_path / name).output
        with pytest.raises(AdapterError, match="made for another base"):
            convert_adapter(file, other, tmp_path / f"new-{name}")
        with pytest.raises(AdapterError, match="made for another base"):
            convert_adapter(file, other, tmp_path / f"new-{name}", force=True)
        report = convert_adapter(file, other, tmp_path / f"new-{name}", any_base=True)
        assert report.warnings == report.notes
        assert report.as_dict()["warnings"][0].startswith("bound to another base")


@pytest.mark.parametrize("name", ["a.safetensors", "a.onnx_adapter"])
def test_a_replaced_parameter_is_converted_for_its_base_alone(tmp_path, name):
    """A change from one base's values, added to another base's, is nobody's parameter."""

    def graph_of(base_sha256):
        stored = (StoredRows(weight="q.weight", rows=(0, 6), transposed=True),)
        module = ExposedModule(
            name="q",
            kind="linear",
            in_dim=5,
            out_dim=6,
            dtype="float32",
            members=(Member(path="q", start=0, out_dim=6, ranks=(), stored=stored),),
        )
        return small(
            tmp_path / base_sha256[:2],
            LoraRecord(mode="swap", base="b.onnx", base_sha256=base_sha256, modules=(module,), max_rank=8),
        )

    here, other = graph_of(BASE), graph_of("cd" * 32)
    given = adapter_of(extras={"q.weight": random(6, 5, seed=4)})
    first = convert_adapter(given, here, tmp_path / f"first-{name}").output
    # The mark stays when a file is converted again.
    for number, file in enumerate((first, convert_adapter(first, here, tmp_path / name).output)):
        with pytest.raises(AdapterError) as caught:
            convert_adapter(file, other, tmp_path / f"{number}-{name}", any_base=True)
        assert "they are valid only for that base" in caught.value.problems[1]


def test_a_rank_above_the_graphs_is_refused(tmp_path):
    with pytest.raises(SiteError, match="rank 2, the graph takes 1 at most"):
        convert_adapter(
            adapter_of(linear("q", 6, 5)), small(tmp_path, max_rank=1), tmp_path / "a.safetensors"
        )


def test_modules_without_a_place_are_refused_or_left_out(tmp_path):
    given = adapter_of(linear("q", 6, 5), linear("gone", 6, 5))
    with pytest.raises(SiteError, match=r"gone\.weight  swap\.onnx has no LoRA tensors for it"):
        convert_adapter(given, small(tmp_path), tmp_path / "a.safetensors")
    report = convert_adapter(given, small(tmp_path), tmp_path / "a.safetensors", allow_unmatched=True)
    assert report.notes == ("left out 1 of 2 parameters: gone.weight",)
    assert [row.parameter for row in report.plan.refused] == ["gone.weight"]


def test_graphs_that_take_no_adapter(tmp_path):
    given = adapter_of(linear("q", 6, 5))
    with pytest.raises(GraphError, match="has no exposed LoRA: its metadata lack"):
        convert_adapter(given, tiny.base_onnx("llama", "dynamo"), tmp_path / "a.safetensors")
    module = ExposedModule(
        name="q",
        kind="linear",
        in_dim=5,
        out_dim=6,
        dtype="float32",
        members=(Member(path="q", start=0, out_dim=6, ranks=(2,)),),
    )
    bank = LoraRecord(
        mode="bank", base="base.onnx", base_sha256=BASE, modules=(module,), max_rank=2, slots=(Slot("one"),)
    )
    with pytest.raises(GraphError, match="is a bank"):
        convert_adapter(given, small(tmp_path, bank), tmp_path / "a.safetensors")


def test_lora_inputs_that_are_not_understood(tmp_path):
    path = small(tmp_path, record=False)
    model = onnx.load(path)
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_param = "in"
    model.graph.input[2].name = "other.lora_B.weight"
    for node in model.graph.node:
        node.input[:] = [name.replace("q.lora_B", "other.lora_B") for name in node.input]
    onnx.save(model, path)
    with pytest.raises(GraphError) as caught:
        convert_adapter(adapter_of(linear("q", 6, 5)), path, tmp_path / "a.safetensors")
    assert caught.value.problems == ("q: lora_B is missing", "other: lora_A is missing")


@pytest.mark.parametrize(
    ("module", "kind", "reason"),
    [
        (linear("lm_head", 6, 5), "linear", "has no LoRA inputs for lm_head"),
        (conv("q", 6, 5, 3), "conv", "adapts only linear modules"),
    ],
)
def test_edge_llm_takes_linear_modules_but_lm_head(tmp_path, module, kind, reason):
    place = ExposedModule(
        name=module.path,
        kind=kind,
        in_dim=5,
        out_dim=6,
        dtype="float32",
        members=(Member(path=module.path, start=0, out_dim=6),),
        kernel=module.lora_a.shape[2:],
    )
    model = small(
        tmp_path, LoraRecord(mode="swap", base="base.onnx", base_sha256=BASE, modules=(place,), max_rank=8)
    )
    with pytest.raises(SiteError, match=reason):
        convert_adapter(adapter_of(module), model, tmp_path / "edge", format="edge-llm")


def test_edge_llm_and_genai_have_no_place_for_a_bias(tmp_path):
    place = ExposedModule(
        name="q",
        kind="linear",
        in_dim=5,
        out_dim=6,
        dtype="float32",
        members=(Member(path="q", start=0, out_dim=6),),
        bias=True,
    )
    model = small(
        tmp_path, LoraRecord(mode="swap", base="base.onnx", base_sha256=BASE, modules=(place,), max_rank=8)
    )
    given = adapter_of(linear("q", 6, 5, lora_bias=random(6)))
    with pytest.raises(SiteError, match=r"q\.lora_B\.bias  has no place in the format"):
        convert_adapter(given, model, tmp_path / "edge", format="edge-llm")


def test_a_converted_dora_file_can_not_be_merged_or_saved_as_peft(swaps, tmp_path):
    from lora_export import save_adapter

    adapter = tiny.adapter("llama", "dora")
    file = convert_adapter(adapter, swaps("llama", "dora"), tmp_path / "a.safetensors").output
    with pytest.raises(AdapterError, match="factors hold for the exposed tensors only"):
        merge_onnx(tiny.base_onnx("llama", "dynamo"), file, tmp_path / "m.onnx")
    with pytest.raises(AdapterError, match="PEFT keeps the magnitude"):
        save_adapter(load_adapter(file), tmp_path / "peft")


def test_a_converted_file_merges_like_the_adapter_it_was_made_of(swaps, tmp_path):
    adapter = tiny.adapter("llama", "rslora")
    file = convert_adapter(adapter, swaps("llama", "rslora"), tmp_path / "a.safetensors").output
    merge_onnx(tiny.base_onnx("llama", "dynamo"), file, tmp_path / "m.onnx")
    got = tiny.run(tmp_path / "m.onnx", tiny.feeds("llama", tmp_path / "m.onnx"))
    assert tiny.relative_error(got, tiny.reference("llama", adapter)) < 2e-6


# --- the command -------------------------------------------------------------------------------------


def command(*arguments):
    return subprocess.run(
        [str(Path(sys.executable).with_name("lora-export")), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_line(swaps, tmp_path):
    model, adapter, out = swaps("llama"), tiny.adapter("llama"), tmp_path / "a.onnx_adapter"
    planned = command("convert-adapter", adapter, "--for", model, "-o", out, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "model.layers.0.self_attn.q_proj.weight  expose" in planned.stdout
    assert not out.exists()
    done = command("convert-adapter", adapter, "--for", model, "-o", out)
    assert done.returncode == 0, done.stderr
    assert "converted 14 modules (rank 4, " in done.stdout
    assert f"wrote {out}" in done.stdout
    again = command("convert-adapter", adapter, "--for", model, "-o", out)
    assert again.returncode == 1
    assert "exists already" in again.stderr
    forced = command("convert-adapter", adapter, "--for", model, "-o", out, "--force", "--json")
    assert json.loads(forced.stdout)["format"] == "onnx_adapter"
    shown = command("inspect", out, "--json")
    assert json.loads(shown.stdout)["format"] == "onnx_adapter"


def test_another_base_is_warned_of_and_force_is_for_the_output_alone(tmp_path):
    module = ExposedModule(
        name="q",
        kind="linear",
        in_dim=5,
        out_dim=6,
        dtype="float32",
        members=(Member(path="q", start=0, out_dim=6),),
    )
    other = small(
        tmp_path / "other",
        LoraRecord(mode="swap", base="other.onnx", base_sha256="cd" * 32, modules=(module,), max_rank=8),
    )
    file = convert_adapter(adapter_of(linear("q", 6, 5)), small(tmp_path), tmp_path / "a.safetensors").output
    arguments = ("convert-adapter", file, "--for", other, "-o", tmp_path / "b.safetensors", "--force")
    refused = command(*arguments)
    assert refused.returncode == 1
    assert "--any-base (any_base=True)" in refused.stderr
    done = command(*arguments, "--any-base", "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("warning: bound to another base than it was made for: base sha256 abab")
    said = command(*arguments, "--any-base").stdout
    assert "converted 1 modules (rank 2, 88 bytes) for swap.onnx" in said
    assert "another base" not in said


def test_reading_options_have_names_of_their_own(tmp_path):
    from safetensors.numpy import save_file

    model, file, out = small(tmp_path), tmp_path / "raw.safetensors", tmp_path / "b.onnx_adapter"
    save_file({"q.lora_A.weight": random(5, 2), "q.lora_B.weight": random(2, 6)}, file)
    unknown = command("convert-adapter", file, "--for", model, "-o", out)
    assert unknown.returncode == 1
    assert "doesn't state alpha" in unknown.stderr
    assert "--from-format" in unknown.stderr
    told = command("convert-adapter", file, "--for", model, "-o", out, "--from-format", "converted")
    assert told.returncode == 0, told.stderr
    (module,) = load_adapter(out).modules.values()
    np.testing.assert_array_equal(module.lora_a, random(5, 2).T)


def test_warnings_stay_when_quiet(tmp_path):
    from safetensors.numpy import save_file

    file = tmp_path / "raw.safetensors"
    save_file(
        {f"{name}.{part}.weight": random(*shape) for name in ("q", "gone") for part, shape in
         (("A", (2, 5)), ("B", (6, 2)))},
        file,
    )  # fmt: skip
    arguments = ("convert-adapter", file, "--for", small(tmp_path), "-o", tmp_path / "a.safetensors")
    done = command(*arguments, "--alpha", 2, "--allow-unmatched", "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "warning: left out: gone.weight: swap.onnx has no LoRA tensors for it" in done.stderr


def test_every_architecture_has_a_plain_adapter_that_converts(swaps, tmp_path):
    """The zoo's architectures whose graphs a swap can be made of by name."""
    for arch in ("t5", "vit"):
        assert "plain" in ARCHITECTURES[arch].features
        model, adapter = swaps(arch), tiny.adapter(arch)
        file = convert_adapter(adapter, model, tmp_path / f"{arch}.onnx_adapter").output
        got = run(model, tiny.feeds(arch, model), file)
        assert tiny.relative_error(got, tiny.reference(arch, adapter)) < 3e-6


def test_errors_are_ours(tmp_path):
    with pytest.raises(LoraExportError, match="no ONNX file at"):
        convert_adapter(adapter_of(linear("q", 6, 5)), tmp_path / "none.onnx", tmp_path / "a.safetensors")
