"""Measure the command line: start-up time, and `inspect` of a 50 MB adapter, against the goals.

Run: python tools/bench_cli.py [--runs 5] [--json]
Prints medians over processes started one after the other, and exits with 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HEAVY = ("torch", "onnxruntime", "tensorrt", "transformers")
HELP_S, INSPECT_S, INSPECT_MB = 0.25, 1.0, 150.0
# Shapes of Llama-3.2-1B's linears: (out_dim, in_dim).
SHAPES = {
    "self_attn.q_proj": (2048, 2048),
    "self_attn.k_proj": (512, 2048),
    "self_attn.v_proj": (512, 2048),
    "self_attn.o_proj": (2048, 2048),
    "mlp.gate_proj": (8192, 2048),
    "mlp.up_proj": (8192, 2048),
    "mlp.down_proj": (2048, 8192),
}
# The command in a process of its own that says at its end what it imported; peak memory comes from wait4.
RUN = f"""
import sys
from lora_export.cli import main
try:
    main(sys.argv[1:])
finally:
    print('imported', *sorted(set({HEAVY}) & sys.modules.keys()), file=sys.stderr)
"""


def make_adapter(folder: Path, rank: int = 18, layers: int = 16) -> None:
    """Write a float32 LoRA of about 50 MB."""
    import numpy as np

    from lora_export.adapter import Adapter, LoraModule
    from lora_export.formats import save_adapter

    random = np.random.default_rng(0)
    modules = {}
    for layer in range(layers):
        for name, (out_dim, in_dim) in SHAPES.items():
            module = LoraModule(
                path=f"model.layers.{layer}.{name}",
                kind="linear",
                lora_a=random.standard_normal((rank, in_dim), dtype=np.float32),
                lora_b=random.standard_normal((out_dim, rank), dtype=np.float32),
                alpha=32,
                rank=rank,
            )
            modules[module.key] = module
    save_adapter(Adapter("bench", "", "peft", modules), folder)


def measure(arguments: list[str], runs: int) -> dict[str, object]:
    """Run the command several times; return the median time, the peak memory, the heavy imports."""
    times, peaks, imported = [], [], set()
    for _ in range(runs):
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        assert process.stderr is not None
        error = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        times.append(time.perf_counter() - start)
        if status:
            raise SystemExit(f"lora-export {' '.join(arguments)} failed:\n{error}")
        peaks.append(usage.ru_maxrss / 1e3)
        imported |= set(error.rpartition("imported")[2].split())
    return {
        "median_s": round(statistics.median(times), 3),
        "peak_mb": round(max(peaks), 1),
        "imported": sorted(imported),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--make", type=Path, help="only write the adapter, into this folder")
    options = parser.parse_args()
    if options.make:
        make_adapter(options.make)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        # In a process of its own: a child's peak memory counts from what its parent held.
        subprocess.run([sys.executable, __file__, "--make", str(adapter)], check=True)
        size = (adapter / "adapter_model.safetensors").stat().st_size
        results = {
            "--help": measure(["--help"], options.runs),
            "inspect": measure(["inspect", str(adapter)], options.runs),
            "inspect --json": measure(["inspect", str(adapter), "--json"], options.runs),
        }
    goals = {
        "--help": (HELP_S, None),
        "inspect": (INSPECT_S, INSPECT_MB),
        "inspect --json": (INSPECT_S, INSPECT_MB),
    }
    missed = [
        name
        for name, (seconds, megabytes) in goals.items()
        if results[name]["median_s"] > seconds
        or (megabytes and results[name]["peak_mb"] > megabytes)
        or results[name]["imported"]
    ]
    if options.json:
        print(json.dumps({"adapter_bytes": size, "results": results, "missed": missed}, indent=2))
        return bool(missed)
    print(f"adapter {size / 1e6:.1f} MB, median of {options.runs} runs, {os.cpu_count()} cores")
    print(f"{'command':<16}{'wall s':>8}{'goal':>8}{'peak MB':>10}{'goal':>8}  heavy imports")
    for name, (seconds, megabytes) in goals.items():
        found = results[name]
        print(
            f"{name:<16}{found['median_s']:>8}{seconds:>8}{found['peak_mb']:>10}{megabytes or '-':>8}  "
            f"{', '.join(found['imported']) or 'none'}{'   MISSED' if name in missed else ''}"
        )
    return bool(missed)


if __name__ == "__main__":
    raise SystemExit(main())
