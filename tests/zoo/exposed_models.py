"""Graphs of the zoo with exposed LoRA, ready to run with an adapter, for tests of swap and bank."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import tiny

from lora_export import (
    bank_onnx,
    load_adapter,
    swap_onnx,
)
from lora_export.binding.bind import bind_adapter
from lora_export.graph.exposed import WEIGHTS_INPUT, LoraRecord, lora_record_of

Array = tiny.Array


@cache
def _opened(path: Path) -> tuple[LoraRecord, ir.Model]:
    model = ir.load(path)
    return lora_record_of(model.metadata_props, path.name), model


def tensors(graph: Path, adapter: Path) -> dict[str, Array]:
    """Return what a swap graph is fed with for an adapter, W0 read from the graph itself."""
    record, model = _opened(graph)

    def weight_of(name: str) -> Array:
        weight = model.graph.initializers[name].const_value
        assert weight is not None
        return weight.numpy()

    return dict(bind_adapter(load_adapter(adapter), record, where=graph.name, weight_of=weight_of).tensors)


def run_swapped(arch: str, graph: Path, adapter: Path | None) -> Array:
    """Return a swap graph's answer with an adapter, or without one."""
    return tiny.run(graph, tiny.feeds(arch, graph) | (tensors(graph, adapter) if adapter else {}))


def run_bank(arch: str, graph: Path, rows: list[str | None] | Array) -> Array:
    """Return a bank's answer with an adapter for each row of the batch, or a row of weights."""
    record, _ = _opened(graph)
    names = [slot.name for slot in record.slots]
    weights = np.zeros((len(rows), len(names)), np.float32)
    for number, row in enumerate(rows):
        if isinstance(row, str):
            weights[number, names.index(row)] = 1
        elif row is not None:
            weights[number] = row
    return tiny.run(graph, tiny.feeds(arch, graph) | {WEIGHTS_INPUT: weights})


def swap(arch: str, exporter: str, adapter: Path, folder: Path, **options: Any) -> Path:
    """Expose an adapter's modules in a base of the zoo."""
    swap_onnx(tiny.base_onnx(arch, exporter), folder / "swap.onnx", adapter=adapter, **options)
    return folder / "swap.onnx"


def bank(arch: str, exporter: str, adapters: dict[str, Path], folder: Path, **options: Any) -> Path:
    """Make adapters resident in a base of the zoo."""
    bank_onnx(tiny.base_onnx(arch, exporter), adapters, folder / "bank.onnx", **options)
    return folder / "bank.onnx"


def swapped_tensors(
    arch: str, exporter: str, adapter: Path, folder: Path, **options: Any
) -> dict[str, Array]:
    """Do what an adapter that doesn't fit must not get through: expose its modules, then bind it."""
    return tensors(swap(arch, exporter, adapter, folder, **options), adapter)


EXPORTERS = tuple(name for name in tiny.EXPORTERS if name != "ort_fusions")


# A batch norm folded into a convolution can't be seen by name.
FOLDED_NORM = {("conv", "dynamo"), ("conv", "torchscript")}


def group(arch):
    """Keep an architecture's tests in one xdist worker: each exports a model once."""
    return pytest.mark.xdist_group(arch)
