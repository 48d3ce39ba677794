"""Recipes: those we ship are valid and their headers complete; bad ones are refused with every problem."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import demos
import pytest

from lora_export.cli import _run, main, root
from lora_export.commands import recipe
from lora_export.commands.inspect import inspect
from lora_export.commands.next_step import print_next
from lora_export.commands.own_recipes import find_recipe, own_recipes
from lora_export.commands.recipe import load_recipe
from lora_export.errors import OutputError, RecipeError

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@click.command()
@click.argument("adapter")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--weight", multiple=True, type=float)
@click.option("--kind", type=click.Choice(["a", "b"]))
@click.option("--json", "as_json", is_flag=True)
@click.option("--force", is_flag=True)
def blend(**_options: object) -> None:
    """A verb with each kind of parameter."""


def read(folder: Path, steps: str, head: str = "name: n\ndescription: d\nneeds: []\n"):
    path = folder / "recipe.yaml"
    path.write_text(head + steps, encoding="utf-8")
    return load_recipe(path, ["blend", "run"], lambda _verb: blend)


def problems(folder: Path, steps: str, head: str = "name: n\ndescription: d\nneeds: []\n") -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(folder, steps, head)
    return list(caught.value.problems)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_our_recipes_are_valid(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["run", str(path), "--dry-run"])
    assert stop.value.code == 0
    assert all(line.startswith("lora-export ") for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_our_recipes_explain_themselves(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    header = [line for line in text.splitlines() if line.startswith("#")]
    for word in ("What:", "Needs:", "Command:", "Result:"):
        assert any(line.startswith(f"# {word}") for line in header), f"{path.name}: header lacks {word}"
    assert f"lora-export run recipes/{path.name}" in text
    assert f"\nname: {path.stem}\n" in text


def test_there_are_recipes() -> None:
    assert RECIPES


def test_a_wheel_has_the_recipes(tmp_path: Path) -> None:
    """Built and installed, far from the checkout: the package's files, and the recipes by their names."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    kept = {path.relative_to(ROOT) for path in (ROOT / "lora_export").rglob("*") if path.is_file()}
    assert {path for path in kept if path.suffix != ".pyc"} <= {
        path.relative_to(site) for path in site.rglob("*")
    }
    environment = {**os.environ, "PYTHONPATH": str(site)}
    found = [
        subprocess.run(
            [sys.executable, "-m", "lora_export", "run", given, "--dry-run"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for given in (RECIPES[0].stem, str(RECIPES[0]))
    ]
    assert found[0] == found[1] != ""
    inside = site / "lora_export" / "recipes"
    assert {path.name for path in inside.glob("*.yaml")} == {path.name for path in RECIPES}
    said = "import lora_export, pathlib; print(pathlib.Path(lora_export.__file__).parent)"
    where = [sys.executable, "-c", said]
    printed = subprocess.check_output(where, cwd=tmp_path, env=environment, text=True)
    assert printed.strip() == str(site / "lora_export")


def test_recipes_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(own_recipes()) == [path.stem for path in RECIPES]
    monkeypatch.chdir(tmp_path)
    assert find_recipe(Path("demo-minilm")) == ROOT / "recipes" / "demo-minilm.yaml"
    for given in ("demo-minilm.yaml", "here/demo-minilm"):
        assert find_recipe(Path(given)) == Path(given)
    (tmp_path / "demo-minilm").write_text("")
    assert find_recipe(Path("demo-minilm")) == Path("demo-minilm")
    with pytest.raises(RecipeError, match="no recipe of this name") as refused:
        find_recipe(Path("demo-minilmm"))
    assert refused.value.hint.startswith("did you mean demo-minilm? those that come with it: bench-smollm2,")


@pytest.mark.slow
@pytest.mark.xdist_group("minilm")
def test_the_demo_recipe_runs_where_it_is_called(tmp_path: Path) -> None:
    from lora_export.demo.report import Parity
    from lora_export.demo.run import run_graph
    from lora_export.demo.sentences import load_tasks
    from lora_export.demo.training import Trainer

    recipe, folder = demos.after_the_demo("demo-minilm", "minilm", tmp_path)
    shutil.copytree(demos.minilm()[0], folder)
    demos.run_recipe(recipe)
    trainer, tasks = Trainer(folder / "base", 0), {task.name: task for task in load_tasks()}
    for name in ("topic", "question"):
        examples = tasks[name].held_out
        got = run_graph(folder / f"{name}-shared.onnx", trainer.encode(examples))
        wanted = trainer.logits(folder / "adapters" / name, examples)
        assert Parity.between(got, wanted).relative_l2 <= 1e-5


def test_steps_become_what_would_be_typed(tmp_path: Path) -> None:
    recipe = read(
        tmp_path,
        """steps:
  - blend: {weight: [0.70, -1e-3], output: a b/x, adapter: my, json: true, force: no}
  - blend: {adapter: 2026-11-01, output: "true", weight: 1, kind: b}
""",
    )
    first, second = recipe.steps
    assert str(first) == "lora-export blend my --weight 0.70 --weight -1e-3 --output 'a b/x' --json"
    assert second.arguments == ("2026-11-01", "--output", "true", "--weight", "1", "--kind", "b")
    # The verb itself understands it so.
    values = blend.make_context("blend", list(first.arguments)).params
    assert values["weight"] == (0.7, -0.001)
    assert values["adapter"] == "my"
    assert values["as_json"]


def test_an_argument_is_never_read_as_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (step,) = read(tmp_path, "steps:\n- blend: {adapter: '--help', output: out, json: true}\n").steps
    assert step.arguments == ("--output", "out", "--json", "--", "--help")
    assert step.with_flag("force").arguments[0] == "--force"
    (tmp_path / "r.yaml").write_text(
        "name: n\ndescription: d\nneeds: []\nsteps:\n- inspect: {adapter: '--help'}\n- targets: {}\n"
    )
    with pytest.raises(SystemExit) as stop:
        main(["run", str(tmp_path / "r.yaml")])
    assert stop.value.code == 1
    assert "no adapter at --help" in capsys.readouterr().err


def test_flags_are_added_once_and_where_they_are_known(tmp_path: Path) -> None:
    (step,) = read(tmp_path, "steps: [{blend: {adapter: a, output: b}}]").steps
    assert "--force" in step.with_flag("force").arguments
    assert step.with_flag("force").with_flag("force") == step.with_flag("force")
    assert step.with_flag("quiet") == step


def test_all_problems_are_listed_with_their_lines(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        """steps:
  - blend:
      adapter: a
      outptu: b
      weight: [1, x]
      kind: c
      json: 3
      output: [a, b]
  - blend: {adapter: a, adapter: b, output: }
  - merge: {}
  - run: {recipe: recipe.yaml}
  - blend:
  - blend: 7
  - [blend]
  - {blend: {}, merge: {}}
  - blend: {adapter: {a: b}, output: true, weight: [[1]]}
""",
        "name: [1]\ndescripton: d\nneeds: torch\n",
    )
    wanted = [
        "line 2: recipe: unknown key 'descripton'; did you mean 'description'?",
        "missing key 'description'",
        "line 1: name: give a text, not a list",
        "line 3: needs: give a list, not 'torch'",
        "line 7: step 1 (blend): unknown option 'outptu'; did you mean 'output'?",
        "line 8: step 1 (blend): 'weight': 'x' is not a valid float.",
        "line 9: step 1 (blend): 'kind': 'c' is not one of 'a', 'b'.",
        "line 10: step 1 (blend): 'json' is true or false, got '3'",
        "line 11: step 1 (blend): 'output' takes one value, got a list",
        "line 12: step 2 (blend): option 'adapter' is given twice",
        "line 12: step 2 (blend): 'output' takes a value, got ''",
        "line 13: step 3: unknown verb 'merge' (there are: blend)",
        "line 14: step 4: unknown verb 'run' (there are: blend)",
        "line 15: step 5 (blend): missing 'adapter', 'output'",
        "line 16: step 6 (blend): options are 'option: value' pairs",
        "line 17: step 7: give one verb with its options, 'verb: {option: value}'",
        "line 18: step 8: give one verb with its options, 'verb: {option: value}'",
        "line 19: step 9 (blend): 'adapter' takes a value, got a mapping",
        "line 19: step 9 (blend): 'output' takes a value, got 'true'",
        "line 19: step 9 (blend): 'weight' takes values, got a list",
    ]
    assert found == wanted


BANK, ENGINE = "bank-onnx: {base: m.onnx, output: o.onnx, ", "build-engine: {model: m.onnx, output: o, "
PARITY, BENCH = "parity: {reference: b, candidate: m.onnx, ", "bench: {model: m.onnx, "
# Step, what is said of it.
REFUSED_BY_VERBS = [
    (f"{BANK}adapter: []}}", "'adapter' takes at least one value, got an empty list"),
    (f"{BANK}adapter: [a]}}", "'a' is not NAME=PATH"),
    (f"{BANK}adapter: [a=b, a=c]}}", "two slots are called a"),
    (f"{ENGINE}target: []}}", "'target' takes at least one value, got an empty list"),
    (f"{ENGINE}target: [sm89, rtx-9999]}}", "some of the targets are unknown; "),
    (f'{ENGINE}target: " "}}', "no target is given"),
    (f"{ENGINE}target: sm89, shape: batch}}", "'batch': not KEY=MIN:OPT:MAX"),
    (f"{ENGINE}target: sm89, shape: 'batch=1:x:8'}}", "batch=1:x:8: wanted MIN:OPT:MAX"),
    (f"{ENGINE}target: sm89, shape: 'batch=4:2:8'}}", "batch=4:2:8: smallest, usual and largest are out of"),
    (f"{ENGINE}target: sm89, shape: 'ids=1x1:8:8x8'}}", "its parts have different numbers of dimensions"),
    (f"{ENGINE}target: sm89, profile: decod}}", "the profile 'decod' has no sizes"),
    (f"{BENCH}batch: '1,x'}}", "'1,x' is not a list of whole numbers"),
    (f"{BENCH}batch: 0}}", "'0' has numbers below 1"),
    (f"{BENCH}shape: height=0}}", "'height=0': a size is at least 1"),
    (f"{PARITY}shape: height}}", "'height': not NAME=SIZE"),
    (f"{PARITY}weight: []}}", "'weight' takes at least one value, got an empty list"),
]


@pytest.mark.parametrize(("step", "said"), REFUSED_BY_VERBS)
def test_what_a_verb_refuses_is_refused_before_the_first_step(step, said, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"name: n\ndescription: d\nneeds: []\nsteps:\n  - targets: {{}}\n  - {step}\n", encoding="utf-8"
    )
    assert _run(["run", str(path), "--dry-run"], False) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"line 6: step 2 ({step.partition(':')[0]}): " in printed.err
    assert said in printed.err


def test_a_recipe_without_steps_is_refused(tmp_path: Path) -> None:
    assert problems(tmp_path, "steps: []") == ["line 4: steps: give at least one step"]
    assert problems(tmp_path, "") == ["missing key 'steps'"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"steps: [", "is not YAML"),
        (b"- a\n", "is not a recipe"),
        (b"", "is not a recipe"),
        (b"\xff\xfe", "is no"),
        (b"name: !!python/object:os.system x\n", "problem"),
        (b"name: &a [*a]\n", "nested deeper"),
        (b"name: !!bool maybe\n", "problem"),
    ],
)
def test_files_that_are_no_recipe(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path, ["blend"], lambda _verb: blend)


def test_a_missing_file_is_an_error_of_the_user(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["run", "nowhere.yaml"])
    assert stop.value.code == 1
    assert "cannot read the recipe nowhere.yaml: No such file" in capsys.readouterr().err


def write(folder: Path, needs: str, *adapters: str) -> Path:
    steps = "".join(f"  - inspect: {{adapter: {adapter}, json: true}}\n" for adapter in adapters)
    path = folder / "recipe.yaml"
    path.write_text(f"name: n\ndescription: d\nneeds: {needs}\nsteps:\n{steps}", encoding="utf-8")
    return path


def test_a_step_that_fails_answers_in_json_if_it_was_asked_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tiny

    missing, good = tmp_path / "missing", tiny.adapter("conv", "plain", 0)
    with pytest.raises(SystemExit) as typed_stop:
        main(["inspect", str(missing), "--json"])
    typed = json.loads(capsys.readouterr().out)
    recipe = write(tmp_path, "[]", str(good), str(missing))
    with pytest.raises(SystemExit) as stop:
        main(["run", str(recipe)])
    said = capsys.readouterr().out
    assert stop.value.code == typed_stop.value.code == 1
    _, rest = json.JSONDecoder().raw_decode(said)
    found = json.loads(said[rest:])
    assert found["error"].keys() == typed["error"].keys()
    assert found["error"]["message"].endswith(typed["error"]["message"])
    # A step that does not ask for it gets none.
    recipe.write_text(recipe.read_text().replace(f"{missing}, json: true", f"{missing}"), encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["run", str(recipe)])
    said = capsys.readouterr().out
    assert not said[json.JSONDecoder().raw_decode(said)[1] :].strip()


def test_steps_run_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tiny

    first, second = (tiny.adapter("conv", "plain", seed) for seed in (0, 1))
    with pytest.raises(SystemExit) as stop:
        main(["run", str(write(tmp_path, "[torch]", str(first), str(second)))])
    said = capsys.readouterr()
    assert stop.value.code == 0, said.err
    assert said.err.index("step 1 of 2: lora-export inspect") < said.err.index("step 2 of 2")
    reports, rest = json.JSONDecoder().raw_decode(said.out)
    assert reports
    assert said.out[rest:].strip().startswith("{")


def test_the_first_failure_stops_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "[]", str(tmp_path / "missing"), str(tmp_path / "never"))
    with pytest.raises(SystemExit) as stop:
        main(["run", str(path)])
    said = capsys.readouterr().err
    assert stop.value.code == 1
    assert f"Error: step 1 (inspect) of {path}: " in said
    assert "never" not in said


def test_missing_packages_are_named_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lora_export.commands.recipe.find_spec", lambda name: "found" if name == "torch" else None
    )
    with pytest.raises(SystemExit) as stop:
        main(["run", str(write(tmp_path, "[onnxruntime_genai, torch, gguf]", "x"))])
    said = capsys.readouterr().err
    assert stop.value.code == 1
    assert "  onnxruntime_genai\n  gguf\nhint: pip install onnxruntime-genai gguf" in said
    assert "step 1" not in said


@pytest.mark.parametrize("name", ["planted", "planted.x", "this.x", "cuda.planted", "torch.x", "os", "../x"])
def test_a_package_by_a_strangers_name_is_neither_looked_for_nor_offered(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To look for a part of a package, Python runs the package; and a stranger's is not to be installed."""
    mark = tmp_path / "mark"
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "__init__.py").write_text(f"open({str(mark)!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        main(["run", str(write(tmp_path, f"[{name}]", "x"))])
    said = capsys.readouterr()
    assert stop.value.code == 1
    assert f"line 3: needs: unknown package {name!r}" in said.err
    assert "pip install" not in said.err
    assert "this" not in sys.modules
    assert not mark.exists()


def test_the_exit_code_of_a_step_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_export.commands import inspect

    class Parity(OutputError):
        exit_code = 3

    def fail(*_arguments: object, **_options: object) -> None:
        raise Parity("differs")

    monkeypatch.setattr(inspect.inspect, "callback", fail)
    with pytest.raises(SystemExit) as stop:
        main(["run", str(write(tmp_path, "[]", "x"))])
    assert stop.value.code == 3


STEP = "name: a\ndescription: b\nneeds: []\nsteps:\n- inspect: {adapter: %s}\n"


@pytest.mark.parametrize("word", [r'"ck\0x"', r'"\ud800"', r'"a\udfffb"', r'["ck\0"]'])
def test_words_that_no_command_line_can_hold_are_refused(word, tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(STEP % word)
    for flags in ([], ["--dry-run"]):
        assert _run(["run", str(path), *flags], False) == 1
        assert "line 5" in capsys.readouterr().err


def test_a_step_with_any_other_character_is_read(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(STEP % '"é\\U0001f600\\e x"')
    assert _run(["run", str(path), "--dry-run"], False) == 0


@pytest.mark.parametrize("place", ["keys", "options", "needs", "one long key"])
def test_of_many_problems_the_first_are_listed(place, tmp_path, monkeypatch):
    """A likely word is looked for a hundred times at most, and not for a word of any length."""
    words = [f"reports{number:x}" for number in range(3000)]
    text = {
        "keys": "".join(f"{word}: 1\n" for word in words),
        "options": STEP % "x" + "- merge:\n" + "".join(f"    {word}: 1\n" for word in words),
        "needs": f"name: a\ndescription: b\nneeds: [{', '.join(words)}]\nsteps: []\n",
        "one long key": "? " + "a" * 400_000 + "\n: 1\n",
    }[place]
    path, looked = tmp_path / "r.yaml", []
    path.write_text(text)
    real = recipe.difflib.get_close_matches

    def close(word, *rest):
        looked.append(len(word))
        return real(word, *rest)

    monkeypatch.setattr(recipe.difflib, "get_close_matches", close)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["inspect", "merge"], lambda _verb: blend)
    assert 0 < len(caught.value.problems) <= 101
    assert 0 < len(looked) <= 100
    assert max(looked) <= 101
    assert max(map(len, caught.value.problems)) < 1000


def test_a_printed_command_runs_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a quoted name would be cut, its own words would be read as commands."""
    path, mark = tmp_path / "recipe.yaml", tmp_path / "mark"
    for cut in range(440, 500, 3):
        word = "A" * 3000 + f"'; touch {mark}; #" + "B" * cut
        text = f"name: n\ndescription: d\nneeds: []\nsteps:\n- inspect: {{adapter: {json.dumps(word)}}}\n"
        path.write_text(text)
        with pytest.raises(SystemExit) as stop:
            main(["run", str(path), "--dry-run"])
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        script = "lora-export() { printf '%s\\0' \"$@\"; }\n" + printed
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.split("\0")[:-1] == ["inspect", word]
        assert not mark.exists()


def test_a_long_step_is_not_printed_in_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: n\ndescription: d\nneeds: []\nsteps:\n- inspect: {{adapter: {'a' * 3000}}}\n")
    with pytest.raises(SystemExit) as stop:
        main(["run", str(path)])
    assert stop.value.code == 1
    first = capsys.readouterr().err.splitlines()[0]
    assert first == "step 1 of 1: lora-export inspect, with words that --dry-run prints"


def test_a_value_is_not_taken_for_a_flag(tmp_path: Path) -> None:
    (step,) = read(tmp_path, "steps:\n- blend: {adapter: --force, output: --force}\n").steps
    assert step.with_flag("force").arguments[0] == "--force"
    assert step.with_flag("force").with_flag("force") == step.with_flag("force")
    (given,) = read(tmp_path, "steps:\n- blend: {adapter: a, output: b, force: true}\n").steps
    assert given.with_flag("force") is given


def test_an_option_under_two_names_is_given_twice(tmp_path: Path) -> None:
    text = "steps:\n- inspect: {adapter: a, component: x, scope: y}\n"
    path = tmp_path / "recipe.yaml"
    path.write_text("name: n\ndescription: d\nneeds: []\n" + text)
    command = root.get_command(click.Context(root), "inspect")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["inspect"], lambda _verb: command)
    assert caught.value.problems == ("line 5: step 1 (inspect): 'component' and 'scope' are one option",)


def test_the_next_command_takes_a_path_for_no_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    context = click.Context(inspect, info_name="inspect")
    for name, typed in (("-x.safetensors", "./-x.safetensors"), ("x" * 3000 + ".safetensors", "")):
        context.params = {"adapter": Path(name), "base": None}
        monkeypatch.setattr("lora_export.commands.next_step.is_file", lambda _path: False)
        print_next(context)
        printed = capsys.readouterr().err
        assert (f"--adapter {typed} " in printed) if typed else printed == ""
