"""Compare the speed of a decoder captured plainly, with --fused and with --runtime ort-cuda, interleaved.

Run: python tools/bench_fused.py --workdir DIR [--shape 1b] [--dtype float16] [--provider cuda] [--repeats 30]
     [--other NAME=model.onnx]
Makes a Llama with random weights in a work folder (transformers), captures it four times with its cache (the
last as merge-onnx does a folder, with q, k and v in one product), and runs the graphs in turn in ONNX
Runtime: the next token behind 512 and 4,096 tokens and a prompt, with one and several rows, of a prompt one
padded on the right. Prints a Markdown table: nodes of each graph, median ms of a run, and the largest
difference of the logits from the first graph's, relative to the largest logit. On CUDA the feeds and the
outputs stay on the device, and the cache is written into memory of its own. ``--graphs fused,ort-cuda`` runs
these alone. ``--other`` (as often as wanted) runs a graph of another builder in the same turns: of the same
shape, with the names of onnxruntime-genai's builder. Its difference says something where it has the weights
of DIR's base, and is printed in a column of its own.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx_ir
from bench_capture import SHAPES

RUNS = ((1, 512, 1), (8, 512, 1), (1, 4096, 1), (8, 4096, 1), (1, 0, 512), (8, 0, 128))
_POSITIONS = 8192
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
    parser.add_argument("--other", action="append", default=[], metavar="NAME=PATH")
    options = parser.parse_args()
    names = [name for name in options.graphs.split(",") if name]
    graphs = captured(options.workdir, options.shape, options.dtype, names)
    others = {name: Path(path) for name, path in (given.split("=", 1) for given in options.other)}
    sessions = {
        name: opened(graph, options.provider, options.threads) for name, graph in (graphs | others).items()
    }
    heads = " | ".join(f"{name}, ms" for name in sessions)
    print(f"| batch × new tokens, past | {heads} | difference |{' of others |' * bool(others)}")
    print("|---|" + "---|" * (len(sessions) + 1 + bool(others)))
    counts = " | ".join(f"{len(onnx_ir.load(graph).graph)}" for graph in (graphs | others).values())
    print(f"| nodes | {counts} | |{' |' * bool(others)}", flush=True)
    for batch, past, tokens in RUNS:
        values = feeds(sessions.values(), options.shape, batch, past=past, tokens=tokens)
        answers, times = timed(sessions, values, options.provider, options.repeats)
        # The first row of a prompt has padding, whose logits nobody reads.
        read = {name: answer[batch > 1 :] for name, answer in answers.items()}
        figures = " | ".join(f"{np.median(times[name]):.2f}" for name in sessions)
        gaps = [gap(read, graphs), *([gap(read, others)] if others else [])]
        print(f"| {batch} × {tokens}, {past} | {figures} | {' | '.join(gaps)} |", flush=True)


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
            max_position_embeddings=_POSITIONS,
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


def feeds(sessions, shape: str, batch: int, past: int, tokens: int) -> dict[str, np.ndarray]:
    """Return values for all inputs that a session has, by name: each graph reads the same."""
    _, hidden, kv_heads, heads, _, _ = SHAPES[shape]
    random, found = np.random.default_rng(0), {}
    ports = {port.name: port for session in sessions for port in session.get_inputs()}
    for name, port in ports.items():
        if name == "input_ids":
            found[name] = random.integers(3, 99, (batch, tokens))
        elif name == "attention_mask":
            found[name] = np.ones((batch, past + tokens), np.int64)
            if batch > 1 and not past:
                found[name][0, -_PADDED:] = 0
        elif name == "position_ids":
            found[name] = np.tile(np.arange(past, past + tokens), (batch, 1))
        elif name.startswith("past_key_values."):
            kind = np.float16 if "float16" in port.type else np.float32
            size = (batch, kv_heads, past, hidden // heads)
            found[name] = (0.3 * random.standard_normal(size, np.float32)).astype(kind)
        else:
            raise SystemExit(
                f"input {name} is not one of a decoder with a cache: input_ids, attention_mask, "
                "position_ids, past_key_values.*; leave that graph out of --other"
            )
    return found


def timed(
    sessions, values: dict[str, np.ndarray], provider: str, repeats: int
) -> tuple[dict[str, np.ndarray], dict[str, list[float]]]:
    """Return each session's logits, and its times in ms, measured in turns of changing order.

    Steps of a token are short: in a fixed order a graph would pay for what the one before it left behind.
    """
    import onnxruntime as ort

    given = {name: ort.OrtValue.ortvalue_from_numpy(array, provider, 0) for name, array in values.items()}
    bound = {name: bind(session, given, provider) for name, session in sessions.items()}
    answers, times = {}, defaultdict(list)
    for name, session in sessions.items():
        for _ in range(4):
            session.run_with_iobinding(bound[name])
        logits = [port.name for port in session.get_outputs()].index("logits")
        answers[name] = bound[name].copy_outputs_to_cpu()[logits].astype(np.float32)
    random = np.random.default_rng(0)
    for _ in range(repeats):
        for name in random.permutation(list(sessions)):
            started = time.perf_counter()
            sessions[name].run_with_iobinding(bound[name])
            bound[name].synchronize_outputs()
            times[name].append(1e3 * (time.perf_counter() - started))
    return answers, times


def bind(session, given, provider: str):
    binding = session.io_binding()
    for port in session.get_inputs():
        binding.bind_ortvalue_input(port.name, given[port.name])
    for port in session.get_outputs():
        binding.bind_output(port.name, provider, 0)
    return binding


def gap(answers: dict[str, np.ndarray], names: Iterable[str]) -> str:
    """Return the largest difference of some answers from the first, relative to its largest value."""
    first = next(iter(answers.values()))
    gaps = [np.abs(answers[name] - first).max() for name in names]
    return f"{max(gaps) / np.abs(first).max():.1e}" if gaps else "–"


if __name__ == "__main__":
    main()
