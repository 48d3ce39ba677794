"""What aliases of a recipe mean is counted in letters, too: its errors, and what it shows, stay small."""

from __future__ import annotations

import sys
from pathlib import Path

import peaks
import pytest

from lora_export.errors import RecipeError
from lora_export.untrusted.documents import MAX_YAML_BYTES, compose_yaml

HEAD = "name: n\ndescription: d\nneeds: []\n"
GOOD = f"{HEAD}steps:\n- doctor: {{json: true}}\n"
COUNT, LETTERS = 40_000, 100_000
MANY = ",".join(["*a"] * COUNT)
LONG = f'&a "{"x" * LETTERS}"'
MERGE = " - merge-onnx: {base: b.onnx, output: o.onnx, "
HOSTILE = {
    "a key": f"name: {LONG}\n? [{MANY}]\n: 1\n",
    "a verb": f"{HEAD.replace(': d', f': {LONG}')}steps:\n - ? [{MANY}]\n   : 1\n",
    "adapters": f"{HEAD.replace(': d', f': {LONG}')}steps:\n{MERGE}adapter: [{MANY}]}}\n",
    "weights": f"{HEAD.replace(': d', f': {LONG}')}steps:\n{MERGE}adapter: a, weight: [{MANY}]}}\n",
    "needs": f"name: n\ndescription: {LONG}\nneeds: [{MANY}]\nsteps: []\n",
    "flags": f"{HEAD}steps:\n"
    + f'{MERGE}adapter: a, force: &a "{"x" * 400_000}"}}\n'
    + f"{MERGE}adapter: a, force: *a}}\n" * 200,
    "many words": f"name: [{'a,' * 255_000}]",
    "many lists": f"name: [{'[],' * 170_000}]",
    "lists in lists": f"name: [{('[' * 60 + ']' * 60 + ',') * 4000}]",
    "too deep lists": f"name: [{('[' * 300 + ']' * 300 + ',') * 830}]",
    "one long word": f"{HEAD}steps:\n{MERGE}adapter: a, force: {'x' * 500_000}}}\n",
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_aliases_take_no_more_than_ten_times_their_recipe(tmp_path: Path) -> None:
    paths = []
    for name, text in HOSTILE.items():
        paths.append(tmp_path / f"{name.replace(' ', '_')}.yaml")
        paths[-1].write_text(text)
    good = tmp_path / "good.yaml"
    good.write_text(GOOD)
    found = peaks.measured([["run", good, "--dry-run"]], [["run", path, "--dry-run"] for path in paths])
    wrong = []
    for path, (code, _, err, peak, seconds) in zip(paths, found, strict=True):
        print(f"{path.name:20} {code} {peak / 1e6:.1f} MB of {peaks.allowed(path) / 1e6:.1f} {seconds:.1f} s")
        if code != 1 or peak > peaks.allowed(path) or len(err) > 10_000 or seconds > 15:
            wrong.append(f"{path.name}: code {code}, peak {peak / 1e6:.0f} MB, {seconds:.0f} s\n{err[:600]}")
    assert not wrong, "\n".join(wrong)


def test_letters_of_aliases_are_counted(tmp_path: Path) -> None:
    path, word = tmp_path / "x.yaml", "x" * (MAX_YAML_BYTES // 4)
    for aliases, fits in ((3, True), (4, False)):
        path.write_text(f'[&a "{word}"{", *a" * aliases}]')
        if fits:
            root = compose_yaml(path, RecipeError, "recipe")
            assert root is not None
            assert len(root.value) == aliases + 1
            continue
        with pytest.raises(RecipeError, match=f"more than {MAX_YAML_BYTES} letters"):
            compose_yaml(path, RecipeError, "recipe")


def test_a_long_recipe_has_no_aliases(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(HEAD + "steps:\n" + "- doctor: {json: true}\n" * 20_000)
    with pytest.raises(RecipeError, match="more than 50000 keys, values and lists") as caught:
        compose_yaml(path, RecipeError, "recipe")
    assert "aliases" not in caught.value.message
    assert "split" in caught.value.hint


@pytest.mark.parametrize("escape", ["\\UFFFFFFFF", "\\U80000000", "\\U00110000"])
def test_an_escape_of_no_character_is_an_error(escape: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f'name: "{escape}"')
    with pytest.raises(RecipeError, match="is not YAML"):
        compose_yaml(path, RecipeError, "recipe")


@pytest.mark.parametrize("key", ["[a, b]", "{a: b}", "? [name]\n"])
def test_a_key_is_a_word(key: str, tmp_path: Path) -> None:
    from lora_export.cli import root
    from lora_export.commands.recipe import load_recipe

    path = tmp_path / "x.yaml"
    path.write_text(f"{GOOD}? {key.removeprefix('? ')}\n: 1\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["doctor"], lambda verb: root.get_command(None, verb))  # type: ignore[arg-type]
    assert any("a key is a word, not a" in problem for problem in caught.value.problems)
