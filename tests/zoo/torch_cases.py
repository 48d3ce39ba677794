"""What tests of torch reference share."""

from __future__ import annotations

import contextlib
import functools

import tiny
import torch
from peft import PeftModel
from tiny_models import ARCHITECTURES, build

from lora_export.adapter import Adapter
from lora_export.formats import load_adapter
from lora_export.runtimes.torch.reference import TorchReference

ONE = (("a", 1.0),)


@contextlib.contextmanager
def float64_throughout():
    """Let transformers and PEFT mean float64 where they say float32: they look it up at every call."""
    single, to_single = torch.float32, torch.Tensor.float
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.float32 = torch.float = single
        torch.Tensor.float = to_single


@functools.cache
def peft_model(arch, path):
    base = build(arch).double()
    if hasattr(base, "set_experts_implementation"):
        base.set_experts_implementation("eager")  # its default takes no float64
    with tiny.quiet():
        return PeftModel.from_pretrained(base, path).double().eval()


def doubled(inputs):
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


def peft_answer(arch, path):
    model = peft_model(arch, path)
    with torch.no_grad(), float64_throughout():
        output = model(**doubled(ARCHITECTURES[arch].inputs()))
    return (output if torch.is_tensor(output) else output.logits).numpy()


def feeds_of(arch):
    return {name: tensor.numpy() for name, tensor in ARCHITECTURES[arch].inputs().items()}


def reference(arch, dtype="float64", **adapters):
    loaded = {n: a if isinstance(a, Adapter) else load_adapter(a) for n, a in adapters.items()}
    if arch == "conv":
        return TorchReference.of_module(build(arch).to(getattr(torch, dtype)), loaded, ["logits"])
    return TorchReference(tiny.checkpoint(arch), dtype, loaded)
