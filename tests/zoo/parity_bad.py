"""What tests of parity bad input share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from session_graphs import P, Q, both
from small_graphs import graph, random, save

from lora_export import Adapter, merge_onnx, save_adapter, swap_onnx

Array = Any


A, B = both(1), both(2, rank=4)


TEXT = """g (float[batch,4] x) => (float[batch,3] y) {
    t = MatMul(x, p_weight)  y = MatMul(t, q_weight)
}"""


X = random(4, 4, seed=3)


def base(folder: Path, name: str = "base.onnx", text: str = TEXT, **changed: Array) -> Path:
    weights = {"p.weight": P.T.copy(), "q.weight": Q.T.copy()} | changed
    return save(graph(text, weights), folder, name)


def stored(folder: Path, given: Adapter = A, name: str = "a") -> Path:
    return save_adapter(given, folder / name)


def merged(folder: Path, given: Path | None = None) -> Path:
    merge_onnx(base(folder), given or stored(folder), folder / "merged.onnx")
    return folder / "merged.onnx"


def swapped(folder: Path, *modules: str) -> Path:
    swap_onnx(base(folder), folder / "swap.onnx", target_modules=list(modules or "pq"), max_rank=8)
    return folder / "swap.onnx"


def saved(folder: Path, name: str = "right.npz", **outputs: Array) -> Path:
    np.savez(folder / name, **(outputs or {"y": X @ P.T @ Q.T}))
    return folder / name


def feeds(folder: Path, **values: Array) -> Path:
    return saved(folder, "feeds.npz", **(values or {"x": X}))


def arguments(given: Mapping[str, Any]) -> list[str]:
    """Return the command line of the arguments of `check_parity`."""
    words = {"weights": "weight", "reference_dtype": "reference-dtype"}
    line = ["parity"]
    for key, value in given.items():
        if key == "adapters":
            line += [part for name, path in value.items() for part in ("--adapter", f"{name}={path}")]
        else:
            for one in value if isinstance(value, list) else [value]:
                line += [f"--{words.get(key, key)}={one}"]
    return line


def outputs(folder: Path) -> list[str]:
    return [f"--report={folder}/r.json", f"--junit={folder}/r.xml", f"--html={folder}/r.html"]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed(name: str, value: float) -> dict[str, Array]:
    """Return a weight with one entry of another value."""
    weight = {"p.weight": P, "q.weight": Q}[name].T.copy()
    weight[1, 1] = value
    return {name: weight}
