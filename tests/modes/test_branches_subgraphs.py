"""Branches in subgraphs: in both sides of an If, behind it, around a weight inside."""

import numpy as np
import pytest
from branch_cases import IN, OUT, X3, W, one, relu
from branch_graphs import (
    TOLERANCE,
    bind,
    check_swap,
    check_values,
    effective,
    lora,
    magnitude,
)
from small_graphs import adapter, graph, random, run, save

from lora_export.modes.swap_onnx import swap_onnx

SCOPES = {"n1": "fc", "n2": "fc"}


ZEROS = "float[2,3,24] {" + ",".join(["0"] * 144) + "}"


BRANCHES = (
    "g (float[2,3,40] x, bool c) => (float[2,3,24] y) {{ y = If (c) <"
    "then_branch = t () => (float[2,3,24] p) {{ {then} }}, "
    "else_branch = e () => (float[2,3,24] q) {{ {other} }}> }}"
)


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("chosen", [True, False], ids=["then", "else"])
def test_both_branches_of_an_if_call_the_module(chosen, dora, tmp_path):
    """They read one activation, but what one computes the other can't see."""
    text = BRANCHES.format(
        then="[n1] p = MatMul (x, fc_weight)", other="[n2] r = MatMul (x, fc_weight) q = Relu (r)"
    )
    base = save(graph(text, {"fc.weight": W.T.copy()}, SCOPES), tmp_path)

    def answer(modules):
        y = X3.astype(np.float64) @ effective(W, modules.get("fc")).T
        return [y if chosen else relu(y)]

    more = {"magnitude": magnitude(OUT)} if dora else {}
    given = adapter(lora("fc", OUT, IN, **more))
    check_swap(base, given, answer, {"x": X3, "c": np.array(chosen)}, dora=dora)


def test_called_in_an_if_and_behind_it(tmp_path):
    text = BRANCHES.format(
        then="[n1] p = MatMul (x, fc_weight)", other=f"q = Constant <value = {ZEROS}> ()"
    ).replace("y) {", "y, float[2,3,24] z) {", 1)
    text = text[: text.rindex("}")] + " [n2] z = MatMul (x, fc_weight) }"
    base = save(graph(text, {"fc.weight": W.T.copy()}, SCOPES), tmp_path)

    def answer(modules):
        return [X3.astype(np.float64) @ effective(W, modules.get("fc")).T] * 2

    check_swap(base, adapter(lora("fc", OUT, IN)), answer, {"x": X3, "c": np.array(True)})


def test_siblings_in_both_branches_of_an_if_packed(tmp_path):
    then, other = (f"{{out}} = MatMul (x, a_{name}_proj_weight)" for name in "qk")
    text = BRANCHES.format(then=then.format(out="p"), other=other.format(out="q"))
    weights = {f"a.{name}_proj.weight": random(IN, OUT, seed=ord(name)) for name in "qk"}
    base = save(graph(text, weights), tmp_path)
    given = adapter(*(lora(f"a.{name}_proj", OUT, IN, seed=ord(name)) for name in "qk"))
    for chosen, path in ((True, "a.q_proj"), (False, "a.k_proj")):
        weight = weights[f"{path}.weight"].T

        def answer(modules, path=path, weight=weight):
            return [X3.astype(np.float64) @ effective(weight, modules.get(path)).T]

        check_swap(base, given, answer, {"x": X3, "c": np.array(chosen)}, pack=True)


def test_a_weight_inside_the_subgraph(tmp_path):
    text = BRANCHES.format(then="p = MatMul (x, fc_weight)", other=f"q = Constant <value = {ZEROS}> ()")
    model = graph(text, {"fc.weight": W.T.copy()})
    inner = model.graph[0].attributes["then_branch"].as_graph()
    weight = model.graph.initializers.pop("fc.weight")
    inner.register_initializer(weight)
    base = save(model, tmp_path)

    def answer(modules):
        return [X3.astype(np.float64) @ effective(W, modules.get("fc")).T]

    feeds = {"x": X3, "c": np.array(True)}
    check_swap(base, adapter(lora("fc", OUT, IN)), answer, feeds)
    given = adapter(lora("fc", OUT, IN, magnitude=magnitude(OUT)))
    check_swap(base, given, answer, feeds, dora=True)


def test_a_weight_in_a_constant_node(tmp_path):
    values = ",".join(map(str, W.T.ravel().tolist()))
    text = one(
        f"fc_weight = Constant <value = float[{IN},{OUT}] {{{values}}}> () [n1] y = MatMul (x, fc_weight)", X3
    )
    base = save(graph(text, {}, SCOPES), tmp_path)

    def answer(modules):
        return [X3.astype(np.float64) @ effective(W, modules.get("fc")).T]

    check_swap(base, adapter(lora("fc", OUT, IN)), answer, {"x": X3})


def test_dora_beside_a_constant_node(tmp_path):
    """Whoever computes the factor looks W0 up among the initializers."""
    values = ",".join(map(str, W.T.ravel().tolist()))
    text = one(
        f"fc_weight = Constant <value = float[{IN},{OUT}] {{{values}}}> () [n1] y = MatMul (x, fc_weight)", X3
    )
    base = save(graph(text, {}, SCOPES), tmp_path)
    given = adapter(lora("fc", OUT, IN, magnitude=magnitude(OUT)))
    report = swap_onnx(base, tmp_path / "swap.onnx", adapter=given, dora=True)
    tensors = bind(given, report, base).tensors
    wanted = X3.astype(np.float64) @ effective(W, given.modules["fc.weight"]).T
    check_values(run(tmp_path / "swap.onnx", x=X3, **tensors), [wanted], TOLERANCE)
