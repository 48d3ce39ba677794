"""What tests of branches share: adapters of any rank, their weights in float64, and the laws of a swap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from sessions import session_of
from small_graphs import delta, error, random, run

from lora_export import Adapter, LoraExportError, LoraModule
from lora_export.binding.bind import Binding, bind_adapter
from lora_export.graph.exposed import WEIGHTS_INPUT
from lora_export.graph.onnx_file import load_graph
from lora_export.modes.bank_onnx import bank_onnx
from lora_export.modes.branches.output import ExposeReport
from lora_export.modes.swap_onnx import swap_onnx

TOLERANCE = 2e-6
Feeds = dict[str, np.ndarray]
# Module path → its factors (empty without an adapter); returns the graph's outputs in float64.
Answer = Callable[[dict[str, LoraModule]], Sequence[np.ndarray]]


# --- adapters and what they make of a weight ---------------------------------------------------------


def lora(path: str, out_dim: int, in_dim: int, rank: int = 2, seed: int = 1, **more: Any) -> LoraModule:
    """Return a linear module whose delta is about as large as a weight of `random`."""
    a, b = random(rank, in_dim, seed=seed), random(out_dim, rank, seed=seed + 50)
    return LoraModule(path, "linear", a, b, alpha=0.8 * rank, rank=rank, **more)


def conv_lora(
    path: str, out_dim: int, in_dim: int, *kernel: int, rank: int = 2, seed: int = 1, **more: Any
) -> LoraModule:
    a = random(rank, in_dim, *kernel, seed=seed)
    share = rank // more.get("groups", 1)
    b = random(out_dim, share, *(1 for _ in kernel), seed=seed + 50)
    return LoraModule(path, "conv", a, b, alpha=0.8 * rank, rank=rank, **more)


def table_lora(path: str, count: int, dim: int, rank: int = 2, seed: int = 1, **more: Any) -> LoraModule:
    a, b = random(rank, count, seed=seed), random(dim, rank, seed=seed + 50)
    return LoraModule(path, "embedding", a, b, alpha=0.8 * rank, rank=rank, **more)


def magnitude(size: int, seed: int = 5) -> np.ndarray:
    return 3 + random(size, seed=seed)


def effective(weight: np.ndarray, module: LoraModule | None) -> np.ndarray:
    """Return the adapted canonical weight by the definition (DoRA: arXiv:2402.09353, eq. 5), in float64."""
    weight = weight.astype(np.float64)
    if module is None:
        return weight
    changed = weight + delta(module)
    if module.magnitude is None:
        return changed
    axes = (0,) if module.kind == "embedding" else tuple(range(1, changed.ndim))
    norm = np.sqrt((changed**2).sum(axis=axes, keepdims=True))
    return changed / norm * module.magnitude.astype(np.float64).reshape(norm.shape)


def convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, **more: Any) -> np.ndarray:
    function = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[weight.ndim - 2]
    values = [None if v is None else torch.tensor(np.asarray(v, np.float64)) for v in (x, weight, bias)]
    return function(*values, **more).numpy()


# --- the laws of a swap ------------------------------------------------------------------------------


def bind(given: Adapter, report: ExposeReport, base: Path) -> Binding:
    """Bind an adapter to a written swap graph, W0 looked up as `convert-adapter` does."""
    constants = {str(v.name): v.const_value for v in load_graph(report.outputs["graph"]).initializers()}

    def weight_of(name: str) -> np.ndarray:
        tensor = constants[name]
        assert tensor is not None
        return tensor.numpy()

    return bind_adapter(given, report.exposed, where=base.name, weight_of=weight_of)


def swapped(base: Path, given: Adapter | None = None, *, full_check: bool = True, **options: Any):
    """Expose LoRA, twice: equal bytes, a checked graph, additions named after their modules.

    Returns:
        The graph's path and the report.
    """
    again = base.parent / "again"
    again.mkdir(exist_ok=True)
    swap_onnx(base, again / "swap.onnx", adapter=given, force=True, **options)
    out = base.parent / "swap.onnx"
    report = swap_onnx(base, out, adapter=given, force=True, **options)
    for name in ("swap.onnx", "swap.onnx.data"):
        assert (base.parent / name).read_bytes() == (again / name).read_bytes()
    onnx.checker.check_model(str(out), full_check=full_check)
    check_names(base, out, [module.name for module in report.exposed.modules])
    return out, report


def check_swap(
    base: Path, given: Adapter, answer: Answer, feeds: Feeds, *others: Adapter, **options: Any
) -> ExposeReport:
    """The base's bits without an adapter; float64's values with ``given`` and with each of ``others``.

    Options are those of `swap_onnx`; values are those of ``evaluate``, within ``tolerance``.
    """
    tolerance, evaluate = options.pop("tolerance", TOLERANCE), options.pop("evaluate", run)
    out, report = swapped(base, None if options.get("target_modules") else given, **options)
    check_bits(run(base, **feeds), run(out, **feeds))
    check_values(evaluate(base, **feeds), answer({}), tolerance)
    for adapter in (given, *others):
        tensors = bind(adapter, report, base).tensors
        modules = {module.path: module for module in adapter.modules.values()}
        check_values(evaluate(out, **feeds, **tensors), answer(modules), tolerance)
    return report


def check_bits(wanted: Sequence[np.ndarray], got: Sequence[np.ndarray]) -> None:
    for left, right in zip(wanted, got, strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(right, left)


def check_values(got: Sequence[np.ndarray], wanted: Sequence[np.ndarray], tolerance: float) -> None:
    for left, right in zip(got, wanted, strict=True):
        assert left.shape == right.shape
        assert error(left, right) < tolerance


def check_names(base: Path, out: Path, paths: Sequence[str], shared: Sequence[str] = ()) -> None:
    """The base's nodes and values keep their names; what is added begins with a module's path and .lora."""
    before, after = ir.load(base), ir.load(out)
    beginnings = (*(f"{path}.lora" for path in paths), *shared)
    # Exporters leave nodes without a name; ours have one.
    old, new = (Counter(node.name or "" for node in model.graph.all_nodes()) for model in (before, after))
    assert not old - new
    assert all(name.startswith(beginnings) for name in new - old), new - old
    kept, all_values = _values(before), _values(after)
    assert not kept - all_values
    assert all(name.startswith(beginnings) for name in all_values - kept), all_values - kept
    ports = [[str(v.name) for v in model.graph.outputs] for model in (before, after)]
    assert ports[0] == ports[1]


def _values(model: ir.Model) -> set[str]:
    names = {str(out.name) for node in model.graph.all_nodes() for out in node.outputs}
    for graph in (model.graph, *model.graph.subgraphs()):
        names.update(str(value.name) for value in (*graph.inputs, *graph.initializers.values()))
    return names


def refused(write: Callable[..., Any], base: Path, *args: Any, **options: Any) -> LoraExportError:
    """Return the error of a mode that must refuse, and see that nothing was written."""
    folder = base.parent / "refused"
    folder.mkdir(exist_ok=True)
    try:
        write(base, *args, folder / "out.onnx", **options)
    except LoraExportError as caught:
        assert not list(folder.iterdir())
        return caught
    raise AssertionError("it was not refused")


def refuse_swap(base: Path, given: Adapter | None = None, **options: Any) -> LoraExportError:
    return refused(swap_onnx, base, adapter=given, **options)


def reasons(caught: LoraExportError) -> dict[str, str]:
    return dict(line.split("  ", 1) for line in caught.problems)


# --- banks -------------------------------------------------------------------------------------------


def banked(base: Path, given: dict[str, Adapter], *, full_check: bool = True, **options: Any):
    """Write a bank, twice: equal bytes, a checked graph, additions with the right names."""
    again = base.parent / "again"
    again.mkdir(exist_ok=True)
    bank_onnx(base, given, again / "bank.onnx", force=True, **options)
    out = base.parent / "bank.onnx"
    report = bank_onnx(base, given, out, force=True, **options)
    for name in ("bank.onnx", "bank.onnx.data"):
        assert (base.parent / name).read_bytes() == (again / name).read_bytes()
    onnx.checker.check_model(str(out), full_check=full_check)
    check_names(base, out, [module.name for module in report.exposed.modules], ["lora."])
    return out, report


def run_bank(path: Path, weights: Any, feeds: Feeds) -> list[np.ndarray]:
    return run(path, **feeds, **{WEIGHTS_INPUT: np.asarray(weights, np.float32)})


def unoptimised(path: Path, **feeds: np.ndarray) -> list[np.ndarray]:
    """Run without any of ONNX Runtime's fusions."""
    return list(session_of(path, unoptimised=True).run(None, feeds))
