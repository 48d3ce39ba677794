"""Input that can't be compared is refused, all of it said at once; what proves nothing never passes.

Every row of the table goes through Python and through the command line.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import broken_exports as broken
import engine_files
import numpy as np
import pytest
from parity_bad import (
    TEXT,
    Array,
    B,
    X,
    arguments,
    base,
    contents,
    feeds,
    merged,
    outputs,
    saved,
    stored,
    swapped,
)
from session_graphs import both
from small_graphs import adapter, graph, linear, random, save

from lora_export import LoraExportError, bank_onnx
from lora_export.cli import _run
from lora_export.parity.check import check_parity

TOKENS = (
    "g (int64[batch,sequence] input_ids) => (float[batch,sequence,4] logits) {logits = Gather(t, input_ids)}"
)


def lookup(folder: Path, rows: int, name: str = "tokens.onnx") -> Path:
    return save(graph(TOKENS, {"t": random(rows, 4)}), folder, name)


def banked(folder: Path) -> Path:
    slots = {"a": stored(folder), "b": stored(folder, B, "b")}
    bank_onnx(base(folder), slots, folder / "bank.onnx")
    return folder / "bank.onnx"


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
        ("doesn't have the same outputs", "no adapter: no z"),
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
        ("x: missing", "z: not an input of the graph", "it takes: x float32"),
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
    "no feeds file": Case(with_feeds(lambda f: f / "no.npz"), "BackendError", ("no file at", "no.npz")),
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
        ("no adapter at", "it does not exist"),
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
        ("can't be a reference", "a checkpoint folder, an .onnx file, or saved outputs"),
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
    "saved texts": Case(of_saved(y=np.array(["a", "b"])), "BackendError", ("not numbers", "y: <U1")),
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
        against_itself_but(dtype="int8"), "BackendError", ("can't check in dtype 'int8'", "float16"), code=2
    ),
    "an unknown dtype of the reference": Case(
        against_itself_but(reference_dtype="float16"),
        "BackendError",
        ("can't check in dtype 'float16'",),
        code=2,
    ),
    "a quantised candidate without a tolerance": Case(
        lambda f: {"reference": base(f), "candidate": quantised(f)},
        "BackendError",
        ("int8.onnx is quantised", "DequantizeLinear", "give --tolerance rtol,atol"),
    ),
    "tokens of what generates none": Case(
        against_itself_but(generate=4), "BackendError", ("is not a decoder", "input x: not known")
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
        lambda f: {**of_saved()(f), "generate": 2}, "BackendError", ("omit --generate",)
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
