"""What tests of binding share."""

from dataclasses import replace

import numpy as np
import pytest
from small_graphs import random

from lora_export import Adapter, AdapterError, LoraModule, SiteError
from lora_export.binding.bind import bind_adapter
from lora_export.graph.exposed import ExposedModule, LoraRecord, Member, Slot

BASE = "ab" * 32


def swap(*modules, **more):
    return LoraRecord(
        mode="swap", base="base.onnx", base_sha256=BASE, modules=modules, **({"max_rank": 8} | more)
    )


def place(path, out_dim, in_dim, dtype="float32", **more):
    stored = more.pop("stored", ())
    return ExposedModule(
        name=path,
        kind="linear",
        in_dim=in_dim,
        out_dim=out_dim,
        dtype=dtype,
        members=(Member(path=path, start=0, out_dim=out_dim, stored=stored),),
        **more,
    )


def bind(given, exposed, **options):
    return bind_adapter(given, exposed, where="out.onnx", **options)


def product(binding, name):
    a, b = (binding.tensors[f"{name}.lora_{part}.weight"].astype(np.float64) for part in "AB")
    return a @ b


def refused(given, exposed, **options):
    with pytest.raises((SiteError, AdapterError)) as caught:
        bind(given, exposed, **options)
    return caught.value


def pack(dtype="float32", **more):
    members = (
        Member(path="l.q_proj", start=0, out_dim=6),
        Member(path="l.k_proj", start=6, out_dim=3),
        Member(path="l.v_proj", start=9, out_dim=3),
    )
    return ExposedModule(
        name="l.qkv_proj", kind="linear", in_dim=5, out_dim=12, dtype=dtype, members=members, **more
    )


def converted(module, **config):
    return Adapter("c", "c", "converted", {module.key: module}, config={"layout": "onnx", **config})


def bank(ranks=((2, 4), (3, 0), (1, 2)), dtype="float32"):
    """Return a bank of two slots with a pack of three members; ``ranks``: of each slot, by member."""
    module = pack(dtype)
    members = tuple(replace(m, ranks=r) for m, r in zip(module.members, ranks, strict=True))
    graph = swap(replace(module, members=members), slots=(Slot("one"), Slot("two")))
    return replace(graph, mode="bank")


def wide(path, out_dim, rank, seed):
    return LoraModule(
        path, "linear", random(rank, 5, seed=seed), random(out_dim, rank, seed=seed + 1), alpha=3.0, rank=rank
    )
