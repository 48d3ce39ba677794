"""Exports of a llama of one layer with other weights, another adapter and other feeds for each seed."""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import broken_exports as broken
import numpy as np
import onnx
import tiny
from onnx import numpy_helper

from lora_export import Adapter, LoraModule, capture_onnx
from lora_export.parity.check import check_parity
from lora_export.parity.result import ParityReport

Array = tiny.Array


@functools.cache
def _template() -> Path:
    """Return a checkpoint whose weights are replaced."""
    folder = tiny.cache_folder() / "random"
    # The zoo's weights all differ: of equal ones, as a new model's norms are, the graph would keep one.
    model: Any = tiny.build("llama")
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    with tiny.quiet():
        model.save_pretrained(folder)
    return folder


@functools.cache
def _graph(dtype: str) -> bytes:
    output = tiny.cache_folder() / "random" / dtype / "base.onnx"
    with tiny.quiet():
        capture_onnx(_template(), output, dtype=dtype)
    return onnx.load(output).SerializeToString()


@dataclasses.dataclass(frozen=True)
class Case:
    """What a seed gives.

    Attributes:
        seed: It.
        mode: How it is exported.
        dtype: Of the graph.
        spread: Of the weights: activations grow with it.
        strength: Of the adapter ``a``.
        adapters: Name → adapter; a merged graph has the first.
        checkpoint: Folder of the weights.
        base: The graph of them.
    """

    seed: int
    mode: str
    dtype: str
    spread: float
    strength: float
    adapters: Mapping[str, Adapter]
    checkpoint: Path
    base: Path

    def __str__(self) -> str:
        ranks = sorted({module.rank for module in self.adapters["a"].modules.values()})
        return (
            f"{self.mode} {self.dtype}, spread {self.spread:.2g}, strength {self.strength:.2g}, ranks {ranks}"
        )

    def export(self, adapters: Mapping[str, Adapter]) -> Path:
        """Write the candidate with these adapters."""
        return broken.export(self.mode, self.base, adapters, self.base.parent)

    def check(self, candidate: Path, **options: Any) -> ParityReport:
        """Check a candidate with the right adapters."""
        right = {"a": self.adapters["a"]} if self.mode == "merged" else self.adapters
        sizes = {"batches": (1, 3), "sequences": (1, 6), "samples": 3, "seed": self.seed}
        return check_parity(self.checkpoint, candidate, right, **sizes, **options)


def case(seed: int, folder: Path) -> Case:
    """Return what a seed gives; files go to ``folder``."""
    from safetensors.numpy import load_file, save_file

    rng = np.random.default_rng(seed)
    mode, dtype = broken.MODES[seed % 3], broken.DTYPES[seed // 3 % 2]
    spread, strength = float(rng.uniform(0.3, 1.2)), float(10 ** rng.uniform(-0.7, 0.7))
    weights = {
        name: _weight(rng, values.shape, spread)
        for name, values in load_file(_template() / "model.safetensors").items()
    }
    folder.mkdir(parents=True)
    shutil.copy(_template() / "config.json", folder)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model = onnx.load_from_string(_graph(dtype))
    for name, values in weights.items():
        broken.constant(model, name).CopyFrom(numpy_helper.from_array(values.astype(dtype), name))
    onnx.save(model, folder / "base.onnx")
    paths = [name.removesuffix(".weight") for name in weights if "_proj" in name]
    shapes = {path: weights[f"{path}.weight"].shape for path in sorted(paths)}
    adapters = {"a": _adapter(rng, "a", shapes, strength)}
    adapters["b"] = _adapter(rng, "b", shapes, 1.0)
    return Case(seed, mode, dtype, spread, strength, adapters, folder, folder / "base.onnx")


def _weight(rng: np.random.Generator, shape: tuple[int, ...], spread: float) -> Array:
    noise = rng.standard_normal(shape)
    values = 1 + 0.2 * noise if len(shape) == 1 else spread * noise / math.sqrt(shape[1])
    return values.astype(np.float32)


def _adapter(
    rng: np.random.Generator, name: str, shapes: Mapping[str, tuple[int, int]], strength: float
) -> Adapter:
    """Return an adapter of some modules, each with a rank, an alpha and a scaling of its own."""
    modules = {}
    for path, (out_dim, in_dim) in shapes.items():
        if rng.random() < 0.3:
            continue
        rank, rslora = int(rng.integers(1, 9)), bool(rng.random() < 0.3)
        alpha = float(rng.choice([1, 4, 5, 8, 16]))
        a = rng.standard_normal((rank, in_dim)) / math.sqrt(in_dim)
        b = rng.standard_normal((out_dim, rank)) * strength * 0.3 * math.sqrt(rank) / alpha
        names = (f"{path}.lora_A.weight", f"{path}.lora_B.weight")
        module = LoraModule(
            path,
            "linear",
            a.astype(np.float32),
            b.astype(np.float32),
            alpha=alpha,
            rank=rank,
            rslora=rslora,
            tensor_names=names,
        )
        modules[module.key] = module
    tensors = tuple(tensor for module in modules.values() for tensor in module.tensor_names)
    return Adapter(name, "random", "peft", modules, tensor_names=tensors)


def damage(made: Case) -> tuple[str, broken.Damage]:
    """Return the module that is broken, and what breaks it: it is left out, or its B is too large by half."""
    rng = np.random.default_rng((made.seed, 1))
    path = str(rng.choice([module.path for module in made.adapters["a"].modules.values()]))
    return path, broken.without(path) if made.seed % 2 else broken.b_scaled(path, 1.5)
