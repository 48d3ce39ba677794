"""Measure finding weights by value: a graph whose names are gone, against the same graph with its names.

Run: python tools/bench_content.py --workdir /tmp/bench [--shape smollm2 1b] [--repeats 3]
Makes a checkpoint of random bfloat16 weights in a Llama's shape and two graphs with the same weights in
``--dtype``, as external data in scrambled order, one MatMul each: one with names, one without. Of ``1b``
q, k and v are packed into one weight, as mobius and ONNX Runtime's fusions do, and the adapter changes 7
linears a layer. Each run is a process of its own: ``merge-onnx --dry-run``, which finds and compares and
writes nothing. Prints medians of wall time, processor seconds and peak memory as a Markdown table. This
process imports neither numpy nor onnx_ir: a child's peak memory counts what its parent held at the fork.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from bench_merge import Run, measure

CLI = "from lora_export.cli import main; main()"
# name: layers, hidden, key-value width, MLP, vocabulary, q, k and v packed
SHAPES = {
    "tiny": (2, 64, 32, 96, 100, False),
    "smollm2": (30, 576, 192, 1536, 49152, False),
    "1b": (16, 2048, 512, 8192, 128256, True),
}
BUILD = """
import json, sys
from pathlib import Path
import ml_dtypes, numpy as np, onnx_ir as ir
from safetensors.numpy import save_file

out, dtype = Path(sys.argv[1]), sys.argv[2]
layers, hidden, kv, mlp, vocab, packed = json.loads(sys.argv[3])
rng = np.random.default_rng(0)
kind = ir.DataType[dtype.upper()]
shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
          "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
          "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp)}

def weight(*shape):
    values = rng.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)
    return values.astype(ml_dtypes.bfloat16)

stored, factors, constants = {"model.embed_tokens.weight": weight(vocab, hidden)}, {}, []
for layer in range(layers):
    for name, shape in shapes.items():
        path = f"model.layers.{layer}.{name}"
        stored[f"{path}.weight"] = weight(*shape)
        prefix = f"base_model.model.{path}.lora"
        factors[f"{prefix}_A.weight"] = rng.standard_normal((16, shape[1]), np.float32)
        factors[f"{prefix}_B.weight"] = rng.standard_normal((shape[0], 16), np.float32)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        stored[f"model.layers.{layer}.{norm}.weight"] = weight(hidden)
    qkv = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for part in "qkv"]
    constants += [qkv] if packed else [[name] for name in qkv]
done = {name for group in constants for name in group}
constants += [[name] for name in stored if name not in done]
(out / "base").mkdir(parents=True)
save_file(stored, out / "base" / "model.safetensors", {"format": "pt"})
(out / "base" / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
(out / "adapter").mkdir()
save_file(factors, out / "adapter" / "adapter_model.safetensors")
(out / "adapter" / "adapter_config.json").write_text(
    json.dumps({"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": list(shapes)}))
order = rng.permutation(len(constants))
places = {}
with (out / "base.onnx.data").open("wb") as data:
    for at in order:
        values = np.concatenate([stored[name] for name in constants[at]])
        linear = values.ndim == 2 and "embed" not in constants[at][0]
        values = np.ascontiguousarray(values.T if linear else values).astype(kind.numpy())
        places[at] = data.tell(), values.nbytes, values.shape, linear
        data.write(values.tobytes())
for names in (True, False):
    x = ir.val("x", shape=ir.Shape(("batch", "sequence", "width")), type=ir.TensorType(kind))
    nodes, weights = [], []
    for number, at in enumerate(order):
        start, length, shape, linear = places[at]
        path = constants[at][0].removesuffix(".weight")
        if len(constants[at]) > 1:
            path = path.replace("q_proj", "qkv_proj")
        value = ir.Value(
            name=f"{path}.weight" if names else f"val_{number}",
            shape=ir.Shape(shape), type=ir.TensorType(kind),
            const_value=ir.ExternalTensor("base.onnx.data", start, length, kind, shape=ir.Shape(shape),
                                          name=f"w{number}", base_dir=out))
        weights.append(value)
        operator = "MatMul" if linear else "Mul"
        name = "/" + path.replace("layers.", "layers#").replace(".", "/").replace("#", ".") + "/" + operator
        nodes.append(ir.node(operator, [x, value], name=name if names else f"node_{number}"))
        nodes[-1].outputs[0].name, nodes[-1].outputs[0].type = f"y{number}", ir.TensorType(kind)
    graph = ir.Graph([x], [node.outputs[0] for node in nodes], nodes=nodes, initializers=weights,
                     opset_imports={"": 20}, name="g")
    ir.save(ir.Model(graph, ir_version=10), out / ("named.onnx" if names else "nameless.onnx"))
"""


def arguments(work: Path, graph: str, *more: str) -> list[str]:
    """Return a command line that finds the adapter's modules in a graph and writes nothing."""
    return [
        *(sys.executable, "-c", CLI, "merge-onnx", "--base", str(work / graph)),
        *("--adapter", str(work / "adapter"), "-o", str(work / "out.onnx"), "--dry-run", "--quiet", *more),
    ]


def contenders(work: Path) -> dict[str, list[str]]:
    """Return the command line of each way to find them."""
    checkpoint = ("--checkpoint", str(work / "base"))
    return {
        "by name": arguments(work, "named.onnx"),
        "by name, verified by value": arguments(work, "named.onnx", *checkpoint),
        "by value": arguments(work, "nameless.onnx", *checkpoint),
    }


def build(work: Path, shape: str, dtype: str) -> None:
    """Make the checkpoint, the adapter and both graphs unless an earlier run left them."""
    import json

    if (work / "nameless.onnx").exists():
        return
    print(f"making {shape} in {work} …", file=sys.stderr)
    subprocess.run([sys.executable, "-c", BUILD, str(work), dtype, json.dumps(SHAPES[shape])], check=True)


def compare(work: Path, names: list[str], repeats: int) -> dict[str, list[Run]]:
    """Run the contenders in turn, ``repeats`` rounds."""
    commands = contenders(work)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in names:
            runs[name].append(measure(commands[name]))
            print(f"{repeat + 1}/{repeats} {name}: {runs[name][-1].wall_s:.2f} s", file=sys.stderr)
    return runs


def table(shape: str, runs: dict[str, list[Run]]) -> str:
    """Return the medians as a Markdown table."""
    lines = [f"| {shape} | wall s | (min–max) | CPU s | peak MB |", "|---|---|---|---|---|"]
    for name, found in runs.items():
        walls = [run.wall_s for run in found]
        cpu, peak = (
            statistics.median(getattr(run, field) for run in found) for field in ("cpu_s", "peak_mb")
        )
        lines.append(
            f"| {name} | {statistics.median(walls):.2f} | {min(walls):.2f}–{max(walls):.2f} "
            f"| {cpu:.2f} | {peak:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    names = list(contenders(Path()))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["smollm2", "1b"])
    parser.add_argument("--dtype", default="float16", choices=("float", "float16", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    options = parser.parse_args()
    for shape in options.shape:
        work = options.workdir / f"{shape}-{options.dtype}"
        build(work, shape, options.dtype)
        print(table(shape, compare(work, options.only, options.repeats)))


if __name__ == "__main__":
    main()
