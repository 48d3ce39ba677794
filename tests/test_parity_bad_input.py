"""Input that can't be compared is refused, all of it said at once; what proves nothing never passes.

Every row of the table goes through Python and through the command line.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import broken_exports as broken
import engine_files
import numpy as np
import onnx
import pytest
import tiny
from session_graphs import P, Q, both
from small_graphs import adapter, graph, linear, random, save

from lora_export import Adapter, LoraExportError, bank_onnx, load_adapter, merge_onnx, save_adapter, swap_onnx
from lora_export.cli import _run
from lora_export.parity import check
from lora_export.parity.check import check_parity
from lora_export.reports.parity import to_html

Array = Any
A, B = both(1), both(2, rank=4)
TEXT = """g (float[batch,4] x) => (float[batch,3] y) {
    t = MatMul(x, p_weight)  y = MatMul(t, q_weight)
}"""
TOKENS = (
    "g (int64[batch,sequence] input_ids) => (float[batch,sequence,4] logits) {logits = Gather(t, input_ids)}"
)
X = random(4, 4, seed=3)
llama = pytest.mark.xdist_group("parity-llama")


def base(folder: Path, name: str = "base.onnx", text: str = TEXT, **changed: Array) -> Path:
    weights = {"p.weight": P.T.copy(), "q.weight": Q.T.copy()} | changed
    return save(graph(text, weights), folder, name)


def lookup(folder: Path, rows: int, name: str = "tokens.onnx") -> Path:
    return save(graph(TOKENS, {"t": random(rows, 4)}), folder, name)


def stored(folder: Path, given: Adapter = A, name: str = "a") -> Path:
    return save_adapter(given, folder / name)


def merged(folder: Path, given: Path | None = None) -> Path:
    merge_onnx(base(folder), given or stored(folder), folder / "merged.onnx")
    return folder / "merged.onnx"


def swapped(folder: Path, *modules: str) -> Path:
    swap_onnx(base(folder), folder / "swap.onnx", target_modules=list(modules or "pq"), max_rank=8)
    return folder / "swap.onnx"


def banked(folder: Path) -> Path:
    slots = {"a": stored(folder), "b": stored(folder, B, "b")}
    bank_onnx(base(folder), slots, folder / "bank.onnx")
    return folder / "bank.onnx"


def saved(folder: Path, name: str = "right.npz", **outputs: Array) -> Path:
    np.savez(folder / name, **(outputs or {"y": X @ P.T @ Q.T}))
    return folder / name


def feeds(folder: Path, **values: Array) -> Path:
    return saved(folder, "feeds.npz", **(values or {"x": X}))


def written(path: Path, content: bytes = b"PK\x03\x04 no archive") -> Path:
    path.write_bytes(content)
    return path


def pickled(folder: Path) -> Path:
    np.savez(folder / "pickled.npz", y=np.array([{"an": "object"}], dtype=object))
    return folder / "pickled.npz"


def cut_off(path: Path) -> Path:
    """Damage a member of an archive, not its directory."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    return written(path, bytes(content))


def quantised(folder: Path) -> Path:
    text = """g (float[batch,4] x) => (float[batch,3] y) {
        w = DequantizeLinear(stored, scale)  y = MatMul(x, w)
    }"""
    constants = {"stored": np.ones((4, 3), np.int8), "scale": np.float32(0.1)}
    return save(graph(text, constants), folder, "int8.onnx")


# --- what is refused -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """Something that can't be compared.

    Attributes:
        given: Folder → the arguments of `check_parity`, adapters as name → path.
        error: Class of the error.
        said: What the message, its problems or its hint say; each of them.
        code: What the command line returns: 2 where click refuses it.
    """

    given: Callable[[Path], dict[str, Any]]
    error: str
    said: tuple[str, ...]
    code: int = 1


def of_saved(**outputs: Array) -> Callable[[Path], dict[str, Any]]:
    return lambda f: {"reference": saved(f, **outputs), "candidate": base(f), "feeds": feeds(f)}


def with_feeds(make: Callable[[Path], Path]) -> Callable[[Path], dict[str, Any]]:
    return lambda f: {"reference": base(f, "other.onnx"), "candidate": base(f), "feeds": make(f)}


def against_itself_but(**options: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda f: {"reference": base(f, "other.onnx"), "candidate": base(f), **options}


NO_ARCHIVE = "no archive"
CASES = {
    # Different models.
    "other outputs": Case(
        lambda f: {
            "reference": base(f),
            "candidate": base(f, "two.onnx", TEXT.replace("3] y)", "3] y, float[batch,5] t)")),
        },
        "BackendError",
        ("1 outputs that the reference does not have", "only the candidate: t", "the reference: y"),
    ),
    "other vocabulary": Case(
        lambda f: {
            "reference": base(f),
            "candidate": base(f, "wide.onnx", TEXT.replace("3] y", "6] y"), **{"q.weight": random(5, 6)}),
        },
        "BackendError",
        ("different shapes", r"y: candidate \(1, 6\), reference \(1, 3\)", "another vocabulary"),
    ),
    "smaller vocabulary of the reference": Case(
        lambda f: {"reference": lookup(f, 30, "small.onnx"), "candidate": lookup(f, 300)},
        "BackendError",
        ("could not run small.onnx",),
    ),
    "saved outputs of other rows": Case(
        of_saved(y=np.zeros((2, 3))), "BackendError", ("different shapes", r"\(4, 3\)", r"\(2, 3\)")
    ),
    "saved states with other outputs": Case(
        lambda f: {
            "reference": saved(f, **{"base/y": X, "a/y": X, "a/z": X}),
            "candidate": swapped(f),
            "adapters": {"a": stored(f)},
            "feeds": feeds(f),
        },
        "BackendError",
        ("not the same outputs", "no adapter: no z"),
    ),
    "base of another shape": Case(
        lambda f: {
            "reference": broken.edited(merged(f), f / "other.onnx", lambda model: None),
            "candidate": f / "merged.onnx",
            "adapters": {"a": f / "a"},
            "base": base(f, "wide.onnx", TEXT.replace("3] y", "6] y"), **{"q.weight": random(5, 6)}),
        },
        "BackendError",
        ("different shapes", r"reference without adapter \(1, 6\)"),
    ),
    # Feeds.
    "feeds lack an input": Case(
        with_feeds(lambda f: feeds(f, z=X)),
        "BackendError",
        ("x: missing", "z: no input", "it takes: x float32"),
    ),
    "feeds of another dtype": Case(
        with_feeds(lambda f: feeds(f, x=X.astype(np.float64))),
        "BackendError",
        ("x: float64, wanted float32",),
    ),
    "feeds of another shape": Case(
        with_feeds(lambda f: feeds(f, x=X[:, :3])), "BackendError", (r"x: shape \[4, 3\], wanted",)
    ),
    "feeds of another rank": Case(
        with_feeds(lambda f: feeds(f, x=X[0])), "BackendError", (r"x: shape \[4\], wanted",)
    ),
    "feeds without rows": Case(with_feeds(lambda f: feeds(f, x=X[:0])), "BackendError", ("holds no values",)),
    "feeds that are no numbers": Case(
        with_feeds(lambda f: feeds(f, x=np.full_like(X, np.nan))),
        "BackendError",
        ("16 of 16 values are NaN",),
    ),
    "feeds beyond the vocabulary": Case(
        lambda f: {
            "reference": lookup(f, 30, "other.onnx"),
            "candidate": lookup(f, 30),
            "feeds": feeds(f, input_ids=np.array([[1, 30]])),
        },
        "BackendError",
        ("values from 1 to 30, wanted 0 to 29",),
    ),
    "damaged feeds": Case(
        with_feeds(lambda f: written(f / "feeds.npz")), "BackendError", ("can't be read: ",)
    ),
    "no feeds file": Case(with_feeds(lambda f: f / "no.npz"), "BackendError", ("no.npz is no file",)),
    "feeds in a folder": Case(with_feeds(lambda f: f), "BackendError", ("is a folder",)),
    "saved outputs without feeds": Case(
        lambda f: {"reference": saved(f), "candidate": base(f)}, "BackendError", ("give --feeds FILE",)
    ),
    "saved outputs of several feeds": Case(
        lambda f: {
            "reference": saved(f),
            "candidate": base(f),
            "feeds": feeds(f, **{"1/x": X, "2/x": X}),
        },
        "BackendError",
        ("holds 2 feeds",),
    ),
    "no samples": Case(
        against_itself_but(samples=0), "BackendError", ("samples 0: nothing would be checked",), code=2
    ),
    "a negative seed": Case(against_itself_but(seed=-1), "BackendError", ("seed -1",), code=2),
    # Adapters.
    "modules that are not there": Case(
        lambda f: {
            "reference": base(f),
            "candidate": swapped(f, "p"),
            "adapters": {"a": stored(f)},
        },
        "SiteError",
        ("q",),
    ),
    "modules of another model": Case(
        lambda f: {
            "reference": base(f),
            "candidate": swapped(f),
            "adapters": {"a": stored(f, adapter(linear("other.proj", 3, 4)))},
        },
        "SiteError",
        (r"other\.proj",),
    ),
    "no slot": Case(
        lambda f: {
            "reference": base(f),
            "candidate": banked(f),
            "adapters": {"c": stored(f, both(7), "c")},
        },
        "AdapterError",
        ("1 adapters have no slot of their own", "its slots: a, b"),
    ),
    "two adapters in one slot": Case(
        lambda f: {
            "reference": base(f),
            "candidate": banked(f),
            "adapters": {"a": f / "a", "again": f / "a"},
        },
        "AdapterError",
        ("again: slot 'a' as well as a",),
    ),
    "no such adapter": Case(
        lambda f: {"reference": base(f), "candidate": merged(f), "adapters": {"no": f / "no"}},
        "AdapterError",
        ("there is no adapter at",),
    ),
    "a base in place of an adapter": Case(
        lambda f: {"reference": base(f), "candidate": merged(f), "adapters": {"b": f / "base.onnx"}},
        "AdapterError",
        ("base.onnx",),
    ),
    "weights of a swap graph": Case(
        lambda f: {
            "reference": base(f),
            "candidate": swapped(f),
            "adapters": {"a": stored(f)},
            "weights": [0.5],
        },
        "BackendError",
        ("swap.onnx is a swap graph",),
    ),
    "too many weights": Case(
        lambda f: {
            "reference": base(f),
            "candidate": merged(f),
            "adapters": {"a": f / "a"},
            "weights": [0.5, 0.5],
        },
        "AdapterError",
        ("2 weights for 1 adapters",),
    ),
    "a reference that can't do without the adapter": Case(
        lambda f: {"reference": merged(f), "candidate": swapped(f), "adapters": {"a": f / "a"}},
        "BackendError",
        ("can't be run with every adapter", "  a"),
    ),
    # Files.
    "no candidate": Case(
        lambda f: {"reference": base(f), "candidate": f / "no.onnx"}, "GraphError", ("no ONNX file at",)
    ),
    "a folder as the candidate": Case(
        lambda f: {"reference": base(f), "candidate": f}, "GraphError", ("is a folder, not an ONNX file",)
    ),
    "a damaged candidate": Case(
        lambda f: {"reference": base(f), "candidate": written(f / "m.onnx")}, "GraphError", ("m.onnx",)
    ),
    "no reference": Case(
        lambda f: {"reference": f / "no", "candidate": base(f)}, "BackendError", ("there is nothing at",)
    ),
    "no reference graph": Case(
        lambda f: {"reference": f / "no.onnx", "candidate": base(f)}, "GraphError", ("no ONNX file at",)
    ),
    "no saved outputs": Case(
        lambda f: {"reference": f / "no.npz", "candidate": base(f), "feeds": feeds(f)},
        "BackendError",
        ("no file at",),
    ),
    "an empty folder as the reference": Case(
        lambda f: {"reference": (f / "a").mkdir() or f / "a", "candidate": base(f)}, "CheckpointError", ("a",)
    ),
    "an adapter as the reference": Case(
        lambda f: {"reference": stored(f), "candidate": base(f)},
        "CheckpointError",
        ("is an adapter, not a base model", "give the folder of its base model"),
    ),
    "a text as the reference": Case(
        lambda f: {"reference": written(f / "r.txt"), "candidate": base(f)},
        "BackendError",
        ("is no reference", "a checkpoint folder, an .onnx file, or saved outputs"),
    ),
    "damaged saved outputs": Case(
        lambda f: {"reference": written(f / "r.npz"), "candidate": base(f), "feeds": feeds(f)},
        "BackendError",
        ("r.npz can't be read",),
    ),
    "saved outputs with a damaged member": Case(
        lambda f: {
            "reference": cut_off(saved(f, y=np.zeros((500, 3)))),
            "candidate": base(f),
            "feeds": feeds(f),
        },
        "BackendError",
        ("can't be read",),
    ),
    "damaged saved safetensors": Case(
        lambda f: {"reference": written(f / "r.safetensors"), "candidate": base(f), "feeds": feeds(f)},
        "BackendError",
        ("r.safetensors",),
    ),
    "saved objects": Case(
        lambda f: {"reference": pickled(f), "candidate": base(f), "feeds": feeds(f)},
        "BackendError",
        ("pickled.npz holds arrays that can't be read",),
    ),
    "saved texts": Case(of_saved(y=np.array(["a", "b"])), "BackendError", ("no numbers", "y: <U1")),
    "an output saved twice": Case(
        of_saved(**{"y": X, "base/y": X}), "BackendError", ("'y' of no adapter twice",)
    ),
    "the candidate as its own reference": Case(
        lambda f: {"reference": base(f), "candidate": base(f)}, "BackendError", ("compared with itself",)
    ),
    "a base beside saved outputs": Case(
        lambda f: {**of_saved()(f), "base": base(f)},
        "BackendError",
        ("--base is for a reference that is a graph",),
    ),
    "no base": Case(
        lambda f: {"reference": base(f), "candidate": merged(f), "base": f / "no.onnx"},
        "GraphError",
        ("no ONNX file at",),
    ),
    # Options.
    **{
        f"tolerance {text}": Case(
            against_itself_but(tolerance=text), "BackendError", (f"tolerance is {text!r}",)
        )
        for text in ("", "exact", "1e-3", "1e-3,x", "1,2,3", "-1,0", "0,0", "nan,1", "inf,0")
    },
    "an unknown dtype": Case(
        against_itself_but(dtype="int8"), "BackendError", ("there is no dtype 'int8'", "float16"), code=2
    ),
    "an unknown dtype of the reference": Case(
        against_itself_but(reference_dtype="float16"),
        "BackendError",
        ("there is no dtype 'float16'",),
        code=2,
    ),
    "a quantised candidate without a tolerance": Case(
        lambda f: {"reference": base(f), "candidate": quantised(f)},
        "BackendError",
        ("int8.onnx is quantised", "DequantizeLinear", "give --tolerance rtol,atol"),
    ),
    "tokens of what generates none": Case(
        against_itself_but(generate=4), "BackendError", ("is no decoder", "input x: not known")
    ),
    "fewer tokens than none": Case(
        lambda f: {
            "reference": lookup(f, 30, "other.onnx"),
            "candidate": lookup(f, 30),
            "generate": -1,
        },
        "BackendError",
        ("can't generate -1 tokens",),
        code=2,
    ),
    "tokens of saved outputs": Case(
        lambda f: {**of_saved()(f), "generate": 2}, "BackendError", ("leave out --generate",)
    ),
    # Devices.
    "an engine without its record": Case(
        lambda f: {"reference": base(f), "candidate": written(f / "m.engine", b"ftrt")},
        "BackendError",
        ("has no record beside it",),
    ),
    "an engine on a processor": Case(
        lambda f: {
            "reference": base(f),
            "candidate": engine_files.engine_of(f / "base.onnx"),
            "provider": "cpu",
        },
        "BackendError",
        ("is an engine, which runs on a GPU",),
    ),
}
EVERY = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])


@EVERY
def test_what_cannot_be_compared_is_refused(case, tmp_path):
    given = case.given(tmp_path)
    with pytest.raises(LoraExportError) as caught:
        check_parity(**given)
    error = caught.value
    assert type(error).__name__ == case.error
    for words in case.said:
        assert re.search(words, str(error)), f"{words!r} is not in:\n{error}"
    assert error.hint


def arguments(given: Mapping[str, Any]) -> list[str]:
    """Return the command line of the arguments of `check_parity`."""
    words = {"weights": "weight", "reference_dtype": "reference-dtype"}
    line = ["parity"]
    for key, value in given.items():
        if key == "adapters":
            line += [part for name, path in value.items() for part in ("--adapter", f"{name}={path}")]
        else:
            for one in value if isinstance(value, list) else [value]:
                line += [f"--{words.get(key, key)}={one}"]
    return line


def outputs(folder: Path) -> list[str]:
    return [f"--report={folder}/r.json", f"--junit={folder}/r.xml", f"--html={folder}/r.html"]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@EVERY
def test_the_command_line_refuses_it_too_and_writes_nothing(case, tmp_path, capsys):
    given = case.given(tmp_path)
    before = contents(tmp_path)
    code = _run([*arguments(given), *outputs(tmp_path)], False)
    printed = capsys.readouterr()
    assert code == case.code
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert "Error: " in printed.err
    if code == 1:
        for words in case.said:
            assert re.search(words, printed.err)
        assert "hint: " in printed.err
    assert contents(tmp_path) == before


def test_two_adapters_of_one_name_are_refused(tmp_path, capsys):
    graph_path = swapped(tmp_path)
    paths = [stored(tmp_path / str(number), both(number)) for number in range(2)]
    with pytest.raises(LoraExportError, match="two adapters are called 'a'") as caught:
        check_parity(tmp_path / "base.onnx", graph_path, paths)
    assert len(caught.value.problems) == 2
    line = arguments({"reference": tmp_path / "base.onnx", "candidate": graph_path})
    assert _run([*line, *(f"--adapter={path}" for path in paths)], False) == 2
    assert "two adapters are called 'a'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["graph", "engine"])
def test_a_gpu_that_is_not_there_is_said(kind, tmp_path, capsys):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    reference, candidate = base(tmp_path, "other.onnx"), base(tmp_path)
    given: dict[str, Any] = {"reference": reference, "candidate": candidate, "provider": "cuda"}
    if kind == "engine":
        pytest.importorskip("torch")
        given = {"reference": reference, "candidate": engine_files.engine_of(candidate)}
    with pytest.raises(LoraExportError) as caught:
        check_parity(**given)
    assert caught.value.hint
    assert _run([*arguments(given), *outputs(tmp_path)], False) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.glob("r.*"))


# --- what is compared and never passes ---------------------------------------------------------------------


def changed(name: str, value: float) -> dict[str, Array]:
    """Return a weight with one entry of another value."""
    weight = {"p.weight": P, "q.weight": Q}[name].T.copy()
    weight[1, 1] = value
    return {name: weight}


SIDES = ("candidate", "reference")


@pytest.mark.parametrize("tolerance", ["auto", "1e9,1e9"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["graph", "saved"])
@pytest.mark.parametrize("side", [("candidate",), ("reference",), SIDES], ids=" and ".join)
def test_values_that_are_no_numbers_never_pass(side, kind, value, tolerance, tmp_path, capsys):
    graphs = {
        name: base(tmp_path, f"{name}.onnx", **(changed("q.weight", value) if name in side else {}))
        for name in SIDES
    }
    given: dict[str, Any] = {**graphs, "tolerance": tolerance}
    if kind == "saved":
        right = X @ P.T @ Q.T
        right[1, 1] = value if "reference" in side else right[1, 1]
        given |= {"reference": saved(tmp_path, y=right), "feeds": feeds(tmp_path)}
    report = check_parity(**given)
    assert not report.passed
    (verdict,) = [v for v in report.failed if v.kind == "finite" and not v.name.partition(":")[2]]
    for name in side:
        assert f"y of the {name}" in verdict.why
    assert _run([*arguments(given), *outputs(tmp_path)], False) == 3
    assert "Traceback" not in capsys.readouterr().err
    assert json.loads((tmp_path / "r.json").read_text())["passed"] is False
    suite = ElementTree.parse(tmp_path / "r.xml").getroot()
    assert suite.findall(".//failure")


def without_effect(given: Adapter) -> Adapter:
    return broken.not_applied(given)


@pytest.mark.parametrize("mode", ["merged", "swap", "bank"])
def test_adapters_without_effect_are_said_and_do_not_pass(mode, tmp_path, capsys):
    empty = stored(tmp_path, without_effect(A), "empty")
    adapters = {"empty": empty}
    if mode == "merged":
        candidate, reference = merged(tmp_path, empty), base(tmp_path, "other.onnx")
        given = {
            "reference": broken.edited(candidate, tmp_path / "m.onnx", lambda model: None),
            "base": reference,
        }
    elif mode == "swap":
        candidate, given = swapped(tmp_path), {}
    else:
        bank_onnx(base(tmp_path), adapters, tmp_path / "bank.onnx")
        candidate, given = tmp_path / "bank.onnx", {}
    if not given:
        given = {"reference": broken.edited(candidate, tmp_path / "other.onnx", lambda model: None)}
    given |= {"candidate": candidate, "adapters": adapters}
    report = check_parity(**given, localise=False)
    (failed,) = report.failed
    assert (failed.kind, failed.state, failed.counted) == ("effect", "empty", False)
    assert "B = 0" in failed.why
    assert _run(arguments(given), False) == 3
    assert "B = 0" in capsys.readouterr().out


def test_an_adapter_without_effect_beside_another_is_said_and_passes(tmp_path, capsys):
    adapters = {"empty": stored(tmp_path, without_effect(A), "empty"), "a": stored(tmp_path)}
    candidate = swapped(tmp_path)
    given = {
        "reference": broken.edited(candidate, tmp_path / "other.onnx", lambda model: None),
        "candidate": candidate,
        "adapters": adapters,
    }
    assert check_parity(**given).passed
    assert _run(arguments(given), False) == 0
    assert "B = 0" in capsys.readouterr().out


@pytest.mark.parametrize("tolerance", ["auto", "1e9,1e9"])
@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_a_candidate_without_its_adapter_or_with_twice_of_it_is_3(weight, tolerance, tmp_path, capsys):
    path = stored(tmp_path)
    merge_onnx(base(tmp_path), path, tmp_path / "right.onnx")
    merge_onnx(base(tmp_path), path, tmp_path / "wrong.onnx", weights=[weight or 1e-9])
    (tmp_path / "wrong.lora.json").unlink()
    given = {
        "reference": tmp_path / "right.onnx",
        "base": tmp_path / "base.onnx",
        "candidate": tmp_path / "wrong.onnx",
        "adapters": {"a": path},
        "tolerance": tolerance,
    }
    report = check_parity(**given)
    assert {"adapter applied", "error / effect"} <= {verdict.name for verdict in report.failed}
    assert _run(arguments(given), False) == 3
    assert "adapter applied" in capsys.readouterr().out


@llama
def test_a_checkpoint_without_the_adapters_modules(tmp_path, capsys):
    given = {
        "reference": tiny.checkpoint("llama"),
        "candidate": broken.base("llama"),
        "adapters": {"x": tiny.adapter("bert")},
    }
    with pytest.raises(LoraExportError) as caught:
        check_parity(**given)
    # Each of them is named, not the first alone.
    modules = load_adapter(tiny.adapter("bert")).modules.values()
    assert all(any(module.path in line for line in caught.value.problems) for module in modules)
    assert _run(arguments(given), False) == 1
    assert "Traceback" not in capsys.readouterr().err


@llama
def test_a_checkpoint_of_another_model(tmp_path):
    with pytest.raises(LoraExportError, match=r"different shapes|don't fit"):
        check_parity(tiny.checkpoint("bert"), broken.base("llama"))


@llama
@pytest.mark.parametrize("rows", [60, 130])
def test_a_checkpoint_of_another_vocabulary(rows, tmp_path):
    """The checkpoint has 100 tokens."""

    def resized(model: onnx.ModelProto) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = broken.constant(model, name)
            values = onnx.numpy_helper.to_array(tensor)
            axis = values.shape.index(tiny.VOCAB)
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(
                    np.resize(values, [rows if i == axis else size for i, size in enumerate(values.shape)]),
                    name,
                )
            )
        del model.graph.value_info[:]
        model.graph.output[0].type.tensor_type.shape.dim[-1].dim_value = rows

    candidate = broken.edited(broken.base("llama"), tmp_path / "other.onnx", resized)
    with pytest.raises(LoraExportError, match=r"different shapes|could not run"):
        check_parity(tiny.checkpoint("llama"), candidate)


# --- reports ---------------------------------------------------------------------------------------------


@pytest.fixture
def good(tmp_path):
    """The command line of a check that passes."""
    models = tmp_path / "models"
    candidate = swapped(models)
    return arguments(
        {
            "reference": broken.edited(candidate, models / "other.onnx", lambda model: None),
            "candidate": candidate,
            "adapters": {"a": stored(models)},
        }
    )


def test_a_check_that_passes_is_0_and_writes_its_reports(good, tmp_path, capsys):
    assert _run([*good, *outputs(tmp_path)], False) == 0
    assert {path.name for path in tmp_path.glob("r.*")} == {"r.json", "r.xml", "r.html"}
    assert json.loads((tmp_path / "r.json").read_text())["passed"] is True
    assert capsys.readouterr().out


def test_json_on_stdout_is_the_report(good, capsys):
    assert _run([*good, "--json"], False) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True
    assert {verdict["state"] for verdict in found["verdicts"]} >= {"no adapter", "a"}


@pytest.fixture
def not_run(monkeypatch):
    """What is wrong with outputs is found before anything is run."""

    def run(*_: Any, **__: Any) -> None:
        raise AssertionError("the check was run")

    monkeypatch.setattr(check, "check_parity", run)


def refused(line: list[str], folder: Path, capsys: Any, said: str) -> None:
    before = contents(folder)
    assert _run(line, False) == 1
    printed = capsys.readouterr()
    assert re.search(said, printed.err)
    assert "Traceback" not in printed.err
    assert contents(folder) == before


def test_existing_reports_are_refused_before_the_run(good, not_run, tmp_path, capsys):
    for name in ("r.json", "r.html"):
        (tmp_path / name).write_text("old")
    refused([*good, *outputs(tmp_path)], tmp_path, capsys, r"(?s)r\.json exists.*r\.html exists")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--report=F/x", "--junit=F/x"], "--report|--json and --junit are both"),
        (["--report=F"], "is a folder"),
        (["--report=F/old.json", "--baseline=F/old.json", "--force"], "is the baseline itself"),
        (["--html=F/./old.json", "--baseline=F/old.json", "--force"], "is the baseline itself"),
        (["--baseline=F/no.json"], "no.json"),
        (["--baseline=F/old.json"], "old.json"),
    ],
)
def test_outputs_that_cannot_be_written_are_refused_before_the_run(
    options, said, good, not_run, tmp_path, capsys
):
    (tmp_path / "old.json").write_text('{"no": "report"}')
    line = [option.replace("F/", f"{tmp_path}/").replace("=F", f"={tmp_path}") for option in options]
    refused([*good, *line], tmp_path, capsys, said)


def test_reports_below_a_file_are_refused(good, tmp_path, capsys):
    (tmp_path / "file").write_text("old")
    refused(
        [*good, f"--report={tmp_path}/r.json", f"--html={tmp_path}/file/r.html"], tmp_path, capsys, "file"
    )


def test_folders_of_reports_are_made(good, tmp_path):
    assert _run([*good, f"--report={tmp_path}/new/er/r.json"], False) == 0
    assert json.loads((tmp_path / "new" / "er" / "r.json").read_text())["passed"] is True


def test_force_replaces_reports(good, tmp_path):
    for name in ("r.json", "r.xml", "r.html"):
        (tmp_path / name).write_text("old")
    assert _run([*good, *outputs(tmp_path), "--force"], False) == 0
    assert all((tmp_path / name).read_text() != "old" for name in ("r.json", "r.xml", "r.html"))


@pytest.mark.parametrize("old", [True, False])
def test_all_reports_appear_or_none(old, good, tmp_path, capsys, monkeypatch):
    def fail(report: Any) -> str:
        raise OSError(28, "No space left on device")

    if old:
        for name in ("r.json", "r.xml", "r.html"):
            (tmp_path / name).write_text("old")
    monkeypatch.setattr(to_html, "report_html", fail)  # the last that is written
    refused([*good, *outputs(tmp_path), *["--force"] * old], tmp_path, capsys, "No space left")


def test_a_baseline_is_read_and_kept(good, tmp_path, capsys):
    baseline = tmp_path / "old.json"
    assert _run([*good, f"--report={baseline}"], False) == 0
    before = baseline.read_bytes()
    assert _run([*good, f"--baseline={baseline}", f"--report={tmp_path}/new.json"], False) == 0
    assert baseline.read_bytes() == before
    # Where the check of then is not among those of now, the gate has a hole.
    data = json.loads(before)
    data["verdicts"] += [{**data["verdicts"][0], "name": "that is gone", "state": "a"}]
    baseline.write_text(json.dumps(data))
    assert _run([*good, f"--baseline={baseline}"], False) == 3
    assert "that is gone" in capsys.readouterr().err


def test_required_options_are_2(capsys):
    for line in (["parity"], ["parity", "--reference=x"], ["parity", "--candidate=x"]):
        assert _run(line, False) == 2
        assert "Traceback" not in capsys.readouterr().err
