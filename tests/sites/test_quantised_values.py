"""Quantised weights held against a checkpoint: what codes of ONNX Runtime's quantisers stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from safetensors.numpy import save_file
from small_graphs import adapter, graph, linear, random, save

from lora_export import SiteError, bank_onnx, swap_onnx

OUT, IN = 48, 72
TEXT = f"g (float[n, {IN}] x) => (float[n, {OUT}] y) {{ [n] y = MatMul (x, fc_weight) }}"


def nbits(bits: int, block: int, symmetric: bool, path: Path, out: Path) -> Path:
    model = onnx.load(path)
    quantiser = MatMulNBitsQuantizer(model, block_size=block, is_symmetric=symmetric, bits=bits)
    quantiser.process()
    onnx.save(quantiser.model.model, out)
    return out


def dynamic(kind: Any, channel: bool, path: Path, out: Path) -> Path:
    quantize_dynamic(str(path), str(out), weight_type=kind, per_channel=channel)
    return out


QUANTISERS: dict[str, tuple[Callable[[Path, Path], Path], bool]] = {
    **{
        f"{bits} bits in {block}{'' if symmetric else ' with zeros'}": (
            lambda path, out, a=(bits, block, symmetric): nbits(*a, path, out),
            True,
        )
        for bits, block, symmetric in [(4, 16, True), (4, 32, False), (8, 32, True), (8, 16, False)]
    },
    "dynamic int8": (lambda path, out: dynamic(QuantType.QInt8, False, path, out), False),
    "dynamic uint8": (lambda path, out: dynamic(QuantType.QUInt8, False, path, out), False),
    "dynamic by channel": (lambda path, out: dynamic(QuantType.QInt8, True, path, out), False),
}


def folder(path: Path, weight: np.ndarray) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    save_file({"fc.weight": np.ascontiguousarray(weight)}, path / "model.safetensors")
    return path


def base(name: str, weight: np.ndarray, tmp_path: Path) -> Path:
    model = graph(TEXT, {"fc.weight": np.ascontiguousarray(weight.T)})
    model.graph.node(0).name = "/fc/MatMul"
    return QUANTISERS[name][0](save(model, tmp_path), tmp_path / "q.onnx")


def plan(path: Path, checkpoint: Path, tmp_path: Path) -> Any:
    given = adapter(linear("fc", OUT, IN))
    return swap_onnx(path, tmp_path / "s.onnx", adapter=given, checkpoint=checkpoint, dry_run=True).plan


@pytest.mark.parametrize("saved", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", QUANTISERS)
def test_the_right_checkpoint(name: str, saved: Any, tmp_path: Path) -> None:
    weight = random(OUT, IN).astype(saved)
    path = base(name, weight.astype(np.float32), tmp_path)
    (row,) = plan(path, folder(tmp_path / "c", weight), tmp_path).rows
    known = QUANTISERS[name][1]
    assert ("within the quantiser's steps" if known else "content is near") in row.reason


@pytest.mark.parametrize(
    "change",
    [
        lambda w: random(OUT, IN, seed=9),
        lambda w: np.concatenate([w[1:], w[:1]]),
        lambda w: np.concatenate([w[:-2], w[-1:], w[-2:-1]]),
        lambda w: np.where(np.arange(OUT)[:, None] == 17, -w, w),
    ],
    ids=["another", "moved by a row", "two rows exchanged", "one row negative"],
)
@pytest.mark.parametrize("name", QUANTISERS)
def test_a_wrong_checkpoint_is_refused(name: str, change: Any, tmp_path: Path) -> None:
    weight = random(OUT, IN)
    path, wrong = base(name, weight, tmp_path), folder(tmp_path / "c", change(weight))
    with pytest.raises(SiteError) as refused:
        plan(path, wrong, tmp_path)
    assert "does not hold the checkpoint's values, as far as its codes tell" in refused.value.problems[0]
    with pytest.raises(SiteError):
        bank_onnx(path, {"a": adapter(linear("fc", OUT, IN))}, tmp_path / "b.onnx", checkpoint=wrong)


@pytest.mark.parametrize("name", list(QUANTISERS)[:4])
def test_values_that_a_quantiser_moved_further_are_near(name: str, tmp_path: Path) -> None:
    """GPTQ and others don't round to the nearest code; a fine-tuned model's values are near, too."""
    weight = random(OUT, IN)
    path = base(name, weight, tmp_path)
    moved = weight + 0.4 * random(OUT, IN, seed=5)
    (row,) = plan(path, folder(tmp_path / "c", moved), tmp_path).rows
    assert row.reason.endswith("content is near, as a quantiser leaves it")
