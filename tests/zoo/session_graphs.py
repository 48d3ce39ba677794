"""Graphs for `AdapterSession`'s tests: a swap graph by `swap_onnx`, a bank by hand, and numpy's answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from small_graphs import adapter, delta, graph, random, save

from lora_export import Adapter, LoraModule
from lora_export.graph.exposed import KEY, WEIGHTS_INPUT, ExposedModule, LoraRecord, Member, Slot
from lora_export.modes.swap_onnx import swap_onnx

# y = q(p(x)) + shift; h is y in bfloat16.
P, Q = random(5, 4, seed=11), random(3, 5, seed=12)
BASE = """g (float[b,4] x, float[3] shift) => (float[b,3] y, bfloat16[b,3] h) {
    t = MatMul(x, p_weight)  z = MatMul(t, q_weight)  y = Add(z, shift)  h = Cast<to = 16>(y)
}"""
SHIFT = random(3, seed=13)


def base(folder: Path) -> Path:
    return save(graph(BASE, {"p.weight": P.T.copy(), "q.weight": Q.T.copy()}), folder)


def swap(folder: Path, name: str = "swap.onnx", **options: Any) -> Path:
    """Write the swap graph with p and q exposed, ranks up to 8."""
    path = folder / "base.onnx"
    swap_onnx(
        path if path.exists() else base(folder),
        folder / name,
        target_modules=["p", "q"],
        max_rank=8,
        **options,
    )
    return folder / name


def linear(path: str, seed: int, rank: int = 2) -> LoraModule:
    out_dim, in_dim = {"p": P, "q": Q}[path].shape
    return LoraModule(
        path,
        "linear",
        random(rank, in_dim, seed=seed),
        random(out_dim, rank, seed=seed + 50),
        alpha=3.0,
        rank=rank,
    )


def both(seed: int, rank: int = 2) -> Adapter:
    """Return an adapter of p and q; another seed is another adapter."""
    made = adapter(linear("p", seed, rank), linear("q", seed + 100, rank + 1))
    return dataclasses.replace(made, name=f"a{seed}", sha256=f"{seed}-{rank}")


def feeds(batch: int = 4, seed: int = 14) -> dict[str, np.ndarray]:
    return {"x": random(batch, 4, seed=seed), "shift": SHIFT}


def wanted(given: Adapter | None, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Return y in float64."""
    changes = {} if given is None else {m.path: delta(m) for m in given.modules.values()}
    p, q = (weight.astype(np.float64) + changes.get(name, 0) for name, weight in (("p", P), ("q", Q)))
    return inputs["x"].astype(np.float64) @ p.T @ q.T + inputs["shift"]


# --- a bank --------------------------------------------------------------------------------------------

BANK = """g (float[b,4] x, float[3] shift, float[b,3] lora_adapter_weights INPUTS) => (float[b,3] y) {
    wp = MatMul(lora_adapter_weights, expand_p)  wq = MatMul(lora_adapter_weights, expand_q)
    tp = MatMul(x, p_weight)  ap = MatMul(x, p_lora_A_weight)
    sp = Mul(ap, wp)  bp = MatMul(sp, p_lora_B_weight)  t = Add(tp, bp)
    tq = MatMul(t, q_weight)  aq = MatMul(t, q_lora_A_weight)
    sq = Mul(aq, wq)  bq = MatMul(sq, q_lora_B_weight)  z = Add(tq, bq)  y = Add(z, shift)
}"""
# Rank of each slot: slots differ, and the last has no room for q.
RANKS = {"p": (2, 4, 3), "q": (3, 5, 0)}
SLOTS = ("emotion", "summary", "spare")


def bank(folder: Path, tensors: str, *residents: Adapter, record: dict[str, Any] | None = None) -> Path:
    """Write a bank of three slots with these adapters in the first ones.

    Args:
        folder: Where to.
        tensors: ``constants``, ``defaults`` (inputs with a default) or ``inputs`` (without).
        residents: Adapters, for the slots in order.
        record: Fields of the record that are to be wrong.
    """
    lora: dict[str, np.ndarray] = {}
    modules = []
    for path, weight in (("p", P), ("q", Q)):
        ranks, (out_dim, in_dim) = RANKS[path], weight.shape
        total = sum(ranks)
        lora_a, lora_b = np.zeros((in_dim, total), np.float32), np.zeros((total, out_dim), np.float32)
        for number, given in enumerate(residents):
            module = given.modules[f"{path}.weight"]
            own = slice(sum(ranks[:number]), sum(ranks[:number]) + module.rank)
            lora_a[:, own] = module.lora_a.T
            lora_b[own] = (module.lora_b * np.float32(module.scaling)).T
        lora |= {f"{path}.lora_A.weight": lora_a, f"{path}.lora_B.weight": lora_b}
        modules.append(
            ExposedModule(
                name=path,
                kind="linear",
                in_dim=in_dim,
                out_dim=out_dim,
                dtype="float32",
                members=(Member(path=path, start=0, out_dim=out_dim, ranks=ranks),),
            )
        )
    fields = {
        "slots": tuple(Slot(n, f"sha{i}" if i < len(residents) else "") for i, n in enumerate(SLOTS)),
        "resident": "initializers" if tensors == "constants" else "inputs",
        "batch_input": "x",
    }
    made = LoraRecord(
        mode="bank",
        base="base.onnx",
        base_sha256="",
        modules=tuple(modules),
        max_rank=8,
        **{**fields, **(record or {})},
    )
    return save(_bank_model(tensors, lora, made), folder, "bank.onnx")


def _bank_model(tensors: str, lora: dict[str, np.ndarray], record: LoraRecord) -> ir.Model:
    names = {name.replace(".", "_"): name for name in [*lora, WEIGHTS_INPUT]}
    declared = "".join(
        f", float[{values.shape[0]},{values.shape[1]}] {name.replace('.', '_')}"
        for name, values in lora.items()
    )
    weights: dict[str, Any] = {"p.weight": P.T.copy(), "q.weight": Q.T.copy()}
    for path, ranks in RANKS.items():
        weights[f"expand.{path}"] = np.repeat(np.eye(len(SLOTS), dtype=np.float32), ranks, axis=1)
    text = BANK.replace("INPUTS", "" if tensors == "constants" else declared)
    model = graph(text, weights if tensors == "inputs" else {**weights, **lora})
    for value in model.graph.inputs:
        value.name = names.get(str(value.name), value.name)
    model.metadata_props[KEY] = record.to_json()
    return model


def fitting(seed: int, slot: int) -> Adapter:
    """Return an adapter that fills a slot's ranks."""
    made = adapter(
        *(linear(path, seed + 7 * len(path), ranks[slot]) for path, ranks in RANKS.items() if ranks[slot])
    )
    return dataclasses.replace(made, name=f"fit{seed}")


def wanted_blend(weights: list[tuple[Adapter, float]], inputs: dict[str, np.ndarray], row: int) -> np.ndarray:
    """Return one row of y in float64, with the adapters' deltas weighted."""
    changed = {"p": P.astype(np.float64), "q": Q.astype(np.float64)}
    for given, weight in weights:
        for module in given.modules.values():
            changed[module.path] = changed[module.path] + weight * delta(module)
    return inputs["x"][row].astype(np.float64) @ changed["p"].T @ changed["q"].T + inputs["shift"]
