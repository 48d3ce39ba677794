"""The laws that every mode keeps, whatever architecture and exporter: all modes through all laws.

merge(x) = base(x) + scaling·B·A·x · without an adapter the base, bit for bit · bank row i = swap with adapter
i · permuted rows give permuted outputs · A→B→A gives A again · read(write(adapter)) = adapter · same input,
same bytes · a plan's rows add up to the adapter file's tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import exposed_models as exposed
import numpy as np
import pytest
import tiny

from lora_export import AdapterSession, convert_adapter, load_adapter, merge_onnx
from lora_export.graph.onnx_file import load_graph

TOLERANCE = 2e-6
# One of each kind: MatMul with names, Gemm on flattened rows, fused weights, convolutions.
GRAPHS = [
    ("llama", "dynamo"),
    ("gpt2", "dynamo"),
    ("qwen2", "genai"),
    ("bert", "torchscript"),
    ("conv", "dynamo_noopt"),
]
FEATURES = {"a": ("plain", 0), "b": ("patterns", 1)}


def adapters(arch: str) -> dict[str, Path]:
    return {name: tiny.adapter(arch, *feature) for name, feature in FEATURES.items()}


@dataclass
class Mode:
    """One way to serve adapters: how it is written, and how it answers with one (or None) for all rows."""

    write: Callable[[str, str, Path], list[Path]]
    answer: Callable[[str, list[Path], str | None], np.ndarray]
    has_base: bool = True


def _merge(arch: str, exporter: str, folder: Path) -> list[Path]:
    outputs = []
    for name, path in adapters(arch).items():
        merge_onnx(tiny.base_onnx(arch, exporter), path, folder / f"{name}.onnx")
        outputs.append(folder / f"{name}.onnx")
    return outputs


def _merged_answer(arch: str, graphs: list[Path], name: str | None) -> np.ndarray:
    graph = next(path for path in graphs if path.stem == name)
    return tiny.run(graph, tiny.feeds(arch, graph))


def _swap(**options: object) -> Callable[[str, str, Path], list[Path]]:
    def write(arch: str, exporter: str, folder: Path) -> list[Path]:
        return [exposed.swap(arch, exporter, adapters(arch)["b"], folder, **options)]

    return write


def _swapped_answer(arch: str, graphs: list[Path], name: str | None) -> np.ndarray:
    return exposed.run_swapped(arch, graphs[0], adapters(arch)[name] if name else None)


def _bank(**options: object) -> Callable[[str, str, Path], list[Path]]:
    def write(arch: str, exporter: str, folder: Path) -> list[Path]:
        return [exposed.bank(arch, exporter, adapters(arch), folder, **options)]

    return write


def _bank_answer(arch: str, graphs: list[Path], name: str | None) -> np.ndarray:
    return exposed.run_bank(arch, graphs[0], [name, name])


MODES = {
    "merge": Mode(_merge, _merged_answer, has_base=False),
    "swap": Mode(_swap(), _swapped_answer),
    "swap-pack": Mode(_swap(pack=True), _swapped_answer),
    "swap-fused": Mode(_swap(fuse_base=True), _swapped_answer),
    "bank": Mode(_bank(), _bank_answer),
    "bank-pack": Mode(_bank(pack=True), _bank_answer),
    "bank-fused": Mode(_bank(fuse_base=True), _bank_answer),
    "bank-inputs": Mode(_bank(resident="inputs"), _bank_answer),
}
EVERY = [
    pytest.param(mode, *graph, marks=pytest.mark.xdist_group(graph[0]), id=f"{mode}-{graph[0]}-{graph[1]}")
    for mode in MODES
    for graph in GRAPHS
]


@cache
def written(mode: str, arch: str, exporter: str) -> list[Path]:
    """Return a mode's graphs, written once for all laws; do not change them."""
    folder = tiny.shared_folder() / "laws" / f"{mode}-{arch}-{exporter}"
    return sorted(tiny._once(folder, lambda made: MODES[mode].write(arch, exporter, made)).glob("*.onnx"))


@cache
def float64_answer(arch: str, name: str | None) -> np.ndarray:
    """Oracle: PyTorch in float64 with W0 + scaling·B·A put into its weights, by the definition."""
    import torch

    model = tiny.build(arch).double()
    if name:
        for module in load_adapter(adapters(arch)[name]).modules.values():
            weight = model.get_submodule(module.path).weight
            a, b = (part.astype(np.float64) for part in (module.lora_a, module.lora_b))
            delta = module.alpha / module.rank * (b.reshape(len(b), -1) @ a.reshape(len(a), -1))
            if delta.size == weight.numel() and tuple(weight.shape) != delta.shape:
                # A kernel, or Conv1D's (in, out).
                delta = delta.T if weight.dim() == 2 else delta.reshape(weight.shape)
            elif type(model.get_submodule(module.path)).__name__ == "Conv1D":
                delta = delta.T
            with torch.no_grad():
                weight.add_(torch.from_numpy(np.ascontiguousarray(delta)))
    inputs = {
        k: v.double() if v.is_floating_point() else v for k, v in tiny.ARCHITECTURES[arch].inputs().items()
    }
    with torch.no_grad():
        output = model(**inputs)
    return (output if torch.is_tensor(output) else output.logits).numpy()


@pytest.mark.parametrize(("mode", "arch", "exporter"), EVERY)
def test_an_adapter_adds_scaling_b_a_x(mode, arch, exporter):
    graphs = written(mode, arch, exporter)
    for name in FEATURES:
        got = MODES[mode].answer(arch, graphs, name)
        assert tiny.relative_error(got, float64_answer(arch, name)) < TOLERANCE
    assert tiny.relative_error(float64_answer(arch, "a"), float64_answer(arch, "b")) > 1e3 * TOLERANCE


@pytest.mark.parametrize(("mode", "arch", "exporter"), EVERY)
def test_without_an_adapter_it_is_the_base_and_a_b_a_gives_a_again(mode, arch, exporter):
    graphs = written(mode, arch, exporter)
    answers = [MODES[mode].answer(arch, graphs, name) for name in ("a", "b", "a")]
    assert np.array_equal(answers[0], answers[2])
    assert not np.array_equal(answers[0], answers[1])
    if MODES[mode].has_base:
        base = tiny.base_onnx(arch, exporter)

        def both():
            return MODES[mode].answer(arch, graphs, None), tiny.run(base, tiny.feeds(arch, base))

        if arch == "conv":
            # What is beside them lets ONNX Runtime fold and lay out the base's convolutions in another way.
            got, wanted = both()
            assert tiny.relative_error(got, wanted) < TOLERANCE
            with tiny.unoptimised():
                got, wanted = both()
        else:
            got, wanted = both()
        assert np.array_equal(got, wanted)


@pytest.mark.parametrize(("mode", "arch", "exporter"), EVERY)
def test_same_input_same_bytes_and_every_tensor_in_the_plan(mode, arch, exporter, tmp_path):
    import json

    MODES[mode].write(arch, exporter, tmp_path)
    first = sorted(written(mode, arch, exporter)[0].parent.iterdir())
    assert len(first) >= 3
    for path in first:
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name
    made_of = adapters(arch)
    for manifest in (path for path in first if path.name.endswith(".lora.json")):
        rows = json.loads(manifest.read_text())["plan"]["rows"]
        spoken = {(row["adapter"], name) for row in rows for name in row["tensors"]}
        names = {row["adapter"] for row in rows}
        files = [load_adapter(path) for path in made_of.values()]
        assert spoken == {(f.name, name) for f in files if f.name in names for name in f.tensor_names}


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(
    ("arch", "exporter"), [pytest.param(*g, marks=pytest.mark.xdist_group(g[0])) for g in GRAPHS]
)
def test_a_banks_row_is_a_swap_with_that_rows_adapter(arch, exporter, pack):
    suffix = "-pack" if pack else ""
    (bank,), (swap,) = (written(f"{mode}{suffix}", arch, exporter) for mode in ("bank", "swap"))
    for rows in (["a", "b"], ["b", None]):
        got = exposed.run_bank(arch, bank, rows)
        for number, name in enumerate(rows):
            wanted = exposed.run_swapped(arch, swap, adapters(arch)[name] if name else None)
            assert tiny.relative_error(got[number], wanted[number]) < TOLERANCE


@pytest.mark.parametrize(
    ("arch", "exporter"), [pytest.param(*g, marks=pytest.mark.xdist_group(g[0])) for g in GRAPHS]
)
def test_permuted_rows_give_permuted_outputs(arch, exporter):
    (bank,), (swap,) = (written(mode, arch, exporter) for mode in ("bank", "swap"))
    feeds = tiny.feeds(arch, swap)
    turned = {name: values[::-1].copy() for name, values in feeds.items()}
    lora = exposed.tensors(swap, adapters(arch)["a"])
    weights = {"lora.adapter_weights": np.array([[1, 0], [0, 1]], np.float32)}
    turned_weights = {"lora.adapter_weights": weights["lora.adapter_weights"][::-1].copy()}
    for graph, one, two in ((swap, lora, lora), (bank, weights, turned_weights)):
        straight, reverse = tiny.run(graph, feeds | one), tiny.run(graph, turned | two)
        assert tiny.relative_error(reverse[::-1], straight) < TOLERANCE
        assert tiny.relative_error(straight[::-1], straight) > 1e3 * TOLERANCE


@pytest.mark.parametrize("suffix", [".safetensors", ".onnx_adapter"])
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(
    ("arch", "exporter"), [pytest.param(*g, marks=pytest.mark.xdist_group(g[0])) for g in GRAPHS]
)
def test_a_converted_adapter_reads_back_as_the_same(arch, exporter, pack, suffix, tmp_path):
    """read(write(adapter)) = adapter, and the session takes either to the same bits."""
    source = adapters(arch)["b"]
    (graph,) = written("swap-pack" if pack else "swap", arch, exporter)
    converted = tmp_path / f"b{suffix}"
    convert_adapter(source, graph, converted)
    direct, again = exposed.tensors(graph, source), exposed.tensors(graph, converted)
    assert direct.keys() == again.keys()
    for name, values in direct.items():
        assert np.array_equal(values, again[name]), name
    session = AdapterSession(graph)
    session.load_adapter("direct", source)
    session.load_adapter("converted", converted)
    feeds = tiny.feeds(arch, graph)
    one, two = (session.run(feeds, adapter=name) for name in ("direct", "converted"))
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_modes_of_the_package_are_all_here():
    """A mode without laws is a mode that nobody checks."""
    import lora_export.modes

    files = {path.stem for path in Path(lora_export.modes.__path__[0]).glob("[!_]*.py")}
    # A capture has no adapter, a merged checkpoint is not a graph, and codes are not exact.
    others = {"merge_checkpoint", "capture_onnx", "convert_adapter", "quantize_onnx"}
    assert files - others == {f"{mode.partition('-')[0]}_onnx" for mode in MODES}


def test_the_zoo_covers_every_kind_of_call():
    """The graphs above must go on having what the laws are to hold for."""
    operators = set()
    for arch, exporter in GRAPHS:
        operators |= {node.op_type for node in load_graph(tiny.base_onnx(arch, exporter)).graph.all_nodes()}
    assert {"MatMul", "Gemm", "Conv", "GroupQueryAttention"} <= operators
