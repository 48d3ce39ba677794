"""What tests of parity check share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import save_file
from session_graphs import P, Q, both
from small_graphs import delta, graph, random, save

from lora_export import Adapter, bank_onnx, merge_onnx, swap_onnx
from lora_export.parity.result import ParityReport, Verdict

Array = Any


A, B = both(1), both(2, rank=4)


# y = q(p(x))
TEXT = """g (float[batch,4] x) => (float[batch,3] y) {
    t = MatMul(x, p_weight)  y = MatMul(t, q_weight)
}"""


X = random(4, 4, seed=3)


llama = pytest.mark.xdist_group("parity-llama")


def base(folder: Path, name: str = "base.onnx", **changed: Array) -> Path:
    weights = {"p.weight": P.T.copy(), "q.weight": Q.T.copy()} | changed
    return save(graph(TEXT, weights), folder, name)


def right(*given: tuple[Adapter, float], x: Array = X) -> Array:
    """Return y in float64 with adapters and their weights."""
    weights = {"p": P.astype(np.float64), "q": Q.astype(np.float64)}
    for adapter, weight in given:
        for module in adapter.modules.values():
            weights[module.path] = weights[module.path] + weight * delta(module)
    return x.astype(np.float64) @ weights["p"].T @ weights["q"].T


def merged(folder: Path, *adapters: Adapter, **options: Any) -> Path:
    merge_onnx(base(folder), list(adapters), folder / "merged.onnx", **options)
    return folder / "merged.onnx"


def swapped(folder: Path, **options: Any) -> Path:
    swap_onnx(base(folder), folder / "swap.onnx", target_modules=["p", "q"], max_rank=8, **options)
    return folder / "swap.onnx"


def banked(folder: Path, slots: Mapping[str, Adapter], **options: Any) -> Path:
    bank_onnx(base(folder), slots, folder / "bank.onnx", **options)
    return folder / "bank.onnx"


def saved(path: Path, outputs: Mapping[str, Array]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **outputs)
    else:
        save_file(dict(outputs), path)
    return path


def feeds(folder: Path, x: Array = X) -> Path:
    return saved(folder / "feeds.npz", {"x": x})


def failures(report: ParityReport) -> str:
    return "\n".join(
        f"{v.kind} {v.name} [{v.state}] {v.output}: {v.value} > {v.limit} ({v.why})" for v in report.failed
    )


def assert_passes(report: ParityReport) -> None:
    assert report.passed, failures(report)


def of(report: ParityReport, kind: str, state: str | None = None) -> list[Verdict]:
    return [v for v in report.verdicts if v.kind == kind and state in (None, v.state)]


def proven(report: ParityReport) -> set[str]:
    """Return the states whose adapters are shown to be applied."""
    return {verdict.state for verdict in of(report, "effect") if verdict.counted and verdict.passed}


def rewritten(graph_path: Path, **fields: Any) -> None:
    path = graph_path.with_suffix(".lora.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def peft_logits(arch: str, folder: Path | None, values: Mapping[str, Array]) -> Array:
    """Return what PEFT computes in float64, unmerged; of Llama not the norms and rotations."""
    from peft import PeftModel

    model: Any = tiny.build(arch)
    if folder is not None:
        with tiny.quiet():
            model = PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        inputs = {name: torch.from_numpy(array) for name, array in values.items()}
        return model.double().eval()(**inputs).logits.numpy()
