"""Slots of a bank: each its adapter, its biases, and nothing of another's."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from binding_cases import bank, bind, converted, pack, swap, wide
from small_graphs import adapter, delta, random

from lora_export import Adapter, AdapterError, LoraModule, SiteError
from lora_export.binding.bind import clear_slot, slot_blocks
from lora_export.graph.exposed import ExposedModule, LoraRecord, Member, Slot
from lora_export.untrusted.fields import FieldError


def filled(graph, *adapters):
    """Write adapters into slots 0, 1, … of tensors full of another tenant's values."""
    (module,) = graph.modules
    total = sum(sum(member.ranks) for member in module.members)
    tensors = {
        module.lora_a: np.full(module.a_shape(total), 77.0, np.float32),
        module.lora_b: np.zeros(module.b_shape(total), np.float32),
    }
    for slot, given in enumerate(adapters):
        for block in clear_slot(graph, slot) if given is None else blocks(given, graph, slot):
            assert tensors[block.tensor][block.index].shape == block.values.shape
            tensors[block.tensor][block.index] = block.values
    return tensors[module.lora_a], tensors[module.lora_b]


def blocks(given, graph, slot, **options):
    return slot_blocks(given, graph, slot, where="bank.onnx", **options).blocks


# In the order of `ExposedModule`: the first member's slots, then the next member's.
_SLOT_OF_COLUMN = [0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1]


def test_each_slot_of_a_bank_computes_its_adapter():
    graph = bank()
    q, k, v = wide("l.q_proj", 6, 2, 1), wide("l.k_proj", 3, 3, 3), wide("l.v_proj", 3, 1, 5)
    other = wide("l.q_proj", 6, 3, 7)
    a, b = filled(graph, adapter(q, k, v), adapter(other))
    for slot, wanted in enumerate(
        [
            np.hstack([delta(q).T, delta(k).T, delta(v).T]),
            np.hstack([delta(other).T, np.zeros((5, 6))]),
        ]
    ):
        mask = np.array([owner == slot for owner in _SLOT_OF_COLUMN], np.float64)
        np.testing.assert_allclose((a * mask).astype(np.float64) @ b, wanted, rtol=1e-5, atol=1e-5)


def test_room_that_a_record_claims_takes_no_memory():
    """Zeros for 10¹⁵ values; what a module has no use for is not believed."""
    graph = bank()
    large = ExposedModule(
        name="other",
        kind="linear",
        in_dim=10**9,
        out_dim=4,
        dtype="float32",
        members=(Member(path="other", start=0, out_dim=4, ranks=(10**6, 10**6)),),
    )
    given = blocks(adapter(wide("l.q_proj", 6, 2, 1)), replace(graph, modules=(*graph.modules, large)), 0)
    assert any(block.tensor == large.lora_a and block.values.size == 10**15 for block in given)
    for members, rank in (([Member(path="l.q", start=0, out_dim=6, ranks=(2, 10**9))], 0), ([], 10**9)):
        (module,) = graph.modules
        claimed = replace(module, members=(*members, *module.members[len(members) :]), rank=rank)
        with pytest.raises(FieldError, match="more than the module's sizes: at most"):
            LoraRecord.from_data(json.loads(replace(graph, modules=(claimed,)).to_json()))


def test_an_emptied_slot_is_the_base():
    a, b = filled(bank(), adapter(wide("l.q_proj", 6, 2, 1)), None)
    mask = np.array([owner == 1 for owner in _SLOT_OF_COLUMN], np.float64)
    assert not ((a * mask) @ b).any()
    assert not a[:, mask == 1].any()


def test_a_slot_too_small_is_refused_with_all_problems():
    given = adapter(wide("l.q_proj", 6, 5, 1), wide("l.k_proj", 3, 1, 3))
    with pytest.raises(SiteError) as caught:
        blocks(given, bank(), 1)
    assert caught.value.problems == (
        "l.q_proj.weight  rank 5, slot 1 has 4 for l.q_proj",
        "l.k_proj.weight  rank 1, slot 1 has 0 for l.k_proj",
    )
    assert caught.value.hint == "make the bank with a larger --slot-rank (slot_rank=)"


def test_nan_and_dora_have_no_place_in_a_bank():
    module = wide("l.q_proj", 6, 2, 1)
    module.lora_b[0, 0] = np.nan
    with pytest.raises(AdapterError, match="1 of 12 values are NaN"):
        blocks(adapter(module), bank(), 0)
    with pytest.raises(SiteError, match="DoRA's factor can't differ by row"):
        blocks(adapter(replace(wide("l.q_proj", 6, 2, 1), magnitude=random(6))), bank(), 0)


def test_a_converted_pack_goes_into_a_bank_member_by_member():
    q, v = wide("l.q_proj", 6, 2, 1), wide("l.v_proj", 3, 1, 5)
    bound = bind(adapter(q, v), swap(pack()))
    whole = LoraModule(
        "l.qkv_proj",
        "linear",
        bound.tensors["l.qkv_proj.lora_A.weight"].T,
        bound.tensors["l.qkv_proj.lora_B.weight"].T,
        alpha=3.0,
        rank=3,
    )
    graph = bank()
    expected = filled(graph, adapter(q, v), None)
    for got, wanted in zip(filled(graph, converted(whole), None), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
    mixed = replace(whole, lora_b=random(12, 3))
    with pytest.raises(SiteError, match="mixes the modules of the pack"):
        blocks(converted(mixed), graph, 0)


def test_a_converted_pack_goes_back_into_its_swap_graph_as_it_is():
    q, v = wide("l.q_proj", 6, 2, 1), wide("l.v_proj", 3, 1, 5)
    bound = bind(adapter(q, v), swap(pack()))
    a, b = (bound.tensors[f"l.qkv_proj.lora_{part}.weight"] for part in "AB")
    again = bind(
        converted(LoraModule("l.qkv_proj", "linear", a.T, b.T, alpha=3.0, rank=3)), swap(pack(), max_rank=1)
    )
    assert np.shares_memory(again.tensors["l.qkv_proj.lora_A.weight"], a)
    plain = Adapter("p", "p", "peft", {"x": LoraModule("l.qkv_proj", "linear", a.T, b.T, alpha=3.0, rank=3)})
    with pytest.raises(SiteError, match="no LoRA tensors"):
        bind(plain, swap(pack()))


def test_a_slot_has_its_own_row_of_biases():
    graph = bank()
    graph = replace(graph, modules=(replace(graph.modules[0], bias=True),))
    v = replace(wide("l.v_proj", 3, 1, 5), lora_bias=random(3))
    bias = np.full((2, 12), 77.0, np.float32)
    for block in blocks(adapter(v), graph, 1):
        if block.tensor == "l.qkv_proj.lora_B.bias":
            bias[block.index] = block.values
    np.testing.assert_allclose(bias[1], np.concatenate([np.zeros(9), 3.0 * v.lora_bias]), rtol=1e-6)
    assert (bias[0] == 77.0).all()
    bound = bind(adapter(v), swap(pack(bias=True)))
    a, b, whole = (bound.tensors[f"l.qkv_proj.lora_{part}"] for part in ("A.weight", "B.weight", "B.bias"))
    zero = LoraModule("l.qkv_proj", "linear", a.T, 0 * b.T, alpha=1.0, rank=1, lora_bias=whole)
    for block in blocks(converted(zero), graph, 1):
        if block.tensor == "l.qkv_proj.lora_B.bias":
            np.testing.assert_allclose(block.values, bias[1:], rtol=1e-6)
        elif block.tensor == "l.qkv_proj.lora_B.weight":
            assert not block.values.any()


def test_slots_of_a_grouped_convolution_share_each_group():
    groups, ranks = 2, (4, 2)
    member = Member(path="c", start=0, out_dim=8, ranks=ranks)
    module = ExposedModule(
        name="c",
        kind="conv",
        in_dim=6,
        out_dim=8,
        dtype="float32",
        members=(member,),
        kernel=(3,),
        groups=groups,
    )
    graph = replace(swap(module, slots=(Slot("one"), Slot("two"))), mode="bank")
    loras = [
        LoraModule(
            "c",
            "conv",
            random(r, 6, 3, seed=r),
            random(8, r // groups, 1, seed=9),
            alpha=1.0,
            rank=r,
            groups=2,
        )
        for r in (2, 2)
    ]
    a, b = filled(graph, adapter(loras[0]), adapter(loras[1]))
    # Of each group's three channels two are slot one's, one is slot two's.
    owners = np.array([0, 0, 1] * groups)
    x = torch.from_numpy(random(2, 6, 9, seed=3)).double()
    for slot, lora in enumerate(loras):
        mask = torch.from_numpy((owners == slot).astype(np.float64))[:, None]
        hidden = torch.conv1d(x, torch.from_numpy(a).double()) * mask
        got = torch.conv1d(hidden, torch.from_numpy(b).double(), groups=groups)
        wanted = torch.conv1d(
            torch.conv1d(x, torch.from_numpy(lora.lora_a).double()),
            torch.from_numpy(lora.lora_b).double() * lora.scaling,
            groups=groups,
        )
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
