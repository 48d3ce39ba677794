"""Measure quantising a graph: time and peak memory, by the size of the model, beside ONNX Runtime's own tool.

Run: python tools/bench_quantize.py --workdir /tmp/bench [--shape 1b 8b] [--only int4 int8 tool] [--turned]
Makes a graph of a Llama's shape in float16, its weights random numbers behind one MatMul each (quantising
reads weights, not what lies between), and quantises it in processes of their own, one after the other: all
products but the head. The work folder needs twice the model's size. ``--turned`` stores weights as PyTorch
does, behind a Transpose, where ONNX Runtime's tool finds none. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from bench_capture import SHAPES
from bench_merge import measure

CLI = "from lora_export.cli import main; main()"
TOOL = """
import sys
import onnx
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
base, out = sys.argv[1:]
left = ["/lm_head/MatMul"]
tool = MatMulNBitsQuantizer(base, bits=4, block_size=32, is_symmetric=True, nodes_to_exclude=left)
tool.process()
tool.model.save_model_to_file(out, use_external_data_format=True)
"""
# A child's peak memory counts what its parent held at the fork: numpy is not imported here.
BUILD = """
import sys
from pathlib import Path
import numpy as np
import onnx_ir as ir
out, turned = Path(sys.argv[1]), sys.argv[2] == "True"
layers, hidden, kv_heads, heads, mlp, vocabulary = map(int, sys.argv[3:])
width = hidden // heads * kv_heads
shapes = {}
for number in range(layers):
    path = f"model.layers.{number}"
    shapes |= {f"{path}.self_attn.{name}_proj": (rows, hidden)
               for name, rows in (("q", hidden), ("k", width), ("v", width), ("o", hidden))}
    shapes |= {f"{path}.mlp.gate_proj": (mlp, hidden), f"{path}.mlp.up_proj": (mlp, hidden)}
    shapes[f"{path}.mlp.down_proj"] = (hidden, mlp)
shapes["lm_head"] = (vocabulary, hidden)
out.mkdir(parents=True, exist_ok=True)
kind = ir.DataType.FLOAT16
inputs = {size: ir.val(f"x{size}", shape=ir.Shape(("batch", size)), type=ir.TensorType(kind))
          for size in (hidden, mlp)}
noise = np.random.default_rng(0).standard_normal(1 << 25, np.float32).astype(np.float16).tobytes()
nodes, weights = [], []
with (out / "base.onnx.data").open("wb") as data:
    for name, shape in shapes.items():
        stored = shape if turned else shape[::-1]
        count = 2 * shape[0] * shape[1]
        tensor = ir.ExternalTensor("base.onnx.data", data.tell(), count, kind, shape=ir.Shape(stored),
                                   name=f"{name}.weight", base_dir=out)
        for start in range(0, count, len(noise)):
            data.write(noise[: min(len(noise), count - start)])
        value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(kind), const_value=tensor)
        weights.append(value)
        path = "/" + name.replace(".", "/").replace("layers/", "layers.")
        if turned:
            nodes.append(ir.node("Transpose", [value], {"perm": [1, 0]}, name=f"{path}/Transpose"))
            nodes[-1].outputs[0].name = f"{name}.turned"
            value = nodes[-1].outputs[0]
        nodes.append(ir.node("MatMul", [inputs[shape[1]], value], name=f"{path}/MatMul"))
        nodes[-1].outputs[0].name, nodes[-1].outputs[0].type = f"{name}.y", ir.TensorType(kind)
results = [node.outputs[0] for node in nodes if node.op_type == "MatMul"]
graph = ir.Graph(list(inputs.values()), results, nodes=nodes, initializers=weights, opset_imports={"": 20},
                 name="g")
ir.save(ir.Model(graph, ir_version=10), out / "base.onnx")
"""


def command(contender: str, base: Path, out: Path) -> list[str]:
    """Return the command line of a contender."""
    if contender == "tool":
        return [sys.executable, "-c", TOOL, str(base), str(out)]
    to, _, method = contender.partition(" ")
    arguments = [
        "quantize-onnx",
        str(base),
        "--to",
        to,
        "--method",
        method or "rtn",
        "-o",
        str(out),
        "--quiet",
    ]
    return [sys.executable, "-c", CLI, *arguments]


def main() -> None:
    contenders = ["int4", "int8", "int4 k-quant", "int4 hqq", "tool"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["1b"])
    parser.add_argument("--only", nargs="+", choices=contenders, default=["int4", "int8", "tool"])
    parser.add_argument("--turned", action="store_true")
    options = parser.parse_args()
    print("| model | way | wall s | CPU s | peak MB | base MB | result MB |\n|---|---|---|---|---|---|---|")
    for shape in options.shape:
        folder = options.workdir / f"{shape}-{'turned' if options.turned else 'plain'}"
        if not (folder / "base.onnx").exists():
            measure([sys.executable, "-c", BUILD, str(folder), str(options.turned), *map(str, SHAPES[shape])])
        base = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        for contender in options.only:
            out = options.workdir / "out"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            run = measure(command(contender, folder / "base.onnx", out / "q.onnx"))
            size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
            figures = f"{run.wall_s:.1f} | {run.cpu_s:.1f} | {run.peak_mb:.0f} | {base:.0f} | {size:.0f}"
            print(f"| {shape} | {contender} | {figures} |", flush=True)
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
