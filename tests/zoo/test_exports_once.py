"""Exports that the tests share: equal modules share one, modules that differ in anything never do."""

from __future__ import annotations

import ast
import copy
import inspect
import re
import shutil

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tiny
import torch
import transformers
from exports_once import exported_once, key_of
from onnx.reference import ReferenceEvaluator
from onnxscript.rewriter import _matcher
from torch.export import exported_program
from torch.onnx._internal.fx.passes import type_promotion
from torch.utils._traceback import CapturedTraceback

from lora_export import capture_onnx


class Scaled(torch.nn.Module):
    def __init__(self, size=4, by=2.0, kind="mul", seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.fc, self.by = torch.nn.Linear(size, size), by
        self.apply_it = {"mul": lambda x: x * by, "add": lambda x: x + by}[kind]

    def forward(self, x):
        return self.apply_it(self.fc(x))


X = torch.ones(2, 4)
DIM = torch.export.Dim("batch")
OTHERS = {
    "values": lambda: (Scaled(seed=1), (X,), {}),
    "an attribute, closed over": lambda: (Scaled(by=3.0), (X,), {}),
    "code": lambda: (Scaled(kind="add"), (X,), {}),
    "mode": lambda: (Scaled().eval(), (X,), {}),
    "dtype": lambda: (Scaled().double(), (X.double(),), {}),
    "input's shape": lambda: (Scaled(), (torch.ones(3, 4),), {}),
    "input's values": lambda: (Scaled(), (X + 1,), {}),
    "input by name": lambda: (Scaled(), (), {"kwargs": {"x": X}}),
    "dynamic shapes": lambda: (Scaled(), (X,), {"dynamic_shapes": {"x": {0: DIM}}}),
    "a limit of a dimension": lambda: (
        *(Scaled(), (X,)),
        {"dynamic_shapes": {"x": {0: torch.export.Dim("batch", max=7)}}},
    ),
    "opset": lambda: (Scaled(), (X,), {"opset_version": 21}),
    "optimised": lambda: (Scaled(), (X,), {"optimize": False}),
    "names": lambda: (Scaled(), (X,), {"output_names": ["y"]}),
    "a forward of its own": lambda: (_replaced(Scaled()), (X,), {}),
    "a hook": lambda: (_hooked(Scaled()), (X,), {}),
}


def _replaced(module):
    module.forward = lambda x: module.fc(x)
    return module


def _hooked(module):
    module.fc.register_forward_hook(lambda *_: None)
    return module


def test_what_differs_has_another_key():
    keys = {what: key_of(*make()) for what, make in OTHERS.items()}
    keys["usual"] = key_of(Scaled(), (X,), {})
    assert len(set(keys.values())) == len(keys)
    assert keys["usual"] == key_of(copy.deepcopy(Scaled()), (X.clone(),), {})
    assert {what: key_of(*make()) for what, make in OTHERS.items()} == {
        what: key for what, key in keys.items() if what != "usual"
    }


def test_without_values_only_parameters_are_left_out():
    def key(module, x=X):
        return key_of(module, (x,), {}, values=False)

    class Kept(Scaled):
        def __init__(self, by=1.0):
            super().__init__()
            self.register_buffer("kept", torch.full((4,), by))

    assert key(Scaled()) == key(Scaled(seed=1)) != key_of(Scaled(), (X,), {})
    assert key(Kept()) != key(Kept(2.0))
    others = [
        Scaled(by=3.0),
        Scaled(kind="add"),
        Scaled().eval(),
        Scaled().half(),
        Scaled().requires_grad_(False),
    ]
    assert len({key(module) for module in (Scaled(), *others)}) == 1 + len(others)
    assert key(Scaled()) != key(Scaled(), X + 1)


class Frozen(torch.nn.Module):
    """A module with a parameter that no layer of torch owns."""

    def __init__(self, by):
        super().__init__()
        self.fc, self.by = torch.nn.Linear(4, 4), torch.nn.Parameter(torch.full((4, 4), by))

    def forward(self, x):
        return self.fc(x) @ self.by


def test_each_has_its_own_values(tmp_path):
    calls = []

    def counted(*arguments, **options):
        calls.append(options)
        return torch.onnx.export.__wrapped__(*arguments, **options)

    once = exported_once(counted, tmp_path)
    for seed in range(3):
        module = Scaled(seed=seed).eval()
        for export in (once, torch.onnx.export.__wrapped__):
            model = export(module, (X,), dynamo=True, optimize=False, verbose=False).model_proto
            (got,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: X.numpy()})
            np.testing.assert_allclose(got, module(X).detach().numpy(), rtol=1e-5)
    assert len(calls) == 1


def test_values_that_are_not_copied_are_not_shared(tmp_path):
    """The exporter's stand-in writes a parameter as something else, or once more under another name."""
    for change in (lambda value: value * 2, lambda value: value):
        calls = []

        def export(module, args, f=None, change=change, calls=calls, **options):
            calls.append(module)
            program = torch.onnx.export.__wrapped__(module, args, f, **options)
            name = "by" if change(1) == 2 else "another"
            held = ir.tensor(change(module.by.detach().numpy()), name=name)
            program.model.graph.initializers[name] = ir.Value(name=name, const_value=held)
            return program

        once = exported_once(export, tmp_path / str(change(1)))
        (tmp_path / str(change(1))).mkdir()
        for by in (2.0, 3.0):
            program = once(Frozen(by), (X,), dynamo=True, optimize=False, verbose=False)
            held = program.model.graph.initializers["by" if change(1) == 2 else "another"].const_value
            assert np.array_equal(held.numpy(), np.full((4, 4), change(by), np.float32))
        assert len(calls) == 3


def test_where_a_model_was_loaded_from_does_not_count(tmp_path):
    shutil.copytree(tiny.checkpoint("llama"), tmp_path / "there")
    load = transformers.AutoModelForCausalLM.from_pretrained
    here, there = (load(folder) for folder in (tiny.checkpoint("llama"), tmp_path / "there"))
    assert here.config._name_or_path != there.config._name_or_path
    assert key_of(here, (), {}) == key_of(there, (), {})


def test_attention_and_config_count():
    config = transformers.AutoConfig.from_pretrained(tiny.checkpoint("llama"))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    other = copy.deepcopy(model)
    assert key_of(model, (), {}) == key_of(other, (), {})
    other.set_attn_implementation("sdpa")
    assert key_of(model, (), {}) != key_of(other, (), {})
    third = copy.deepcopy(model)
    third.config.rms_norm_eps *= 2
    assert key_of(model, (), {}) != key_of(third, (), {})


def test_tied_weights_are_told_from_equal_ones():
    one, two = Scaled(), Scaled()
    both = torch.nn.ModuleList([one.fc, two.fc])
    assert key_of(both, (), {}) != key_of(torch.nn.ModuleList([one.fc, one.fc]), (), {})


# Where in Python a node comes from.
STACK = "pkg.torch.onnx.stack_trace"


def renumbered(path, left_out=None):
    """Return a graph as text with its temporary names numbered as they come, and its constants' bytes.

    Args:
        path: The file.
        left_out: Key of the nodes' metadata that is not told.
    """
    model = onnx.load(path)
    del model.metadata_props[:]
    for node in model.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key != left_out]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    text, numbers = re.sub(r"(<eval_with_key>)\.\d+", r"\1", str(model)), {}  # torch counts what it traces
    return re.sub(r"\b(val|node_\w+?)_\d+", lambda name: f"{numbers.setdefault(name[0], len(numbers))}", text)


class Folded(Frozen):
    """A module with a product that the optimiser computes beforehand."""

    def forward(self, x):
        return self.fc(x).relu() @ (self.by.T * 2)


def test_an_optimised_one_is_made_of_one_that_is_not(tmp_path):
    real = torch.onnx.export.__wrapped__
    calls = []

    def counted(*arguments, **options):
        calls.append(options)
        return real(*arguments, **options)

    (tmp_path / "shared").mkdir()
    once = exported_once(counted, tmp_path / "shared")
    given = {"dynamic_shapes": {"x": {0: DIM}}, "input_names": ["u"], "output_names": ["v"], "verbose": False}
    for by in (2.0, 3.0):
        torch.manual_seed(0)
        module, places = Folded(by).eval(), [tmp_path / f"{by}-{name}.onnx" for name in ("ours", "torch's")]
        for export, path in zip((once, real), places, strict=True):
            export(module, (X,), path, dynamo=True, external_data=False, **given)
        ours, others = map(renumbered, places)
        assert ours == others
    assert "Transpose" not in ours
    assert [options["optimize"] for options in calls] == [False]


@pytest.mark.parametrize("kv_cache", [False, True])
def test_what_is_captured_is_the_same_with_and_without(kv_cache, tmp_path, monkeypatch):
    """For the first and for those that find it there byte for byte; without, but for numbers in names."""
    real = torch.onnx.export.__wrapped__
    calls = []

    def counted(*arguments, **options):
        calls.append(options)
        return real(*arguments, **options)

    (tmp_path / "shared").mkdir()
    for name in ("first", "again", "without"):
        export = exported_once(counted, tmp_path / "shared") if name != "without" else real
        monkeypatch.setattr(torch.onnx, "export", export)
        (tmp_path / name).mkdir()
        capture_onnx(tiny.checkpoint("llama"), tmp_path / name / "m.onnx", kv_cache=kv_cache)
    assert len(calls) == 1
    for file in ("m.onnx", "m.onnx.data"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    assert renumbered(tmp_path / "first" / "m.onnx") == renumbered(tmp_path / "without" / "m.onnx")


def test_what_is_optimised_is_the_same_with_and_without(tmp_path):
    """Of the values of its own: norms are folded into convolutions."""
    real, spec = torch.onnx.export.__wrapped__, tiny.ARCHITECTURES["conv"]
    calls = []

    def counted(*arguments, **options):
        calls.append(options)
        return real(*arguments, **options)

    given = {"kwargs": spec.inputs(), "dynamic_shapes": spec.dynamic, "output_names": ["logits"]}
    (tmp_path / "shared").mkdir()
    once = exported_once(counted, tmp_path / "shared")
    for factor in (1.0, 0.5):
        model = tiny.build("conv")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)
        for name, export in (("first", once), ("again", once), ("without", real)):
            with tiny.quiet():
                (tmp_path / name).mkdir(exist_ok=True)
                export(model, (), tmp_path / name / "m.onnx", **given, dynamo=True)
        for file in ("m.onnx", "m.onnx.data"):
            assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
        assert renumbered(tmp_path / "first" / "m.onnx") == renumbered(tmp_path / "without" / "m.onnx")
    assert len(calls) == 1


class Attention(torch.nn.Module):
    """Operators that have decompositions, pairs that the optimiser joins, dtypes that are promoted."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc, self.out = torch.nn.LayerNorm(4), torch.nn.Linear(4, 12), torch.nn.Linear(4, 4)

    def forward(self, x):
        query, key, value = self.fc(self.norm(x))[:, None].chunk(3, -1)
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        both = mixed.split(2, -1)
        gate = torch.arange(4) * x.half()  # integers and halves, and a product with floats
        return self.out(torch.nn.functional.silu(torch.cat([both[1], -both[0]], -1))) * gate * 1.0 + True


def test_what_is_left_out_has_no_effect(tmp_path, monkeypatch):
    """The exporter as it is installed makes the same graph, of operators whose decomposition we change."""
    base, matcher = torch._ops.OperatorBase, _matcher.SimplePatternMatcher
    module = Attention().eval()

    def export(path):
        given = {"dynamic_shapes": {"x": {0: DIM}}, "external_data": False, "verbose": False}
        torch.onnx.export.__wrapped__(module, (X[None],), path, **given, dynamo=True)

    export(tmp_path / "fewer.onnx")
    interpreter = type_promotion._TypePromotionInterpreter
    monkeypatch.setattr(interpreter, "run_node", interpreter.run_node.__wrapped__)
    monkeypatch.setattr(torch.fx.proxy, "CapturedTraceback", CapturedTraceback)
    monkeypatch.setattr(base, "py_impl", base.py_impl.__wrapped__)
    monkeypatch.setattr(matcher, "match", matcher.match.__wrapped__)
    for line in ast.parse(inspect.getsource(exported_program)).body:
        if isinstance(line, ast.Assign) and line.targets[0].id.endswith("KEYS_TO_OVERRIDE"):
            keys = eval(ast.unparse(line.value), vars(exported_program))
            assert set(keys) >= set(getattr(exported_program, line.targets[0].id))
            monkeypatch.setattr(exported_program, line.targets[0].id, keys)
    export(tmp_path / "all.onnx")
    fewer, whole = (renumbered(tmp_path / name, STACK) for name in ("fewer.onnx", "all.onnx"))
    assert fewer == whole
    assert "convert_element_type" in fewer


def test_failures_are_raised_each_time(tmp_path):
    def broken(*_, **__):
        raise RuntimeError("no")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            exported_once(broken, tmp_path)(Scaled(), (X,))
