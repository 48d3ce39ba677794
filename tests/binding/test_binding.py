"""Adapters bound to graphs with exposed LoRA: values by numpy in float64 and by PEFT, and every refusal."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from binding_cases import bind, pack, place, product, refused, swap
from small_graphs import adapter, delta, embedding, linear, random

from lora_export import LoraModule
from lora_export.graph.exposed import ExposedModule, Member, StoredRows

# --- values ------------------------------------------------------------------------------------------


def test_linear_and_embedding_compute_the_scaled_delta():
    q, e = linear("a.q", 6, 5), embedding("a.e", 7, 3)
    table = ExposedModule(
        name="a.e",
        kind="embedding",
        in_dim=7,
        out_dim=3,
        dtype="float32",
        members=(Member(path="a.e", start=0, out_dim=3),),
    )
    bound = bind(adapter(q, e), swap(place("a.q", 6, 5), table))
    np.testing.assert_allclose(product(bound, "a.q"), delta(q).T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(product(bound, "a.e"), delta(e), rtol=1e-5, atol=1e-6)
    assert bound.ranks == {"a.q": 2, "a.e": 2}
    assert [row.action for row in bound.plan.rows] == ["expose", "expose"]
    assert all(values.flags.c_contiguous for values in bound.tensors.values())


@pytest.mark.parametrize("groups", [1, 2])
def test_conv_computes_what_pytorch_computes(groups):
    module = LoraModule(
        "c",
        "conv",
        random(4, 6, 3, 2),
        random(8, 4 // groups, 1, 1, seed=1),
        alpha=6.0,
        rank=4,
        groups=groups,
    )
    where = ExposedModule(
        name="c",
        kind="conv",
        in_dim=6,
        out_dim=8,
        dtype="float32",
        members=(Member(path="c", start=0, out_dim=8),),
        kernel=(3, 2),
        groups=groups,
        rank=6,
    )
    bound = bind(adapter(module), swap(where))
    x = torch.from_numpy(random(2, 6, 9, 9, seed=2)).double()
    a, b = (torch.from_numpy(bound.tensors[f"c.lora_{part}.weight"]).double() for part in "AB")
    wanted = torch.conv2d(
        torch.conv2d(x, torch.from_numpy(module.lora_a).double()),
        torch.from_numpy(module.lora_b).double() * 1.5,
        groups=groups,
    )
    assert a.shape == (6, 6, 3, 2)
    got = torch.conv2d(torch.conv2d(x, a), b, groups=groups)
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
    assert bound.notes == ("c: rank 4, padded with zeros to the graph's 6",)


def test_a_scaling_of_one_copies_nothing():
    a, b = random(5, 2), random(2, 6)
    module = LoraModule("q", "linear", a.T, b.T, alpha=2.0, rank=2)
    bound = bind(adapter(module), swap(place("q", 6, 5)))
    assert np.shares_memory(bound.tensors["q.lora_A.weight"], a)
    assert np.shares_memory(bound.tensors["q.lora_B.weight"], b)
    assert bound.notes == ()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_scaling_is_rounded_once_to_the_graphs_dtype(dtype):
    module = replace(linear("q", 6, 5), lora_b=random(6, 2).astype(np.float16), alpha=2 / 3)
    bound = bind(adapter(module), swap(place("q", 6, 5, dtype)))
    target = np.dtype(getattr(ml_dtypes, dtype, dtype))
    work = np.float64 if dtype == "float64" else np.float32
    wanted = (module.lora_b.T.astype(work) * work(1 / 3)).astype(target)
    got = bound.tensors["q.lora_B.weight"]
    assert got.dtype == target
    np.testing.assert_array_equal(got, wanted)
    assert bound.notes[0].startswith("converted from float")


def test_a_float16_adapter_on_a_float32_graph_is_converted_and_said():
    half = replace(
        linear("q", 6, 5),
        lora_a=random(2, 5).astype(np.float16),
        lora_b=random(6, 2, seed=3).astype(np.float16),
    )
    bound = bind(adapter(half), swap(place("q", 6, 5)))
    assert bound.notes == ("converted from float16 to float32 (1 module)",)
    np.testing.assert_array_equal(bound.tensors["q.lora_A.weight"], half.lora_a.T.astype(np.float32))


# --- packs -------------------------------------------------------------------------------------------


def test_a_pack_computes_each_members_delta_and_nothing_for_those_left_alone():
    q, v = linear("l.q_proj", 6, 5), linear("l.v_proj", 3, 5, seed=7)
    bound = bind(adapter(v, q), swap(pack()))
    assert bound.ranks == {"l.qkv_proj": 4}
    wanted = np.hstack([delta(q).T, np.zeros((5, 3)), delta(v).T])
    np.testing.assert_allclose(product(bound, "l.qkv_proj"), wanted, rtol=1e-5, atol=1e-6)
    assert {row.layout for row in bound.plan.rows} == {"outputs 0–6 of a pack", "outputs 9–12 of a pack"}


def test_a_pack_of_fixed_rank_takes_the_sum_of_its_members_ranks():
    q, v = linear("l.q_proj", 6, 5), linear("l.v_proj", 3, 5, seed=7)
    assert bind(adapter(q, v), swap(pack(rank=5))).ranks == {"l.qkv_proj": 5}
    error = refused(adapter(q, v), swap(pack(rank=3)))
    assert error.problems == (
        "l.q_proj.weight  rank 4, the graph fixes 3",
        "l.v_proj.weight  rank 4, the graph fixes 3",
    )


# --- names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("model.layers.0.mlp.up", "model.layers.0.mlp.up"),
        ("model.layers.0.mlp.up", "layers.0.mlp.up"),
        ("layers.0.mlp.up", "model.layers.0.mlp.up"),
        ("model.layers.0.self_attn.q_proj", "model.layers.0.attn.q_proj"),
    ],
)
def test_paths_match_exactly_with_one_prefix_or_renamed(ours, theirs):
    bound = bind(adapter(linear(ours, 6, 5)), swap(place(theirs, 6, 5)))
    assert set(bound.ranks) == {theirs}
    assert bound.plan.rows[0].parameter == f"{ours}.weight"


def test_one_prefix_change_holds_for_the_whole_adapter():
    graph = swap(place("encoder.l.0.q", 6, 5), place("decoder.l.0.q", 6, 5))
    error = refused(adapter(linear("l.0.q", 6, 5)), graph)
    assert "ambiguous" in error.problems[0]
    assert "decoder" in error.problems[0]


def test_flattened_names_find_their_dots():
    given = adapter(linear("model_layers_0_q_proj", 6, 5), flattened=True)
    assert set(bind(given, swap(place("model.layers.0.q_proj", 6, 5))).ranks) == {"model.layers.0.q_proj"}
    both = swap(place("a.model.layers.0.q_proj", 6, 5), place("b.model.layers.0.q_proj", 6, 5))
    assert "ambiguous" in refused(given, both).problems[0]


def test_components_with_the_same_path_are_ambiguous():
    given = adapter(linear("q", 6, 5, component="unet"), linear("q", 6, 5, component="text_encoder"))
    error = refused(given, swap(place("q", 6, 5)))
    assert len(error.problems) == 2
    assert "--component text_encoder or --component unet" in error.hint


# --- biases ------------------------------------------------------------------------------------------


def test_a_bias_of_lora_b_is_scaled_into_its_tensor():
    q, v = linear("l.q_proj", 6, 5), linear("l.v_proj", 3, 5, seed=7, lora_bias=random(3, seed=8))
    bound = bind(adapter(q, v), swap(pack(bias=True)))
    got = bound.tensors["l.qkv_proj.lora_B.bias"]
    np.testing.assert_allclose(got, np.concatenate([np.zeros(9), 1.5 * v.lora_bias]), rtol=1e-6)
    assert [row.parameter for row in bound.plan.rows] == [
        *("l.q_proj.weight", "l.v_proj.weight", "l.v_proj.bias")
    ]
    with_dora = linear("l.q_proj", 6, 5, magnitude=random(6), lora_bias=random(6))
    graph = swap(pack(bias=True), dora=True)
    graph = replace(graph, modules=(replace(graph.modules[0], members=_stored_members(graph)),))
    error = refused(adapter(with_dora), graph, weight_of={"w": random(6, 5)}.__getitem__)
    assert error.problems == (
        "l.q_proj.bias  lora_bias: its module has DoRA, whose factor would scale the bias as well",
    )
    assert "merge-onnx" in error.hint


def _stored_members(graph):
    first, *rest = graph.modules[0].members
    return (replace(first, stored=(StoredRows(weight="w", rows=(0, 6)),)), *rest)
