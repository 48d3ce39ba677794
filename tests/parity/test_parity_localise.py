"""Where an error begins: the module whose adapter is wrong is named, in every kind of graph, and no other.

Oracle: PyTorch in float64 with the adapter beside its weights, module by module.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import exposed_models as exposed
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tiny
import tiny_models

from lora_export import Adapter, load_adapter, merge_onnx
from lora_export.graph.exposed import WEIGHTS_INPUT
from lora_export.graph.onnx_file import load_graph
from lora_export.parity.localise import localise as localising
from lora_export.parity.localise.find_modules import NOT_FOUND, ModuleShape, find_probes
from lora_export.parity.localise.localise import Sources, localise
from lora_export.parity.localise.module_error import Measured, Runs
from lora_export.parity.localise.run_inside import run_with_outputs
from lora_export.parity.localise.walk import tap_values
from lora_export.parity.result import BASE, Localisation, ModuleRow, State, state_of
from lora_export.runtimes.torch.reference import TorchReference

# Of float32, relative: what a whole tiny model loses.
NOISE = 2e-6
STATE = state_of("a")
# A batch norm is folded into the convolution, which has no output of its own then.
FOLDED = {("conv", exporter): "conv" for exporter in ("dynamo", "torchscript", "ort_fusions")}
GRAPHS = [
    ("llama", "dynamo"),
    ("gpt2", "dynamo"),
    ("qwen2", "genai"),
    ("bert", "torchscript"),
    ("conv", "dynamo_noopt"),
]
FORMS: dict[str, dict[str, Any]] = {"plain": {}, "pack": {"pack": True}, "fused": {"fuse_base": True}}


def grouped(*values: Any) -> Any:
    """Let one worker run what is exported once."""
    arch = next(value for value in values if value in tiny.ARCHITECTURES)
    return pytest.param(*values, id="-".join(map(str, values)), marks=pytest.mark.xdist_group(arch))


@cache
def right(arch: str, feature: str = "plain") -> Adapter:
    return load_adapter(tiny.adapter(arch, feature))


class Remembered(TorchReference):
    """PyTorch, run once on the same values: of one graph several modules are wrong, one after another."""

    def run_with_modules(self, feeds: Any, state: State, modules: Any) -> Any:
        known: dict[Any, Any] = self.__dict__.setdefault("_known", {})
        given = tuple((name, values.dtype.str, values.tobytes()) for name, values in sorted(feeds.items()))
        key = (given, state, tuple(modules))
        if key not in known:
            known[key] = super().run_with_modules(feeds, state, modules)
        return known[key]


@cache
def reference(arch: str, feature: str, dtype: str) -> TorchReference:
    model = tiny.build(arch)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    model = model.double() if dtype == "float64" else model
    return Remembered.of_module(model, {"a": right(arch, feature)}, ("logits",))


def sources(arch: str, graph: Path, feature: str = "plain", **changes: Any) -> Sources:
    wide, feeds = reference(arch, feature, "float64"), tiny.feeds(arch, graph)
    masks = [values for name, values in feeds.items() if name == "attention_mask"]
    made = Sources(
        reference=wide,
        model=wide.module,
        own=reference(arch, feature, "float32"),
        candidate=graph,
        provider="cpu",
        values=feeds,
        tensors={},
        state=STATE,
        masks=masks,
    )
    return dataclasses.replace(made, **changes)


def wrong(adapter: Adapter, path: str, factor: float = 2.0) -> Adapter:
    """Return an adapter whose scaling is wrong in one module."""
    modules = {
        key: dataclasses.replace(module, alpha=module.alpha * factor) if module.path == path else module
        for key, module in adapter.modules.items()
    }
    assert modules != adapter.modules
    return dataclasses.replace(adapter, modules=modules, sha256="")


def merged(arch: str, exporter: str, adapter: Adapter, folder: Path) -> Path:
    checkpoint = tiny.checkpoint(arch)
    merge_onnx(tiny.base_onnx(arch, exporter), adapter, folder / "m.onnx", checkpoint=checkpoint, force=True)
    return folder / "m.onnx"


def paths(adapter: Adapter) -> list[str]:
    return list(dict.fromkeys(module.path for module in adapter.modules.values()))


def some(adapter: Adapter, count: int = 4) -> list[str]:
    """Return a few modules of an adapter, evenly spaced, the first and the last one among them."""
    every = paths(adapter)
    return [every[n] for n in dict.fromkeys(np.linspace(0, len(every) - 1, count).round().astype(int))]


def rows_of(found: Localisation) -> dict[str, ModuleRow]:
    return {row.module: row for row in found.rows}


def assert_clean(found: Localisation, modules: Sequence[str]) -> None:
    assert found.module == "", found
    assert found.note.startswith("no module's error jumps"), found.note
    rows = rows_of(found)
    assert set(modules) <= set(rows), found.note
    assert all(row.error_out < NOISE for row in rows.values())
    assert all(math.isnan(row.error_in) or row.error_in < NOISE for row in rows.values())
    assert not any(row.jumped for row in rows.values())
    assert any(row.effect > 1e3 * NOISE for row in rows.values())


def assert_named(found: Localisation, module: str) -> None:
    assert found.module == module, found
    rows = rows_of(found)
    assert [row.module for row in found.rows if row.jumped] == [module]
    assert rows[module].error_out > 10 * NOISE
    assert math.isnan(rows[module].error_in) or rows[module].error_in < NOISE


# --- merged graphs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "exporter"), [grouped(*pair) for pair in tiny.pairs()])
def test_in_a_good_graph_every_module_is_found_and_none_is_named(arch, exporter, tmp_path):
    graph = merged(arch, exporter, right(arch), tmp_path)
    found = localise(sources(arch, graph))
    hidden = FOLDED.get((arch, exporter))
    assert_clean(found, [path for path in paths(right(arch)) if path != hidden])
    assert found.looked_at == found.of == len(found.rows)
    if hidden:
        assert f"{hidden}: the exporter has folded a norm into it" in found.note


@pytest.mark.parametrize(("arch", "exporter"), [grouped(*pair) for pair in tiny.pairs()])
def test_in_a_merged_graph_the_wrong_module_is_named(arch, exporter, tmp_path):
    # Exporters take turns: each architecture has an even one and an odd one.
    for path in some(right(arch))[tiny.EXPORTERS.index(exporter) % 2 :: 2]:
        graph = merged(arch, exporter, wrong(right(arch), path), tmp_path)
        found = localise(sources(arch, graph))
        if path == FOLDED.get((arch, exporter)):
            assert found.module in ("", "norm")
            assert f"{path}: the exporter has folded a norm into it" in found.note
        else:
            assert_named(found, path)


FEATURES = [
    grouped(arch, exporter, feature)
    for arch, exporter in (
        ("llama", "dynamo"),
        ("gpt2", "dynamo_noopt"),
        ("bert", "ort_fusions"),
        ("conv", "dynamo_noopt"),
        ("t5", "torchscript"),
        ("qwen2_moe", "dynamo"),
        ("qwen2_moe", "torchscript"),
    )
    for feature in tiny.ARCHITECTURES[arch].features
    if feature != "plain"
]


@pytest.mark.parametrize(("arch", "exporter", "feature"), FEATURES)
def test_every_feature_of_adapters_is_followed(arch, exporter, feature, tmp_path):
    adapter = right(arch, feature)
    graph = merged(arch, exporter, adapter, tmp_path)
    called = paths(adapter)
    # T5's table is called by each of its halves, under their names.
    own = [path for path in called if path != "shared"]
    assert_clean(localise(sources(arch, graph, feature)), own)
    for path in (own[0], own[-1]):
        graph = merged(arch, exporter, wrong(adapter, path), tmp_path)
        assert_named(localise(sources(arch, graph, feature)), path)


def test_the_first_of_several_wrong_modules_is_named(tmp_path):
    arch = "llama"
    late, early = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"
    graph = merged(arch, "dynamo", wrong(wrong(right(arch), late), early), tmp_path)
    assert_named(localise(sources(arch, graph)), early)
    doubled = right(arch)
    for path in paths(doubled):
        doubled = wrong(doubled, path)
    found = localise(sources(arch, merged(arch, "dynamo", doubled, tmp_path)))
    assert found.module in {f"model.layers.0.self_attn.{name}_proj" for name in "qkv"}
    assert found.module == next(row.module for row in found.rows if row.effect > 0)


def test_figures_are_those_of_pytorch(tmp_path):
    arch, path = "llama", "model.layers.0.mlp.down_proj"
    graph = merged(arch, "dynamo", wrong(right(arch), path, factor=3.0), tmp_path)
    row = rows_of(localise(sources(arch, graph)))[path]
    wide, feeds = reference(arch, "plain", "float64"), tiny.feeds(arch, graph)
    states: tuple[State, ...] = (STATE, BASE)
    (x, y), (_, base) = (wide.run_with_modules(feeds, state, [path])[1][path] for state in states)
    module = right(arch).modules[f"{path}.weight"]
    change = module.scaling * x @ (module.lora_b @ module.lora_a).astype(np.float64).T
    assert row.error_out == pytest.approx(np.linalg.norm(2 * change) / np.linalg.norm(y), rel=1e-4)
    assert row.effect == pytest.approx(np.linalg.norm(y - base) / np.linalg.norm(y), rel=1e-9)
    assert 0 < row.own_out < NOISE


# --- exposed LoRA --------------------------------------------------------------------------------------


# Every graph in every form, as a swap graph or as a bank; the plain form of each, and llama's, as both.
BOTH = [*((graph, "plain") for graph in GRAPHS), *((GRAPHS[0], form) for form in ("pack", "fused"))]
SWAPS = [*BOTH, *((graph, ("pack", "fused")[n % 2]) for n, graph in enumerate(GRAPHS[1:]))]
BANKS = [*BOTH, *((graph, ("fused", "pack")[n % 2]) for n, graph in enumerate(GRAPHS[1:]))]


@pytest.mark.parametrize(("arch", "exporter", "form"), [grouped(*graph, form) for graph, form in SWAPS])
def test_in_a_swap_graph_the_module_with_wrong_tensors_is_named(arch, exporter, form, tmp_path, monkeypatch):
    graph = exposed.swap(arch, exporter, tiny.adapter(arch), tmp_path, **FORMS[form])
    given = sources(arch, graph, tensors=exposed.tensors(graph, tiny.adapter(arch)))
    assert_clean(localise(given), paths(right(arch)))
    assert localise(dataclasses.replace(given, tensors={}, state=BASE)).module == ""
    for path in some(right(arch), 5):
        bad = wrong(right(arch), path)
        monkeypatch.setattr(exposed, "load_adapter", lambda _, bad=bad: bad)
        tensors = exposed.tensors(graph, tiny.adapter(arch))
        assert_named(localise(dataclasses.replace(given, tensors=tensors)), path)


@pytest.mark.parametrize(("arch", "exporter", "form"), [grouped(*graph, form) for graph, form in BANKS])
def test_in_a_bank_the_wrong_module_of_a_slot_is_named(arch, exporter, form, tmp_path):
    path = some(right(arch), 3)[1]
    slots: dict[str, Any] = {"other": tiny.adapter(arch, seed=1), "a": right(arch)}
    slots["bad"] = wrong(right(arch), path)
    graph = exposed.bank(arch, exporter, slots, tmp_path, **FORMS[form])
    rows = tiny.ARCHITECTURES[arch].inputs()
    batch = len(next(iter(rows.values())))

    def slot(number: int) -> dict[str, np.ndarray]:
        return {WEIGHTS_INPUT: np.tile(np.eye(3, dtype=np.float32)[number], (batch, 1))}

    given = sources(arch, graph, tensors=slot(1))
    assert_clean(localise(given), paths(right(arch)))
    assert_named(localise(dataclasses.replace(given, tensors=slot(2))), path)
    off_by_one = localise(dataclasses.replace(given, tensors=slot(0)))
    assert off_by_one.module == next(row.module for row in off_by_one.rows if row.effect > 0)


# --- what is no target ---------------------------------------------------------------------------------


def changed(graph: Path, name: str, change: Any) -> Path:
    """Write a graph again with one constant changed."""
    model = onnx.load(graph)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    values = onnx.numpy_helper.to_array(tensor).copy()
    change(values)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))
    out = graph.with_name("changed.onnx")
    onnx.save(model, out)
    return out


def _double(values: np.ndarray) -> None:
    values *= 2


@pytest.mark.xdist_group("llama")
def test_what_adapters_leave_alone_is_named_too(tmp_path):
    graph = merged("llama", "dynamo", right("llama"), tmp_path)
    token = int(tiny.feeds("llama", graph)["input_ids"][0, 3])

    def forget(values: np.ndarray) -> None:
        values[token] = 0

    found = localise(sources("llama", changed(graph, "model.embed_tokens.weight", forget)))
    assert_named(found, "model.embed_tokens")
    assert rows_of(found)["model.embed_tokens"].effect == 0
    for name in ("model.layers.1.post_attention_layernorm", "model.norm"):
        assert_named(localise(sources("llama", changed(graph, f"{name}.weight", _double))), name)


@pytest.mark.xdist_group("llama")
def test_an_error_between_modules_is_said_to_be_there(tmp_path):
    graph = merged("llama", "dynamo_noopt", right("llama"), tmp_path)
    names = [name for name in (t.name for t in onnx.load(graph).graph.initializer) if "inv_freq" in name]
    found = localise(sources("llama", changed(graph, names[0], _double)))
    assert found.module == ""
    assert not any(row.jumped for row in found.rows)
    assert "the input of model.layers.0.self_attn.o_proj already has the error: it begins after" in found.note
    assert "after model.layers.0.self_attn." in found.note


@pytest.mark.xdist_group("llama")
def test_the_first_value_that_is_not_finite_is_named(tmp_path):
    path = "model.layers.0.mlp.up_proj"
    graph = merged("llama", "dynamo_noopt", right("llama"), tmp_path)

    def overflow(values: np.ndarray) -> None:
        values[0, 0] = np.inf

    found = localise(sources("llama", changed(graph, f"{path}.weight", overflow)))
    assert_named(found, path)
    assert rows_of(found)[path].error_out == math.inf


# --- many modules --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep() -> Iterator[str]:
    """Add a llama of 6 layers to the zoo: 7 targets and 2 norms each, and what stands before and behind."""
    make = tiny_models._decoder("LlamaConfig", "LlamaForCausalLM", num_hidden_layers=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.ARCHITECTURES, "deep", dataclasses.replace(tiny.ARCHITECTURES["llama"], make=make))
        yield "deep"


@pytest.mark.xdist_group("deep")
# At the front, in the middle (with others beside it, which read the same input), at the end.
@pytest.mark.parametrize(
    ("most", "inner"), [(6, ["self_attn.k_proj", "mlp.up_proj"]), (24, ["self_attn.v_proj"])]
)
def test_of_many_modules_some_are_looked_at_first(deep, most, inner, tmp_path, monkeypatch):
    exposed_at_once: list[int] = []
    run = localising.run_with_outputs

    def counted(graph: Any, values: Sequence[ir.Value], *more: Any) -> Any:
        exposed_at_once.append(len(values))
        return run(graph, values, *more)

    monkeypatch.setattr(localising, "run_with_outputs", counted)
    adapter = right(deep)
    layer = [f"model.layers.3.{path}" for path in inner]
    for path in ["model.layers.0.mlp.gate_proj", *layer, "model.layers.5.mlp.down_proj"]:
        exposed_at_once.clear()
        found = localise(sources(deep, merged(deep, "torchscript", wrong(adapter, path), tmp_path)), most)
        assert_named(found, path)
        assert found.of == 6 * 9 + 3
        assert found.looked_at == len(found.rows) < found.of
        # An input and an output of each.
        assert max(exposed_at_once) <= 2 * most
        # Once more where a module that stands beside the mistake was taken for one behind it.
        assert len(exposed_at_once) <= 2 + math.ceil(math.log(found.of, most - 1))
    exposed_at_once.clear()
    good = localise(sources(deep, merged(deep, "torchscript", adapter, tmp_path)), most)
    assert_clean(good, paths(adapter))
    assert good.looked_at == good.of
    assert len(exposed_at_once) == math.ceil(good.of / most)


# --- where nothing can be found ------------------------------------------------------------------------


@pytest.mark.xdist_group("llama")
def test_what_can_not_be_looked_into_is_said_and_nothing_raised(tmp_path, monkeypatch):
    graph = merged("llama", "torchscript", right("llama"), tmp_path)
    given = sources("llama", graph)
    engine = localise(dataclasses.replace(given, candidate=tmp_path / "m.engine"))
    assert (engine.module, engine.rows) == ("", ())
    assert "m.engine is an engine" in engine.note
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(graph.read_bytes()[:1000])
    for candidate in (broken, tmp_path / "none.onnx"):
        found = localise(dataclasses.replace(given, candidate=candidate))
        assert found.note.startswith(f"could not look into {candidate.name}: "), found.note
    strange = localise(dataclasses.replace(given, candidate=tiny.base_onnx("conv", "torchscript")))
    assert "no module of the model could be found in model.onnx" in strange.note
    lacking = {name: values for name, values in given.values.items() if name != "attention_mask"}
    short = localise(dataclasses.replace(given, values=lacking))
    assert "could not look into m.onnx: ONNX Runtime could not run" in short.note

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("nobody thought of it")

    monkeypatch.setattr(localising, "find_probes", fail)
    assert localise(given).note == "could not look into m.onnx: ZeroDivisionError: nobody thought of it"


@pytest.mark.xdist_group("llama")
def test_a_module_of_another_size_is_listed(tmp_path):
    graph = merged("llama", "dynamo", right("llama"), tmp_path)
    given = sources("llama", graph)
    less = {name: values[:1] for name, values in given.values.items()}

    class Other:
        """A reference on the first row alone: all sizes differ, and no multiple by calls is meant."""

        def run_with_modules(self, values: Any, state: State, modules: Any) -> Any:
            return given.reference.run_with_modules(less, state, modules)

    other: Any = Other()
    found = localise(dataclasses.replace(given, reference=other, own=None))
    assert (found.module, found.rows) == ("", ())
    assert "of another size in the graph: " in found.note


@pytest.mark.xdist_group("llama")
def test_looking_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "graphs").mkdir()
    path = merged("llama", "dynamo", right("llama"), tmp_path / "graphs")
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    assert localise(sources("llama", path)).rows
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before
    assert not any((tmp_path / "temporary").iterdir())
    graph = load_graph(path)
    written = ir.to_proto(graph.model).SerializeToString(deterministic=True)
    values = [node.outputs[0] for node in list(graph.graph)[:30:7]]
    found = run_with_outputs(graph, values, tiny.feeds("llama", path), "cpu")
    assert set(found) == {value.name for value in values}
    assert ir.to_proto(graph.model).SerializeToString(deterministic=True) == written


# --- figures of one module -----------------------------------------------------------------------------


def made_up(seed: int, effect: float, noise: float, missing: float) -> Measured:
    """Return what is made of a candidate that loses as much as PyTorch, and lacks some of the effect."""
    generator = np.random.default_rng(seed)
    shape = (2, 7, 64)
    base, change, *lost = (generator.standard_normal(shape) for _ in range(4))
    wanted = base + effect * change
    own, got = (wanted + noise * part for part in lost)
    got = got - missing * effect * change
    runs = Runs(
        right={"m": (base, wanted)},
        without={"m": (base, base)},
        own={"m": (base, own)},
        bare={"m": base},
        dtype="float16",
    )
    found = runs.measure("m", base, got, -1)
    assert found is not None
    return found


def test_an_effect_as_small_as_rounding_is_missed_where_it_is_missing():
    for seed in range(200):
        assert not made_up(seed, effect=1e-3, noise=1e-3, missing=0.0).off
        assert not made_up(seed, effect=1e-4, noise=1e-3, missing=0.0).off
        # Rule 1 can't tell: the distance is less than twice PyTorch's own.
        lacking = made_up(seed, effect=1e-3, noise=1e-3, missing=1.0)
        assert lacking.row.error_out < 2 * lacking.row.own_out
        assert lacking.off
        assert made_up(seed, effect=1e-3, noise=1e-3, missing=-1.0).off
    assert made_up(0, effect=0.0, noise=1e-3, missing=1.0).row.effect == 0


def test_padded_positions_do_not_count():
    generator = np.random.default_rng(0)
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 0]])
    wanted = generator.standard_normal((2, 4, 8))
    got = wanted.copy()
    got[mask == 0] = np.nan
    for shape in ((2, 4, 8), (8, 8)):
        taken = {"m": (wanted.reshape(shape), wanted.reshape(shape))}
        found = Runs(right=taken, without=taken, own={}, bare={}, dtype="float32", masks=[mask]).measure(
            "m", got, got, -1
        )
        assert found is not None
        assert (found.row.error_in, found.row.error_out, found.off, found.off_in) == (0, 0, False, False)
        blind = Runs(right=taken, without=taken, own={}, bare={}, dtype="float32").measure("m", got, got, -1)
        assert blind is not None
        assert blind.off
        assert blind.off_in


def test_of_several_calls_the_first_one_is_compared():
    first, second = np.ones((2, 3)), np.full((2, 3), 5.0)
    joined = np.concatenate([first, second])
    taken = {"m": (joined, joined), "ragged": (joined.reshape(-1), joined.reshape(-1))}
    runs = Runs(right=taken, without=taken, own={}, bare={}, dtype="float32")
    for name in taken:
        found = runs.measure(name, first, first, -1)
        assert found is not None
        assert (found.row.error_in, found.row.error_out) == (0, 0)
    assert runs.measure("m", None, np.ones((2, 2)), -1) is None
    assert runs.measure("other", None, first, -1) is None


# --- operators that hide a product ---------------------------------------------------------------------

HIDDEN = 8


def small(nodes: str, **constants: np.ndarray) -> ir.Model:
    """Return a graph of ``x`` with these nodes; its output is ``y``."""
    text = f"""<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
        g (float[2, 3, {HIDDEN}] x) => (float[2, 3, n] y) {{ {nodes} }}"""
    model = ir.from_onnx_text(text)
    for name, values in constants.items():
        tensor = ir.tensor(values, name=name)
        value = next(
            given for node in model.graph for given in node.inputs if given is not None and given.name == name
        )
        value.const_value, value.shape, value.dtype = tensor, ir.Shape(values.shape), tensor.dtype
        model.graph.register_initializer(value)
    return model


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(math.prod(shape)).standard_normal(shape).astype(np.float32)


W, WIDE, BIAS = draw(HIDDEN, HIDDEN), draw(HIDDEN, 3 * HIDDEN), draw(HIDDEN)
SKIP = "p = MatMul(x, w) y, m, v, s = com.microsoft.SkipLayerNormalization(p, x, ones, zeros, b)"
SIMPLE = "p = MatMul(x, w) y, m, v, s = com.microsoft.SkipSimplifiedLayerNormalization(p, x, ones, b)"
HIDING = {
    "bias behind": ("p = MatMul(x, w) a = Add(p, b) y = Relu(a)", {}),
    "bias in front": ("p = MatMul(x, w) a = Add(b, p) y = Relu(a)", {}),
    "BiasGelu": ("p = MatMul(x, w) y = com.microsoft.BiasGelu(p, b)", {}),
    "FastGelu": ("p = MatMul(x, w) y = com.microsoft.FastGelu(p, b)", {}),
    "SkipLayerNormalization": (SKIP, {"ones": draw(HIDDEN), "zeros": draw(HIDDEN)}),
    "SkipSimplifiedLayerNormalization": (SIMPLE, {"ones": draw(HIDDEN)}),
}


def probed(model: ir.Model, folder: Path, **weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return what leaves modules that are found by their weights ``(in_dim, out_dim)``."""
    ir.save(model, folder / "m.onnx")
    graph = load_graph(folder / "m.onnx")
    shapes = [ModuleShape(name, "linear", values.shape[::-1]) for name, values in weights.items()]
    probes, missing = find_probes(graph, shapes, lambda target: weights[target.path].T)
    assert not missing
    taps = [tap.value for probe in probes for tap in probe.y]
    got = run_with_outputs(graph, taps, {"x": draw(2, 3, HIDDEN)}, "cpu")
    return {probe.module: tap_values(probe.y[0], got, probe.axis) for probe in probes}


@pytest.mark.parametrize("name", HIDING)
def test_a_bias_is_in_the_output_wherever_the_graph_adds_it(name, tmp_path):
    nodes, more = HIDING[name]
    (got,) = probed(small(nodes, w=W, b=BIAS, **more), tmp_path, m=W).values()
    assert tiny.relative_error(got, draw(2, 3, HIDDEN) @ W + BIAS) < NOISE


def test_a_sum_with_something_else_is_no_bias(tmp_path):
    for nodes in ("p = MatMul(x, w) y = Add(p, x)", "p = MatMul(x, w) r = Relu(p) y = Add(p, r)"):
        (got,) = probed(small(nodes, w=W), tmp_path, m=W).values()
        assert tiny.relative_error(got, draw(2, 3, HIDDEN) @ W) < NOISE


def test_q_k_and_v_are_seen_inside_of_attention(tmp_path):
    nodes = "y = com.microsoft.Attention <num_heads = 2> (x, w, b)"
    parts = dict(zip("qkv", np.split(WIDE, 3, axis=1), strict=True))
    bias, other = draw(3 * HIDDEN), WIDE + 0.3 * WIDE[::-1, ::-1]
    got = probed(small(nodes, w=other, b=bias), tmp_path, **parts)
    wanted = draw(2, 3, HIDDEN) @ other + bias
    for name, part in zip("qkv", np.split(wanted, 3, axis=-1), strict=True):
        assert tiny.relative_error(got[name], part) < NOISE


def test_attention_of_three_inputs_with_one_bias(tmp_path):
    nodes = (
        "q = MatMul(x, a) k = MatMul(x, c) v = MatMul(x, w) "
        "y = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v, b)"
    )
    one, two = WIDE[:, :HIDDEN], np.ascontiguousarray(WIDE[:, HIDDEN : 2 * HIDDEN])
    bias = draw(3 * HIDDEN)
    model = small(nodes, a=np.ascontiguousarray(one), c=two, w=W, b=bias)
    got = probed(model, tmp_path, q=one, k=two, v=W)
    for number, (name, weight) in enumerate((("q", one), ("k", two), ("v", W))):
        part = bias[number * HIDDEN : (number + 1) * HIDDEN]
        assert tiny.relative_error(got[name], draw(2, 3, HIDDEN) @ weight + part) < NOISE


def test_weights_without_names_are_found_by_what_they_are_nearest_to(tmp_path):
    """Two of one shape, in an order that tells nothing, both changed; a third one is nobody's."""
    one, two, other = (draw(HIDDEN, HIDDEN + n)[:, :HIDDEN].copy() for n in (1, 2, 3))
    noise = 0.5 * draw(HIDDEN, HIDDEN + 4)[:, :HIDDEN]
    model = small("p = MatMul(x, c) r = MatMul(p, a) y = MatMul(r, w)", c=two + noise, a=other, w=one - noise)
    got = probed(model, tmp_path, one=one, two=two)
    x = draw(2, 3, HIDDEN)
    assert tiny.relative_error(got["two"], x @ (two + noise)) < NOISE
    assert tiny.relative_error(got["one"], x @ (two + noise) @ other @ (one - noise)) < 10 * NOISE
    ir.save(model, tmp_path / "again.onnx")
    graph, shape = load_graph(tmp_path / "again.onnx"), ModuleShape("none", "linear", (HIDDEN, HIDDEN))
    assert find_probes(graph, [shape], lambda _: W) == ([], {"none": NOT_FOUND})
