"""A graph lowered for ONNX Runtime's CUDA provider answers as PyTorch does, with rows padded on the right."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model

from lora_export import (
    AdapterSession,
    BackendError,
    EngineBuildError,
    GraphError,
    OutputError,
    bank_onnx,
    capture_onnx,
    check_parity,
    merge_onnx,
    swap_onnx,
)
from lora_export.base.lowering import cached_attention
from lora_export.base.lowering.rotary_tables import RotaryTables
from lora_export.cli import root
from lora_export.engines.prepare.prepare import admit
from lora_export.graph.captured import Captured
from lora_export.graph.onnx_file import load_graph
from lora_export.graph.proof import Proof

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}
ROWS, TOKENS, STEPS = 3, 9, 3
# Largest difference of logits relative to the largest one; float32 rounds by 1e-7 in each operator.
LIMIT = 3e-6


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def qwen2():
    """Biases of q, k and v."""
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES))


def qwen3():
    """Norms of each head of q and k, of a size for which the operator turns nothing itself."""
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=8))


def gemma2():
    """Soft capping, norms on both sides, and windows shorter than the texts in half of the layers."""
    sizes = {**SIZES, "num_hidden_layers": 4, "head_dim": 16}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, sliding_window=4))


def gpt2():
    """Layer norms, no rotary embedding, and as many heads of keys as of queries."""
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=64)
    return transformers.GPT2LMHeadModel(config)


def phi():
    """A rotary embedding of half of each head, whose halves are joined behind it."""
    return transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES, partial_rotary_factor=0.5))


def mistral(window):
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=window))


def saved(make, folder):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    return model


def trained(model, folder, seed=1):
    """Write an adapter whose every number counts, and give the model it is in."""
    torch.manual_seed(seed)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=targets))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(folder)
    peft.unload()
    return folder


def operators(path):
    proto = onnx.load(path, load_external_data=False)
    return Counter(node.op_type for node in proto.graph.node if node.domain == "com.microsoft")


def unread(path):
    """Return the nodes that nothing reads, which ONNX Runtime runs all the same."""
    graph = onnx.load(path, load_external_data=False).graph
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    return [node.name for node in graph.node if not read & set(node.output)]


def prompt():
    """Return ids and a mask of rows of different lengths, padded on the right."""
    ids = np.random.default_rng(0).integers(3, 99, (ROWS, TOKENS))
    mask = np.ones_like(ids)
    mask[1, -4:], mask[2, -1:] = 0, 0
    return ids, mask


def generated(run):
    """Return the logits of a prompt's tokens that are not padding, and those of the steps behind it."""
    ids, mask = prompt()
    state, found = None, []
    for step in range(STEPS + 1):
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        logits, state = run(ids, mask, positions, state)
        found.append(logits[mask.astype(bool)] if step == 0 else logits[:, 0])
        ids = np.random.default_rng(step).integers(3, 99, (ROWS, 1))
        mask = np.concatenate([mask, np.ones_like(ids)], 1)
    return found


def of_torch(model):
    def run(ids, mask, positions, state):
        with torch.no_grad():
            given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            found = model(
                **{name: torch.from_numpy(value) for name, value in given.items()},
                past_key_values=state,
                use_cache=True,
            )
        return found.logits.numpy(), found.past_key_values

    return generated(run)


def of_graph(path, run=None):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_outputs()]

    def step(ids, mask, positions, state):
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feeds = {}
        for port in session.get_inputs():
            if port.name in given:
                feeds[port.name] = given[port.name]
            elif port.name.startswith("past"):
                empty = np.zeros((len(ids), port.shape[1], 0, port.shape[3]), np.float32)
                feeds[port.name] = (
                    empty if state is None else state[port.name.replace("past_key_values", "present")]
                )
        found = run(feeds) if run else dict(zip(names, session.run(names, feeds), strict=True))
        return found["logits"], found

    return generated(step)


def check_equal(actual, expected):
    for got, want in zip(actual, expected, strict=True):
        assert np.abs(got - want).max() <= LIMIT * np.abs(want).max()


@pytest.mark.parametrize(
    ("make", "trace", "grouped", "norms", "rotary"),
    [
        pytest.param(llama, "loaded", 3, 6, 0, id="llama"),
        pytest.param(gemma2, "outline", 2, 8, 4, id="gemma2, in outline", marks=pytest.mark.proven),
        pytest.param(qwen2, "loaded", 3, 6, 0, id="qwen2"),
        pytest.param(qwen3, "loaded", 3, 6, 6, id="qwen3"),
        pytest.param(gpt2, "loaded", 2, 5, 0, id="gpt2"),
        pytest.param(phi, "loaded", 3, 3, 6, id="phi"),
    ],
)
def test_prompts_and_steps_are_pytorchs(make, trace, grouped, norms, rotary, tmp_path):
    model = saved(make, tmp_path / "base")
    graph, _ = capture_onnx(
        tmp_path / "base", tmp_path / "m.onnx", kv_cache=True, trace=trace, runtime="ort-cuda"
    )
    found = operators(graph)
    assert found["GroupQueryAttention"] == grouped
    skips = found["SkipSimplifiedLayerNormalization"] + found["SkipLayerNormalization"]
    assert skips == norms
    assert [node.op_type for node in load_graph(graph).graph].count("RotaryEmbedding") == rotary
    assert Captured.from_metadata(load_graph(graph).model.metadata_props).padding == "right"
    assert not unread(graph)
    check_equal(of_graph(graph), of_torch(model))


@pytest.mark.proven
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves(dtype, tmp_path):
    """The capture compares them with PyTorch itself; bfloat16, which no CPU runs, by a twin in float32."""
    saved(llama, tmp_path / "base")
    graph, _ = capture_onnx(
        tmp_path / "base", tmp_path / "m.onnx", dtype=dtype, kv_cache=True, runtime="ort-cuda"
    )
    assert operators(graph) == {"GroupQueryAttention": 3, "SkipSimplifiedLayerNormalization": 6}
    metadata = load_graph(graph).model.metadata_props
    assert Proof.from_metadata(metadata).of == ("model" if dtype == "float16" else "twin")
    tables = [value for name, value in load_graph(graph).graph.initializers.items() if "lowered" in name]
    assert sum(value.dtype.name == dtype.upper() for value in tables) == 2


@pytest.fixture(scope="module")
def llama_graph(tmp_path_factory):
    """Return a folder with a checkpoint, two adapters, and the graph that was lowered from the checkpoint."""
    folder = tmp_path_factory.mktemp("lowered")
    model = saved(llama, folder / "base")
    for seed, name in enumerate("ab", 1):
        trained(model, folder / name, seed)
    capture_onnx(folder / "base", folder / "base.onnx", kv_cache=True, runtime="ort-cuda")
    return folder


def with_adapter(folder, name):
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    return PeftModel.from_pretrained(model, folder / name).eval()


def test_merged(llama_graph, tmp_path):
    merge_onnx(llama_graph / "base.onnx", llama_graph / "a", tmp_path / "merged.onnx")
    check_equal(of_graph(tmp_path / "merged.onnx"), of_torch(with_adapter(llama_graph, "a")))
    report = check_parity(llama_graph / "base", tmp_path / "merged.onnx", llama_graph / "a", samples=6)
    assert report.passed, report
    assert any("prompts are padded on the right" in note for note in report.notes)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(llama, id="llama"),
        pytest.param(qwen2, id="qwen2, with biases, in outline", marks=pytest.mark.proven),
    ],
)
def test_a_folder_is_merged_at_once(make, tmp_path):
    """Queries, keys and values are one product: a merged weight gets no branches beside it."""
    model = saved(make, tmp_path / "base")
    trained(model, tmp_path / "a")
    kind = type(model)
    merge_onnx(tmp_path / "base", tmp_path / "a", tmp_path / "m.onnx", kv_cache=True, runtime="ort-cuda")
    graph = load_graph(tmp_path / "m.onnx").graph
    attentions = [node for node in graph if node.op_type == "GroupQueryAttention"]
    assert [node.inputs[1:3] for node in attentions] == [(None, None)] * 3
    assert not [name for name in graph.initializers if "q_proj" in name]
    merged = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "a").eval()
    check_equal(of_graph(tmp_path / "m.onnx"), of_torch(merged))
    report = check_parity(tmp_path / "base", tmp_path / "m.onnx", tmp_path / "a", samples=4)
    assert report.passed, report


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"bias": "all", "target_modules": ["q_proj", "up_proj"]}, id="biases"),
        pytest.param({"modules_to_save": ["q_proj"], "target_modules": ["v_proj"]}, id="a projection whole"),
    ],
)
def test_what_an_adapter_replaces_of_a_packed_projection(settings, tmp_path):
    model = saved(qwen2, tmp_path / "base")
    peft = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                # Like the base's, as after a training: that tells how a square matrix lies.
                parameter.add_(torch.randn(parameter.shape) * 0.02)
    peft.save_pretrained(tmp_path / "a")
    capture_onnx(tmp_path / "base", tmp_path / "b.onnx", kv_cache=True, runtime="ort-cuda")
    assert not [name for name in load_graph(tmp_path / "b.onnx").graph.initializers if "q_proj" in name]
    merge_onnx(tmp_path / "b.onnx", tmp_path / "a", tmp_path / "m.onnx")
    base = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "base")
    check_equal(
        of_graph(tmp_path / "m.onnx"), of_torch(PeftModel.from_pretrained(base, tmp_path / "a").eval())
    )


def test_a_session_swaps_adapters(llama_graph, tmp_path):
    swap_onnx(llama_graph / "base.onnx", tmp_path / "swap.onnx", adapter=llama_graph / "a")
    session = AdapterSession(tmp_path / "swap.onnx")
    for name in "ab":
        session.load_adapter(name, llama_graph / name)
    for name in "aba":
        found = of_graph(tmp_path / "swap.onnx", lambda feeds, name=name: session.run(feeds, name))
        check_equal(found, of_torch(with_adapter(llama_graph, name)))
    base = transformers.LlamaForCausalLM.from_pretrained(llama_graph / "base").eval()
    check_equal(of_graph(tmp_path / "swap.onnx", session.run), of_torch(base))


def test_a_bank_has_an_adapter_for_each_row(llama_graph, tmp_path):
    adapters = {name: llama_graph / name for name in "ab"}
    bank_onnx(llama_graph / "base.onnx", adapters, tmp_path / "bank.onnx")
    session = AdapterSession(tmp_path / "bank.onnx")
    rows = ["a", "b", "b"]
    found = of_graph(tmp_path / "bank.onnx", lambda feeds: session.run(feeds, adapters=rows))
    expected = {name: of_torch(with_adapter(llama_graph, name)) for name in "ab"}
    tokens = prompt()[1].sum(1)
    owners = [np.repeat(rows, tokens), *[np.array(rows)] * STEPS]
    for step, owner in enumerate(owners):
        want = np.where((owner == "a")[:, None], expected["a"][step], expected["b"][step])
        assert np.abs(found[step] - want).max() <= LIMIT * np.abs(want).max()


def feeds_of(mask, tokens, session):
    rows, total = mask.shape
    feeds = {
        "input_ids": np.full((rows, tokens), 5),
        "attention_mask": mask,
        "position_ids": np.tile(np.arange(total - tokens, total), (rows, 1)),
    }
    for port in session.values():
        if port.name.startswith("past"):
            feeds[port.name] = np.zeros((rows, port.shape[1], total - tokens, port.shape[3]), np.float32)
    return feeds


@pytest.mark.parametrize(
    ("mask", "tokens", "text"),
    [
        ([[1, 1, 1], [0, 1, 1]], 3, "row 2 does not begin with a token"),
        ([[0, 0, 0], [1, 1, 1]], 3, "row 1 does not begin with a token"),
        ([[1, 1, 1], [1, 0, 1]], 3, "row 2 has padding between its tokens"),
        ([[0, 1, 1]], 1, "row 1 does not begin with a token"),
        ([[1, 1, 1, 0]], 2, "a new token of row 1 is padding, behind a past"),
        ([[1, 1, 1, 1]] * 2, 2, "2 new tokens of 2 rows behind a past"),
        ([[1, 2, 1]], 3, "other numbers than 0 and 1"),
        ([[1, 1, 0, 1]], 1, "those of row 1 do not count its tokens"),
    ],
)
def test_a_session_refuses_other_padding(mask, tokens, text, llama_graph, tmp_path):
    swap_onnx(llama_graph / "base.onnx", tmp_path / "swap.onnx", adapter=llama_graph / "a")
    session = AdapterSession(tmp_path / "swap.onnx")
    feeds = feeds_of(np.array(mask), tokens, session._model.inputs)
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in feeds.items()}
    for given in (feeds, values):
        with pytest.raises(BackendError, match="padded on the right only") as refused:
            session.run(given)
        assert text in refused.value.problems[0]
        assert "--runtime portable" in refused.value.hint


def test_several_tokens_behind_a_past_of_one_row(llama_graph, tmp_path):
    """Chunks of a prompt give what the whole prompt gives."""
    swap_onnx(llama_graph / "base.onnx", tmp_path / "swap.onnx", adapter=llama_graph / "a")
    session = AdapterSession(tmp_path / "swap.onnx")
    feeds = feeds_of(np.ones((1, 7), np.int64), 7, session._model.inputs)
    feeds["input_ids"] = np.arange(20, 27)[None]
    whole = session.run(feeds)
    first = session.run(
        {name: value[:, :4] if value.ndim == 2 else value for name, value in feeds.items()}, outputs=None
    )
    second = {name: feeds[name][:, 4:] for name in ("input_ids", "position_ids")}
    second["attention_mask"] = feeds["attention_mask"]
    second |= {
        name.replace("present", "past_key_values"): value
        for name, value in first.items()
        if name.startswith("present")
    }
    found = session.run(second)
    np.testing.assert_allclose(found["logits"], whole["logits"][:, 4:], atol=1e-5)


@pytest.mark.parametrize(("window", "grouped"), [(4, 0), (63, 0), (64, 3)])
def test_a_window_is_seen_however_long_it_is(window, grouped, tmp_path):
    """With 64 positions one of 64 hides nothing."""
    model = saved(lambda: mistral(window), tmp_path / "base")
    graph, _ = capture_onnx(tmp_path / "base", tmp_path / "m.onnx", kv_cache=True, runtime="ort-cuda")
    assert operators(graph)["GroupQueryAttention"] == grouped
    padding = Captured.from_metadata(load_graph(graph).model.metadata_props).padding
    assert padding == ("right" if grouped else "any")
    check_equal(of_graph(graph), of_torch(model))


@pytest.mark.proven
@pytest.mark.parametrize("fault", ["scale", "tokens"])
def test_a_wrong_lowering_is_not_written(fault, tmp_path, monkeypatch):
    saved(llama, tmp_path / "base")
    write, count = cached_attention._write, cached_attention._counts

    def with_another_scale(graph, found, *more):
        found.node.attributes["scale"] = ir.AttrFloat32("scale", 0.2)
        write(graph, found, *more)

    def of_whole_rows(graph):
        """Return counts of a mask in which padding is a token."""
        seqlens, total = count(graph)
        tokens = seqlens.producer().inputs[0].producer().inputs[0].producer()
        ones = ir.node("Equal", [tokens.inputs[0]] * 2)
        numbers = ir.node("Cast", [ones.outputs[0]], {"to": int(ir.DataType.INT64)})
        graph.insert_before(tokens, [ones, numbers])
        tokens.replace_input_with(0, numbers.outputs[0])
        return seqlens, total

    if fault == "scale":
        monkeypatch.setattr(cached_attention, "_write", with_another_scale)
    else:
        monkeypatch.setattr(cached_attention, "_counts", of_whole_rows)
    with pytest.raises(GraphError, match="answers otherwise than PyTorch"):
        capture_onnx(
            tmp_path / "base", tmp_path / "m.onnx", kv_cache=True, trace="loaded", runtime="ort-cuda"
        )
    assert not (tmp_path / "m.onnx").exists()


def test_an_encoder_has_its_norms_fused_and_takes_every_padding(tmp_path):
    config = transformers.BertConfig(**{key: SIZES[key] for key in SIZES if "key_value" not in key})
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "base")
    graph, _ = capture_onnx(tmp_path / "base", tmp_path / "m.onnx", runtime="ort-cuda")
    assert operators(graph) == {"SkipLayerNormalization": 6}
    assert check_parity(tmp_path / "base", graph, samples=4).passed


@pytest.mark.proven
def test_a_portable_graph_is_not_taken_for_a_lowered_one(tmp_path, monkeypatch):
    """From the cache of captures each runtime has a graph of its own."""
    monkeypatch.setenv("LORA_EXPORT_CACHE", str(tmp_path / "cache"))
    saved(llama, tmp_path / "base")
    for number, runtime in enumerate(["portable", "ort-cuda", "portable", "ort-cuda"]):
        graph, _ = capture_onnx(
            tmp_path / "base", tmp_path / f"{number}.onnx", kv_cache=True, fused=True, runtime=runtime
        )
        assert bool(operators(graph)) is (runtime == "ort-cuda")


def test_engines_are_not_built_from_it(llama_graph):
    with pytest.raises(EngineBuildError) as refused:
        admit(load_graph(llama_graph / "base.onnx"), {"tensorrt-rtx": ["8.9"]})
    assert "com.microsoft.GroupQueryAttention" in "\n".join(refused.value.problems)
    assert "--runtime portable" in refused.value.hint


def test_the_verbs(llama_graph, tmp_path):
    given = ["--adapter", str(llama_graph / "a"), "--runtime", "ort-cuda", "--kv-cache"]
    out = ["-o", str(tmp_path / "s.onnx")]
    result = CliRunner().invoke(root, ["swap-onnx", "--base", str(llama_graph / "base"), *given, *out])
    assert result.exit_code == 0, result.output
    assert "lowered to ort-cuda: 3 GroupQueryAttention, 6 norms" in result.output
    result = CliRunner().invoke(root, ["inspect", str(tmp_path / "s.onnx")])
    assert "rows padded on the right only" in result.output
    base = ["swap-onnx", "--base", str(llama_graph / "base.onnx"), *given, "-o", str(tmp_path / "t.onnx")]
    result = CliRunner().invoke(root, base)
    assert result.exit_code == 1
    assert "--kv-cache and --runtime can't change how it was captured" in str(result.exception)


def test_an_unknown_runtime(tmp_path):
    with pytest.raises(OutputError, match="no runtime 'cuda'") as refused:
        capture_onnx(tmp_path, tmp_path / "m.onnx", runtime="cuda")
    assert "portable, ort-cuda" in refused.value.hint


@pytest.mark.parametrize(
    ("angle", "has_tables"),
    [
        ("Mul (floats, frequencies)", True),
        # Scaled by how many there are.
        ("Div (products, most)", False),
    ],
)
def test_angles_of_one_position_do_not_depend_on_others(angle, has_tables):
    text = f"""
        <ir_version: 10, opset_import: ["" : 23]>
        g (int64[batch, sequence] position_ids, float[batch, 4, sequence, 16] x) => (float[a, b, c, d] y)
        <int64[1] two = {{2}}, float[1, 1, 8] frequencies = {{1.0, 0.5, 0.25, 0.12, 0.06, 0.03, 0.01, 0}}> {{
            axes = Unsqueeze (position_ids, two)
            floats = Cast <to = 1> (axes)
            products = Mul (floats, frequencies)
            largest = ReduceMax <keepdims = 1> (floats)
            most = Add (largest, frequencies)
            angles = {angle}
            cosines = Cos (angles)
            sines = Sin (angles)
            y = RotaryEmbedding (x, cosines, sines)
        }}"""
    model = ir.from_onnx_text(text)
    values = {value.name: value for node in model.graph for value in node.outputs}
    for name in ("cosines", "sines"):
        values[name].shape = ir.Shape(["batch", "sequence", 8])
        values[name].type = ir.TensorType(ir.DataType.FLOAT)
    captured = Captured(kind="decoder", kv_cache=True, dtype="float32", largest={"total_sequence": 40})
    rotary = values["y"].producer()
    tables = RotaryTables(model, captured).of(rotary, rotary)
    assert (tables is not None) is has_tables
    if tables:
        places, frequencies = np.arange(40)[:, None], model.graph.initializers["frequencies"].const_value
        np.testing.assert_allclose(
            tables[0].const_value.numpy(), np.cos(places * frequencies.numpy()[0]), atol=1e-5
        )
