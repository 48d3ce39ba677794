"""Compare the speed of a decoder captured plainly, with --fused and with --runtime ort-cuda, interleaved.

Run: python tools/bench_fused.py --workdir DIR [--shape 1b] [--dtype float16] [--provider cuda] [--repeats 30]
Makes a Llama with random weights in a work folder (transformers), captures it four times with its cache (the
last as merge-onnx does a folder, with q, k and v in one product), and runs the graphs in turn in ONNX
Runtime: the next token behind 512 tokens and a prompt, with one and several rows, of a prompt one padded on
the right. Prints a Markdown table: median ms of a run, and the largest difference of the logits from the
plain graph's, relative to the largest logit. On CUDA the feeds and the outputs stay on the device. ``--graphs
fused,ort-cuda`` runs these alone.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from bench_capture import SHAPES

RUNS = ((1, 512, 1), (8, 512, 1), (1, 0, 512), (8, 0, 128))
_PADDED = 3
# Name of a column → options of the capture.
GRAPHS = {
    "plain": {},
    "fused": {"fused": True},
    "ort-cuda": {"runtime": "ort-cuda"},
    "packed": {"runtime": "ort-cuda", "packed": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float16")
    parser.add_argument("--provider", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--graphs", default=",".join(GRAPHS))
    options = parser.parse_args()
    sessions = {}
    names = options.graphs.split(",")
    for name, graph in captured(options.workdir, options.shape, options.dtype, names).items():
        sessions[name] = opened(graph, options.provider, options.threads)
    print(
        "| batch × new tokens, past | " + " | ".join(f"{name}, ms" for name in sessions) + " | difference |"
    )
    print("|---|" + "---|" * (len(sessions) + 1))
    for batch, past, tokens in RUNS:
        bound = {
            name: bind(session, feeds(session, batch, past=past, tokens=tokens), options.provider)
            for name, session in sessions.items()
        }
        answers, times = [], defaultdict(list)
        for name, session in sessions.items():
            for _ in range(4):
                session.run_with_iobinding(bound[name])
            # The first row of a prompt has padding, whose logits nobody reads.
            answers.append(bound[name].copy_outputs_to_cpu()[0].astype(np.float32)[batch > 1 :])
        for _ in range(options.repeats):
            for name, session in sessions.items():
                started = time.perf_counter()
                session.run_with_iobinding(bound[name])
                bound[name].synchronize_outputs()
                times[name].append(1e3 * (time.perf_counter() - started))
        gap = max(np.abs(answer - answers[0]).max() for answer in answers) / np.abs(answers[0]).max()
        figures = " | ".join(f"{np.median(times[name]):.2f}" for name in sessions)
        print(f"| {batch} × {tokens}, {past} | {figures} | {gap:.1e} |", flush=True)


def captured(workdir: Path, shape: str, dtype: str, names: list[str]) -> dict[str, Path]:
    """Return the graphs by the way in which they were captured; those that are there are taken."""
    import torch
    import transformers

    from lora_export.base.capture.capture import capture_checkpoint

    layers, hidden, kv_heads, heads, mlp, vocabulary = SHAPES[shape]
    base = workdir / f"{shape}-base"
    if not base.exists():
        config = transformers.LlamaConfig(
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocabulary,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(base)
    graphs = {}
    for name in names:
        graphs[name] = workdir / f"{shape}-{dtype}-{name}.onnx"
        if not graphs[name].exists():
            capture_checkpoint(base, graphs[name], dtype=dtype, kv_cache=True, **GRAPHS[name])
    return graphs


def opened(graph: Path, provider: str, threads: int):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    providers = ["CUDAExecutionProvider"] * (provider == "cuda") + ["CPUExecutionProvider"]
    return ort.InferenceSession(graph, options, providers=providers)


def feeds(session, batch: int, past: int, tokens: int) -> dict[str, np.ndarray]:
    random, found = np.random.default_rng(0), {}
    for port in session.get_inputs():
        if port.name == "input_ids":
            found[port.name] = random.integers(3, 99, (batch, tokens))
        elif port.name == "attention_mask":
            found[port.name] = np.ones((batch, past + tokens), np.int64)
            if batch > 1 and not past:
                found[port.name][0, -_PADDED:] = 0
        elif port.name == "position_ids":
            found[port.name] = np.tile(np.arange(past, past + tokens), (batch, 1))
        else:
            kind = np.float16 if "float16" in port.type else np.float32
            shape = (batch, port.shape[1], past, port.shape[3])
            found[port.name] = (0.3 * random.standard_normal(shape)).astype(kind)
    return found


def bind(session, values: dict[str, np.ndarray], provider: str):
    import onnxruntime as ort

    binding = session.io_binding()
    for name, array in values.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, provider, 0))
    for port in session.get_outputs():
        binding.bind_output(port.name, provider, 0)
    return binding


if __name__ == "__main__":
    main()
