"""How a model is called for the reference: names, inputs, outputs, modules that run twice or never."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import onnxruntime
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, HEADS, HIDDEN, KV_HEADS, build
from torch import nn
from torch_cases import ONE, feeds_of, float64_throughout, peft_answer, peft_model, reference

from lora_export.adapter import Adapter, LoraModule
from lora_export.base.capture.capture import capture_checkpoint
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.names import Names
from lora_export.errors import AdapterError, BackendError, CheckpointError
from lora_export.formats import load_adapter
from lora_export.runtimes.torch.reference import TorchReference


@pytest.mark.xdist_group("bert")
def test_other_spellings_of_paths():
    plain = load_adapter(tiny.adapter("bert", "modules_to_save"))
    backbone = dataclasses.replace(
        plain,
        extras={},
        modules={k: m for k, m in plain.modules.items() if k.startswith("bert.")},
        config={**plain.config, "modules_to_save": None},
    )

    def respelled(change, **more):
        modules = [dataclasses.replace(m, path=change(m.path)) for m in backbone.modules.values()]
        return dataclasses.replace(backbone, modules={m.key: m for m in modules}, **more)

    spellings = {
        "a": backbone,
        "kohya": respelled(lambda path: path.replace(".", "_"), flattened=True),
        "shorter": respelled(lambda path: path.removeprefix("bert.")),
        "wrapped": respelled(lambda path: f"0.auto_model.{path}"),
    }
    model = reference("bert", "float32", **spellings)
    wanted = model.run(feeds_of("bert"), ONE)["logits"]
    for name in spellings:
        assert np.array_equal(model.run(feeds_of("bert"), ((name, 1.0),))["logits"], wanted)


@pytest.mark.xdist_group("vit")
def test_names_of_an_older_transformers():
    plain = load_adapter(tiny.adapter("vit"))
    table = Names(Checkpoint.open(tiny.checkpoint("vit")))
    modules = []
    for lora in plain.modules.values():
        (part,) = table.find(f"{lora.path}.weight")
        modules.append(dataclasses.replace(lora, path=part.tensor.removesuffix(".weight")))
    assert {m.path for m in modules}.isdisjoint(
        m.path for m in plain.modules.values() if "attention" in m.path
    )
    old = dataclasses.replace(plain, modules={m.key: m for m in modules})
    model = reference("vit", "float32", a=plain, old=old)
    wanted = model.run(feeds_of("vit"), ONE)["logits"]
    assert np.array_equal(model.run(feeds_of("vit"), (("old", 1.0),))["logits"], wanted)


@pytest.mark.xdist_group("qwen2_moe")
def test_an_expert_of_an_older_transformers():
    """It was a Linear of its own; now it is some rows of a stacked parameter."""
    rng = np.random.default_rng(0)
    path = "model.layers.0.mlp.experts.2.up_proj"
    lora = LoraModule(
        path, "linear", rng.standard_normal((4, 64)) / 8, rng.standard_normal((24, 4)), alpha=6.0, rank=4
    )
    adapter = Adapter("old", "", "peft", {lora.key: lora})
    model = build("qwen2_moe").double()
    model.set_experts_implementation("eager")
    left, right = lora.factors(dtype=np.float64)
    with torch.no_grad(), float64_throughout():
        # gate_proj's rows come first, then up_proj's.
        model.model.layers[0].mlp.experts.gate_up_proj[2, 24:] += torch.from_numpy(left @ right)
        wanted = model(**ARCHITECTURES["qwen2_moe"].inputs()).logits.numpy()
    got = reference("qwen2_moe", a=adapter).run(feeds_of("qwen2_moe"), ONE)["logits"]
    assert tiny.relative_error(got, wanted) < 1e-13
    assert tiny.relative_error(tiny.base_reference("qwen2_moe"), wanted) > 1e-3


@pytest.mark.xdist_group("qwen2")
def test_a_tied_head_changes_alone():
    """As in PEFT without a merge: the embedding, whose weight it shares, stays."""
    head = build("qwen2").lm_head.weight.detach().numpy()
    config = {"modules_to_save": ["lm_head"]}
    adapter = Adapter("head", "", "peft", {}, extras={"lm_head.weight": 2 * head}, config=config)
    model = reference("qwen2", a=adapter)
    base = model.run(feeds_of("qwen2"))["logits"]
    assert np.array_equal(model.run(feeds_of("qwen2"), ONE)["logits"], 2 * base)


@pytest.mark.xdist_group("bert")
def test_what_the_adapter_brings_may_be_missing_in_the_checkpoint(tmp_path):
    path = tiny.adapter("bert", "modules_to_save")
    folder = shutil.copytree(tiny.checkpoint("bert"), tmp_path / "base")
    values = load_file(folder / "model.safetensors")
    left = {name: tensor for name, tensor in values.items() if not name.startswith("classifier")}
    save_file(left, folder / "model.safetensors", metadata={"format": "pt"})
    got = TorchReference(folder, "float64", {"a": load_adapter(path)}).run(feeds_of("bert"), ONE)["logits"]
    assert tiny.relative_error(got, peft_answer("bert", path)) < 1e-13
    with pytest.raises(CheckpointError, match="lacks 2 of the model's weights"):
        TorchReference(folder, "float64", {})


def in_two_steps(model, feeds, cut, state, position_ids):
    ids, mask = feeds["input_ids"], feeds["attention_mask"]
    past = {
        f"past_key_values.{layer}.{part}": np.zeros((len(ids), KV_HEADS, 0, HIDDEN // HEADS))
        for layer in range(2)
        for part in ("key", "value")
    }
    logits = []
    for start, end in ((0, cut), (cut, ids.shape[1])):
        step = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], **past}
        if position_ids:
            step["position_ids"] = np.arange(start, end)[None].repeat(len(ids), 0)
        result = model.run(step, state)
        logits.append(result["logits"])
        past = {
            name.replace("present", "past_key_values"): values
            for name, values in result.items()
            if name.startswith("present")
        }
    return np.concatenate(logits, 1), past


@pytest.mark.xdist_group("llama")
@pytest.mark.parametrize("position_ids", [True, False])
def test_a_cache_changes_nothing(position_ids):
    model = reference("llama", a=tiny.adapter("llama"))
    feeds = feeds_of("llama")
    for state in ((), ONE):
        whole = model.run(feeds, state)
        assert list(whole) == ["logits"]
        got, past = in_two_steps(model, feeds, 4, state, position_ids)
        assert tiny.relative_error(got, whole["logits"]) < 1e-13
        asked = model.run(feeds, state, ["present.1.value", "logits"])
        assert list(asked) == ["present.1.value", "logits"]
        assert tiny.relative_error(past["past_key_values.1.value"], asked["present.1.value"]) < 1e-13
        assert np.array_equal(asked["logits"], whole["logits"])


@pytest.mark.xdist_group("llama")
def test_as_a_captured_graph_with_a_cache(tmp_path):
    path = capture_checkpoint(tiny.checkpoint("llama"), tmp_path / "model.onnx", kv_cache=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {"input_ids": rng.integers(3, 100, (2, 3))}
    feeds["attention_mask"] = np.ones((2, 5), np.int64)
    feeds["attention_mask"][0, 0] = feeds["attention_mask"][1, 4] = 0
    feeds["position_ids"] = np.array([[1, 2, 3], [2, 3, 4]])
    for port in session.get_inputs()[3:]:
        feeds[port.name] = rng.standard_normal((2, KV_HEADS, 2, HIDDEN // HEADS)).astype(np.float32)
    got = reference("llama").run(feeds)
    names = [port.name for port in session.get_outputs()]
    assert list(got) == names
    for name, wanted in zip(names, session.run(names, feeds), strict=True):
        assert tiny.relative_error(wanted, got[name]) < 2e-6


@pytest.mark.parametrize(
    ("arch", "names", "vocab"),
    [
        pytest.param(arch, names, vocab, marks=pytest.mark.xdist_group(arch))
        for arch, names, vocab in [
            ("llama", ("logits",), 100),
            ("vit", ("logits",), None),
            ("t5", ("logits", "encoder_last_hidden_state"), 100),
        ]
    ],
)
def test_names_of_outputs(arch, names, vocab):
    model = reference(arch, "float32")
    assert model.output_names == names == tuple(model.run(feeds_of(arch)))
    assert model.vocab_size == vocab


@pytest.mark.xdist_group("llama")
def test_what_the_model_does_not_take():
    model = reference("llama", "float32")
    extra = {name: np.zeros((2, 7), np.int64) for name in ("token_type_ids", "pixels")}
    with pytest.raises(BackendError) as caught:
        model.run(feeds_of("llama") | extra | {"past_key_values.1.key": np.zeros((2, 2, 0, 16))})
    said = " ".join(caught.value.problems)
    for name in (*extra, "past_key_values.0.key", "past_key_values.0.value", "past_key_values.1.key"):
        assert f"{name}:" in said
    with pytest.raises(BackendError, match=r"has no output present\.9\.key"):
        model.run(feeds_of("llama"), (), ["present.9.key"])
    with pytest.raises(BackendError, match="fails on the feeds"):
        model.run({"input_ids": np.full((1, 2), 10**6)})
    with pytest.raises(AdapterError, match="no adapter named a"):
        model.run(feeds_of("llama"), ONE)
    with pytest.raises(BackendError, match="no such modules"):
        model.run_with_modules(feeds_of("llama"), (), ["model.layers.7"])
    with pytest.raises(BackendError, match="can't run in dtype 'int8'"):
        reference("llama", "int8")


@pytest.mark.xdist_group("bert")
def test_a_model_without_a_cache():
    model = reference("bert", "float32")
    past = {f"past_key_values.0.{part}": np.zeros((2, 4, 1, 16)) for part in ("key", "value")}
    with pytest.raises(BackendError, match="no output present"):
        model.run(feeds_of("bert"), (), ["present.0.key"])
    with pytest.raises(BackendError):
        model.run(feeds_of("bert") | past)


@pytest.mark.parametrize(
    ("arch", "feature"),
    [
        pytest.param(arch, feature, marks=pytest.mark.xdist_group(arch))
        for arch, feature in [
            ("llama", "embedding"), ("gpt2", "dora"), ("conv", "plain"), ("qwen2_moe", "target_parameters"),
        ]
    ],
)  # fmt: skip
def test_modules_as_hooks_on_peft(arch, feature):
    path = tiny.adapter(arch, feature)
    model = reference(arch, a=path)
    paths = {lora.path for lora in load_adapter(path).modules.values()}
    outputs, got = model.run_with_modules(feeds_of(arch), ONE, paths)
    wanted, handles = {}, []
    theirs = peft_model(arch, path)
    for name in paths:

        def keep(_, args, kwargs, output, name=name):
            wanted[name] = (args[0] if args else kwargs["hidden_states"]).numpy(), output.numpy()

        module = theirs.get_submodule(f"base_model.model.{name}")
        handles.append(module.register_forward_hook(keep, with_kwargs=True))
    logits = peft_answer(arch, path)
    for handle in handles:
        handle.remove()
    assert tiny.relative_error(outputs["logits"], logits) < 1e-13
    assert got.keys() == wanted.keys() == paths
    for name in paths:
        for ours, oracle in zip(got[name], wanted[name], strict=True):
            assert ours.dtype == oracle.dtype
            assert ours.shape == oracle.shape
            assert tiny.relative_error(ours, oracle) < 1e-13
    _, base = model.run_with_modules(feeds_of(arch), (), paths)
    assert all(tiny.relative_error(base[name][1], got[name][1]) > 1e-3 for name in paths)


class Repeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3, dtype=torch.float64)
        self.idle = nn.Linear(4, 3)

    def forward(self, x, y):
        return self.inner(x), self.inner(input=y)


def test_a_module_that_runs_twice_or_never():
    module = Repeated()
    model = TorchReference.of_module(module, {})
    x, y, z = (np.random.default_rng(i).standard_normal((2 + i, 4)) for i in range(3))
    outputs, got = model.run_with_modules({"x": x, "y": y}, (), ["inner", "idle"])
    assert list(got) == ["inner"]
    assert np.array_equal(got["inner"][0], np.concatenate([x, y]))
    assert np.array_equal(got["inner"][1], np.concatenate(list(outputs.values())))
    outputs, got = model.run_with_modules({"x": x, "y": z[None]}, (), ["inner"])
    assert np.array_equal(got["inner"][0], np.concatenate([x.ravel(), z.ravel()]))
    assert np.array_equal(got["inner"][1], np.concatenate([v.ravel() for v in outputs.values()]))
