"""`bank-onnx` on the zoo: each row of a batch with an adapter of its own, against PEFT."""

import json

import exposed_models as exposed
import numpy as np
import onnx
import pytest
import small_graphs
import tiny
import torch
from exposed_models import EXPORTERS, FOLDED_NORM, group
from peft import PeftModel

from lora_export import AdapterError, SiteError, bank_onnx, load_adapter
from lora_export.cli import _run

TOLERANCE = 2e-6
NAMES = ("a", "b", "c")
FORMS = ("plain", "pack", "inputs")


def adapters(arch):
    """Three adapters of different ranks and scalings."""
    features = (("plain", 0), ("patterns", 1), ("rslora", 2))
    return {name: tiny.adapter(arch, *feature) for name, feature in zip(NAMES, features, strict=True)}


def options(arch, exporter):
    return {"checkpoint": tiny.checkpoint(arch)} if (arch, exporter) in FOLDED_NORM else {}


def row_by_row(arch, named, rows):
    """Oracle: PEFT's answer of each row from a run with that row's adapter alone."""
    whole = [
        tiny.base_reference(arch) if row is None else tiny.reference(arch, named[row], merged=False)
        for row in rows
    ]
    return np.stack([answer[number] for number, answer in enumerate(whole)])


def table():
    """Every graph. The forms take turns: each meets every architecture and every exporter."""
    archs = list(tiny.ARCHITECTURES)
    for arch, exporter in tiny.pairs(*EXPORTERS):
        how = FORMS[(archs.index(arch) + EXPORTERS.index(exporter)) % len(FORMS)]
        yield pytest.param(arch, exporter, how, marks=group(arch), id=f"{arch}-{exporter}-{how}")


@pytest.mark.parametrize(("arch", "exporter", "how"), table())
def test_bank_agrees_with_peft_row_by_row(arch, exporter, how, tmp_path):
    named = adapters(arch)
    more = options(arch, exporter) | {
        "pack": how == "pack",
        "resident": "inputs" if how == "inputs" else "initializers",
    }
    graph = exposed.bank(arch, exporter, named, tmp_path, **more)
    for rows in (["b", "a"], ["c", None]):
        got = exposed.run_bank(arch, graph, rows)
        assert tiny.relative_error(got, row_by_row(arch, named, rows)) < TOLERANCE
    base = tiny.base_onnx(arch, exporter)
    wanted, got = tiny.run(base, tiny.feeds(arch, base)), exposed.run_bank(arch, graph, [None, None])
    if (arch, exporter) == ("conv", "dynamo_noopt"):
        # Constant kernels beside it let ONNX Runtime choose another layout for the base's own convolutions.
        assert tiny.relative_error(got, wanted) < 1e-6
    else:
        assert np.array_equal(got, wanted)


def mixed_batch(arch, named, rows):
    """Oracle: PEFT's own mixed batch, `adapter_names`."""
    with tiny.quiet():
        first, *others = named
        model = PeftModel.from_pretrained(tiny.build(arch), named[first], adapter_name=first)
        for name in others:
            model.load_adapter(named[name], adapter_name=name)
        with torch.no_grad():
            inputs = tiny.ARCHITECTURES[arch].inputs()
            output = model.eval()(**inputs, adapter_names=[row or "__base__" for row in rows])
    return (output if torch.is_tensor(output) else output.logits).numpy()


# Mixture-of-experts: PEFT counts the rows of the flattened activation and refuses.
@pytest.mark.parametrize(
    "arch", [pytest.param(a, marks=group(a)) for a in tiny.ARCHITECTURES if a != "qwen2_moe"]
)
def test_bank_agrees_with_pefts_mixed_batch(arch, tmp_path):
    named = adapters(arch)
    graph = exposed.bank(arch, "dynamo", named, tmp_path, **options(arch, "dynamo"))
    for rows in (["a", "c"], ["b", None], ["b", "b"]):
        got = exposed.run_bank(arch, graph, rows)
        assert tiny.relative_error(got, mixed_batch(arch, named, rows)) < TOLERANCE


@pytest.mark.parametrize("arch", [pytest.param(a, marks=group(a)) for a in ("llama", "gpt2", "conv")])
def test_other_weights_blend(arch, tmp_path):
    """Oracle: PEFT's add_weighted_adapter with combination_type "cat"; another blend in each row."""
    named = adapters(arch)
    graph = exposed.bank(arch, "dynamo_noopt", named, tmp_path)
    blends = np.array([[0.7, 0.3, 0], [-0.5, 0, 1.5]], np.float32)
    got = exposed.run_bank(arch, graph, blends)
    for number, blend in enumerate(blends):
        with tiny.quiet():
            model = PeftModel.from_pretrained(tiny.build(arch), named["a"], adapter_name="a")
            model.load_adapter(named["b"], adapter_name="b")
            model.load_adapter(named["c"], adapter_name="c")
            chosen = [(name, float(w)) for name, w in zip(NAMES, blend, strict=True) if w]
            model.add_weighted_adapter(
                [name for name, _ in chosen], [w for _, w in chosen], "blend", combination_type="cat"
            )
            model.set_adapter("blend")
            with torch.no_grad():
                output = model.eval()(**tiny.ARCHITECTURES[arch].inputs())
        wanted = (output if torch.is_tensor(output) else output.logits).numpy()
        assert tiny.relative_error(got[number], wanted[number]) < TOLERANCE


@group("llama")
def test_adapters_with_different_modules(tmp_path):
    """A slot leaves modules alone that its adapter doesn't change; embeddings have rows as well."""
    named = {"plain": tiny.adapter("llama"), "wide": tiny.adapter("llama", "embedding", 1)}
    graph = exposed.bank("llama", "dynamo", named, tmp_path)
    for rows in (["plain", "wide"], ["wide", None]):
        got = exposed.run_bank("llama", graph, rows)
        assert tiny.relative_error(got, row_by_row("llama", named, rows)) < TOLERANCE


@group("bert")
def test_heads_are_resident_too(tmp_path):
    """modules_to_save: each task has its own classifier, W' = W0 + ΔW, and its own bias."""
    named = {name: tiny.adapter("bert", "modules_to_save", seed) for seed, name in enumerate(NAMES)}
    graph = exposed.bank("bert", "dynamo", named, tmp_path)
    for rows in (["a", "b"], [None, "c"]):
        got = exposed.run_bank("bert", graph, rows)
        assert tiny.relative_error(got, row_by_row("bert", named, rows)) < TOLERANCE


@group("llama")
def test_a_wrong_number_of_rows_fails_in_the_graph_itself(tmp_path):
    graph = exposed.bank("llama", "dynamo", adapters("llama"), tmp_path)
    for rows in (["a"], ["a", "b", "c"], ["a"] * 14):
        with pytest.raises(Exception, match=r"[sS]plit"):
            exposed.run_bank("llama", graph, rows)


@group("llama")
def test_names_of_slots_are_in_manifest_and_metadata(tmp_path):
    named = adapters("llama")
    graph = exposed.bank("llama", "dynamo", named, tmp_path)
    metadata = {entry.key: entry.value for entry in onnx.load(graph).metadata_props}
    record = json.loads(metadata["lora_export.exposed"])
    manifest = json.loads((tmp_path / "bank.lora.json").read_text())
    for slots in (record["slots"], manifest["exposed"]["slots"]):
        assert [slot["name"] for slot in slots] == list(named)
        assert [slot["adapter"] for slot in slots] == [load_adapter(path).sha256 for path in named.values()]
    weights = next(value for value in onnx.load(graph).graph.input if value.name == "lora.adapter_weights")
    assert weights.type.tensor_type.shape.dim[1].dim_value == 3
    assert weights.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


@group("llama")
def test_no_rank_is_padded(tmp_path):
    named = adapters("llama")
    graph = exposed.bank("llama", "dynamo", named, tmp_path)
    sizes = {tensor.name: list(tensor.dims) for tensor in onnx.load(graph).graph.initializer}
    for path in load_adapter(named["a"]).modules.values():
        total = sum(load_adapter(file).modules[path.key].rank for file in named.values())
        assert sizes[f"{path.path}.lora_A.weight"][1] == total
        assert sizes[f"{path.path}.lora_B.weight"][0] == total


@group("llama")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_a_slot_is_refused(value, tmp_path):
    """It would reach rows that use another slot: 0 · NaN is NaN."""
    good = load_adapter(tiny.adapter("llama"))
    bad = load_adapter(tiny.adapter("llama", "plain", 1))
    module = next(iter(bad.modules.values()))
    spoilt = module.lora_a.copy()
    spoilt[0, 0] = value
    object.__setattr__(module, "lora_a", spoilt)
    with pytest.raises(AdapterError, match="can't be used") as caught:
        bank_onnx(tiny.base_onnx("llama", "dynamo"), {"good": good, "bad": bad}, tmp_path / "m.onnx")
    assert module.path in caught.value.problems[0]
    assert not list(tmp_path.iterdir())


@group("llama")
def test_dora_is_refused_with_a_way_out(tmp_path):
    with pytest.raises(SiteError, match="14 parameters") as caught:
        exposed.bank("llama", "dynamo", {"d": tiny.adapter("llama", "dora")}, tmp_path)
    assert all("DoRA" in line for line in caught.value.problems)
    assert "swap-onnx --dora" in caught.value.hint


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--adapter", "{a}"], "not NAME=PATH"),
        (["--adapter", "x={a}", "--adapter", "x={a}"], "two slots are called x"),
        (["--adapter", "x y={a}"], "'x y': a slot's name"),
        (["--adapter", "x={a}", "--batch-input", "nothing"], "no input 'nothing' with a batch axis"),
        (["--adapter", "x={a}", "--resident", "inputs", "--slot-rank", "2"], "give --slot-rank 4 or more"),
        # Tensors of 3 TB.
        (
            ["--adapter", "x={a}", "--resident", "inputs", "--slot-rank", "100000000000"],
            "give --slot-rank 4 or more, up to 1024",
        ),
    ],
)
@group("llama")
def test_bad_arguments(arguments, said, tmp_path, capsys):
    given = [argument.format(a=tiny.adapter("llama")) for argument in arguments]
    base = str(tiny.base_onnx("llama", "dynamo"))
    assert _run(["bank-onnx", "--base", base, "-o", str(tmp_path / "m.onnx"), *given], False) in (1, 2)
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arch", "exporter", "said"),
    [
        pytest.param(*case, marks=group(case[0]))
        for case in (("llama", "dynamo", 0), ("gpt2", "torchscript", 0), ("qwen2_moe", "torchscript", 1))
    ],
)
def test_what_can_not_be_verified_is_said(arch, exporter, said, tmp_path, capsys):
    """TorchScript's experts read all rows, tiled as often as there are experts: not followed, and said."""
    base, adapter = tiny.base_onnx(arch, exporter), tiny.adapter(arch)
    arguments = [
        "bank-onnx",
        "--base",
        str(base),
        "--adapter",
        f"a={adapter}",
        "-o",
        str(tmp_path / "m.onnx"),
    ]
    assert _run(arguments, False) == 0
    assert capsys.readouterr().out.count("the graph doesn't tell the first axis") == said


@pytest.fixture
def headless(tmp_path):
    """A BERT whose classifier has a bias of zeros, as every fresh one has: dynamo's optimiser drops it."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "zero-bias"
    shutil.copytree(tiny.checkpoint("bert"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"].zero_()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def zero_bias_reference(adapter, row):
    model = tiny.build("bert")
    model.classifier.bias.data.zero_()
    with tiny.quiet(), torch.no_grad():
        model = PeftModel.from_pretrained(model, adapter) if adapter else model
        return model.eval()(**tiny.ARCHITECTURES["bert"].inputs()).logits.numpy()[row]


@pytest.mark.slow
@group("bert")
def test_two_heads_on_a_base_whose_bias_was_dropped(headless, tmp_path):
    named = {name: tiny.adapter("bert", "modules_to_save", seed) for seed, name in enumerate(("a", "b"))}
    bank_onnx(headless, named, tmp_path / "bank.onnx")
    rows = ["b", "a"]
    got = exposed.run_bank("bert", tmp_path / "bank.onnx", rows)
    for number, row in enumerate(rows):
        assert tiny.relative_error(got[number], zero_bias_reference(named[row], number)) < TOLERANCE


@group("llama")
def test_everything_wrong_with_all_adapters_is_listed(tmp_path):
    named = {
        "gpt2": tiny.adapter("gpt2"),
        "good": tiny.adapter("llama"),
        "dora": tiny.adapter("llama", "dora"),
    }
    with pytest.raises(SiteError, match="2 of 3 adapters don't fit") as caught:
        exposed.bank("llama", "dynamo", named, tmp_path)
    said = str(caught.value)
    assert said.count("not found") == 8
    assert said.count("DoRA has a factor") == 14


@group("llama")
def test_a_converted_dora_is_dora(tmp_path):
    """Its factor can't differ by row: it must not be left out in silence."""
    from lora_export import convert_adapter

    graph = exposed.swap("llama", "dynamo", tiny.adapter("llama", "dora"), tmp_path, dora=True)
    for suffix in (".safetensors", ".onnx_adapter"):
        convert_adapter(tiny.adapter("llama", "dora"), graph, tmp_path / f"d{suffix}")
        with pytest.raises(SiteError, match="14 parameters"):
            exposed.bank("llama", "dynamo", {"d": tmp_path / f"d{suffix}"}, tmp_path)
        with pytest.raises(SiteError, match="14 parameters"):
            exposed.swap("llama", "dynamo", tmp_path / f"d{suffix}", tmp_path / suffix)


@group("llama")
def test_a_file_converted_for_another_base_is_refused(tmp_path):
    from lora_export import convert_adapter, merge_onnx, swap_onnx

    graph = exposed.swap("llama", "dynamo", tiny.adapter("llama"), tmp_path)
    convert_adapter(tiny.adapter("llama"), graph, tmp_path / "a.safetensors")
    other, out = tiny.base_onnx("llama", "torchscript"), tmp_path / "m.onnx"
    for attempt in (
        lambda: bank_onnx(other, {"a": tmp_path / "a.safetensors"}, out),
        lambda: swap_onnx(other, out, adapter=tmp_path / "a.safetensors"),
        lambda: merge_onnx(other, tmp_path / "a.safetensors", out),
    ):
        with pytest.raises(AdapterError, match="converted for another base"):
            attempt()
    assert not out.exists()
    # Its own base takes it, and it is the adapter that it was.
    merge_onnx(tiny.base_onnx("llama", "dynamo"), tmp_path / "a.safetensors", out)
    got = tiny.run(out, tiny.feeds("llama", out))
    assert tiny.relative_error(got, tiny.reference("llama", tiny.adapter("llama"))) < TOLERANCE


@group("llama")
def test_nothing_is_merged_into_a_graph_with_exposed_lora(tmp_path):
    """Its record names the base that adapters were converted for."""
    from lora_export import GraphError, merge_onnx

    for graph in (
        exposed.swap("llama", "dynamo", tiny.adapter("llama"), tmp_path / "s"),
        exposed.bank("llama", "dynamo", adapters("llama"), tmp_path / "b"),
    ):
        with pytest.raises(GraphError, match="has exposed LoRA already"):
            merge_onnx(graph, tiny.adapter("llama"), tmp_path / "m.onnx")


@group("llama")
def test_what_a_smaller_type_loses_is_said(tmp_path):
    """Values that float16 can't hold: the slot would be the base, in silence."""
    adapter = load_adapter(tiny.adapter("llama"))
    for module in adapter.modules.values():
        object.__setattr__(module, "lora_b", module.lora_b * np.float32(1e-9))
    half = {"model.layers.0.self_attn.q_proj.weight": small_graphs.random(64, 64, seed=1).astype(np.float16)}
    product = "y = MatMul (x, model_layers_0_self_attn_q_proj_weight)"
    text = f"g (float16[b,s,64] x) => (float16[b,s,64] y) {{ {product} }}"
    base = small_graphs.save(small_graphs.graph(text, half), tmp_path)
    report = bank_onnx(base, {"tiny": adapter}, tmp_path / "m.onnx", allow_unmatched=True)
    assert any("became 0" in warning for warning in report.warnings)
