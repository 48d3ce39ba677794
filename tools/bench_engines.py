"""Measure builds of TensorRT-RTX engines: time, memory, size, and the second build from the cache.

Run: python tools/bench_engines.py --workdir /tmp/bench [--model llama-1b] [--modes merged swap …]
Makes a model of that shape with random weights, adapters of rank 16 on all linears, the base graph (float16,
with key-value cache) and merged, swap and bank graph, kept in the work folder for the next run. Then it
builds each for one GPU, for all of TensorRT-RTX's in one engine, and for one again from the cache, and prints
a Markdown table. No GPU is needed. Needs tensorrt-rtx-cu13, torch, transformers and peft.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lora_export import bank_onnx, build_engine, merge_onnx, swap_onnx
from lora_export.modes.capture_onnx import capture_onnx

SHAPES = {
    "smollm2-135m": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "llama-1b": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
}  # fmt: skip
SLOTS, RANK = 4, 16
ENGINE_SHAPES = {"batch": "1:1:4", "sequence": "1:128:512", "past_sequence": "0:256:1024"}


def model_of(name: str, folder: Path) -> Path:
    """Make the checkpoint and the adapters unless an earlier run left them; return the checkpoint."""
    base = folder / "hf"
    if (folder / f"adapter{SLOTS - 1}").exists():
        return base
    torch.manual_seed(0)
    model = LlamaForCausalLM(SHAPES[name]).to(torch.float16)
    model.save_pretrained(base)
    for slot in range(SLOTS):
        peft = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear"))
        for parameter_name, parameter in peft.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.02)
        peft.save_pretrained(folder / f"adapter{slot}")
        model = peft.unload()
    return base


def graphs_of(name: str, folder: Path, modes: list[str]) -> dict[str, Path]:
    """Make the graphs unless an earlier run did."""
    checkpoint, base = model_of(name, folder), folder / "base.onnx"
    if not base.exists():
        started = time.monotonic()
        capture_onnx(checkpoint, base, dtype="float16", kv_cache=True)
        print(f"captured in {time.monotonic() - started:.0f} s", flush=True)
    paths = {mode: folder / f"{mode}.onnx" for mode in modes}
    adapters = [folder / f"adapter{slot}" for slot in range(SLOTS)]
    for mode, path in paths.items():
        if path.exists():
            continue
        if mode == "merged":
            merge_onnx(base, adapters[0], path)
        elif mode == "swap":
            swap_onnx(base, path, adapter=adapters[0], max_rank=RANK, flavour="tensorrt")
        else:
            bank_onnx(base, {f"a{slot}": adapter for slot, adapter in enumerate(adapters)}, path)
    return paths


def measure(graph: Path, folder: Path, targets: str, cache: Path) -> tuple[float, int, int, bool]:
    """Build one engine; return seconds, peak memory and size in bytes, and whether it came from the cache."""
    started = time.monotonic()
    report = build_engine(
        graph, targets, folder, together=True, shapes=ENGINE_SHAPES, cache=cache, force=True
    )
    seconds, (engine,) = time.monotonic() - started, report.engines
    assert engine.record is not None
    return seconds, engine.record.peak_build_bytes, engine.record.size_bytes, engine.cached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--model", choices=list(SHAPES), default="smollm2-135m")
    parser.add_argument(
        "--modes", nargs="+", choices=["merged", "swap", "bank"], default=["merged", "swap", "bank"]
    )
    parser.add_argument("--one-target-only", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.workdir / arguments.model
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for mode, graph in graphs_of(arguments.model, folder, arguments.modes).items():
        cache = folder / f"cache-{time.time_ns()}"
        for targets in ["sm89", *([] if arguments.one_target_only else ["all"]), "sm89"]:
            seconds, peak, size, cached = measure(graph, folder / "engines", targets, cache)
            what = "unchanged, from the cache" if cached else "one GPU" if targets == "sm89" else "all six"
            memory = "–" if cached else f"{peak / 1e9:.2f}"
            rows.append(f"| {mode} | {what} | {seconds:.1f} | {memory} | {size / 1e6:.0f} |")
            print(rows[-1], flush=True)
    print("\n| graph | built for | wall s | peak GB | engine MB |\n|---|---|---|---|---|\n" + "\n".join(rows))


if __name__ == "__main__":
    main()
