"""Adapters bound to graphs with exposed LoRA: values by numpy in float64 and by PEFT, and every refusal."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from small_graphs import adapter, conv, delta, embedding, linear, random

from lora_export import Adapter, AdapterError, LoraModule, SiteError
from lora_export.binding.bind import bind_adapter, clear_slot, slot_blocks
from lora_export.graph.exposed import ExposedGraph, ExposedModule, Member, Slot, StoredRows

BASE = "ab" * 32


def swap(*modules, **more):
    return ExposedGraph("swap", "base.onnx", BASE, modules, **({"max_rank": 8} | more))


def place(path, out_dim, in_dim, dtype="float32", **more):
    stored = more.pop("stored", ())
    return ExposedModule(
        path, "linear", in_dim, out_dim, dtype, (Member(path, 0, out_dim, stored=stored),), **more
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


# --- values ------------------------------------------------------------------------------------------


def test_linear_and_embedding_compute_the_scaled_delta():
    q, e = linear("a.q", 6, 5), embedding("a.e", 7, 3)
    table = ExposedModule("a.e", "embedding", 7, 3, "float32", (Member("a.e", 0, 3),))
    bound = bind(adapter(q, e), swap(place("a.q", 6, 5), table))
    np.testing.assert_allclose(product(bound, "a.q"), delta(q).T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(product(bound, "a.e"), delta(e), rtol=1e-5, atol=1e-6)
    assert bound.ranks == {"a.q": 2, "a.e": 2}
    assert [row.action for row in bound.plan.rows] == ["expose", "expose"]
    assert all(values.flags.c_contiguous for values in bound.tensors.values())


@pytest.mark.parametrize("groups", [1, 2])
def test_conv_computes_what_pytorch_computes(groups):
    module = LoraModule(
        "c", "conv", random(4, 6, 3, 2), random(8, 4 // groups, 1, 1, seed=1), 6.0, 4, groups=groups
    )
    where = ExposedModule(
        "c", "conv", 6, 8, "float32", (Member("c", 0, 8),), kernel=(3, 2), groups=groups, rank=6
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
    module = LoraModule("q", "linear", a.T, b.T, 2.0, 2)
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


def pack(dtype="float32", **more):
    members = (Member("l.q_proj", 0, 6), Member("l.k_proj", 6, 3), Member("l.v_proj", 9, 3))
    return ExposedModule("l.qkv_proj", "linear", 5, 12, dtype, members, **more)


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


# --- refusals ----------------------------------------------------------------------------------------


def unfit():
    """Return an adapter that is wrong in every way that a place can be, and a graph for it."""
    modules = [
        linear("absent", 6, 5),
        linear("wide", 7, 5),
        conv("kind", 6, 5, 3, 3),
        replace(linear("large", 6, 5), lora_a=random(9, 5), lora_b=random(6, 9), rank=9),
        linear("dora", 6, 5, magnitude=random(6)),
        replace(linear("biased", 6, 5), lora_bias=random(6), tensor_names=("biased.A", "biased.bias")),
        replace(linear("moe", 6, 5), kind="parameter", parameter="up", experts=3),
        linear("right", 6, 5),
    ]
    names = ("wide", "kind", "large", "dora", "biased", "moe", "right")
    given = adapter(*modules, extras={"head.weight": random(3, 3)})
    return given, swap(*(place(name, 6, 5) for name in names))


def test_an_adapter_of_another_model_is_told_from_one_that_partly_fits():
    given = adapter(linear("encoder.a", 6, 5), linear("encoder.b", 6, 5), extras={"foo.bar": random(3)})
    error = refused(given, swap(place("q", 6, 5)), weight_of={}.__getitem__)
    assert error.message == (
        "adapter 'tiny' was made for another model, or for modules that out.onnx does not expose: "
        "none of its 3 parameters has a place"
    )
    assert len(error.problems) == 3
    some = refused(adapter(linear("q", 6, 5), linear("encoder.b", 6, 5)), swap(place("q", 6, 5)))
    assert some.message == "adapter 'tiny' has 1 parameters with no place in out.onnx (of 2)"
    assert "(allow_unmatched=True)" in some.hint


def test_a_parameter_that_the_graph_lacks_is_told_from_a_constant():
    weights = {"head.weight": random(3, 3, seed=5)}
    given = adapter(linear("q", 6, 5), extras={"foo.bar": random(3), "head.weight": random(3, 3)})
    error = refused(given, swap(place("q", 6, 5)), weight_of=weights.__getitem__)
    assert error.problems == (
        "foo.bar  the graph has no parameter of this name",
        "head.weight  replaces the whole parameter, which the graph keeps as a constant",
    )
    assert "merge-onnx" in error.hint


def test_everything_without_a_place_is_listed_at_once():
    given, graph = unfit()
    error = refused(given, graph)
    found = dict(line.split("  ", 1) for line in error.problems)
    assert found.keys() == {
        *("absent.weight", "wide.weight", "kind.weight", "large.weight", "dora.weight"),
        *("biased.bias", "moe.up", "head.weight"),
    }
    assert found["absent.weight"].startswith("out.onnx has no LoRA tensors for it")
    assert found["wide.weight"] == "shapes differ: (in_dim, out_dim) (5, 7), the graph has (5, 6)"
    assert found["kind.weight"] == "the adapter has a conv module, the graph a linear one"
    assert found["large.weight"] == "rank 9, the graph takes 8 at most"
    assert "DoRA" in found["dora.weight"]
    assert "swap-onnx --dora and this adapter" in error.hint
    assert "lora_bias" in found["biased.bias"]
    assert "stacked experts (3)" in found["moe.up"]
    assert "whole parameter" in found["head.weight"]
    assert "merge the adapter with merge-onnx" in error.hint
    assert "--max-rank" in error.hint
    assert "--allow-unmatched" in error.hint


def test_allow_unmatched_goes_on_with_the_rest():
    given, graph = unfit()
    bound = bind(given, graph, allow_unmatched=True)
    assert set(bound.ranks) == {"right", "biased"}
    assert len(bound.plan.refused) == 8
    assert bound.notes[-1].startswith("left out 8 of 10 parameters: ")


def test_allow_unmatched_never_binds_nothing():
    with pytest.raises(SiteError, match="none of its 1 parameters has a place"):
        bind(adapter(linear("absent", 6, 5)), swap(place("q", 6, 5)), allow_unmatched=True)


def test_a_square_matrix_that_fits_is_never_turned_around():
    square = linear("q", 5, 5)
    bound = bind(adapter(square), swap(place("q", 5, 5)))
    np.testing.assert_allclose(product(bound, "q"), delta(square).T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    module = linear("q", 6, 5)
    module.lora_a[1, 2] = bad
    error = refused(adapter(module, linear("absent", 1, 1)), swap(place("q", 6, 5)))
    assert isinstance(error, SiteError)
    assert error.problems[1] == "q lora_A: 1 of 10 values are NaN or infinite"
    assert isinstance(refused(adapter(module), swap(place("q", 6, 5))), AdapterError)
    assert isinstance(
        refused(adapter(module, linear("x", 1, 1)), swap(place("q", 6, 5)), allow_unmatched=True),
        AdapterError,
    )


def test_values_that_overflow_in_the_graphs_dtype_are_refused():
    module = linear("q", 6, 5)
    module.lora_b[0, 0] = 60000.0
    error = refused(adapter(module), swap(place("q", 6, 5, "float16")))
    assert error.problems == (
        "q lora_B: values up to 9e+04 are too large for float16, which ends at 6.55e+04",
    )
    assert np.isfinite(
        bind(adapter(module), swap(place("q", 6, 5, "bfloat16"))).tensors["q.lora_B.weight"]
    ).all()


def underflowing(dtype, factor):
    """Return a module whose A shrinks by ``factor``, what is bound, and NumPy's loss of A and of B."""
    module = replace(linear("q", 6, 5), lora_a=linear("q", 6, 5).lora_a * np.float32(factor))
    bound = bind(adapter(module), swap(place("q", 6, 5, dtype)))
    lost = {}
    for part, exact in (("A", module.lora_a.T), ("B", module.lora_b.T * np.float32(1.5))):
        got = bound.tensors[f"q.lora_{part}.weight"].astype(np.float64)
        exact = exact.astype(np.float64)
        error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
        lost[part] = error, ((got == 0) & (exact != 0)).mean()
    return bound, lost


def test_values_lost_in_the_graphs_dtype_are_said():
    bound, lost = underflowing("float16", 1e-7)
    assert lost["A"][0] > 0.25
    assert lost["A"][1] > 0
    said = f"q lora_A (error {lost['A'][0]:.2%}, {lost['A'][1]:.2%} of its values became 0)"
    assert bound.notes == (
        "converted from float32 to float16 (1 module)",
        f"values too small for the graph's dtype: {said}",
    )
    assert bound.warnings == bound.notes[1:]
    assert bound.plan.notes == bound.notes


def test_small_losses_are_said_without_a_warning_and_rounding_not_at_all():
    bound, lost = underflowing("float16", 3e-6)
    assert 0.01 < lost["A"][0] < 0.25
    assert f"error {lost['A'][0]:.2%}" in bound.notes[1]
    assert not bound.warnings
    for dtype in ("float16", "bfloat16"):
        bound, lost = underflowing(dtype, 1)
        assert 0 < lost["A"][0] < 0.01
        assert len(bound.notes) == 1
    # bfloat16 has float32's exponents, and a float32 graph needs no conversion.
    assert len(underflowing("bfloat16", 1e-30)[0].notes) == 1
    assert not underflowing("float32", 1e-30)[0].notes


def test_a_scaling_that_makes_values_too_small_is_said_without_a_conversion():
    half = linear("q", 6, 5)
    half = replace(half, lora_a=half.lora_a.astype(np.float16), lora_b=half.lora_b.astype(np.float16))
    bound = bind(adapter(replace(half, alpha=2e-8)), swap(place("q", 6, 5, "float16")))
    assert not bound.tensors["q.lora_B.weight"].any()
    assert bound.warnings == (
        "values too small for the graph's dtype: q lora_B (error 100.00%, 100.00% of its values became 0)",
    )


def test_a_slot_says_what_was_lost_as_well():
    module = replace(wide("l.q_proj", 6, 2, 1), alpha=2e-9)
    found = slot_blocks(adapter(module), bank(dtype="float16"), 0, where="bank.onnx")
    assert "l.q_proj lora_B (error 100.00%" in found.warnings[0]
    assert found.notes[-1:] == found.warnings


def test_every_tensor_of_the_file_is_accounted_for():
    module = linear("q", 6, 5, tensor_names=("q.A", "q.B"))
    with pytest.raises(SiteError, match="the plan does not speak of"):
        bind(adapter(module, tensor_names=("q.A", "q.B", "q.C")), swap(place("q", 6, 5)))


# --- other bases -------------------------------------------------------------------------------------


def converted(module, **config):
    return Adapter("c", "c", "converted", {module.key: module}, config={"layout": "onnx", **config})


@pytest.mark.parametrize("config", [{"base_sha256": "cd" * 32}, {"base_version": 7}])
def test_a_file_converted_for_another_base_is_refused(config):
    given, graph = converted(linear("q", 6, 5), **config), swap(place("q", 6, 5))
    with pytest.raises(AdapterError, match="was made for another base"):
        bind(given, graph)
    bound = bind(given, graph, any_base=True)
    assert set(bound.ranks) == {"q"}
    assert bound.notes == bound.warnings
    assert bound.notes[0].startswith("bound to another base than it was made for: base ")


@pytest.mark.parametrize(
    ("module", "config"),
    [
        (linear("q", 6, 5, scale=random(6)), {"base_sha256": "cd" * 32}),
        (linear("q", 6, 5), {"base_sha256": "cd" * 32, "only_this_base": "true"}),
        (linear("q", 6, 5), {"base_version": 7, "only_this_base": "true"}),
    ],
)
def test_values_computed_from_a_base_hold_for_no_other(module, config):
    graph = swap(place("q", 6, 5), dora=True)
    error = refused(converted(module, **config), graph, any_base=True)
    assert "they hold for no other base" in error.problems[1]
    assert "any-base" not in error.hint
    here = bind(converted(module, **config | {"base_sha256": BASE}), graph, any_base=True)
    assert here.only_this_base
    assert not here.warnings


def test_a_file_converted_for_this_base_is_taken():
    given = converted(linear("q", 6, 5), base_sha256=BASE, base_version=int(BASE[:16], 16) % 2**31)
    assert set(bind(given, swap(place("q", 6, 5))).ranks) == {"q"}


# --- whole parameters saved along -----------------------------------------------------------------------


def test_a_whole_parameter_that_the_base_holds_already_is_unchanged():
    table = random(7, 3, seed=9)
    member = Member("e", 0, 3, stored=(StoredRows("val_3", (0, 7)),))
    graph = swap(ExposedModule("e", "embedding", 7, 3, "float32", (member,)))
    weights = {"val_3": table, "head.weight": random(4, 3)}
    given = adapter(embedding("e", 7, 3), extras={"e.weight": table.copy(), "head.weight": random(4, 3)})
    bound = bind(given, graph, weight_of=weights.__getitem__)
    assert [row.action for row in bound.plan.rows] == ["expose", "unchanged", "unchanged"]
    weights["val_3"] = table + 1
    del weights["head.weight"]
    error = refused(given, graph, weight_of=weights.__getitem__)
    assert [line.split("  ")[0] for line in error.problems] == ["e.weight", "head.weight"]


def head(bias=True):
    """Return a graph with a classifier's head in it, and its weights."""
    member = Member("head", 0, 3, (), (StoredRows("w", (0, 3), transposed=True),), (StoredRows("b", (0, 3)),))
    module = ExposedModule("head", "linear", 5, 3, "float32", (member,), bias=bias)
    return swap(place("q", 6, 5), module), {"w": random(5, 3, seed=20), "b": random(3, seed=21)}


def test_a_replaced_head_becomes_the_change_from_the_bases_values():
    graph, weights = head()
    new = {"head.weight": random(3, 5, seed=22), "head.bias": random(3, seed=23)}
    bound = bind(adapter(linear("q", 6, 5), extras=new), graph, weight_of=weights.__getitem__)
    assert bound.ranks == {"q": 2, "head": 3}
    assert bound.only_this_base
    np.testing.assert_allclose(
        weights["w"] + product(bound, "head"), new["head.weight"].T, rtol=1e-5, atol=1e-6
    )
    got = weights["b"] + bound.tensors["head.lora_B.bias"]
    np.testing.assert_allclose(got, new["head.bias"], rtol=1e-6, atol=1e-6)
    assert {row.parameter: row.place for row in bound.plan.rows}["head.bias"] == "head.lora_B.bias"
    # A bias that is the base's own needs no change.
    same = new | {"head.bias": weights["b"].copy()}
    again = bind(adapter(linear("q", 6, 5), extras=same), graph, weight_of=weights.__getitem__)
    assert not again.tensors["head.lora_B.bias"].any()
    assert [row.action for row in again.plan.rows] == ["expose", "expose", "unchanged"]


def test_a_replaced_head_is_refused_where_it_can_not_be_a_change():
    graph, weights = head()
    wrong = {"head.weight": random(4, 5), "head.bias": random(3, seed=23)}
    error = refused(adapter(linear("q", 6, 5), extras=wrong), graph, weight_of=weights.__getitem__)
    assert error.problems[0] == "head.weight  shapes differ: (4, 5), the graph has (3, 5)"
    assert error.problems[1].startswith("head.bias  replaces the whole parameter")
    right = {"head.weight": random(3, 5)}
    error = refused(adapter(linear("q", 6, 5), extras=right), graph)
    assert error.problems[0].startswith("head.weight  replaces the whole parameter")
    error = refused(adapter(extras=right), replace(graph, max_rank=2), weight_of=weights.__getitem__)
    assert error.problems == ("head.weight  rank 3, the graph takes 2 at most",)
    without, weights = head(bias=False)
    both = right | {"head.bias": random(3, seed=23)}
    error = refused(adapter(extras=both), without, weight_of=weights.__getitem__)
    assert [line.split("  ")[0] for line in error.problems] == ["head.bias"]


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
    return (replace(first, stored=(StoredRows("w", (0, 6)),)), *rest)


# --- DoRA --------------------------------------------------------------------------------------------


def dora_layer(base):
    """Return PEFT's DoRA layer around a module, everything random, and the adapter that it would save."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(
        torch.nn.Sequential(base), LoraConfig(r=2, lora_alpha=3, target_modules=["0"], use_dora=True)
    )
    layer = model.base_model.model[0]
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * (1 if "magnitude" not in name else 0.1) + 0.5)
    is_table = isinstance(base, torch.nn.Embedding)
    a, b = (layer.lora_embedding_A, layer.lora_embedding_B) if is_table else (layer.lora_A, layer.lora_B)
    a, b = a["default"], b["default"]
    a, b = (a, b) if is_table else (a.weight, b.weight)
    kind = "embedding" if is_table else "conv" if a.ndim > 2 else "linear"
    magnitude = layer.lora_magnitude_vector["default"].weight.detach().numpy().reshape(-1)
    module = LoraModule("m", kind, a.detach().numpy(), b.detach().numpy(), 3.0, 2, magnitude=magnitude)
    return layer.eval(), module


@pytest.mark.parametrize("layout", ["as in PyTorch", "transposed", "split", "inside a fused weight"])
def test_doras_factor_gives_pefts_forward_linear(layout):
    layer, module = dora_layer(torch.nn.Linear(5, 6))
    w0 = layer.base_layer.weight.detach().numpy()
    fused = np.vstack([random(4, 5), w0, random(2, 5)])
    stored, weights = {
        "as in PyTorch": ((StoredRows("w", (0, 6)),), {"w": w0}),
        "transposed": ((StoredRows("w", (0, 6), transposed=True),), {"w": w0.T}),
        "split": ((StoredRows("u", (0, 2)), StoredRows("v", (2, 6), row=1)), {"u": w0, "v": w0[1:]}),
        "inside a fused weight": ((StoredRows("f", (0, 6), col=4, transposed=True),), {"f": fused.T}),
    }[layout]
    graph = swap(place("m", 6, 5, stored=stored), dora=True)
    bound = bind(adapter(module), graph, weight_of=weights.__getitem__)
    x = random(3, 5, seed=8)
    branch = x @ bound.tensors["m.lora_A.weight"] @ bound.tensors["m.lora_B.weight"]
    got = (x @ w0.T + branch) * bound.tensors["m.lora_scale.weight"] + layer.base_layer.bias.detach().numpy()
    with torch.no_grad():
        np.testing.assert_allclose(got, layer(torch.from_numpy(x)), rtol=1e-5, atol=1e-5)


def test_doras_factor_gives_pefts_forward_conv():
    layer, module = dora_layer(torch.nn.Conv2d(3, 6, (3, 2), bias=False))
    w0 = layer.base_layer.weight.detach()
    member = Member("m", 0, 6, stored=(StoredRows("w", (0, 6)),))
    graph = swap(ExposedModule("m", "conv", 3, 6, "float32", (member,), kernel=(3, 2)), dora=True)
    bound = bind(adapter(module), graph, weight_of={"w": w0.numpy()}.__getitem__)
    a, b, scale = (torch.from_numpy(bound.tensors[f"m.lora_{part}.weight"]) for part in ("A", "B", "scale"))
    x = torch.randn(2, 3, 7, 7)
    got = (torch.conv2d(x, w0) + torch.conv2d(torch.conv2d(x, a), b)) * scale[:, None, None]
    with torch.no_grad():
        np.testing.assert_allclose(got, layer(x), rtol=1e-4, atol=1e-5)


def test_doras_factor_gives_pefts_forward_embedding():
    layer, module = dora_layer(torch.nn.Embedding(7, 3))
    w0 = layer.base_layer.weight.detach().numpy()
    member = Member("m", 0, 3, stored=(StoredRows("w", (0, 7)),))
    graph = swap(ExposedModule("m", "embedding", 7, 3, "float32", (member,)), dora=True)
    bound = bind(adapter(module), graph, weight_of={"w": w0}.__getitem__)
    ids = np.array([0, 6, 3])
    branch = bound.tensors["m.lora_A.weight"][ids] @ bound.tensors["m.lora_B.weight"]
    with torch.no_grad():
        wanted = layer(torch.from_numpy(ids))
    np.testing.assert_allclose(
        (w0[ids] + branch) * bound.tensors["m.lora_scale.weight"], wanted, rtol=1e-5, atol=1e-5
    )


def test_members_of_a_pack_without_dora_get_ones():
    w0 = random(6, 5, seed=4)
    q = linear("l.q_proj", 6, 5, magnitude=np.abs(random(6, seed=5)))
    v = linear("l.v_proj", 3, 5, seed=7)
    module = pack()
    first = replace(module.members[0], stored=(StoredRows("w", (0, 6)),))
    graph = swap(replace(module, members=(first, *module.members[1:])), dora=True)
    scale = bind(adapter(q, v), graph, weight_of={"w": w0}.__getitem__).tensors[
        "l.qkv_proj.lora_scale.weight"
    ]
    wanted = q.magnitude / np.linalg.norm(w0.astype(np.float64) + delta(q), axis=1)
    np.testing.assert_allclose(scale[:6], wanted, rtol=1e-6)
    np.testing.assert_array_equal(scale[6:], np.ones(6, np.float32))


def test_modules_without_dora_get_no_factor():
    graph = swap(place("q", 6, 5), place("v", 6, 5, stored=(StoredRows("w", (0, 6)),)), dora=True)
    given = adapter(linear("q", 6, 5), linear("v", 6, 5, magnitude=random(6)))
    bound = bind(given, graph, weight_of={"w": random(6, 5, seed=4)}.__getitem__)
    assert {name for name in bound.tensors if "scale" in name} == {"v.lora_scale.weight"}
    assert bound.only_this_base
    assert not bind(adapter(linear("q", 6, 5)), graph).only_this_base


def test_dora_needs_the_bases_weights():
    module = linear("q", 6, 5, magnitude=random(6))
    graph = swap(place("q", 6, 5), dora=True)
    assert "only the graph's record is at hand" in refused(adapter(module), graph).problems[0]
    quantised = refused(adapter(module), graph, weight_of={}.__getitem__)
    assert "quantised" in quantised.problems[0]
    short = swap(place("q", 6, 5, stored=(StoredRows("w", (0, 4)),)), dora=True)
    error = refused(adapter(module), short, weight_of={"w": random(6, 5)}.__getitem__)
    assert error.problems == ("q: the graph holds 4 of the 6 rows of W0",)
    cut = swap(place("q", 6, 5, stored=(StoredRows("w", (0, 6)),)), dora=True)
    error = refused(adapter(module), cut, weight_of={"w": random(5, 5)}.__getitem__)
    assert error.problems == ("q: w (5, 5) has no rows 0–6 of 5 columns",)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_large_w0_is_read_in_blocks_and_gives_the_same_factor(monkeypatch, transposed):
    w0 = random(50, 40, seed=4)
    module = linear("q", 50, 40, magnitude=np.abs(random(50, seed=5)))
    graph = swap(place("q", 50, 40, stored=(StoredRows("w", (0, 50), transposed=transposed),)), dora=True)
    monkeypatch.setattr("lora_export.binding.base_weights._BLOCK", 7 * 40)
    weights = {"w": w0.T if transposed else w0}
    scale = bind(adapter(module), graph, weight_of=weights.__getitem__).tensors["q.lora_scale.weight"]
    wanted = module.magnitude / np.linalg.norm(w0.astype(np.float64) + delta(module), axis=1)
    np.testing.assert_allclose(scale, wanted, rtol=1e-6)


# --- banks -------------------------------------------------------------------------------------------


def bank(ranks=((2, 4), (3, 0), (1, 2)), dtype="float32"):
    """Return a bank of two slots with a pack of three members; ``ranks``: of each slot, by member."""
    module = pack(dtype)
    members = tuple(replace(m, ranks=r) for m, r in zip(module.members, ranks, strict=True))
    graph = swap(replace(module, members=members), slots=(Slot("one"), Slot("two")))
    return replace(graph, mode="bank")


def wide(path, out_dim, rank, seed):
    return LoraModule(
        path, "linear", random(rank, 5, seed=seed), random(out_dim, rank, seed=seed + 1), 3.0, rank
    )


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
        3.0,
        3,
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
    again = bind(converted(LoraModule("l.qkv_proj", "linear", a.T, b.T, 3.0, 3)), swap(pack(), max_rank=1))
    assert np.shares_memory(again.tensors["l.qkv_proj.lora_A.weight"], a)
    plain = Adapter("p", "p", "peft", {"x": LoraModule("l.qkv_proj", "linear", a.T, b.T, 3.0, 3)})
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
    zero = LoraModule("l.qkv_proj", "linear", a.T, 0 * b.T, 1.0, 1, lora_bias=whole)
    for block in blocks(converted(zero), graph, 1):
        if block.tensor == "l.qkv_proj.lora_B.bias":
            np.testing.assert_allclose(block.values, bias[1:], rtol=1e-6)
        elif block.tensor == "l.qkv_proj.lora_B.weight":
            assert not block.values.any()


def test_slots_of_a_grouped_convolution_share_each_group():
    groups, ranks = 2, (4, 2)
    member = Member("c", 0, 8, ranks=ranks)
    module = ExposedModule("c", "conv", 6, 8, "float32", (member,), kernel=(3,), groups=groups)
    graph = replace(swap(module, slots=(Slot("one"), Slot("two"))), mode="bank")
    loras = [
        LoraModule("c", "conv", random(r, 6, 3, seed=r), random(8, r // groups, 1, seed=9), 1.0, r, groups=2)
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
