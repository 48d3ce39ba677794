"""Measure capturing a checkpoint: time and peak memory of each way to trace it, by the size of the model.

Run: python tools/bench_capture.py --workdir /tmp/bench [--shape 1b 8b] [--trace outline again loaded]
Makes a checkpoint folder of a Llama's shape whose weights file is sparse (zeros that take no disk), and runs
``capture-onnx --kv-cache`` in a process of its own for each way. The graphs are written whole: the work
folder needs as much space as the largest model has, once. ``again`` is a second capture in outline, from the
cache. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import sys
from pathlib import Path

from bench_merge import measure

CLI = "from lora_export.cli import main; main()"
# name: layers, hidden, key-value heads, heads, MLP, vocabulary
SHAPES = {
    "tiny": (4, 64, 2, 4, 96, 100),
    "smollm2": (30, 576, 3, 9, 1536, 49152),
    "1b": (16, 2048, 8, 32, 8192, 128256),
    "8b": (32, 4096, 8, 32, 14336, 128256),
    "70b": (80, 8192, 8, 64, 28672, 128256),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["1b"])
    parser.add_argument(
        "--trace", nargs="+", choices=["outline", "loaded", "again"], default=["outline", "again", "loaded"]
    )
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--fused", action="store_true", help="capture-onnx --fused")
    parser.add_argument("--share-base", action="store_true", help="write no weights (give --dtype bfloat16)")
    options = parser.parse_args()
    options.workdir.mkdir(parents=True, exist_ok=True)
    print("| model | way | wall s | CPU s | peak MB | graph MB |\n|---|---|---|---|---|---|")
    for shape in options.shape:
        folder = make(options.workdir / shape, *SHAPES[shape])
        os.environ["LORA_EXPORT_CACHE"] = str(options.workdir / "cache")
        shutil.rmtree(options.workdir / "cache", ignore_errors=True)
        for trace in options.trace:
            out = options.workdir / "out"
            shutil.rmtree(out, ignore_errors=True)
            arguments = ["capture-onnx", str(folder), "-o", str(out / "m.onnx"), "--kv-cache", "--quiet"]
            more = ["--dtype", options.dtype, "--trace", "outline" if trace == "again" else trace]
            more += ["--fused"] * options.fused
            if options.share_base:
                # Beside the weights, where they are found.
                arguments[3] = str(folder / "m.onnx")
                more.append("--share-base")
            run = measure([sys.executable, "-c", CLI, *arguments, *more])
            written = list(folder.glob("m.onnx*") if options.share_base else out.iterdir())
            size = sum(path.stat().st_size for path in written) / 1e6
            figures = f"{run.wall_s:.1f} | {run.cpu_s:.1f} | {run.peak_mb:.0f} | {size:.0f}"
            print(f"| {shape} | {trace} | {figures} |", flush=True)
            for path in written:
                path.unlink()


def make(
    folder: Path, layers: int, hidden: int, kv_heads: int, heads: int, mlp: int, vocabulary: int
) -> Path:
    """Write a checkpoint folder whose weights are zeros that take no disk."""
    folder.mkdir(parents=True, exist_ok=True)
    width = hidden // heads * kv_heads
    shapes = {"model.embed_tokens.weight": [vocabulary, hidden], "lm_head.weight": [vocabulary, hidden]}
    shapes["model.norm.weight"] = [hidden]
    for number in range(layers):
        path = f"model.layers.{number}"
        for name, rows in (("q", hidden), ("k", width), ("v", width), ("o", hidden)):
            shapes[f"{path}.self_attn.{name}_proj.weight"] = [rows, hidden]
        for name in ("gate", "up"):
            shapes[f"{path}.mlp.{name}_proj.weight"] = [mlp, hidden]
        shapes[f"{path}.mlp.down_proj.weight"] = [hidden, mlp]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{path}.{name}.weight"] = [hidden]
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        handle.truncate(8 + len(text) + at)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


if __name__ == "__main__":
    main()
