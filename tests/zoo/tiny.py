"""The zoo: tiny models, PEFT adapters on them, ONNX files of them by each exporter, and PyTorch's answers.

In a test::

    base = tiny.base_onnx("llama", "dynamo")        # exported once per process
    adapter = tiny.adapter("llama", "rslora")       # a PEFT folder
    … merge `adapter` into `base`, giving `merged` …
    got = tiny.run(merged, tiny.feeds("llama", merged))
    assert tiny.relative_error(got, tiny.reference("llama", adapter)) < 2e-6
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import logging
import math
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from exports_once import locked
from numpy.typing import NDArray
from sessions import session_of
from tiny_models import ARCHITECTURES, HEADS, HIDDEN, KV_HEADS, VOCAB, Architecture, build
from torch import nn

Array = NDArray[Any]
EXPORTERS = ("dynamo", "dynamo_noopt", "torchscript", "genai", "ort_fusions", "mobius")

# (architecture, exporter) → what happened when we tried, with the versions in constraints.txt.
UNSUPPORTED: dict[tuple[str, str], str] = {
    ("gpt2", "genai"): "NotImplementedError: the model is not currently supported",
    ("bert", "genai"): "NotImplementedError: the model is not currently supported",
    ("vit", "genai"): "ValueError: it wants a tokenizer beside every model",
    ("t5", "genai"): "NotImplementedError: the model is not currently supported",
    ("conv", "genai"): "ValueError: it wants a Hugging Face config.json",
    ("qwen2_moe", "genai"): "NotImplementedError: the model is not currently supported",
    ("conv", "mobius"): "ValueError: it wants a model_type in config.json",
}
# What an exporter builds as another model: other names (test_mobius.py), no classifier, an encoder alone.
OTHERS = {(arch, "mobius") for arch in ("gpt2", "bert", "vit", "t5")}


@functools.cache
def cache_folder() -> Path:
    """Return this process's folder for everything made once; removed at exit."""
    folder = Path(tempfile.mkdtemp(prefix="lora-export-zoo-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def shared_folder() -> Path:
    """Return the folder of what `_once` makes: one for all workers of a run of the tests."""
    shared = os.environ.get("LORA_EXPORT_TESTS_SHARED")
    return Path(shared) / "zoo" if shared else cache_folder()


@functools.cache
def checkpoint(arch: str) -> Path:
    """Return the checkpoint folder of ``arch``; do not change it."""
    return _once(shared_folder() / arch / "checkpoint", lambda folder: save_checkpoint(arch, folder))


@functools.cache
def adapter(arch: str, feature: str = "plain", seed: int = 0) -> Path:
    """Return a PEFT folder; do not change it."""
    folder = shared_folder() / arch / f"adapter-{feature}-{seed}"
    return _once(folder, lambda made: make_adapter(arch, made, feature, seed))


@functools.cache
def base_onnx(arch: str, exporter: str) -> Path:
    """Return the ONNX file of the base model; do not change it."""
    folder = shared_folder() / arch / exporter
    return _once(folder, lambda made: export(arch, exporter, made)) / "model.onnx"


def _once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Return a folder that the first worker makes, where it will be: some of what is made names its place."""
    done = folder.with_name(f"{folder.name}.done")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f"{folder.name}.lock")):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            done.touch()
    return folder


def pairs(*exporters: str) -> list[tuple[str, str]]:
    """Return every supported (architecture, exporter), of these exporters if any are given."""
    left_out = UNSUPPORTED.keys() | OTHERS
    return [(a, e) for a in ARCHITECTURES for e in exporters or EXPORTERS if (a, e) not in left_out]


# --- checkpoints and adapters ------------------------------------------------------------------------


def save_checkpoint(arch: str, folder: Path) -> Path:
    """Save the base as its library does: `save_pretrained`, or a bare safetensors file for ``conv``."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    model = build(arch)
    if not hasattr(model, "save_pretrained"):
        save_file(model.state_dict(), folder / "model.safetensors")
        return folder
    with quiet():
        model.save_pretrained(folder)
    if ARCHITECTURES[arch].causal:
        _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>"])}
    words |= {f"w{index}": index for index in range(3, VOCAB)}
    inner = Tokenizer(WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def make_adapter(arch: str, folder: Path, feature: str = "plain", seed: int = 0) -> Path:
    """Save a PEFT LoRA adapter whose every trained value is random and visible in the outputs.

    Args:
        arch: Key of `ARCHITECTURES`.
        folder: Where to; made if missing.
        feature: One of the architecture's ``features``.
        seed: Another seed gives another adapter of the same shape.
    """
    from peft import LoraConfig, get_peft_model

    spec = ARCHITECTURES[arch]
    assert feature in spec.features, f"{arch} has no feature {feature!r}"
    options = {"r": 4, "lora_alpha": 8, "target_modules": spec.targets} | _feature_options(spec, feature)
    with quiet():
        model = get_peft_model(build(arch), LoraConfig(**options))
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                _randomise(name, parameter, generator)
    with quiet():
        model.save_pretrained(folder)
    return folder


def _feature_options(spec: Architecture, feature: str) -> dict[str, Any]:
    """Return what ``feature`` changes in the `LoraConfig` of a plain adapter."""
    first, second, *_, last = spec.targets
    return {
        "plain": {},
        "rslora": {"use_rslora": True, "lora_alpha": 5},
        "patterns": {
            "rank_pattern": {first: 2, second: 6},
            "alpha_pattern": {last: 3, rf".*\.1\..*{first}": 5},
        },
        "dora": {"use_dora": True},
        "modules_to_save": {
            "modules_to_save": [spec.head],
            "target_modules": [name for name in spec.targets if name != spec.head],
        },
        "bias": {"bias": "all"},
        "lora_bias": {"lora_bias": True},
        "embedding": {"target_modules": [*spec.targets, spec.embedding]},
        "target_parameters": {"target_parameters": spec.parameters},
    }[feature]


def _randomise(name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    noise = torch.randn(parameter.shape, generator=generator)
    if "lora_magnitude" in name:
        parameter.mul_(1 + 0.2 * noise)
    elif "lora_embedding_A" in name:
        parameter.copy_(0.3 * noise)
    elif "lora_A" in name:
        parameter.copy_(noise / math.sqrt(parameter[0].numel()))
    elif "lora_" in name:
        parameter.copy_(0.05 * noise)
    else:
        parameter.add_(0.1 * noise)


# --- what PyTorch and PEFT say -----------------------------------------------------------------------


@functools.cache
def base_reference(arch: str) -> Array:
    """Return the base model's main output on the architecture's inputs."""
    return _answer(build(arch), arch)


@functools.cache
def reference(arch: str, adapter_path: Path, merged: bool = True) -> Array:
    """Return the main output of the base with the adapter, by PEFT in float32.

    Args:
        arch: Key of `ARCHITECTURES`.
        adapter_path: A PEFT folder.
        merged: After `merge_and_unload`; else with PEFT's own branches.
    """
    from peft import PeftModel

    with quiet():
        model = PeftModel.from_pretrained(build(arch), adapter_path)
        return _answer(model.merge_and_unload() if merged else model, arch)


def _answer(model: nn.Module, arch: str) -> Array:
    with torch.no_grad():
        output = model.eval()(**ARCHITECTURES[arch].inputs())
    logits: torch.Tensor = output if torch.is_tensor(output) else output.logits
    return logits.numpy()


def relative_error(got: Array, wanted: Array) -> float:
    """Return ‖got − wanted‖ / ‖wanted‖, computed in float64."""
    difference = got.astype(np.float64) - wanted.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(wanted.astype(np.float64)))


# --- what onnxruntime says ---------------------------------------------------------------------------


def feeds(arch: str, onnx_path: Path) -> dict[str, Array]:
    """Return the architecture's inputs under the graph's names; an empty past where the graph has one."""
    values = {name: tensor.numpy() for name, tensor in ARCHITECTURES[arch].inputs().items()}
    graph = onnx.load(onnx_path, load_external_data=False).graph
    initializers = {tensor.name for tensor in graph.initializer}
    batch = len(next(iter(values.values())))
    result: dict[str, Array] = {}
    for value in graph.input:
        if value.name in initializers:
            continue
        if ".lora_" in value.name or value.name == "lora.adapter_weights":
            continue
        if value.name.startswith("past_key_values."):
            result[value.name] = np.zeros((batch, KV_HEADS, 0, HIDDEN // HEADS), np.float32)
        elif value.name == "position_ids":
            result[value.name] = np.arange(values["input_ids"].shape[1])[None].repeat(batch, 0)
        else:
            result[value.name] = values[value.name]
    return result


def run(onnx_path: Path, inputs: dict[str, Array]) -> Array:
    """Return the graph's first output by onnxruntime on one CPU thread."""
    session = session_of(onnx_path, bool(_UNOPTIMISED))
    first = session.get_outputs()[0].name
    return np.asarray(session.run([first], inputs)[0])


_UNOPTIMISED: list[bool] = []


@contextlib.contextmanager
def unoptimised() -> Iterator[None]:
    """Let `run` compute node by node what the graph says.

    What ONNX Runtime folds into a convolution (a norm behind it), and the layout that it chooses, depend on
    what is beside it, and their last bits on the processor.
    """
    _UNOPTIMISED.append(True)
    try:
        yield
    finally:
        _UNOPTIMISED.pop()


# --- exporters ---------------------------------------------------------------------------------------


def export(arch: str, exporter: str, folder: Path) -> Path:
    """Export the base model ``arch`` to ``folder/model.onnx`` and print how long that took."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    started = time.perf_counter()
    with quiet(), torch.no_grad():
        _EXPORT[exporter](arch, path)
    print(f"zoo: {arch} by {exporter} in {time.perf_counter() - started:.1f} s")
    return path


def _exportable(arch: str) -> nn.Module:
    model = build(arch)
    if arch == "qwen2_moe":
        # The default dispatches tokens to experts in a loop over data: no exporter can trace it.
        model.set_experts_implementation("batched_mm")
    return model


def _export_dynamo(arch: str, path: Path, optimize: bool = True) -> None:
    spec = ARCHITECTURES[arch]
    torch.onnx.export(
        _exportable(arch),
        (),
        str(path),
        kwargs=spec.inputs(),
        dynamic_shapes=spec.dynamic,
        dynamo=True,
        optimize=optimize,
        verbose=False,
    )


def _export_torchscript(arch: str, path: Path) -> None:
    spec, model = ARCHITECTURES[arch], _exportable(arch)
    inputs, forward = spec.inputs(), model.forward
    # By position, and nothing else to see: else `logits_to_keep` and its like become inputs of the graph.
    model.forward = lambda *values: forward(**dict(zip(inputs, values, strict=True)))
    torch.onnx.export(
        model,
        tuple(inputs.values()),
        str(path),
        input_names=list(inputs),
        output_names=["logits"],
        dynamic_axes=spec.dynamic,
        dynamo=False,
        opset_version=17,
    )


def _export_genai(arch: str, path: Path) -> None:
    from onnxruntime_genai.models import builder

    source, cache = str(checkpoint(arch)), str(cache_folder() / "genai")
    options = builder.parse_extra_options(None, source, str(path.parent), "fp32", "cpu", cache, [])
    builder.create_model(None, source, str(path.parent), "fp32", "cpu", cache, **options)


def _export_ort_fusions(arch: str, path: Path) -> None:
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    config = OnnxConfig(dynamic=True, ort_fusions="cpu")
    exported = OnnxExporter().export(_exportable(arch), ARCHITECTURES[arch].inputs(), config=config)
    onnx_ir.save(exported.program, path, external_data=f"{path.name}.data")


def _export_mobius(arch: str, path: Path) -> None:
    from mobius.__main__ import main

    # The processor's form: q, k and v in one constant, GroupQueryAttention.
    with contextlib.redirect_stderr(io.StringIO()):
        main(["build", "--config", str(checkpoint(arch)), "--ep", "cpu", str(path.parent)])


_EXPORT = {
    "dynamo": _export_dynamo,
    "dynamo_noopt": functools.partial(_export_dynamo, optimize=False),
    "torchscript": _export_torchscript,
    "genai": _export_genai,
    "ort_fusions": _export_ort_fusions,
    "mobius": _export_mobius,
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' chatter: an export prints dozens of lines that are no news."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
