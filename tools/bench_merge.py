"""Measure merging into a checkpoint and a graph of a 1B Llama's shape, side by side with `cp` and PEFT.

Run: python tools/bench_merge.py --workdir /tmp/bench [--repeats 3] [--only cp "lora-export merge"]
Makes 2.5 GB of random weights in the work folder, as a checkpoint and as a graph's external data (kept
there for the next run), and needs 5 GB more. The graph has the checkpoint's weights, transposed as torch.onnx
stores them, behind one MatMul each: merging reads names and weights, not what lies between. Each
contender runs in a process of its own, one after the other, right behind a `cp` and `rm` of the base: fresh
memory pages of a virtual machine cost seconds, and the `cp` says what the machine gives at that moment.
Prints medians of wall time, processor seconds and peak memory as a Markdown table. This process imports
neither numpy nor torch: a child's peak memory counts what its parent held at the fork.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SHARD_BYTES = "1GB"
# fsync does nothing here: PEFT and cp don't call it, and a disk's speed is not what is compared.
CLI = "from lora_export.cli import main; main()"
NO_FSYNC = f"import os; os.fsync = lambda handle: None; {CLI}"
PEFT = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
merged.save_pretrained(out, max_shard_size="{SHARD_BYTES}")
"""
BUILD = f"""
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
base, adapter = sys.argv[1:]
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
config = LlamaConfig(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
    num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    max_position_embeddings=131072, rope_theta=500000.0, bos_token_id=128000, eos_token_id=128001,
)
model = LlamaForCausalLM(config)
model.save_pretrained(base, max_shard_size="{SHARD_BYTES}")
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
peft = get_peft_model(model, lora)
for name, parameter in peft.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.01)
peft.save_pretrained(adapter)
"""
# The weights as torch.onnx's dynamo exporter with optimisation leaves them: bfloat16, (in, out), 2.5 GB.
BUILD_GRAPH = """
import sys
from pathlib import Path
import numpy as np
import onnx_ir as ir
from lora_export.checkpoint import Checkpoint
base, out = Path(sys.argv[1]), Path(sys.argv[2])
out.mkdir(exist_ok=True)
checkpoint = Checkpoint.open(base)
kind = ir.DataType.BFLOAT16
x = ir.val("x", shape=ir.Shape(("batch", "sequence", "width")), type=ir.TensorType(kind))
nodes, weights = [], []
with (out / "base.onnx.data").open("wb") as data:
    for name in checkpoint.tensors:
        values = checkpoint.read(name)
        linear = values.ndim == 2 and "embed" not in name
        values = np.ascontiguousarray(values.T) if linear else values
        tensor = ir.ExternalTensor(
            "base.onnx.data", data.tell(), values.nbytes, kind, shape=ir.Shape(values.shape), name=name,
            base_dir=out,
        )
        data.write(values.tobytes())
        weights.append(
            ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(kind), const_value=tensor)
        )
        path = "/" + "/".join(name.removesuffix(".weight").replace("layers.", "layers#").split("."))
        operator = "MatMul" if linear else "Mul"
        nodes.append(ir.node(operator, [x, weights[-1]], name=f"{path.replace('#', '.')}/{operator}"))
for number, node in enumerate(nodes):
    node.outputs[0].name, node.outputs[0].type = f"y{number}", ir.TensorType(kind)
graph = ir.Graph(
    [x], [node.outputs[0] for node in nodes], nodes=nodes, initializers=weights, opset_imports={"": 20},
    name="g",
)
ir.save(ir.Model(graph, ir_version=10), out / "base.onnx")
"""


@dataclass(frozen=True)
class Run:
    """One process: seconds of wall time, seconds of processor time, peak memory in MB."""

    wall_s: float
    cpu_s: float
    peak_mb: float


Command = Callable[[Path, Path], list[str]]


def merge_arguments(work: Path, out: Path) -> list[str]:
    base, adapter = work / "base", work / "adapter"
    return ["merge", "--base", str(base), "--adapter", str(adapter), "-o", str(out), "--quiet"]


def graph_arguments(work: Path, out: Path) -> list[str]:
    base, adapter = work / "graph" / "base.onnx", work / "adapter"
    output = out / "merged.onnx"
    return ["merge-onnx", "--base", str(base), "--adapter", str(adapter), "-o", str(output), "--quiet"]


# A contender is a command line that reads work/base and work/adapter and writes the folder `out`.
CONTENDERS: dict[str, Command] = {
    "cp": lambda work, out: ["cp", "-r", str(work / "base"), str(out)],
    "lora-export merge": lambda work, out: [
        sys.executable, "-c", CLI, *merge_arguments(work, out)
    ],
    "lora-export merge, fsync off": lambda work, out: [
        sys.executable, "-c", NO_FSYNC, *merge_arguments(work, out)
    ],
    "lora-export merge-onnx": lambda work, out: [
        sys.executable, "-c", CLI, *graph_arguments(work, out)
    ],
    "lora-export merge-onnx, fsync off": lambda work, out: [
        sys.executable, "-c", NO_FSYNC, *graph_arguments(work, out)
    ],
    "PEFT merge_and_unload": lambda work, out: [
        sys.executable, "-c", PEFT, str(work / "base"), str(work / "adapter"), str(out)
    ],
}  # fmt: skip


def measure(command: list[str]) -> Run:
    """Run a command to its end; exit with its messages if it fails."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        messages = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - started
    if process.returncode:
        sys.exit(f"{' '.join(command)[:200]}\nfailed:\n{messages}")
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def build(work: Path) -> None:
    """Make the base and the adapter unless an earlier run left them."""
    print(f"making what is missing of base, adapter and graph in {work} …", file=sys.stderr)
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "adapter" / "adapter_config.json").exists():
        subprocess.run([sys.executable, "-c", BUILD, str(work / "base"), str(work / "adapter")], check=True)
    if not (work / "graph" / "base.onnx").exists():
        subprocess.run(
            [sys.executable, "-c", BUILD_GRAPH, str(work / "base"), str(work / "graph")], check=True
        )


def compare(work: Path, names: list[str], repeats: int) -> dict[str, list[Run]]:
    """Run the contenders in turn, ``repeats`` rounds, each right behind a `cp`."""
    runs: dict[str, list[Run]] = {name: [] for name in ["cp", *names]}
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    for repeat in range(repeats):
        for name in names:
            for contender in ("cp", name):
                runs[contender].append(measure(CONTENDERS[contender](work, out)))
                shutil.rmtree(out)
            last = runs[name][-1]
            print(f"{repeat + 1}/{repeats} {name}: {last.wall_s:.2f} s", file=sys.stderr)
    return runs


def table(runs: dict[str, list[Run]]) -> str:
    """Return the medians as a Markdown table, with ratios to cp and from PEFT."""
    medians = {
        name: Run(*(statistics.median(getattr(r, f) for r in found) for f in ("wall_s", "cpu_s", "peak_mb")))
        for name, found in runs.items()
    }
    cp, peft = medians["cp"], medians.get("PEFT merge_and_unload")
    lines = [
        "| | wall s | (min–max) | × cp | PEFT ÷ it | CPU s | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, median in medians.items():
        walls = [run.wall_s for run in runs[name]]
        faster = f"{peft.wall_s / median.wall_s:.1f}" if peft else "–"
        lines.append(
            f"| {name} | {median.wall_s:.2f} | {min(walls):.2f}–{max(walls):.2f} "
            f"| {median.wall_s / cp.wall_s:.2f} | {faster} | {median.cpu_s:.2f} | {median.peak_mb:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    names = [name for name in CONTENDERS if name != "cp"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    options = parser.parse_args()
    build(options.workdir)
    print(table(compare(options.workdir, options.only, options.repeats)))


if __name__ == "__main__":
    main()
