"""DoRA's factor and whole parameters, bound against PEFT's forward."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from binding_cases import bind, pack, place, product, refused, swap
from small_graphs import adapter, delta, embedding, linear, random

from lora_export import LoraModule
from lora_export.graph.exposed import ExposedModule, Member, StoredRows


def test_a_whole_parameter_that_the_base_holds_already_is_unchanged():
    table = random(7, 3, seed=9)
    member = Member(path="e", start=0, out_dim=3, stored=(StoredRows(weight="val_3", rows=(0, 7)),))
    graph = swap(
        ExposedModule(name="e", kind="embedding", in_dim=7, out_dim=3, dtype="float32", members=(member,))
    )
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
    member = Member(
        path="head",
        start=0,
        out_dim=3,
        ranks=(),
        stored=(StoredRows(weight="w", rows=(0, 3), transposed=True),),
        stored_bias=(StoredRows(weight="b", rows=(0, 3)),),
    )
    module = ExposedModule(
        name="head", kind="linear", in_dim=5, out_dim=3, dtype="float32", members=(member,), bias=bias
    )
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
    module = LoraModule(
        "m", kind, a.detach().numpy(), b.detach().numpy(), alpha=3.0, rank=2, magnitude=magnitude
    )
    return layer.eval(), module


@pytest.mark.parametrize("layout", ["as in PyTorch", "transposed", "split", "inside a fused weight"])
def test_doras_factor_gives_pefts_forward_linear(layout):
    layer, module = dora_layer(torch.nn.Linear(5, 6))
    w0 = layer.base_layer.weight.detach().numpy()
    fused = np.vstack([random(4, 5), w0, random(2, 5)])
    stored, weights = {
        "as in PyTorch": ((StoredRows(weight="w", rows=(0, 6)),), {"w": w0}),
        "transposed": ((StoredRows(weight="w", rows=(0, 6), transposed=True),), {"w": w0.T}),
        "split": (
            (StoredRows(weight="u", rows=(0, 2)), StoredRows(weight="v", rows=(2, 6), row=1)),
            {"u": w0, "v": w0[1:]},
        ),
        "inside a fused weight": (
            (StoredRows(weight="f", rows=(0, 6), col=4, transposed=True),),
            {"f": fused.T},
        ),
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
    member = Member(path="m", start=0, out_dim=6, stored=(StoredRows(weight="w", rows=(0, 6)),))
    graph = swap(
        ExposedModule(
            name="m", kind="conv", in_dim=3, out_dim=6, dtype="float32", members=(member,), kernel=(3, 2)
        ),
        dora=True,
    )
    bound = bind(adapter(module), graph, weight_of={"w": w0.numpy()}.__getitem__)
    a, b, scale = (torch.from_numpy(bound.tensors[f"m.lora_{part}.weight"]) for part in ("A", "B", "scale"))
    x = torch.randn(2, 3, 7, 7)
    got = (torch.conv2d(x, w0) + torch.conv2d(torch.conv2d(x, a), b)) * scale[:, None, None]
    with torch.no_grad():
        np.testing.assert_allclose(got, layer(x), rtol=1e-4, atol=1e-5)


def test_doras_factor_gives_pefts_forward_embedding():
    layer, module = dora_layer(torch.nn.Embedding(7, 3))
    w0 = layer.base_layer.weight.detach().numpy()
    member = Member(path="m", start=0, out_dim=3, stored=(StoredRows(weight="w", rows=(0, 7)),))
    graph = swap(
        ExposedModule(name="m", kind="embedding", in_dim=7, out_dim=3, dtype="float32", members=(member,)),
        dora=True,
    )
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
    first = replace(module.members[0], stored=(StoredRows(weight="w", rows=(0, 6)),))
    graph = swap(replace(module, members=(first, *module.members[1:])), dora=True)
    scale = bind(adapter(q, v), graph, weight_of={"w": w0}.__getitem__).tensors[
        "l.qkv_proj.lora_scale.weight"
    ]
    wanted = q.magnitude / np.linalg.norm(w0.astype(np.float64) + delta(q), axis=1)
    np.testing.assert_allclose(scale[:6], wanted, rtol=1e-6)
    np.testing.assert_array_equal(scale[6:], np.ones(6, np.float32))


def test_modules_without_dora_get_no_factor():
    graph = swap(place("q", 6, 5), place("v", 6, 5, stored=(StoredRows(weight="w", rows=(0, 6)),)), dora=True)
    given = adapter(linear("q", 6, 5), linear("v", 6, 5, magnitude=random(6)))
    bound = bind(given, graph, weight_of={"w": random(6, 5, seed=4)}.__getitem__)
    assert {name for name in bound.tensors if "scale" in name} == {"v.lora_scale.weight"}
    assert bound.only_this_base
    assert not bind(adapter(linear("q", 6, 5)), graph).only_this_base


def test_dora_needs_the_bases_weights():
    module = linear("q", 6, 5, magnitude=random(6))
    graph = swap(place("q", 6, 5), dora=True)
    assert "only the graph's LoRA record is available" in refused(adapter(module), graph).problems[0]
    quantised = refused(adapter(module), graph, weight_of={}.__getitem__)
    assert "quantised" in quantised.problems[0]
    short = swap(place("q", 6, 5, stored=(StoredRows(weight="w", rows=(0, 4)),)), dora=True)
    error = refused(adapter(module), short, weight_of={"w": random(6, 5)}.__getitem__)
    assert error.problems == ("q: the graph holds 4 of the 6 rows of W0",)
    cut = swap(place("q", 6, 5, stored=(StoredRows(weight="w", rows=(0, 6)),)), dora=True)
    error = refused(adapter(module), cut, weight_of={"w": random(5, 5)}.__getitem__)
    assert error.problems == ("q: w (5, 5) has no rows 0–6 of 5 columns",)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_large_w0_is_read_in_blocks_and_gives_the_same_factor(monkeypatch, transposed):
    w0 = random(50, 40, seed=4)
    module = linear("q", 50, 40, magnitude=np.abs(random(50, seed=5)))
    graph = swap(
        place("q", 50, 40, stored=(StoredRows(weight="w", rows=(0, 50), transposed=transposed),)), dora=True
    )
    monkeypatch.setattr("lora_export.binding.base_weights._BLOCK", 7 * 40)
    weights = {"w": w0.T if transposed else w0}
    scale = bind(adapter(module), graph, weight_of=weights.__getitem__).tensors["q.lora_scale.weight"]
    wanted = module.magnitude / np.linalg.norm(w0.astype(np.float64) + delta(module), axis=1)
    np.testing.assert_allclose(scale, wanted, rtol=1e-6)
