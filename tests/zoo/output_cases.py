"""Every verb that writes, with small inputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import session_graphs
from engine_graphs import product
from half_graphs import half_graph, small_adapter

from lora_export import cli
from lora_export.formats.reading.tensors import write_safetensors


@dataclass(frozen=True)
class Case:
    """A verb with small inputs.

    Attributes:
        arguments: Given the folder of inputs and that of outputs; inputs are made there once.
        groups: Files that belong together, each a prefix of their names; "" for all that is written.
    """

    arguments: Callable[[Path, Path], list[object]]
    groups: tuple[tuple[str, ...], ...] = (("",),)


def made(path: Path, make: Callable[[Path], object]) -> Path:
    if not path.exists():
        make(path)
    return path


def inputs(folder: Path) -> tuple[Path, Path]:
    (folder / "g").mkdir(exist_ok=True)
    graph = made(folder / "g" / "base.onnx", lambda path: half_graph(path, np.float32))
    return graph, made(folder / "adapter", lambda path: small_adapter(path, 0.01))


def checkpoint(folder: Path) -> Path:
    def make(path: Path) -> None:
        path.mkdir()
        (path / "config.json").write_text('{"model_type": "x"}')
        weights = {"fc.weight": np.ones((64, 64), np.float32)}
        write_safetensors(path / "model.safetensors", weights, {"format": "pt"})

    return made(folder / "checkpoint", make)


def merge(folder, out):
    _, adapter = inputs(folder)
    return ["merge", "--base", checkpoint(folder), "--adapter", adapter, "-o", out / "m"]


def merge_onnx(folder, out):
    graph, adapter = inputs(folder)
    return ["merge-onnx", "--base", graph, "--adapter", adapter, "-o", out / "m.onnx"]


def swap_onnx(folder, out):
    graph, adapter = inputs(folder)
    config = '{"model": {"decoder": {"filename": "base.onnx"}}}'
    made(graph.with_name("genai_config.json"), lambda path: path.write_text(config))
    made(graph.with_name("tokenizer.json"), lambda path: path.write_text("{}"))
    return ["swap-onnx", "--base", graph, "--adapter", adapter, "-o", out / "m.onnx"]


def bank_onnx(folder, out):
    graph, adapter = inputs(folder)
    return ["bank-onnx", "--base", graph, "--adapter", f"a={adapter}", "-o", out / "m.onnx"]


def convert_adapter(folder, out):
    _, adapter = inputs(folder)
    return ["convert-adapter", adapter, "--for", exposed(folder), "-o", out / "a.safetensors"]


def convert_to_a_folder(folder, out):
    return [*convert_adapter(folder, out)[:-1], out / "edge", "--format", "edge-llm"]


def exposed(folder: Path) -> Path:
    graph, adapter = inputs(folder)
    arguments = ["swap-onnx", "--base", graph, "--adapter", adapter, "-o", folder / "swap.onnx", "--quiet"]
    return made(folder / "swap.onnx", lambda _: cli._run([str(entry) for entry in arguments], False))


def capture_onnx(folder, out):
    return ["capture-onnx", checkpoint(folder), "-o", out / "m.onnx"]


def quantize_onnx(folder, out):
    graph, _ = inputs(folder)
    return ["quantize-onnx", graph, "--to", "int8", "-o", out / "m.onnx"]


def build_engine(folder, out):
    return ["build-engine", made(folder / "p.onnx", product), "--target", "sm89", "-o", out]


def kit(folder, out):
    return [*build_engine(folder, out), "--kit"]


def parity(folder, out):
    reports = ["--report", out / "p.json", "--junit", out / "p.xml", "--html", out / "p.html"]
    return ["parity", "--reference", checkpoint(folder), "--candidate", folder / "p.onnx", *reports]


def bench(folder, out):
    graph = made(folder / "bench.onnx", lambda path: session_graphs.base(folder).rename(path))
    return ["bench", graph, "--report", out / "b.json", "--html", out / "b.html"]


def demonstrate(folder, out):
    return ["demo", "-o", out / "demo"]


CASES = {
    "merge": Case(merge),
    "merge-onnx": Case(merge_onnx),
    "swap-onnx": Case(swap_onnx),
    "bank-onnx": Case(bank_onnx),
    "convert-adapter": Case(convert_adapter),
    "convert-adapter to a folder": Case(convert_to_a_folder),
    "capture-onnx": Case(capture_onnx),
    "quantize-onnx": Case(quantize_onnx),
    "build-engine": Case(build_engine),
    "kit": Case(kit),
    "parity": Case(parity),
    "bench": Case(bench),
    "demo": Case(demonstrate),
}


def run(case: Case, folder: Path, out: Path, *more: str) -> int:
    return cli._run([str(entry) for entry in (*case.arguments(folder, out), *more)], False)


def old_of(new: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files that an earlier run has left: others than the new ones, in folders that are ours.

    A folder is replaced only where its own record lists what is in it.
    """
    old = {place: b"" if place.endswith("/") else b"old" for place in new}
    for place in new:
        folder, _, name = place.rpartition("/")
        inside = [other[len(folder) + 1 :] for other in new if folder and other.startswith(f"{folder}/")]
        inside = [other for other in inside if other and not other.endswith("/")]
        listing = {"files": dict.fromkeys(inside, "old")}
        if name == "lora.json":
            old[place] = json.dumps(listing).encode()
        elif name == "config.json" and folder == "edge":
            old[place] = json.dumps({"lora_export": listing}).encode()
        elif name == "SHA256SUMS":
            lines = [f"{'0' * 64}  {other}\n" for other in inside if other != name]
            old[place] = "".join(lines).encode()
    return old


def fill(out: Path, files: dict[str, bytes]) -> None:
    for place, content in files.items():
        path = out / place
        if place.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
