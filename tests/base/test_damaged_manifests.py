"""A manifest that can't be read is not taken for none: what it tells of earlier merges would go unseen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from session_graphs import P, Q, both
from small_graphs import graph, random, save

from lora_export import LoraExportError, merge_checkpoint, merge_onnx, save_adapter
from lora_export.parity.check import check_parity

TEXT = """g (float[batch,4] x) => (float[batch,3] y) {
    t = MatMul(x, p_weight)  y = MatMul(t, q_weight)
}"""
DAMAGES: dict[str, tuple[Callable[[str], bytes], str]] = {
    "cut off": (lambda text: text.encode()[:-20], "can't be read as JSON"),
    "no UTF-8": (lambda text: b"\xff" + text.encode(), "not UTF-8"),
    "empty": (lambda _: b"", "can't be read as JSON"),
    "another's": (lambda _: b"{}", "adapters: is missing"),
    "no plan": (lambda text: json.dumps(json.loads(text) | {"plan": 3}).encode(), "plan: 3, wanted"),
    "adapters without names": (
        lambda text: json.dumps(json.loads(text) | {"adapters": [{}]}).encode(), "adapters[0].name: is",
    ),
    "an earlier history of another kind": (
        lambda text: json.dumps(
            (data := json.loads(text)) | {"outputs": data["outputs"] | {"earlier": {"changed": 3}}}
        ).encode(),
        "changed: 3, wanted an object",
    ),
}  # fmt: skip


def bases(folder: Path) -> tuple[Path, Path]:
    weights = {"p.weight": P.T.copy(), "q.weight": Q.T.copy()}
    checkpoint = folder / "hf"
    checkpoint.mkdir()
    save_file({"p.weight": P.copy(), "q.weight": Q.copy()}, checkpoint / "model.safetensors")
    (checkpoint / "config.json").write_text('{"model_type": "x"}')
    return save(graph(TEXT, weights), folder, "base.onnx"), checkpoint


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_second_merge_over_a_damaged_manifest_is_refused(damage: str, tmp_path: Path) -> None:
    spoil, says = DAMAGES[damage]
    base, checkpoint = bases(tmp_path)
    one, two = (save_adapter(both(seed), tmp_path / f"a{seed}") for seed in (1, 2))
    merge_onnx(base, one, tmp_path / "merged.onnx")
    merge_checkpoint(checkpoint, one, tmp_path / "merged")
    for manifest, merge in (
        (
            tmp_path / "merged.lora.json",
            lambda: merge_onnx(tmp_path / "merged.onnx", two, tmp_path / "o.onnx"),
        ),
        (
            tmp_path / "merged" / "lora.json",
            lambda: merge_checkpoint(tmp_path / "merged", two, tmp_path / "o"),
        ),
    ):
        before, good = {*tmp_path.iterdir()}, manifest.read_text()
        manifest.write_bytes(spoil(good))
        with pytest.raises(LoraExportError) as caught:
            merge()
        assert str(manifest) in str(caught.value)
        assert says in str(caught.value)
        assert "restore it" in caught.value.hint
        assert {*tmp_path.iterdir()} == before
        # As it was, and removed: both are a base like any other.
        manifest.write_text(good)
        merge()
        for made in {*tmp_path.iterdir()} - before:
            made.rename(made.with_name(f"kept-{made.name}"))
        manifest.unlink()
        merge()


def test_parity_says_that_it_leaves_a_damaged_manifest_aside(tmp_path: Path) -> None:
    base, _ = bases(tmp_path)
    given = both(1)
    merge_onnx(base, save_adapter(given, tmp_path / "a"), tmp_path / "merged.onnx")
    manifest, x = tmp_path / "merged.lora.json", random(4, 4, seed=3)
    np.savez(tmp_path / "feeds.npz", x=x)
    delta = {m.path: m.scaling * m.lora_b @ m.lora_a for m in given.modules.values()}
    right = x @ (P + delta["p"]).T @ (Q + delta["q"]).T
    np.savez(tmp_path / "right.npz", y=right.astype(np.float32))

    def notes() -> str:
        report = check_parity(
            tmp_path / "right.npz", tmp_path / "merged.onnx", {"a": given}, feeds=tmp_path / "feeds.npz"
        )
        return "\n".join(report.notes)

    good = manifest.read_text()
    assert "are ignored" not in notes()
    for spoilt in (good[:-9], good.replace('"plan"', '"plans"'), "\udcff"):
        manifest.write_bytes(spoilt.encode(errors="surrogateescape"))
        assert "merged.lora.json: " in notes()
        assert "its weights and rounding are ignored" in notes()
    with manifest.open("wb") as file:
        file.truncate(1 << 41)  # it takes no room on the disk
    assert "its weights and rounding are ignored" in notes()
