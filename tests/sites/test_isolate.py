"""A change for one module must reach all of its uses and nothing else: shared, tied and repeated weights."""

import contextlib
import io

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.numpy import save_file
from small_graphs import (
    adapter,
    constants,
    delta,
    embedding,
    error,
    graph,
    linear,
    random,
    refusals,
    run,
    save,
)
from torch import nn

from lora_export import AdapterError, merge_onnx

X = random(2, 3, 6, seed=9)
EXPORTERS = ("dynamo", "dynamo_noopt", "torchscript")


def export(model, exporter, folder, x=X):
    path = folder / f"{exporter}.onnx"
    options = {"dynamo": False} if exporter == "torchscript" else {"dynamo": True, "verbose": False}
    if exporter == "dynamo_noopt":
        options["optimize"] = False
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(model.eval(), (torch.tensor(x),), str(path), input_names=["x"], **options)
    return path


def answer(model, x=X, **changes):
    """Return the model's output in float64 after adding a delta to each named weight."""
    model = model.double()
    with torch.no_grad():
        for name, change in changes.items():
            model.get_parameter(name.replace("__", ".")).add_(torch.tensor(change))
        result = model(torch.tensor(x).double()).numpy()
    model.float()
    return result


class Pair(nn.Module):
    """Two layers with equal weights and zero biases; ``second`` is what the other one is called."""

    def __init__(self, second="b", first="a", bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.names = first, second
        setattr(self, first, nn.Linear(6, 6, bias))
        setattr(self, second, nn.Linear(6, 6, bias))
        if bias:
            nn.init.zeros_(getattr(self, first).bias)
        getattr(self, second).load_state_dict(getattr(self, first).state_dict())

    def forward(self, x):
        first, second = (getattr(self, name) for name in self.names)
        return second(torch.tanh(first(x)))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.sh = nn.Linear(6, 6)

    def forward(self, x):
        return self.sh(torch.tanh(self.sh(x)))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Twice()

    def forward(self, x):
        return self.block(torch.relu(self.block(x)))


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("which", ["a", "b"])
def test_equal_weights_of_two_modules(exporter, which, tmp_path):
    module = linear(which, 6, 6, lora_bias=random(6, seed=4))
    base = export(Pair(), exporter, tmp_path)
    merged = sorted(constants(base))
    report = merge_onnx(base, adapter(module), tmp_path / "m.onnx")
    changes = {f"{which}__weight": delta(module), f"{which}__bias": 1.5 * module.lora_bias}
    assert error(run(tmp_path / "m.onnx", x=X)[0], answer(Pair(), **changes)) < 2e-6
    # The exporters do merge equal weights, all but dynamo without its optimiser; the user is told.
    shared = exporter != "dynamo_noopt"
    assert ("b.bias" not in merged) == shared
    assert len(report.plan.notes) == (2 if shared else 0)
    assert all(note.startswith(f"{which}: its weight") for note in report.plan.notes)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_equal_weights_with_different_adapters(exporter, tmp_path):
    one = linear("a", 6, 6, seed=1, lora_bias=random(6, seed=4))
    two = linear("b", 6, 6, seed=2, lora_bias=random(6, seed=5))
    base = export(Pair(), exporter, tmp_path)
    wanted = answer(
        Pair(),
        a__weight=delta(one),
        b__weight=delta(two),
        a__bias=1.5 * one.lora_bias,
        b__bias=1.5 * two.lora_bias,
    )
    merge_onnx(base, adapter(one, two), tmp_path / "m.onnx")
    assert error(run(tmp_path / "m.onnx", x=X)[0], wanted) < 2e-6
    # As two adapters in one merge, and one after the other.
    merge_onnx(base, [adapter(one), adapter(two)], tmp_path / "n.onnx")
    assert error(run(tmp_path / "n.onnx", x=X)[0], wanted) < 2e-6
    merge_onnx(base, adapter(two), tmp_path / "first.onnx")
    merge_onnx(tmp_path / "first.onnx", adapter(one), tmp_path / "both.onnx")
    assert error(run(tmp_path / "both.onnx", x=X)[0], wanted) < 2e-6


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize(("model", "path"), [(Twice, "sh"), (Nested, "block.sh")])
def test_a_module_called_twice_changes_in_every_call(exporter, model, path, tmp_path):
    module = linear(path, 6, 6, lora_bias=random(6, seed=4))
    base = export(model(), exporter, tmp_path)
    report = merge_onnx(base, adapter(module), tmp_path / "m.onnx")
    name = path.replace(".", "__")
    changes = {f"{name}__weight": delta(module), f"{name}__bias": 1.5 * module.lora_bias}
    assert error(run(tmp_path / "m.onnx", x=X)[0], answer(model(), **changes)) < 2e-6
    assert not report.plan.notes
    if exporter == "torchscript":
        # It numbers repeated calls, so that the plan can only suppose: it says so.
        reason = report.plan.rows[0].reason
        assert f"; {path}_1" in reason
        assert reason.endswith("taken for further calls of it")


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("which", ["fc", "fc_1"])
def test_a_real_module_named_like_a_second_call(exporter, which, tmp_path):
    """`fc_1` beside `fc` with equal weights: the TorchScript exporter writes a second call of fc the same."""
    base = export(Pair("fc_1", "fc"), exporter, tmp_path)
    module = linear(which, 6, 6)
    merge_onnx(base, adapter(module), tmp_path / "m.onnx")
    wanted = answer(Pair("fc_1", "fc"), **{f"{which}__weight": delta(module)})
    assert error(run(tmp_path / "m.onnx", x=X)[0], wanted) < 2e-6


@pytest.mark.parametrize("known_by", ["adapter", "checkpoint"])
def test_a_second_module_without_a_bias_is_known_by_adapter_or_checkpoint(known_by, tmp_path):
    from safetensors.torch import save_file

    model = Pair("fc_1", "fc", bias=False)
    base = export(model, "torchscript", tmp_path)
    one, two = linear("fc", 6, 6, seed=1), linear("fc_1", 6, 6, seed=2)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file(
        {name: values.clone() for name, values in model.state_dict().items()}, folder / "model.safetensors"
    )
    if known_by == "adapter":
        merge_onnx(base, adapter(one, two), tmp_path / "m.onnx")
        wanted = answer(model, fc__weight=delta(one), fc_1__weight=delta(two))
    else:
        merge_onnx(base, adapter(one), tmp_path / "m.onnx", checkpoint=folder)
        wanted = answer(model, fc__weight=delta(one))
    assert error(run(tmp_path / "m.onnx", x=X)[0], wanted) < 2e-6


def test_a_file_that_onnxruntime_has_optimised(tmp_path):
    """MatMul and Add have become Gemm, and the nodes `/block/sh/MatMul/MatMulAddFusion`."""
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimised.onnx"), 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    plain = export(Nested(), "torchscript", tmp_path)
    ort.InferenceSession(str(plain), options, providers=["CPUExecutionProvider"])
    module = linear("block.sh", 6, 6, lora_bias=random(6, seed=4))
    report = merge_onnx(tmp_path / "optimised.onnx", adapter(module), tmp_path / "m.onnx")
    assert {row.operator for row in report.plan.rows} == {"Gemm"}
    changes = {"block__sh__weight": delta(module), "block__sh__bias": 1.5 * module.lora_bias}
    assert error(run(tmp_path / "m.onnx", x=X)[0], answer(Nested(), **changes)) < 2e-6


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 6)
        self.lm_head = nn.Linear(6, 10, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        return self.lm_head(torch.tanh(self.embed(ids)))


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("which", ["lm_head", "embed"])
def test_tied_weights(exporter, which, tmp_path):
    """As PEFT trains it: the delta is one module's, not the other's."""
    ids = np.array([[1, 2, 7]])
    base = export(Tied(), exporter, tmp_path, ids)
    module = linear("lm_head", 10, 6) if which == "lm_head" else embedding("embed", 10, 6)
    merge_onnx(base, adapter(module), tmp_path / "m.onnx")
    table = Tied().embed.weight.detach().double().numpy()
    head = table + (delta(module) if which == "lm_head" else 0)
    wanted = np.tanh((table + (delta(module) if which == "embed" else 0))[ids]) @ head.T
    assert error(run(tmp_path / "m.onnx", x=ids)[0], wanted) < 2e-6


class Norms(nn.Module):
    """Two norms with equal weights, as every untrained pair has them."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.LayerNorm(6), nn.LayerNorm(6)

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("which", ["one", "two"])
def test_equal_norms(exporter, which, tmp_path):
    base = export(Norms(), exporter, tmp_path)
    saved = {f"{which}.weight": random(6, seed=4), f"{which}.bias": random(6, seed=5)}
    merge_onnx(base, adapter(extras=saved), tmp_path / "m.onnx")
    changes = {f"{which}__weight": saved[f"{which}.weight"] - 1.0, f"{which}__bias": saved[f"{which}.bias"]}
    assert error(run(tmp_path / "m.onnx", x=X)[0], answer(Norms(), **changes)) < 2e-6


# --- what the exporters compute from weights ----------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight * 0.125, self.bias)


class Holder(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.fc = module

    def forward(self, x):
        return self.fc(x)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.bn = nn.Linear(6, 6), nn.BatchNorm1d(6)
        nn.init.uniform_(self.bn.running_var, 0.5, 2)

    def forward(self, x):
        return self.bn(self.fc(x))


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("kind", ["scaled", "weight-norm"])
@pytest.mark.parametrize("rank", [2, 3])
def test_computed_weights_are_refused(exporter, kind, rank, tmp_path):
    """`fc.weight * 0.125` folded into one constant: adding to it would be silently wrong."""
    if (exporter, kind, rank) == ("torchscript", "scaled", 3):
        pytest.skip("nothing in the graph tells: the exporter renames every transposed weight")
    torch.manual_seed(0)
    inner = Scaled(6, 6) if kind == "scaled" else nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    base = export(Holder(inner), exporter, tmp_path, X if rank == 3 else X[0])
    assert refusals(base, adapter(linear("fc", 6, 6)), tmp_path).keys() == {"fc.weight"}


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_batch_norm_folded_into_a_linear_layer(exporter, tmp_path):
    from safetensors.torch import save_file

    model, module = Normed().eval(), linear("fc", 6, 6)
    base = export(model, exporter, tmp_path, X[0])
    folded = not any(node.op_type == "BatchNormalization" for node in ir.load(base).graph)
    assert folded == (exporter == "dynamo")
    options = {}
    if folded:
        assert "batch norm" in refusals(base, adapter(module), tmp_path)["fc.weight"]
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        options = {"checkpoint": tmp_path}
    merge_onnx(base, adapter(module), tmp_path / "m.onnx", **options)
    wanted = answer(model, X[0], fc__weight=delta(module))
    assert error(run(tmp_path / "m.onnx", x=X[0])[0], wanted) < 2e-6


# --- by hand ------------------------------------------------------------------------------------------

HEAD = "g (float[B,S,6] x) => (float[B,S,N] y) "


def test_readers_without_names_are_ambiguous(tmp_path):
    """One module called twice, or two whose equal weights were merged? Nothing tells."""
    text = HEAD + "{ h = MatMul (x, fc_weight) y = MatMul (h, fc_weight) }"
    base = save(graph(text, {"fc.weight": random(6, 6)}), tmp_path)
    assert "ambiguous" in refusals(base, adapter(linear("fc", 6, 6)), tmp_path)["fc.weight"]


def test_a_reader_that_is_not_understood_is_not_left_behind(tmp_path):
    text = HEAD + '{ [a] h = MatMul (x, fc_weight) [b] y = Einsum <equation = "bsi,io->bso"> (h, fc_weight) }'
    weights = {"fc.weight": random(6, 6)}
    base = save(graph(text, weights, {"a": "fc", "b": "fc"}), tmp_path)
    assert "Einsum" in refusals(base, adapter(linear("fc", 6, 6)), tmp_path)["fc.weight"]
    # Another module's Einsum keeps the old values.
    base = save(graph(text, weights, {"a": "fc", "b": "other"}), tmp_path)
    module, w = linear("fc", 6, 6), weights["fc.weight"]
    merge_onnx(base, adapter(module), tmp_path / "m.onnx")
    wanted = X.astype(np.float64) @ (w + delta(module).T) @ w.astype(np.float64)
    assert error(run(tmp_path / "m.onnx", x=X)[0], wanted) < 2e-6


def test_a_constant_node_shared_by_two_modules(tmp_path):
    w = random(6, 6, seed=7)
    numbers = ", ".join(repr(float(v)) for v in w.reshape(-1))
    text = HEAD + f"{{ w = Constant <value = float[6,6] {{{numbers}}}> () "
    text += "[m] h = MatMul (x, w) [n] y = MatMul (h, w) }"
    model = graph(text, {}, {"m": "a", "n": "b"})
    model.graph[0].outputs[0].name = "a.weight"
    base = save(model, tmp_path)
    one, two = linear("a", 6, 6, seed=1), linear("b", 6, 6, seed=2)
    merge_onnx(base, adapter(one, two), tmp_path / "m.onnx")
    wanted = X.astype(np.float64) @ (w + delta(one).T) @ (w + delta(two).T)
    assert error(run(tmp_path / "m.onnx", x=X)[0], wanted) < 2e-6


@pytest.mark.parametrize("through", ["", "Identity"])
def test_a_weight_that_is_a_graph_output_as_well(through, tmp_path):
    """The graph goes on to give out the base's weight."""
    weight, module = random(6, 6, seed=7), linear("fc", 6, 6)
    if through:
        text = "g (float[B,S,6] x) => (float[B,S,N] y, float[6,6] w) "
        text += "{ w = Identity (fc_weight) y = MatMul (x, fc_weight) }"
    else:
        text = "g (float[B,S,6] x) => (float[B,S,N] y, float[6,6] fc_weight) { y = MatMul (x, fc_weight) }"
    base = save(graph(text, {"fc.weight": weight}), tmp_path)
    merge_onnx(base, adapter(module), tmp_path / "m.onnx")
    got, given_out = run(tmp_path / "m.onnx", x=X)
    assert error(got, X.astype(np.float64) @ (weight + delta(module).T)) < 2e-6
    assert np.array_equal(given_out, weight)


def test_a_weight_that_is_a_graph_input_as_well(tmp_path):
    """Overridable: the merged values are the default, and what a user feeds still wins."""
    weight, module = random(6, 6, seed=7), linear("fc", 6, 6)
    text = "g (float[B,S,6] x, float[6,6] fc_weight) => (float[B,S,N] y) { y = MatMul (x, fc_weight) }"
    model = graph(text, {"fc.weight": weight})
    assert [value.name for value in model.graph.inputs] == ["x", "fc.weight"]
    merge_onnx(save(model, tmp_path), adapter(module), tmp_path / "m.onnx")
    x64 = X.astype(np.float64)
    assert error(run(tmp_path / "m.onnx", x=X)[0], x64 @ (weight + delta(module).T)) < 2e-6
    mine = {"x": X, "fc.weight": random(6, 6, seed=3)}
    assert error(run(tmp_path / "m.onnx", **mine)[0], x64 @ mine["fc.weight"]) < 2e-6


BRANCH = """g (float[2,3,6] x, bool c) => (float[2,3,6] y) {
    y = If (c) <
        then_branch = t () => (float[2,3,6] p) { BODY },
        else_branch = e () => (float[2,3,6] q) { q = MatMul (x, fc_weight) }
    >
}"""
INNER = "w = Constant <value = float[6,6] {NUMBERS}> () [n] p = MatMul (x, w)"


@pytest.mark.parametrize("branch", [True, False])
def test_outer_weight_captured_by_a_branch(branch, tmp_path):
    weight, module = random(6, 6, seed=7), linear("fc", 6, 6)
    text = BRANCH.replace("BODY", "p = Relu (x)")
    base = save(graph(text, {"fc.weight": weight}), tmp_path)
    merge_onnx(base, adapter(module), tmp_path / "m.onnx")
    wanted = np.maximum(X, 0) if branch else X.astype(np.float64) @ (weight + delta(module).T)
    assert error(run(tmp_path / "m.onnx", x=X, c=np.array(branch))[0], wanted) < 2e-6


def test_outer_weight_shared_between_branches(tmp_path):
    """Each branch is another module; the copy's Transpose goes into the branch that reads it."""
    weight, module = random(6, 6, seed=7), linear("a", 6, 6)
    text = BRANCH.replace("BODY", "[m] p = MatMul (x, fc_weight)").replace(
        "{ q", "{ t = Transpose (fc_weight) [n] q"
    )
    text = text.replace("q = MatMul (x, fc_weight)", "q = MatMul (x, t)")
    base = save(graph(text, {"fc.weight": weight}, {"m": "b", "n": "a"}), tmp_path)
    merge_onnx(base, adapter(module), tmp_path / "m.onnx")
    x64 = X.astype(np.float64)
    assert error(run(tmp_path / "m.onnx", x=X, c=np.array(True))[0], x64 @ weight) < 2e-6
    wanted = x64 @ (weight.T + delta(module).T)
    assert error(run(tmp_path / "m.onnx", x=X, c=np.array(False))[0], wanted) < 2e-6


def test_constant_inside_a_branch(tmp_path):
    weight, module = random(6, 6, seed=7), linear("in", 6, 6)
    numbers = "{" + ", ".join(repr(float(v)) for v in weight.reshape(-1)) + "}"
    text = BRANCH.replace("BODY", INNER.replace("{NUMBERS}", numbers))
    model = graph(text, {"fc.weight": random(6, 6)}, {"n": "in"})
    (inner,) = [
        node for node in model.graph.all_nodes() if node.op_type == "Constant" and node.outputs[0].name == "w"
    ]
    inner.outputs[0].name = "in.weight"
    base = save(model, tmp_path)
    merge_onnx(base, adapter(module), tmp_path / "m.onnx")
    wanted = X.astype(np.float64) @ (weight + delta(module).T)
    assert error(run(tmp_path / "m.onnx", x=X, c=np.array(True))[0], wanted) < 2e-6


def test_weight_in_a_loop_body(tmp_path):
    weight, module = 0.1 * random(6, 6, seed=7), linear("fc", 6, 6)
    text = """g (float[2,3,6] x, int64 n) => (float[2,3,6] y) {
        y = Loop (n, , x) <body = b (int64 i, bool c, float[2,3,6] h) => (bool d, float[2,3,6] k)
            { d = Identity (c) k = MatMul (h, fc_weight) }>
    }"""
    base = save(graph(text, {"fc.weight": weight}), tmp_path)
    merge_onnx(base, adapter(module), tmp_path / "m.onnx")
    changed = weight + delta(module).T
    wanted = X.astype(np.float64) @ changed @ changed @ changed
    assert error(run(tmp_path / "m.onnx", x=X, n=np.array(3))[0], wanted) < 2e-6


def test_weight_behind_a_function(tmp_path):
    """Functions are inlined: each call is a node of its own, which says no module; the values do."""
    text = HEAD + "{ h = local.Layer (x, a_weight) y = local.Layer (h, b_weight) }"
    function = '<domain: "local", opset_import: ["" : 20]> Layer (u, w) => (v) '
    function += "{ t = Transpose <perm = [1, 0]> (w) v = MatMul (u, t) }"
    weights = {"a.weight": random(4, 6), "b.weight": random(5, 4, seed=1)}
    head = '<ir_version: 10, opset_import: ["" : 20, "local" : 1]>'
    model = graph(text + function, weights, head=head)
    assert model.functions
    one, two = linear("a", 4, 6, seed=1), linear("b", 5, 4, seed=2)
    (tmp_path / "c").mkdir()
    save_file(weights, tmp_path / "c" / "model.safetensors")
    base = save(model, tmp_path)
    merge_onnx(base, adapter(one, two), tmp_path / "m.onnx", checkpoint=tmp_path / "c")
    wanted = (
        X.astype(np.float64) @ (weights["a.weight"] + delta(one)).T @ (weights["b.weight"] + delta(two)).T
    )
    assert error(run(tmp_path / "m.onnx", x=X)[0], wanted) < 2e-6


def test_two_targets_in_one_place_are_refused(tmp_path):
    """A file for two text encoders, one graph: both would go into the same weight."""
    text = HEAD + "{ y = MatMul (x, fc_weight) }"
    base = save(graph(text, {"fc.weight": random(6, 6)}), tmp_path)
    one = linear("fc", 6, 6, seed=1, component="text_encoder")
    two = linear("fc", 6, 6, seed=2, component="text_encoder_2")
    with pytest.raises(AdapterError) as refused:
        merge_onnx(base, adapter(one, two), tmp_path / "m.onnx")
    assert "--component text_encoder or --component text_encoder_2" in refused.value.hint
    assert not (tmp_path / "m.onnx").exists()
