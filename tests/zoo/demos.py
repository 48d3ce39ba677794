"""The demos, each run once in a run of the tests; recipes that begin with one go on from what it left.

Tests that share one are in the group of its name: no worker waits for what another one is making.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import preloaded
import tiny
import yaml
from safetensors import safe_open
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
# What each demo is called with, beside the folder.
DEMOS = {"minilm": {}, "smollm2": {"model": "smollm2"}}


@functools.cache
def minilm() -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Return the folder of `lora-export demo`, and how its process ended; do not change it."""

    def make(folder: Path) -> None:
        folder.mkdir()
        command = [sys.executable, "-c", "from lora_export.cli import main; main()"]
        command += ["demo", "--output", str(folder / "out"), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        ended = [done.args, done.returncode, done.stdout, done.stderr]
        (folder / "ended").write_text(json.dumps(ended))

    folder = tiny._once(tiny.shared_folder() / "demos" / "minilm", make)
    return folder / "out", subprocess.CompletedProcess(*json.loads((folder / "ended").read_text()))


@functools.cache
def smollm2() -> Path:
    """Return the folder of ``recipes/genai-smollm2.yaml``, run in a process of its own; do not change it."""

    def make(folder: Path) -> None:
        folder.mkdir()
        command = [sys.executable, "-c", "from lora_export.cli import main; main()"]
        command += ["run", str(RECIPES / "genai-smollm2.yaml"), "--quiet"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert not done.stderr

    return tiny._once(tiny.shared_folder() / "demos" / "smollm2", make) / "lora-export-genai"


def after_the_demo(recipe: str, demo: str, folder: Path) -> tuple[Path, Path]:
    """Write a recipe without its first step, which is the demo; return it and the folder that the demo left.

    Args:
        recipe: Name of the recipe.
        demo: Name of the demo.
        folder: Where the recipe will be run.
    """
    said: dict[str, Any] = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8"))
    first, *rest = said["steps"]
    output = first["demo"]["output"]
    assert first == {"demo": DEMOS[demo] | {"output": output}}
    written = folder / f"{recipe}.yaml"
    written.write_text(yaml.safe_dump(said | {"steps": rest}), encoding="utf-8")
    return written, folder / output


def run_recipe(recipe: Path) -> None:
    """Run a recipe in its own folder."""
    done = preloaded.run(["run", recipe], cwd=recipe.parent)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr


def cut(demo: Path, base: str, layers: int, folder: Path) -> None:
    """Copy a demo's base and adapters without its later layers: the same graph, fewer times.

    Args:
        demo: What the demo left.
        base: Name of the base's folder in it.
        layers: How many layers stay.
        folder: Where the copy goes.
    """
    for part in (demo / base, *(demo / "adapters").iterdir()):
        made = folder / part.relative_to(demo)
        shutil.copytree(part, made, ignore=shutil.ignore_patterns("*.safetensors"))
        (weights,) = part.glob("*.safetensors")
        with safe_open(weights, "numpy") as stored:
            kept = {name: stored.get_tensor(name) for name in stored.keys() if _layer(name) < layers}  # noqa: SIM118
        assert {_layer(name) for name in kept} >= set(range(layers))
        save_file(kept, made / weights.name, {"format": "pt"})
    config = folder / base / "config.json"
    said = json.loads(config.read_text())
    assert said["num_hidden_layers"] > layers
    said["num_hidden_layers"] = layers
    if "layer_types" in said:
        said["layer_types"] = said["layer_types"][:layers]
    config.write_text(json.dumps(said))


def _layer(name: str) -> int:
    """Return the number of a tensor's layer; -1 outside of the layers."""
    return next((int(word) for word in name.split(".") if word.isdecimal()), -1)
