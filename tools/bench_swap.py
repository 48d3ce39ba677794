"""Measure what exposed LoRA costs over its base graph, and what changing the adapter costs, beside PEFT.

Run: python tools/bench_swap.py --workdir /tmp/bench [--provider cuda] [--shapes 8x1 8x128 1x512]
Makes layers as wide as `--hidden` says (2048: those of Llama 3.2 1B) with random weights, adapters of rank 16
on all seven linears, and the base graph of each ``batch x sequence`` shape by torch.onnx.export, all kept in
the work folder for the next run (1 GB a shape in float32). Then it makes the graphs by merge_onnx, swap_onnx
and bank_onnx and prints two Markdown tables:

1. A run of base, merged, swap and bank graph (also packed, and on a fused base) by ONNX Runtime, inputs and
   outputs bound on the device, with and without CUDA graphs, and of PyTorch with PEFT, unmerged: one adapter,
   and a batch whose rows have different ones (`adapter_names`). In turn in one process: times move with the
   machine, ratios hardly do.
2. From an adapter to the first answer: one that is resident, one that was converted to a file, against PEFT's
   `load_adapter` + `set_adapter` and a new session of a merged graph.

Each line also says how far the answer is from PEFT's, relative, so that nothing is timed that computes
something else. Needs onnxruntime (onnxruntime-gpu for cuda), torch, transformers and peft.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaModel
from transformers.utils import logging as transformers_logging

from lora_export import AdapterSession, bank_onnx, convert_adapter, load_adapter, merge_onnx, swap_onnx
from lora_export.binding.bind import bind_adapter
from lora_export.graph.exposed import WEIGHTS_INPUT, lora_record_of

EAGER, GRAPH = "-1", "1"  # gpu_graph_id: -1 runs without a CUDA graph
# What is given to swap_onnx and bank_onnx.
FORMS = {"plain": "", "pack": "--pack", "fuse-base": "--fuse-base"}
Run = Callable[[], Any]


@dataclass(frozen=True)
class Setup:
    """What is measured."""

    work: Path
    provider: Literal["cpu", "cuda"]
    dtype: torch.dtype
    hidden: int
    layers: int
    rank: int
    slots: int
    forms: tuple[str, ...]

    @property
    def cuda(self) -> bool:
        return self.provider == "cuda"

    @property
    def numpy(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def folder(self) -> Path:
        """Weights, adapters and graphs of this size."""
        return self.work / f"swap-{self.hidden}-{self.layers}-{self.numpy}-r{self.rank}"

    def adapter(self, slot: int) -> Path:
        return self.folder / f"adapter{slot}" / "default"

    def providers(self) -> list[Any]:
        if not self.cuda:
            return ["CPUExecutionProvider"]
        return [("CUDAExecutionProvider", {"enable_cuda_graph": "1"}), "CPUExecutionProvider"]

    def inputs(self, shape: tuple[int, int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(*shape, self.hidden, generator=generator).to(self.dtype)


# --- what is measured is made --------------------------------------------------------------------------


class Layers(torch.nn.Module):
    """The decoder layers alone: embeddings in, hidden states out, no cache."""

    def __init__(self, model: LlamaModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(inputs_embeds=x, use_cache=False).last_hidden_state


def build(setup: Setup) -> None:
    """Make the checkpoint and the adapters unless an earlier run left them."""
    base = setup.folder / "base"
    if not base.exists():
        config = LlamaConfig(
            vocab_size=32, hidden_size=setup.hidden, intermediate_size=4 * setup.hidden,
            num_hidden_layers=setup.layers, num_attention_heads=setup.hidden // 64,
            num_key_value_heads=setup.hidden // 256, head_dim=64, attn_implementation="eager",
        )  # fmt: skip
        torch.manual_seed(0)
        LlamaModel(config).to(setup.dtype).save_pretrained(base)
    missing = [slot for slot in range(setup.slots) if not setup.adapter(slot).exists()]
    model = load_base(setup) if missing else None
    for slot in missing:
        config = LoraConfig(r=setup.rank, lora_alpha=2 * setup.rank, target_modules="all-linear")
        peft = get_peft_model(model, config)
        torch.manual_seed(slot + 1)
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        peft.save_pretrained(setup.adapter(slot))
        model = peft.unload()


def load_base(setup: Setup) -> Any:
    folder = setup.folder / "base"
    return LlamaModel.from_pretrained(folder, dtype=setup.dtype, attn_implementation="eager").eval()


def graphs(setup: Setup, shape: tuple[int, int]) -> dict[str, Path]:
    """Export the base of this shape unless an earlier run did; make the others."""
    folder = setup.folder / "x".join(map(str, shape))
    folder.mkdir(parents=True, exist_ok=True)
    exposed = [f"{mode} {form}".strip() for mode in ("swap", "bank") for form in setup.forms]
    paths = {name: folder / f"{name.replace(' ', '')}.onnx" for name in ("base", "merged", *exposed)}
    if not paths["base"].exists():
        layers, x = Layers(load_base(setup)), setup.inputs(shape)
        arguments: dict[str, Any] = {"dynamo": True, "external_data": True, "verbose": False}
        with torch.no_grad():
            torch.onnx.export(
                layers, (x,), str(paths["base"]), input_names=["x"], output_names=["y"], **arguments
            )
    merge_onnx(paths["base"], setup.adapter(0), paths["merged"], force=True)
    adapters = {f"a{slot}": setup.adapter(slot) for slot in range(setup.slots)}
    for form in setup.forms:
        options: dict[str, Any] = {"share_base": True, "force": True}
        options |= {form.removeprefix("--").replace("-", "_"): True} if form else {}
        swap_onnx(paths["base"], paths[f"swap {form}".strip()], adapter=setup.adapter(0), **options)
        bank_onnx(paths["base"], adapters, paths[f"bank {form}".strip()], batch_input="x", **options)
    return paths


# --- contenders ----------------------------------------------------------------------------------------


class Graph:
    """A graph with everything bound on the device, captured as a CUDA graph where there is one."""

    def __init__(
        self, setup: Setup, path: Path, feeds: dict[str, np.ndarray], shape: tuple[int, ...]
    ) -> None:
        self._session = ort.InferenceSession(str(path), patient(), providers=setup.providers())
        self._binding = self._session.io_binding()
        place = ("cuda", 0) if setup.cuda else ("cpu", 0)
        self._kept = {
            name: ort.OrtValue.ortvalue_from_numpy(values, *place) for name, values in feeds.items()
        }
        self.y = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, setup.numpy), *place)
        for name, value in self._kept.items():
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_ortvalue_output(self._session.get_outputs()[0].name, self.y)
        self._modes = {mode: ort.RunOptions() for mode in ((EAGER, GRAPH) if setup.cuda else (EAGER,))}
        for mode, run in self._modes.items():
            if setup.cuda:
                run.add_run_config_entry("gpu_graph_id", mode)

    def run(self, mode: str) -> Run:
        return lambda: self._session.run_with_iobinding(self._binding, self._modes[mode])


def graph_contenders(
    setup: Setup, shape: tuple[int, int], paths: dict[str, Path]
) -> Iterator[tuple[str, Graph]]:
    x = setup.inputs(shape).numpy()
    adapter = load_adapter(setup.adapter(0))
    onehot = np.eye(setup.slots, dtype=np.float32)[np.arange(shape[0]) % setup.slots]
    for name, path in paths.items():
        feeds = {"x": x}
        if name.startswith("swap"):
            record = lora_record_of(metadata_of(path), str(path))
            feeds |= bind_adapter(adapter, record, where=str(path)).tensors
        if name.startswith("bank"):
            feeds[WEIGHTS_INPUT] = onehot
        yield name, Graph(setup, path, feeds, x.shape)


def patient() -> ort.SessionOptions:
    """Return options for threads that wait asleep: spinning, they would take PyTorch its cores."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def metadata_of(path: Path) -> dict[str, str]:
    model = onnx.load(str(path), load_external_data=False)
    return {entry.key: entry.value for entry in model.metadata_props}


class Peft:
    """PyTorch: the model alone, and with every adapter loaded by PEFT."""

    def __init__(self, setup: Setup, shape: tuple[int, int]) -> None:
        device = "cuda" if setup.cuda else "cpu"
        self._sync: Run = torch.cuda.synchronize if setup.cuda else lambda: None
        self._x = setup.inputs(shape).to(device)
        self._plain = load_base(setup).to(device)
        self.model: Any = PeftModel.from_pretrained(load_base(setup), setup.adapter(0), adapter_name="a0")
        for slot in range(1, setup.slots):
            self.model.load_adapter(setup.adapter(slot), adapter_name=f"a{slot}")
        self.model = self.model.to(device, setup.dtype).eval()
        self._rows = [f"a{row % setup.slots}" for row in range(shape[0])]

    def base(self) -> torch.Tensor:
        return self._forward(self._plain)

    def one(self) -> torch.Tensor:
        return self._forward(self.model)

    def mixed(self) -> torch.Tensor:
        return self._forward(self.model, adapter_names=self._rows)

    def change_to(self, adapter: str) -> torch.Tensor:
        self.model.set_adapter(adapter)
        return self.one()

    def answer_from_file(self, folder: Path) -> None:
        self.model.load_adapter(folder, adapter_name="new")
        self.change_to("new")

    def forget(self) -> None:
        self.model.set_adapter("a0")
        self.model.delete_adapter("new")

    def answers(self) -> dict[str, np.ndarray]:
        """Return graph's name → the answer that it should give."""
        base, one, mixed = (y.float().cpu().numpy() for y in (self.base(), self.one(), self.mixed()))
        return {"base": base, "merged": one, "swap": one, "bank": mixed}

    def _forward(self, model: Any, **options: Any) -> torch.Tensor:
        with torch.inference_mode():
            y: torch.Tensor = model(inputs_embeds=self._x, use_cache=False, **options).last_hidden_state
        self._sync()
        return y


# --- measuring -----------------------------------------------------------------------------------------


def measure(runs: dict[tuple[str, str], Run], rounds: int, inner: int) -> dict[tuple[str, str], float]:
    """Run all in turn; return the best of three medians, in ms."""
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(rounds):
        for key, run in runs.items():
            run()
            for _ in range(inner):
                started = time.perf_counter()
                run()
                times[key].append(time.perf_counter() - started)
    found = {}
    for key, values in times.items():
        third = max(1, len(values) // 3)
        medians = [statistics.median(values[at : at + third]) for at in range(0, 3 * third, third)]
        found[key] = 1e3 * min(medians)
    return found


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got.astype(np.float32) - wanted) / np.linalg.norm(wanted))


def overhead(setup: Setup, shape: tuple[int, int], paths: dict[str, Path], rounds: int, inner: int) -> None:
    """Print the first table's lines of one shape."""
    peft = Peft(setup, shape)
    wanted = peft.answers()
    errors: dict[str, float] = defaultdict(float)
    runs: dict[tuple[str, str], Run] = {}
    modes = (EAGER, GRAPH) if setup.cuda else (EAGER,)
    for name, graph in graph_contenders(setup, shape, paths):
        for mode in modes:
            runs[name, mode] = graph.run(mode)
            runs[name, mode]()
            errors[name] = max(errors[name], error(graph.y.numpy(), wanted[name.partition(" ")[0]]))
    runs["PyTorch, no adapter", EAGER] = peft.base
    runs["PyTorch + PEFT, one adapter", EAGER] = peft.one
    runs["PyTorch + PEFT, adapter_names", EAGER] = peft.mixed
    times = measure(runs, rounds, inner)
    for name in dict.fromkeys(name for name, _ in runs):
        cells = []
        for mode in modes:
            ms = times.get((name, mode))
            cells.append(f"{ms:.3f} | {ms / times['base', mode]:.3f}" if ms else "– | –")
        far = f"{errors[name]:.1e}" if name in errors else "–"
        print(f"| {shape[0]}×{shape[1]} | {name} | {' | '.join(cells)} | {far} |", flush=True)


def swapping(setup: Setup, shape: tuple[int, int], paths: dict[str, Path]) -> None:
    """Print the second table's lines."""
    x, peft, names = setup.inputs(shape).numpy(), Peft(setup, shape), ("a0", "a1")
    files = {kind: paths["swap"].with_name(f"a1.{kind}") for kind in ("safetensors", "onnx_adapter")}
    for file in files.values():
        convert_adapter(setup.adapter(1), paths["swap"], file, force=True)
    session = AdapterSession(
        paths["swap"], provider=setup.provider, cuda_graph=setup.cuda, session_options=patient()
    )
    for slot, name in enumerate(names):
        session.load_adapter(name, setup.adapter(slot))
    turns = itertools.cycle(names)
    in_turn: dict[tuple[str, str], Run] = {
        ("the same adapter again", ""): lambda: session.run({"x": x}, adapter="a0"),
        ("two resident adapters in turn", ""): lambda: session.run({"x": x}, adapter=next(turns)),
        ("PEFT: the same adapter again", ""): peft.one,
        ("PEFT: set_adapter, in turn", ""): lambda: peft.change_to(next(turns)),
    }
    for (what, _), ms in measure(in_turn, 5, 20).items():
        print(f"| {what} | {ms:.3f} |", flush=True)

    def answer_from(file: Path) -> None:
        session.load_adapter("new", file, replace=True)
        session.run({"x": x}, adapter="new")

    for kind, file in files.items():
        ms = once(partial(answer_from, file))
        print(f"| {kind} of {file.stat().st_size / 1e6:.1f} MB → first answer | {ms:.1f} |", flush=True)
    ms = once(partial(peft.answer_from_file, setup.adapter(1)), peft.forget)
    print(f"| PEFT: load_adapter, set_adapter → first answer | {ms:.1f} |", flush=True)
    ms = once(lambda: Graph(setup, paths["merged"], {"x": x}, x.shape).run(EAGER)(), repeats=3)
    print(f"| a new session of a merged graph → first answer | {ms:.1f} |", flush=True)


def once(run: Run, undo: Run = lambda: None, repeats: int = 7) -> float:
    """Return the median of single runs in ms; the first one does not count."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - started))
        undo()
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", nargs="+", default=["8x1", "1x128"], help="batch x sequence")
    parser.add_argument("--dtype", choices=("float32", "float16"), help="float16 on cuda, else float32")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument(
        "--forms", nargs="+", choices=FORMS, default=list(FORMS), help="of swap_onnx and bank_onnx"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--inner", type=int, default=10, help="runs of each contender in a round")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers_logging.disable_progress_bar()
    ort.set_default_logger_severity(3)
    dtype = options.dtype or ("float16" if options.provider == "cuda" else "float32")
    setup = Setup(
        options.workdir, options.provider, getattr(torch, dtype), options.hidden, options.layers,
        options.rank, options.slots, tuple(FORMS[form] for form in options.forms),
    )  # fmt: skip
    shapes = [(int(b), int(s)) for b, _, s in (text.partition("x") for text in options.shapes)]
    build(setup)
    made = {shape: graphs(setup, shape) for shape in shapes}
    device = torch.cuda.get_device_name() if setup.cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}; onnxruntime {ort.__version__}, torch {torch.__version__}; {setup.folder.name}\n")
    ratios = ["eager", "CUDA graph"] if setup.cuda else [""]
    columns = " | ".join(f"{mode} ms | ÷ base".strip() for mode in ratios)
    print(f"| batch×sequence | | {columns} | error |\n|---|---|{'---|---|' * len(ratios)}---|")
    for shape in shapes:
        overhead(setup, shape, made[shape], options.rounds, options.inner)
        gc.collect()
    print(f"\n| {shapes[0][0]}×{shapes[0][1]}: from an adapter to the answer | ms |\n|---|---|")
    swapping(setup, shapes[0], made[shapes[0]])


if __name__ == "__main__":
    main()
