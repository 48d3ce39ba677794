"""Adapters that can't be bound: told apart, all problems at once; values that a dtype loses."""

from dataclasses import replace

import numpy as np
import pytest
from binding_cases import BASE, bank, bind, converted, place, product, refused, swap, wide
from small_graphs import adapter, conv, delta, linear, random

from lora_export import AdapterError, SiteError
from lora_export.binding.bind import slot_blocks


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
    with pytest.raises(SiteError, match="missing from the plan"):
        bind(adapter(module, tensor_names=("q.A", "q.B", "q.C")), swap(place("q", 6, 5)))


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
    assert "they are valid only for that base" in error.problems[1]
    assert "any-base" not in error.hint
    here = bind(converted(module, **config | {"base_sha256": BASE}), graph, any_base=True)
    assert here.only_this_base
    assert not here.warnings


def test_a_file_converted_for_this_base_is_taken():
    given = converted(linear("q", 6, 5), base_sha256=BASE, base_version=int(BASE[:16], 16) % 2**31)
    assert set(bind(given, swap(place("q", 6, 5))).ranks) == {"q"}
