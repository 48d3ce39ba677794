"""A checkpoint's own Python is never run, by no verb, whatever stands on stdin."""

import ast
import contextlib
import json
import os
import shutil
from pathlib import Path

import preloaded
import pytest
import tiny
import torch
import transformers
from exposed_models import group
from planted import AUTO_MAP, plant
from safetensors.torch import load_file

from lora_export.base.capture.loading import load_model
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.meta_model import build_model
from lora_export.base.checkpoint.own_code import code_notes, never_asked, why_not_built
from lora_export.errors import CheckpointError

# What transformers can't build without the code, and what it can.
FOREIGN = {
    "type": {"model_type": "x", "architectures": ["XModel"]},
    "architecture": {"architectures": ["XModel"]},
    "no type": {"model_type": None, "architectures": ["XModel"]},
    "an auto class": {"model_type": "x", "architectures": ["AutoModelForCausalLM"]},
    "a function": {"architectures": ["pipeline"]},
}
NATIVE = {"known to transformers": {}, "code of another repository": {"_name_or_path": "{folder}"}}


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "executed"


@pytest.fixture
def asked(tmp_path):
    """Run a verb with a "y" for every question, as `yes |` does."""

    def call(*arguments):
        env = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
        done = preloaded.run(arguments, env=env, input="y\n" * 50)
        assert "Traceback" not in done.stderr, done.stderr
        assert "[y/N]" not in done.stdout + done.stderr
        return done

    return call


def verbs(base, out):
    """Yield each verb that takes a checkpoint's folder, and whether it builds the model."""
    adapter, graph = tiny.adapter("llama"), tiny.base_onnx("llama", "dynamo")
    given = ("--base", base, "--adapter", adapter)
    yield False, ("merge", *given, "-o", out / "merged")
    yield True, ("capture-onnx", base, "-o", out / "captured.onnx")
    yield True, ("merge-onnx", *given, "-o", out / "merged.onnx")
    yield True, ("swap-onnx", *given, "-o", out / "swap.onnx")
    yield True, ("bank-onnx", "--base", base, "--adapter", f"a={adapter}", "-o", out / "bank.onnx")
    yield True, ("parity", "--reference", base, "--candidate", graph)
    yield False, ("inspect", adapter, "--base", base)
    yield (
        False,
        ("merge-onnx", "--base", graph, "--checkpoint", base, "--adapter", adapter, "-o", out / "g.onnx"),
    )
    yield (
        False,
        ("swap-onnx", "--base", graph, "--checkpoint", base, "--adapter", adapter, "-o", out / "h.onnx"),
    )


@group("llama")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["type", "known to transformers"])
def test_no_verb_runs_it_with_a_yes_on_stdin(kind, mark, asked, tmp_path):
    base = plant(tmp_path / "base", mark, **(FOREIGN | NATIVE)[kind])
    out = tmp_path / "out"
    out.mkdir()
    for builds, arguments in verbs(base, out):
        done = asked(*arguments)
        assert not mark.exists(), arguments[0]
        if builds and kind in FOREIGN:
            assert done.returncode == 1, (arguments, done.stdout, done.stderr)
            assert "auto_map names Python code of its own" in done.stderr
            assert "modeling_x.XModel" in done.stderr
        else:
            assert done.returncode == 0, (arguments, done.stderr)
            if arguments[0] != "inspect" and base in arguments[:3]:
                assert "configuration_x.XConfig" in done.stdout + done.stderr, arguments


@group("llama")
@pytest.mark.parametrize("kind", ["type", "known to transformers"])
def test_a_merge_keeps_the_code_beside_the_weights(kind, mark, tmp_path, capsys):
    """Who trusts the model runs the result as the base: with its code, which we never did."""
    from lora_export.cli import _run

    base = plant(tmp_path / "base", mark, **(FOREIGN | NATIVE)[kind])
    given = ["--base", str(base), "--adapter", str(tiny.adapter("llama"))]
    assert _run(["merge", *given, "-o", str(tmp_path / "out")], False) == 0
    assert "Python code of its own" in capsys.readouterr().out
    assert (
        _run(["merge", "--base", str(tiny.checkpoint("llama")), *given[2:], "-o", str(tmp_path / "p")], False)
        == 0
    )
    merged, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "p"))
    assert all(torch.equal(merged[name], plain[name]) for name in plain)
    assert (tmp_path / "out" / "modeling_x.py").read_bytes() == (base / "modeling_x.py").read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert not mark.exists()


@pytest.fixture
def yes(monkeypatch):
    """Answer yes to whatever is asked in this process, and count the questions."""
    questions = []
    monkeypatch.setattr("builtins.input", lambda text="": questions.append(text) or "y")
    return questions


@group("llama")
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_needs_the_code_is_refused_by_name(kind, mark, yes, tmp_path):
    base = plant(tmp_path / "base", mark, **FOREIGN[kind])
    with pytest.raises(CheckpointError, match="auto_map names Python code of its own") as caught:
        load_model(base, "float32")
    assert str(base) in caught.value.message
    assert caught.value.hint
    with pytest.raises(CheckpointError, match="never run"):
        build_model(Checkpoint.open(base))
    assert not mark.exists()
    assert not yes


@group("llama")
@pytest.mark.parametrize("kind", NATIVE)
def test_what_transformers_knows_is_built_by_its_own_class(kind, mark, yes, tmp_path):
    base = plant(tmp_path / "base", mark, **NATIVE[kind])
    checkpoint = Checkpoint.open(base)
    assert any("configuration_x.XConfig" in note for note in checkpoint.notes)
    for model in (load_model(base, "float32")[0], build_model(checkpoint)):
        assert type(model) is transformers.LlamaForCausalLM
    assert not mark.exists()
    assert not yes


# AutoModel has no class for an encoder-decoder, so for a part of that type transformers would ask.
PARTS = ["text_config", "vision_config"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["encoder-decoder", "x"])
def test_code_that_a_part_of_a_config_names(part, kind, mark, yes, tmp_path):
    """The part's own path is a stranger's word as well: transformers would import from there."""
    base = plant(tmp_path / "base", mark)
    hidden = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    llama, clip = {"model_type": "llama", **hidden}, {"model_type": "clip_vision_model", **hidden}
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    config |= {"text_config": llama, "vision_config": clip}
    encoders = {"encoder": llama, "decoder": llama} if kind == "encoder-decoder" else {}
    config[part] = {"model_type": kind, "auto_map": AUTO_MAP, "_name_or_path": str(base), **encoders}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        load_model(base, "float32")
    with pytest.raises(Exception):  # noqa: B017 - transformers' own, where the type is known
        build_model(Checkpoint.open(base))
    assert not mark.exists()
    assert not yes


@pytest.mark.parametrize("kind", ["encoder-decoder"])
def test_without_the_switch_that_part_would_be_asked_for(kind, mark, yes, tmp_path):
    """The oracle of the test above: the plant works, and transformers' own call asks and runs it."""
    base = plant(tmp_path / "base", mark)
    config = transformers.EncoderDecoderConfig(
        encoder={"model_type": "llama"}, decoder={"model_type": "llama"}
    )
    config.auto_map, config._name_or_path = AUTO_MAP, str(base)
    with contextlib.suppress(Exception):  # what the code does with it is no matter
        transformers.AutoModelForCausalLM.from_config(config)
    assert yes
    assert mark.exists()
    mark.unlink()
    with never_asked(), pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_config(config)
    assert not mark.exists()


def test_the_switch_is_as_before_when_the_last_has_ended():
    from transformers import dynamic_module_utils as asking

    before = asking.TIME_OUT_REMOTE_CODE
    first, second = never_asked(), never_asked()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert asking.TIME_OUT_REMOTE_CODE == 0
    second.__exit__(None, None, None)
    assert before == asking.TIME_OUT_REMOTE_CODE


@group("llama")
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["stranger/kernel", {"": "stranger/kernel@main"}])
def test_a_kernel_of_the_hub_is_not_fetched(key, value, mark, tmp_path):
    base = plant(tmp_path / "base", mark, auto_map=None, **{key: value})
    with pytest.raises(CheckpointError, match="stranger/kernel"):
        load_model(base, "float32")
    with pytest.raises(CheckpointError, match="stranger/kernel"):
        build_model(Checkpoint.open(base))


@group("llama")
def test_an_adapter_in_the_models_folder_is_not_applied(tmp_path):
    """PEFT would import what its config names (megatron_core), and only where PEFT is installed."""
    shutil.copytree(tiny.checkpoint("llama"), tmp_path / "base")
    shutil.copytree(tiny.adapter("llama"), tmp_path / "base", dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match="holds an adapter beside the model"):
        load_model(tmp_path / "base", "float32")


@pytest.mark.parametrize(
    "config", [{}, {"auto_map": {}}, {"auto_map": None}, {"auto_map": 3}, {"text_config": []}]
)
def test_a_config_that_names_no_code(config):
    assert not code_notes(config)
    assert not why_not_built(config)


def test_a_config_of_any_depth():
    config = {}
    for _ in range(100_000):
        config = {"text_config": config}
    assert not code_notes(config)


# Model classes of diffusers, looked up in a table of ours, run no code of a folder's and have no such switch.
OF_DIFFUSERS = {"diffusers_loading.py", "diffusers_kind.py"}
# Call → the argument with which it runs nothing of a stranger's, and its value.
SWITCHES = {
    "from_pretrained": ("trust_remote_code", False),
    "from_config": ("trust_remote_code", False),
    "load": ("weights_only", True),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_every_call_that_has_a_switch_sets_it(name):
    """Of transformers' and torch's; PEFT's ``PeftModel`` builds no base and has none."""
    argument, wanted = SWITCHES[name]
    found, wrong = 0, []
    for path in (Path(__file__).parents[2] / "lora_export").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            owner = ast.unparse(call.func.value)
            if call.func.attr != name or owner == "PeftModel" or (name == "load" and owner != "torch"):
                continue
            if path.name in OF_DIFFUSERS:
                continue
            found += 1
            values = [key.value for key in call.keywords if key.arg == argument]
            if not any(isinstance(value, ast.Constant) and value.value is wanted for value in values):
                wrong.append(f"{path.name}:{call.lineno}: {owner}.{name}")
    assert found
    assert not wrong
